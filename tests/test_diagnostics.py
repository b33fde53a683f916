"""`measure` against NumPy's formulas; `advise` on real runs: each trouble found, mended by its remedy, and no
healthy run disturbed."""

import re
from functools import cache, partial
from pydoc_data.topics import topics
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import apply_updates, diagnostics, rmsprop, rows, storage, warmup

# measure ------------------------------------------------------------------------------------------------


def tree(dtype=jnp.float32):
    """Parameters with a matrix, a scalar and leaves to be left out, and gradients with zeros in them."""
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.normal(size=(30, 20)), "bias": rng.normal(size=20)},
        "gain": rng.normal(size=()),
    }
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape) * (rng.random(p.shape) < 0.8), params)
    params, grads = (jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (params, grads))
    for t in (params, grads):
        t |= {"empty": jnp.zeros((0, 3), dtype), "none": None}
    return params, grads


def stepped(tx, dtype=jnp.float32, steps=3):
    """What `measure` takes, after some updates with gradients that change."""
    params, grads = tree(dtype)
    state = tx.init(params)
    for t in range(steps):
        now = jax.tree.map(lambda g, t=t: g * (1 + t), grads)
        updates, state = tx.update(now, state, params)
    return now, state, updates, params


def rms(x):
    return np.sqrt(np.mean(np.square(np.abs(np.asarray(x, np.float64)))))


NAMES = ["dense/bias", "dense/kernel", "gain"]
FORMS = {
    "plain": (rmsprop, {}),
    "outside": (rmsprop, {"eps_in_sqrt": False}),
    "bfloat16": (rmsprop, {"accumulator": "bfloat16"}),
    "uint8": (rmsprop, {"accumulator": "uint8"}),
    "own": (rmsprop, {"accumulator": storage.Uint8(-40)}),
    "corrected": (rmsprop, {"bias_correction": True}),
    "centered": (rmsprop, {"centered": True}),
    "momentum": (rmsprop, {"momentum": 0.9}),
    "optax, counted": (optax.rmsprop, {"bias_correction": True}),
    "optax, centered": (optax.rmsprop, {"centered": True, "bias_correction": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measure_follows_its_formulas(form, dtype):
    """To 1e-4 of float32 sums; all the leaves have less than 4,096 elements, so nothing is sampled."""
    make, options = FORMS[form]
    decay, eps, in_root = 0.9, 1e-2, options.get("eps_in_sqrt", True)
    # In bfloat16, Optax's nu has 8 bits, and the moments' difference fewer.
    rtol = 1e-4 if make is rmsprop or dtype == "float32" else 3e-2
    grads, state, updates, params = stepped(make(0.01, decay, eps, **options), dtype)
    accumulator = options.get("accumulator")
    hyper = {"decay": decay, "eps": eps, "eps_in_sqrt": in_root, "accumulator": accumulator}
    measured = diagnostics.measure(grads, state, updates, params, **hyper)
    assert measured.step == 3
    kept = storage.convert(state, "float32", source=accumulator)
    nu_tree, mu_tree = optax.tree.get(kept, "nu"), optax.tree.get(kept, "mu")
    for name in NAMES:
        g, u, p, nu, mu = (
            None if t is None else np.asarray(leaf(t, name), np.float64)
            for t in (grads, updates, params, nu_tree, mu_tree)
        )
        if make is optax.rmsprop and mu is not None:
            nu = nu - mu**2
        size = np.sqrt(nu + eps) if in_root else np.sqrt(nu) + eps
        rate = rms(u) / rms(g / size)
        low, middle, high = np.quantile(1 / size[nu > 0], [0.1, 0.5, 0.9], method="lower")
        by_eps = (nu < eps) if in_root else (np.sqrt(nu) < eps)
        expected = {
            "gradient_rms": rms(g),
            "accumulator_rms": np.sqrt(nu.mean()),
            "staleness": np.sqrt(nu.mean()) / rms(g),
            "update_rms": rms(u),
            "update_ratio": rms(u) / rms(p),
            "learning_rate": rate,
            "effective_rate": rate * middle,
            "effective_rate_spread": high / low,
            "eps_share": np.mean(by_eps[g != 0]) if np.any(g != 0) else 0,
            "stuck_share": 0.0,
            "nonfinite_share": 0.0,
            "warmth": 1 - decay**3,
            "noise_to_signal": np.nan if mu is None else np.sqrt(nu.mean()) / rms(mu),
            "descent": -np.sum(g * u),
        }
        for field, value in expected.items():
            found = getattr(measured, field)[name]
            assert (found.dtype, found.shape) == (jnp.float32, ())
            assert list(getattr(measured, field)) == NAMES
            np.testing.assert_allclose(found, value, rtol=rtol, atol=1e-6, err_msg=f"{field} of {name}")


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


def test_learning_rate_has_schedule_and_correction_in_it():
    """Not momentum or decay of weights: then it is what it is by its definition."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    for correction, factor in ((False, 1), (True, np.sqrt(1 - 0.9**3))):
        tx = rmsprop(schedule, bias_correction=correction)
        measured = diagnostics.measure(*stepped(tx), decay=0.9)
        assert measured.learning_rate["dense/kernel"] == pytest.approx(0.08 * factor, rel=1e-5)


def test_a_large_layer_is_sampled():
    """Of 200,000 elements, some 2,000: their median is within 20% of that of all, five standard errors."""
    params = {"w": jnp.ones((400, 500))}
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.normal(size=(400, 500)) * np.exp(rng.normal(size=(400, 500))), jnp.float32)}
    tx = rmsprop(0.01, decay=0.99)
    updates, state = tx.update(grads, tx.init(params), params)
    measured = diagnostics.measure(grads, state, updates, params, decay=0.99)
    expected = 0.01 / np.median(np.sqrt(state[0].nu["w"]))
    assert measured.effective_rate["w"] == pytest.approx(expected, rel=0.2)
    assert measured.gradient_rms["w"] == pytest.approx(rms(grads["w"]), rel=1e-5)  # of all of them


def test_numbers_at_the_ends_of_the_range():
    """Zero, infinite and NaN gradients are told, and those whose square overflows."""
    params = {"huge": jnp.ones(100), "zero": jnp.zeros(3), "bad": jnp.ones(4)}
    grads = {"huge": jnp.full(100, 1e30), "zero": jnp.zeros(3), "bad": jnp.array([1, jnp.nan, jnp.inf, 0])}
    tx = rmsprop(0.1)
    updates, state = tx.update(grads, tx.init(params), params)
    measured = diagnostics.measure(grads, state, updates, params, decay=0.9)
    assert measured.gradient_rms["huge"] == np.inf
    assert measured.update_ratio["huge"] == pytest.approx(0.1 / np.sqrt(0.1), rel=1e-3)
    assert measured.gradient_rms["zero"] == 0
    assert measured.eps_share["zero"] == 0
    assert measured.nonfinite_share["bad"] == 0.5
    assert measured.nonfinite_share["huge"] == 0


def test_eps_share_is_of_the_elements_that_have_a_gradient():
    params = {"w": jnp.ones(4)}
    grads = {"w": jnp.array([0.0, 1e-6, 1e-6, 1.0])}
    tx = rmsprop(0.1, decay=0.9)
    updates, state = tx.update(grads, tx.init(params), params)
    measured = diagnostics.measure(grads, state, updates, params, decay=0.9)
    assert measured.eps_share["w"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("decay", "stuck"), [(0.9, 0), (0.99, 0), (0.999, 1)])
def test_stuck_share_is_what_bfloat16_cannot_decay(decay, stuck):
    """Optax's accumulator in bfloat16, to which 0.999 is 1. In float32, and here, none is stuck."""
    for make, dtype, expected in (
        (optax.rmsprop, jnp.bfloat16, stuck),
        (optax.rmsprop, jnp.float32, 0),
        (rmsprop, jnp.bfloat16, 0),
    ):
        arguments = stepped(make(0.01, decay), dtype)
        measured = diagnostics.measure(*arguments, decay=decay, count=3)
        assert measured.stuck_share["dense/kernel"] == pytest.approx(expected, abs=0.25)  # a fifth is 0


def test_complex_and_float64(x64):
    params = {"c": jnp.array([1 + 1j, 2.0]), "d": jnp.ones(3, jnp.float64)}
    grads = {"c": jnp.array([3 + 4j, 0.0]), "d": jnp.full(3, 1e-30, jnp.float64)}
    tx = rmsprop(0.1, eps=0.0)
    updates, state = tx.update(grads, tx.init(params), params)
    measured = diagnostics.measure(grads, state, updates, params, decay=0.9, eps=0.0)
    assert measured.gradient_rms["c"] == pytest.approx(5 / np.sqrt(2))
    assert measured.descent["c"] == pytest.approx(5 * 0.1 / np.sqrt(0.1))
    assert measured.update_rms["d"] == pytest.approx(0.1 / np.sqrt(0.1))
    assert measured.gradient_rms["d"] == pytest.approx(1e-30)
    assert measured.gradient_rms["d"].dtype == jnp.float32


def test_it_finds_the_accumulators_in_any_chain():
    """Partitioned, in a chain, with hyper-parameters injected: each layer that has one, and no other."""
    params, grads = tree()
    labels = {"dense": {"kernel": "a", "bias": "b"}, "gain": "none", "empty": "a", "none": None}
    tx = optax.chain(
        optax.clip(1.0),
        optax.partition(
            {
                "a": optax.inject_hyperparams(rmsprop)(0.1, decay=0.99),
                "b": rmsprop(0.01, decay=0.99),
                "none": optax.set_to_zero(),
            },
            labels,
        ),
    )
    updates, state = tx.update(grads, tx.init(params), params)
    measured = diagnostics.measure(optax.tree.clip(grads, -1, 1), state, updates, params, decay=0.99)
    assert sorted(measured.warmth) == ["dense/bias", "dense/kernel"]
    assert measured.learning_rate["dense/kernel"] == pytest.approx(0.1, rel=1e-5)
    assert measured.learning_rate["dense/bias"] == pytest.approx(0.01, rel=1e-5)


def test_the_tree_may_be_one_array():
    measured = diagnostics.measure(
        *(lambda tx, p: (p, *tx.update(p, tx.init(p), p)[::-1], p))(rmsprop(0.1), jnp.ones(3)), decay=0.9
    )
    assert list(measured.warmth) == ["(the whole tree)"]


def test_measure_in_jit_and_scan_is_as_outside():
    params, grads = tree()
    tx = rmsprop(0.01, decay=0.99)

    def step(state, scale):
        now = jax.tree.map(lambda g: g * scale, grads)
        updates, state = tx.update(now, state, params)
        return state, diagnostics.measure(now, state, updates, params, decay=0.99)

    state, outside = tx.init(params), []
    for scale in (1.0, 2.0, 3.0):
        state, measured = step(state, scale)
        outside.append(measured)
    _, stacked = jax.jit(partial(jax.lax.scan, step))(tx.init(params), jnp.array([1.0, 2.0, 3.0]))
    listed = jax.tree.map(lambda *xs: jnp.stack(xs), *outside)
    chex.assert_trees_all_close(stacked, listed, rtol=1e-5)  # XLA fuses more inside
    assert diagnostics.advise(outside) == diagnostics.advise(stacked) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"eps": -1}, "eps=-1"),
        ({"eps_in_sqrt": 1}, "eps_in_sqrt=1"),
        ({"accumulator": "int4"}, "accumulator='int4'"),
        ({"state": optax.EmptyState()}, "no accumulator of RMSProp"),
        ({"state": optax.rmsprop(0.1).init(tree()[0])}, "pass count="),
        (
            {"grads": {"dense": {"kernel": jnp.ones((30, 20))}}},
            "Invalid grads: they have no layer 'dense/bias'",
        ),
        (
            {"params": {**tree()[0], "gain": jnp.ones(2)}},
            r"layer 'gain' has shape \(2,\), its accumulator \(\)",
        ),
        (
            {"updates": {**tree()[0], "gain": rows.RowGradient(jnp.zeros(1, int), jnp.ones((1, 2)), 3)}},
            "Invalid updates: layer 'gain' is by rows",
        ),
    ],
)
def test_measure_says_what_is_wrong(change, message):
    names = ("grads", "state", "updates", "params")
    arguments = dict(zip(names, stepped(rmsprop(0.1)), strict=True)) | {"decay": 0.9} | change
    with pytest.raises(ValueError, match=message):
        diagnostics.measure(*[arguments.pop(name) for name in names], **arguments)


# watch --------------------------------------------------------------------------------------------------


def train_quadratic(tx, steps, jit=True):
    params = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2) + p["b"] ** 2)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    def run(params, state):
        return jax.lax.scan(step, (params, state), length=steps)

    (params, state), updates = (jax.jit(run) if jit else run)(params, tx.init(params))
    return params, state, updates


def test_watch_changes_no_update_and_measures_what_measure_does():
    tx = rmsprop(0.01, decay=0.99)
    watched = diagnostics.watch(tx, every=4, decay=0.99)
    params, _, updates = train_quadratic(tx, 10)
    seen_params, state, seen_updates = train_quadratic(watched, 10)
    chex.assert_trees_all_equal((params, updates), (seen_params, seen_updates))
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1, 5, 9])
    np.testing.assert_allclose(history.warmth["w"], 1 - 0.99 ** np.array([1, 5, 9]), rtol=1e-5)

    p, s = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}, tx.init(params)
    grads = jax.tree.map(lambda x: 2 * x, p)
    updates, s = tx.update(grads, s, p)
    first = diagnostics.measure(grads, s, updates, p, decay=0.99)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], history), first, rtol=1e-5)


@pytest.mark.parametrize("steps", [7, 8, 9, 16, 31, 64])
def test_a_long_run_is_spanned_evenly_by_few_measurements(steps):
    _, state, _ = train_quadratic(diagnostics.watch(rmsprop(0.01), every=1, decay=0.9, capacity=8), steps)
    history = diagnostics.history(state)
    assert len(history.step) <= 8
    assert steps < 8 or len(history.step) >= 4
    (stride,) = {*np.diff(history.step)}
    np.testing.assert_array_equal(history.step, np.arange(1, steps + 1, stride)[: len(history.step)])
    assert steps - history.step[-1] < stride + 1
    assert history.warmth["b"] == pytest.approx(1 - 0.9**history.step, rel=1e-5)


def test_watch_around_optax_and_around_chains():
    """Whose states do not count, and whose gradients are clipped before."""
    tx = optax.chain(optax.clip(0.5), diagnostics.watch(optax.rmsprop(0.01, decay=0.5), 2, decay=0.5))
    _, state, _ = train_quadratic(tx, 5)
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1, 3, 5])
    np.testing.assert_allclose(history.warmth["b"], 1 - 0.5**history.step)
    np.testing.assert_allclose(history.gradient_rms["w"], 0.5)


def test_watch_compiles_once_and_needs_no_copy_of_the_parameters():
    """The branch that measures reads what the step has; the state is overwritten in place."""
    size = 1 << 16
    tx = diagnostics.watch(rmsprop(0.01), decay=0.9, capacity=2)
    params = {"w": jnp.ones(size)}

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile()
    assert not re.findall(rf"f32\[{size}\]\S* copy\(", compiled.as_text())
    # What there is are the gradients, the new accumulators, the updates and a mask, in the branch.
    assert compiled.memory_analysis().temp_size_in_bytes < 4.5 * 4 * size
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=(0, 1))
    state = tx.init(params)
    for _ in range(3):
        params, state = counted(params, state, {"w": jnp.ones(size)})


def test_flax_nnx_in_one_line():
    nnx = pytest.importorskip("flax.nnx", reason="the examples' extra is not installed")
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    tx = optax.chain(optax.clip(1.0), diagnostics.watch(rmsprop(0.01), every=2, decay=0.9))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model))

    for _ in range(5):
        step(model, optimizer)
    history = diagnostics.history(optimizer.opt_state)
    np.testing.assert_array_equal(history.step, [1, 3, 5])
    assert set(history.warmth) == {f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")}
    assert np.all(history.learning_rate["layers/1/kernel"] == pytest.approx(0.01, rel=1e-4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"capacity": 3}, "capacity=3"),
        ({"decay": 2}, "decay=2"),
    ],
)
def test_watch_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.watch(rmsprop(0.1), **{"decay": 0.9} | arguments)


def test_watch_needs_parameters_and_history_a_watch():
    tx = diagnostics.watch(rmsprop(0.1), decay=0.9)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match="it has 0 of watch's"):
        diagnostics.history(rmsprop(0.1).init(jnp.ones(3)))


# advise, on real runs -----------------------------------------------------------------------------------


class Model(NamedTuple):
    init: object
    loss: object  # of parameters and a batch
    data: tuple
    batch: int


def normal(key, *shape, gain=1.0):
    return gain * jax.random.normal(key, shape) / np.sqrt(max(1, np.prod(shape[:-1])))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def mlp(off=0.0, norm=lambda x: 0.0):
    """A network on the breast-cancer data. `off` is what its first biases start from, `norm` a penalty."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "first": {"kernel": normal(keys[0], 30, 32, gain=1.4), "bias": jnp.full(32, -off)},
            "second": {"kernel": normal(keys[1], 32, 32, gain=1.4), "bias": jnp.zeros(32)},
            "head": {"kernel": normal(keys[2], 32, 2), "bias": jnp.zeros(2)},
        }

    def loss(params, x, y):
        first, second, head = params["first"], params["second"], params["head"]
        h = jax.nn.relu(x.astype(first["kernel"].dtype) @ first["kernel"] + first["bias"])
        h = jax.nn.relu(h @ second["kernel"] + second["bias"])
        return cross_entropy(h @ head["kernel"] + head["bias"], y) + norm(second["bias"])

    return Model(init, loss, (x.astype(np.float32), y.astype(np.int32)), 64)


def cnn(between=lambda x: x):
    """A convolutional network on the digits. `between` is applied after its first layer."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_digits(return_X_y=True)
    x = x.reshape(-1, 8, 8, 1) / 8 - 1

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "conv_1": normal(keys[0], 3, 3, 1, 8, gain=1.4),
            "conv_2": normal(keys[1], 3, 3, 8, 16, gain=1.4),
            "bias": jnp.zeros(16),
            "head": normal(keys[2], 64, 10),
        }

    def loss(params, x, y):
        def conv(x, kernel):
            layout = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)

        h = between(jax.nn.relu(conv(x.astype(params["head"].dtype), params["conv_1"])))
        h = jax.nn.relu(conv(h, params["conv_2"]) + params["bias"])
        return cross_entropy(h.reshape(len(h), -1) @ params["head"], y)

    return Model(init, loss, (x.astype(np.float32), y.astype(np.int32)), 64)


def gru(bias=True):
    """A recurrent network on Python's documentation, with or without the bias of its head in use."""
    text = " ".join(topics[name] for name in sorted(topics))[:200_000]
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    size, hidden, window = len(alphabet), 32, 12
    tokens = tokens[: len(tokens) // window * window].reshape(-1, window)

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": normal(keys[0], size, hidden, gain=np.sqrt(size)),
            "gates": normal(keys[1], 2 * hidden, 2 * hidden),
            "new": normal(keys[2], 2 * hidden, hidden),
            "head": normal(keys[3], hidden, size),
            "bias": jnp.zeros(size),
        }

    def loss(params, tokens):
        def cell(h, x):
            z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ params["gates"]), 2, -1)
            h = (1 - z) * h + z * jnp.tanh(jnp.concatenate([x, r * h], -1) @ params["new"])
            return h, h

        x = params["embed"][tokens[:, :-1]].swapaxes(0, 1)
        _, h = jax.lax.scan(cell, jnp.zeros_like(x[0]), x)
        return cross_entropy(h @ params["head"] + (params["bias"] if bias else 0.0), tokens[:, 1:].T)

    return Model(init, loss, (tokens.astype(np.int32),), 16)


def linear():
    """Linear regression on the diabetes data."""
    sklearn = pytest.importorskip("sklearn.datasets")
    x, y = sklearn.load_diabetes(return_X_y=True)
    x, y = (((a - a.mean(0)) / a.std(0)).astype(np.float32) for a in (x, y))

    def loss(params, x, y):
        predicted = x.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"]
        return jnp.mean(jnp.square(predicted.astype(jnp.float32) - y))

    return Model(lambda key: {"kernel": normal(key, 10), "bias": jnp.zeros(())}, loss, (x, y), 32)


def quadratic():
    """Noisy gradients of a bowl, a hundred times as steep in some directions as in others."""
    curvature = np.geomspace(0.1, 10, 50).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=(4096, 50)).astype(np.float32)

    def loss(params, x):
        p = jnp.concatenate([params["flat"], params["steep"]])
        return jnp.mean(jnp.sum(curvature * jnp.square(p - x), -1))

    return Model(lambda key: {"flat": jnp.full(25, 3.0), "steep": jnp.full(25, 3.0)}, loss, (noise,), 8)


def slowly(cases, fast):
    """The cases, of which those for other models than `fast` take minutes to compile, all together."""
    first = [case if isinstance(case, str) else case[0] for case in cases]
    return [
        pytest.param(
            *([case] if isinstance(case, str) else case), marks=[] if name in fast else pytest.mark.slow
        )
        for name, case in zip(first, cases, strict=True)
    ]


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "gru": gru,
    "linear": linear,
    "quadratic": quadratic,
    "mlp, switched off": partial(mlp, off=30.0),
    "mlp, norm": partial(mlp, norm=lambda x: 1e-3 * jnp.sqrt(jnp.sum(x**2))),
    "mlp, safe norm": partial(mlp, norm=lambda x: 1e-3 * jnp.sqrt(jnp.sum(x**2) + 1e-12)),
    "cnn, cut": partial(cnn, between=jax.lax.stop_gradient),
    "gru, no bias": partial(gru, bias=False),
}
STEPS = 400
FAST = ["linear", "quadratic"]


class Run(NamedTuple):
    history: diagnostics.Measurement
    losses: np.ndarray
    final: float  # the loss on all of the data

    @property
    def findings(self):
        return diagnostics.advise(self.history, self.losses)


@cache
def trainer(model, form):
    """A compiled run, with what may vary from one to the next: rates, decay, eps, and factors of the loss."""
    init, loss, data, size = MODELS[model]()
    options = dict(form)
    make, skip = options.pop("make", rmsprop), options.pop("skip", False)
    dtype = jnp.dtype(options.pop("dtype", "float32"))
    rounded = make is rmsprop and dtype != jnp.float32

    # At level 1 the convolutions' gradients compile in half the time.
    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    def run(seed, rates, decay, eps, factors):
        fixed = {} if make is rmsprop else {"decay": 0.999}  # Optax rounds a traced decay otherwise

        def optimizer(rate):
            tx = make(rate, **{"decay": decay, "eps": eps} | fixed | options)
            tx = optax.apply_if_finite(tx, 10**6) if skip else tx
            return diagnostics.watch(tx, 5, decay=decay, eps=eps, accumulator=options.get("accumulator"))

        def step(carry, now):
            params, state = carry
            t, rate, factor = now
            key = jax.random.fold_in(seed, t)
            rows = jax.random.randint(key, (size,), 0, len(data[0]))
            batch = [jnp.asarray(x)[rows] for x in data]
            value, grads = jax.value_and_grad(lambda p: factor * loss(p, *batch))(params)
            updates, state = optimizer(rate).update(grads, state, params)
            return (apply_updates(params, updates, key=key if rounded else None), state), value

        params = jax.tree.map(lambda p: p.astype(dtype), init(jax.random.fold_in(seed, STEPS)))
        now = jnp.arange(STEPS), rates, factors
        (params, state), losses = jax.lax.scan(step, (params, optimizer(rates[0]).init(params)), now)
        return state, losses, loss(params, *data)

    return run


def train(model, rate, decay=0.9, eps=1e-8, factors=(), seed=0, **form):
    """A run with a rate or schedule, and factors of the loss at some steps, {step: factor}."""
    rates = rate(np.arange(STEPS)) if callable(rate) else rate
    loss_factors = np.ones(STEPS, np.float32)
    for step, factor in dict(factors).items():
        loss_factors[step] = factor
    arguments = (
        jnp.broadcast_to(jnp.asarray(rates), STEPS),
        jnp.asarray(decay),
        jnp.asarray(eps),
        loss_factors,
    )
    run = trainer(model, tuple(sorted(form.items(), key=lambda item: item[0])))
    with jax.numpy_rank_promotion("allow"):  # the models' biases
        state, losses, final = run(jax.random.key(seed), *arguments)
    return Run(diagnostics.history(state), np.asarray(losses), float(final))


def number_after(text, words):
    return float(re.search(re.escape(words) + r" ([-+.e\d]*\d)", text)[1])


def the_finding(run, trouble):
    (found,) = run.findings
    assert found.trouble == trouble
    assert str(found).startswith(trouble[:1].upper() + trouble[1:])
    return found


@pytest.mark.parametrize("model", slowly(["mlp", "gru", "linear", "quadratic"], FAST))
def test_too_large_a_rate_is_found_and_the_proposed_one_trains(model):
    broken = train(model, 30.0 if model == "quadratic" else 1.0)
    found = the_finding(broken, "the loss explodes")
    mended = train(model, number_after(found.remedy, "a lower learning rate,"))
    assert mended.findings == []
    assert mended.final < broken.final
    assert mended.losses.mean() < broken.losses.mean() / 2


@pytest.mark.parametrize("model", slowly(["mlp", "gru", "linear", "quadratic"], FAST))
def test_too_small_a_rate_is_found_and_the_proposed_one_trains(model):
    broken = train(model, 1e-6)
    found = the_finding(broken, "steps too small")
    mended = train(model, number_after(found.remedy.replace(" to", " up to"), "up to"))
    assert mended.findings == []
    assert mended.final < 0.8 * broken.final


@pytest.mark.parametrize(
    ("model", "rate", "decay"),
    slowly([("mlp", 0.03, 0.99), ("linear", 0.1, 0.999), ("gru", 0.03, 0.999)], FAST),
)
def test_an_unstable_start_is_found_and_mended(model, rate, decay):
    """By bias correction, and by warm-up where there are as many steps as it takes."""
    broken = train(model, rate, decay)
    found = the_finding(broken, "unstable start")
    assert found.figures["first step over the learning rate"] == pytest.approx(
        1 / np.sqrt(1 - decay), rel=0.7
    )  # less for rows not met
    assert "warmup(" in found.remedy
    assert "bias_correction=True" in found.remedy
    mended = [train(model, rate, decay, bias_correction=True)]
    if decay == 0.99:
        mended.append(train(model, warmup(rate, decay), decay))
    for run in mended:
        assert run.findings == []
        assert run.losses.mean() < broken.losses.mean()
        assert run.losses.max() < broken.losses.max() / 2


@pytest.mark.parametrize(("model", "rate"), slowly([("mlp", 5e-4), ("gru", 1e-3), ("linear", 2e-2)], FAST))
def test_a_stale_accumulator_is_found_and_a_smaller_decay_mends_it(model, rate):
    """One batch early on has a loss ten thousand times too large."""
    settings = {"rate": rate, "factors": {5: 1e4}}
    broken = train(model, decay=0.999, **settings)
    found = the_finding(broken, "stale accumulator")
    mended = train(model, decay=number_after(found.remedy, "a smaller decay, such as"), **settings)
    assert mended.findings == []
    assert mended.final < broken.final


@pytest.mark.parametrize("model", slowly(["mlp", "cnn", "gru"], ["gru"]))
def test_an_eps_that_dominates_is_found_and_a_smaller_one_mends_it(model):
    """eps = 1, which MobileNet was published with, for gradients that are smaller than MobileNet's."""
    broken = train(model, 1e-3, eps=1.0, factors=dict.fromkeys(range(STEPS), 0.01))
    found = the_finding(broken, "eps dominates")
    eps = number_after(found.remedy, "under the root below")
    mended = train(model, 1e-3, eps=eps, factors=dict.fromkeys(range(STEPS), 0.01))
    assert mended.findings == []
    assert mended.final < 0.9 * broken.final


@pytest.mark.parametrize(
    ("model", "healthy", "layers"),
    slowly(
        [
            ("mlp, switched off", "mlp", ("first/bias", "first/kernel")),
            ("cnn, cut", "cnn", ("conv_1",)),
            ("gru, no bias", "gru", ("bias",)),
        ],
        ["gru, no bias"],
    ),
)
def test_a_dead_layer_is_found(model, healthy, layers):
    """Switched off by its biases, cut off by stop_gradient, and forgotten. Without the losses, too."""
    broken = train(model, 2e-3)
    found = the_finding(broken, "dead layer")
    assert set(layers) <= set(found.layers)
    assert found in diagnostics.advise(broken.history)
    mended = train(healthy, 2e-3)
    assert mended.findings == []
    assert mended.final < broken.final


@pytest.mark.parametrize("model", slowly(["cnn", "linear", "quadratic"], ["linear"]))
def test_nonfinite_gradients_are_found_and_mended_by_skipping(model):
    broken = train(model, 1e-2, factors={200: np.nan})
    found = the_finding(broken, "non-finite gradients")
    assert found.steps == (201, 396)
    assert "apply_if_finite" in found.remedy
    mended = train(model, 1e-2, factors={200: np.nan}, skip=True)
    assert mended.findings == []
    assert np.isfinite(mended.final)


@pytest.mark.slow
def test_a_root_of_zero_is_found():
    broken = train("mlp, norm", 1e-3)
    assert "root or logarithm of 0" in the_finding(broken, "non-finite gradients").remedy
    mended = train("mlp, safe norm", 1e-3)
    assert mended.findings == []
    assert mended.final < 0.2


@pytest.mark.parametrize(("model", "rate"), slowly([("mlp", 2e-4), ("cnn", 2e-4), ("linear", 1e-3)], FAST))
def test_an_accumulator_that_is_rounded_away_is_found(model, rate):
    """`optax.rmsprop`'s in bfloat16, for which a decay of 0.999 is 1."""
    broken = train(model, rate, 0.999, dtype="bfloat16", make=optax.rmsprop)
    found = the_finding(broken, "accumulator rounded away")
    assert "rmsprop_jax.rmsprop" in found.remedy
    mended = train(model, rate, 0.999, dtype="bfloat16")
    assert mended.findings == []
    assert mended.final < broken.final


HEALTHY = [
    ("mlp", 1e-3, 0.9, {}),
    ("mlp", 3e-3, 0.999, {}),
    ("mlp", 2e-3, 0.9, {"momentum": 0.9}),
    ("mlp", 1e-2, 0.999, {"bias_correction": True}),
    ("cnn", 3e-3, 0.99, {}),
    ("mlp", 3e-3, 0.9, {"centered": True}),
    ("cnn", 3e-3, 0.9, {"dtype": "bfloat16", "accumulator": "uint8"}),
    ("gru", 3e-3, 0.99, {}),
    ("gru", warmup(1e-2, 0.99), 0.99, {}),
    ("gru", 5e-3, 0.9, {"accumulator": "bfloat16"}),
    ("linear", 1e-2, 0.9, {}),
    ("linear", optax.cosine_decay_schedule(3e-2, STEPS), 0.999, {}),
    ("quadratic", 3e-2, 0.9, {}),
    ("quadratic", optax.cosine_decay_schedule(0.1, STEPS), 0.99, {}),
    ("quadratic", 1e-2, 0.9, {"centered": True}),
]


@pytest.mark.parametrize(("model", "rate", "decay", "form"), slowly(HEALTHY, FAST))
def test_a_healthy_run_is_not_disturbed(model, rate, decay, form):
    run = train(model, rate, decay, **form)
    assert run.losses[-40:].mean() < 0.8 * run.losses[:10].mean()  # it does learn
    assert run.findings == []
    assert diagnostics.advise(run.history) == []
    # With the losses of the measured steps alone, and with a history that is cut short.
    assert diagnostics.advise(run.history, run.losses[run.history.step - 1]) == []
    assert diagnostics.advise(jax.tree.map(lambda x: x[:20], run.history), run.losses[:100]) == []

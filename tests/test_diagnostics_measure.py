"""`measure` against NumPy's formulas."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import Settings, accumulators, diagnostics, rmsprop, rows, scale_by_rms
from rmsprop_jax.diagnostics._figures import FIGURES, _sample

DECAY, EPS = 0.9, 1e-2


def reference(g, u, p, nu, mu, stored, decay=DECAY, eps=EPS, in_root=True, steps=3):
    """The figures of a layer of fewer than 4,096 elements; `stored` is nu where it is rounded to nearest."""

    def rms(x):
        return np.sqrt(np.mean(np.square(np.abs(x))))

    size = np.sqrt(nu + eps) if in_root else np.sqrt(nu) + eps
    rate = rms(u) / rms(g / size)
    low, middle, high = np.quantile(1 / size[nu > 0], [0.1, 0.5, 0.9], method="lower")
    by_eps = (nu if in_root else np.sqrt(nu)) < eps
    stuck = 0.0
    if stored is not None:
        stuck = np.mean((np.asarray(decay, stored.dtype) * stored == stored)[stored > 0])
    return {
        "gradient_rms": rms(g),
        "accumulator_rms": np.sqrt(nu.mean()),
        "staleness": np.sqrt(nu.mean()) / rms(g),
        "update_rms": rms(u),
        "update_ratio": rms(u) / rms(p),
        "learning_rate": rate,
        "effective_rate": rate * middle,
        "effective_rate_spread": high / low,
        "eps_share": np.mean(by_eps[g != 0]),
        "stuck_share": stuck,
        "nonfinite_share": 0.0,
        "bias_correction_factor": 1 - decay**steps,
        "noise_to_signal": np.nan if mu is None else np.sqrt(nu.mean()) / rms(mu),
        "descent": -np.sum(g * u),
    }


def form(make=rmsprop, dtype="float32", rate=None, slow=False, decay=DECAY, eps=EPS, **options):
    """A row of the test: an optimizer, its parameters' dtype, and its learning rate where that is known."""
    schedule = optax.linear_schedule(0.1, 0.0, 10)  # 0.08 at the third update
    settings = {"decay": decay, "eps": eps}
    tx = make(schedule, **settings, **options)
    marks = pytest.mark.slow if slow else ()
    settings["in_root"] = options.get("eps_in_sqrt", True)
    return pytest.param(tx, settings, make is rmsprop, dtype, rate, marks=marks)


FORMS = {
    "plain": form(rate=0.08),
    "outside": form(rate=0.08, eps_in_sqrt=False),
    "corrected": form(rate=0.08 * np.sqrt(1 - DECAY**3), eps=1e-16, slow=True, bias_correction=True),
    "centered": form(centered=True, momentum=0.9),
    "uint8": form(accumulator="uint8"),
    "optax": form(optax.rmsprop, centered=True, bias_correction=True),
    "optax, stuck": form(optax.rmsprop, "bfloat16", decay=0.999),
    "optax, not stuck": form(optax.rmsprop, "bfloat16", slow=True),
    "own": form(slow=True, accumulator=accumulators.Uint8(-40)),
    **{f"{name}": form(slow=True, accumulator=name) for name in ("bfloat16", "factored")},
    "plain, bfloat16": form(dtype="bfloat16", slow=True),
    "uint8, bfloat16": form(dtype="bfloat16", slow=True, accumulator="uint8"),
    "centered, bfloat16": form(dtype="bfloat16", slow=True, centered=True),
    "optax, bfloat16": form(optax.rmsprop, "bfloat16", slow=True, centered=True, bias_correction=True),
}


@pytest.mark.parametrize(("tx", "settings", "ours", "dtype", "rate"), FORMS.values(), ids=FORMS)
def test_measure_follows_its_formulas(tx, settings, ours, dtype, rate):
    """To 1e-4 of float32 sums; Optax's nu in bfloat16 has 8 bits, and its moments' difference fewer."""
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(12, 8))}, "gain": rng.normal(size=(1,))}
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape) * (rng.random(p.shape) < 0.8), params)
    grads["gain"] += 1
    for tree in (params, grads):
        tree |= {"empty": np.zeros((0, 3)), "none": None}
    params, grads = (jax.tree.map(lambda x: jnp.asarray(x, dtype), tree) for tree in (params, grads))
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(3):
        now = jax.tree.map(lambda g, t=t: g * (1 + t), grads)
        updates, state = update(now, state, params)
    known = {"tx": tx}
    if not ours:
        known = {"settings": Settings(settings["decay"], settings["eps"]), "count": 3}
    measured = jax.jit(partial(diagnostics.measure, **known))(now, state, updates, params)
    assert measured.step == 3
    assert measured.names == ("dense/kernel", "gain")

    numbers = accumulators.convert(state, "float32") if ours else state
    trees = now, updates, params, optax.tree.get(numbers, "nu"), optax.tree.get(numbers, "mu")
    for name in measured.names:
        arrays = [None if tree is None else leaf(tree, name) for tree in trees]
        g, u, p, nu, mu = (None if x is None else np.asarray(x, np.float64) for x in arrays)
        raw = nu if ours or mu is None else nu - mu**2
        expected = reference(g, u, p, raw, mu, None if ours else np.asarray(arrays[3]), **settings)
        assert tuple(expected) == FIGURES
        for figure, value in expected.items():
            found = getattr(measured, figure)[name]
            assert (found.dtype, found.shape) == (jnp.float32, ())
            rtol = 1e-4 if ours or dtype == "float32" else 3e-2
            np.testing.assert_allclose(found, value, rtol=rtol, atol=1e-6, err_msg=f"{figure} of {name}")
        assert rate is None or measured.learning_rate[name] == pytest.approx(rate, rel=1e-5)
    if settings["decay"] == 0.999:  # to bfloat16 it is 1
        assert measured.stuck_share["dense/kernel"] == 1


def leaf(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree


# What eager calls share, so that they compile the figures of one layer once: parameters of four elements.
TX = rmsprop(0.1)
FOUR = {"dense": {"kernel": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}, "gain": jnp.ones(4)}


def stepped(tx=TX, grads=FOUR, params=FOUR):
    """What `measure` takes, after one update."""
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return grads, state, updates, params


def test_a_large_layer_is_sampled():
    """Of 200,000 elements, some 2,000: their median is within 20% of that of all, five standard errors."""
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(400, 500)) * np.exp(rng.normal(size=(400, 500))), jnp.float32)
    grads, state, updates, params = stepped(grads={"w": grads}, params={"w": jnp.ones((400, 500))})
    measured = jax.jit(partial(diagnostics.measure, tx=TX))(grads, state, updates, params)
    expected = 0.1 / np.median(np.sqrt(state[0].nu["w"]))
    assert measured.effective_rate["w"] == pytest.approx(expected, rel=0.2)
    of_all = np.sqrt(np.mean(np.square(np.asarray(grads["w"], np.float64))))
    assert measured.gradient_rms["w"] == pytest.approx(of_all, rel=1e-5)


def test_no_slice_has_two_strides():
    """XLA on TPU holds all that such a one spans in fast memory: of a large matrix it does not compile."""
    for shape in [(50257, 768), (4096, 4096), (3, 3, 512, 512)]:
        text = jax.jit(_sample).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).as_text()
        slices = [axes.split(", ") for axes in re.findall(r"stablehlo\.slice %\S+ \[(.*?)\]", text)]
        strided = [sum(axis.count(":") == 2 for axis in axes) for axes in slices]
        assert max(strided) == 1


def test_numbers_at_the_ends_of_the_range():
    """Zero, infinite and NaN gradients, and those whose square overflows; eps where there is a gradient."""
    grads = {
        "huge": jnp.full(4, 1e30),
        "zero": jnp.zeros(4),
        "bad": jnp.array([1, jnp.nan, jnp.inf, 0]),
        "tiny": jnp.array([0, 1e-6, 1e-6, 1]),
    }
    params = jax.tree.map(jnp.ones_like, grads)
    measured = diagnostics.measure(*stepped(grads=grads, params=params), tx=TX)
    assert measured.gradient_rms["huge"] == np.inf
    assert measured.update_ratio["huge"] == pytest.approx(0.1 / np.sqrt(0.1), rel=1e-3)
    assert measured.gradient_rms["zero"] == measured.eps_share["zero"] == 0
    assert measured.nonfinite_share["bad"] == 0.5
    assert measured.nonfinite_share["huge"] == 0
    assert measured.eps_share["tiny"] == pytest.approx(2 / 3)


def test_complex_and_float64(x64):
    params = {"c": jnp.array([1 + 1j, 2.0]), "d": jnp.ones(3, jnp.float64)}
    grads = {"c": jnp.array([3 + 4j, 0.0]), "d": jnp.full(3, 1e-30, jnp.float64)}
    tx = rmsprop(0.1, eps=0.0)
    measured = diagnostics.measure(*stepped(tx, grads, params), tx=tx)
    assert measured.gradient_rms["c"] == pytest.approx(5 / np.sqrt(2))
    assert measured.descent["c"] == pytest.approx(5 * 0.1 / np.sqrt(0.1))
    assert measured.update_rms["d"] == pytest.approx(0.1 / np.sqrt(0.1))
    assert measured.gradient_rms["d"] == pytest.approx(1e-30)
    assert measured.gradient_rms["d"].dtype == jnp.float32


def test_it_finds_the_accumulators_in_any_chain():
    """Partitioned, in a chain, with hyper-parameters injected: each layer that has one, and no other."""
    labels = {"dense": {"kernel": "a", "bias": "b"}, "gain": "none"}
    parts = {"a": optax.inject_hyperparams(rmsprop)(0.1), "b": rmsprop(0.01), "none": optax.set_to_zero()}
    tx = optax.chain(optax.clip(1.0), optax.partition(parts, labels))
    _, *rest = stepped(tx)
    measured = diagnostics.measure(optax.tree.clip(FOUR, -1, 1), *rest, settings=Settings(0.9))
    assert sorted(measured.names) == ["dense/bias", "dense/kernel"]
    assert measured.learning_rate["dense/kernel"] == pytest.approx(0.1, rel=1e-5)
    assert measured.learning_rate["dense/bias"] == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("left_out", [["grads"], ["updates"], ["params"], ["updates", "params"]])
def test_a_layer_without_one_of_the_arrays_is_left_out(left_out):
    arguments = dict(zip(("grads", "state", "updates", "params"), stepped(), strict=True))
    arguments |= {name: arguments[name] | {"gain": None} for name in left_out}
    measured = diagnostics.measure(*arguments.values(), tx=TX)
    assert sorted(measured.names) == ["dense/bias", "dense/kernel"]


def test_the_tree_may_be_one_array():
    measured = diagnostics.measure(*stepped(grads=jnp.ones(4), params=jnp.ones(4)), tx=TX)
    assert list(measured.bias_correction_factor) == ["(the whole tree)"]


def test_measure_in_jit_and_scan_is_as_outside():
    def step(state, scale):
        now = jax.tree.map(lambda g: g * scale, FOUR)
        updates, state = TX.update(now, state, FOUR)
        return state, diagnostics.measure(now, state, updates, FOUR, tx=TX)

    state, outside = TX.init(FOUR), []
    for scale in (1.0, 2.0, 3.0):
        state, measured = step(state, scale)
        outside.append(measured)
    _, scanned = jax.jit(partial(jax.lax.scan, step))(TX.init(FOUR), jnp.array([1.0, 2.0, 3.0]))
    assert scanned.gradient_rms["gain"].shape == (3,)
    listed = jax.tree.map(lambda *xs: jnp.stack(xs), *outside)
    chex.assert_trees_all_close(scanned, listed, rtol=1e-5)  # XLA fuses more inside
    assert diagnostics.advise(outside) == diagnostics.advise(scanned) == []


def test_a_measurement_is_one_table():
    measured = diagnostics.measure(*stepped(), tx=TX)
    assert measured.table.shape == (len(FIGURES), len(measured.names))
    for row, figure in enumerate(FIGURES):
        np.testing.assert_array_equal([*getattr(measured, figure).values()], measured.table[row])
    assert type(jax.device_get(measured).update_ratio["gain"]) is np.float32
    with pytest.raises(AttributeError, match="no figure 'loss', it has gradient_rms, "):
        _ = measured.loss


def test_a_measurement_is_exported():
    pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    tx = scale_by_rms()
    measure, arguments = jax.jit(partial(diagnostics.measure, tx=tx)), stepped(tx)
    exported = jax.export.deserialize(jax.export.export(measure)(*arguments).serialize())
    chex.assert_trees_all_close(exported.call(*arguments), measure(*arguments), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tx": None},
            r"Invalid settings: settings=None.* Pass tx=.*, or pass its numbers, such as settings=",
        ),
        ({"settings": Settings(0.9)}, r"Invalid settings: settings=Settings\(decay=0.9, .* has its own"),
        ({"tx": None, "settings": 0.9}, "Invalid settings: settings=0.9"),
        ({"state": optax.EmptyState()}, "no accumulator of RMSProp"),
        ({"state": optax.rmsprop(0.1).init(FOUR)}, "pass count="),
        ({"grads": {"dense": {"kernel": jnp.ones(4)}}}, "Invalid grads: they have no layer 'dense/bias'"),
        ({"params": FOUR | {"gain": jnp.ones(2)}}, r"layer 'gain' has shape \(2,\), its accumulator \(4,\)"),
        (
            {"updates": FOUR | {"gain": rows.RowGradient(jnp.zeros(1, int), jnp.ones((1, 2)), 3)}},
            "Invalid updates: layer 'gain' is row-sparse",
        ),
    ],
)
def test_measure_says_what_is_wrong(change, message):
    names = ("grads", "state", "updates", "params")
    arguments = dict(zip(names, stepped(), strict=True)) | {"tx": TX} | change
    with pytest.raises(ValueError, match=message):
        diagnostics.measure(*[arguments.pop(name) for name in names], **arguments)

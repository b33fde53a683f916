"""`measure` against NumPy's formulas."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SMALL, forms

from rmsprop_jax import accumulators, diagnostics, rmsprop, rows


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
    **{
        name: (rmsprop, options)
        for name, options in forms("plain", "outside", "corrected", "centered", "momentum").items()
    },
    **{name: (rmsprop, {"accumulator": name}) for name in SMALL},
    "own": (rmsprop, {"accumulator": accumulators.Uint8(-40)}),
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
    kept = accumulators.convert(state, "float32", source=accumulator)
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
            "bias_correction_factor": 1 - decay**3,
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
    assert sorted(measured.bias_correction_factor) == ["dense/bias", "dense/kernel"]
    assert measured.learning_rate["dense/kernel"] == pytest.approx(0.1, rel=1e-5)
    assert measured.learning_rate["dense/bias"] == pytest.approx(0.01, rel=1e-5)


def test_the_tree_may_be_one_array():
    measured = diagnostics.measure(
        *(lambda tx, p: (p, *tx.update(p, tx.init(p), p)[::-1], p))(rmsprop(0.1), jnp.ones(3)), decay=0.9
    )
    assert list(measured.bias_correction_factor) == ["(the whole tree)"]


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
            "Invalid updates: layer 'gain' is row-sparse",
        ),
    ],
)
def test_measure_says_what_is_wrong(change, message):
    names = ("grads", "state", "updates", "params")
    arguments = dict(zip(names, stepped(rmsprop(0.1)), strict=True)) | {"decay": 0.9} | change
    with pytest.raises(ValueError, match=message):
        diagnostics.measure(*[arguments.pop(name) for name in names], **arguments)

"""The chain: momentum, learning rate, weight decay, and the dtypes between them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import scanned, step_of

from rmsprop_jax import rmsprop, scale_by_rms

# A learning rate that changes every step, so that its place in the chain shows.
CHANGING = optax.exponential_decay(0.1, transition_steps=1, decay_rate=0.7)


def trajectory(tx, steps=30, dtype=jnp.float32):
    """Parameters after each step of a noisy quadratic, and the last state."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype), "bias": jnp.ones(2, dtype)}
    step, state = step_of(tx), tx.init(params)
    history = []
    for _ in range(steps):
        grads = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), dtype), params)
        params, state = step(params, state, grads)
        history.append(params)
    return history, state


def by_hand(lr_in_momentum, nesterov, momentum=0.9, decay=0.9, eps=1e-3, weight_decay=0.0, steps=30):
    """`trajectory` in float64 NumPy, from the equations."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": np.ones(2)}
    nu, b = ({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    history = []
    for t in range(steps):
        lr = 0.1 * 0.7**t
        for k in sorted(params):  # jax.tree's order
            p = params[k]
            g = p + rng.normal(size=p.shape)
            nu[k] = decay * nu[k] + (1 - decay) * g**2
            u = g / np.sqrt(nu[k] + eps) * (lr if lr_in_momentum else 1)
            b[k] = momentum * b[k] + u
            step = (u + momentum * b[k] if nesterov else b[k]) * (1 if lr_in_momentum else lr)
            params[k] = p - step - lr * weight_decay * p
        history.append(dict(params))
    return history


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_momentum_and_weight_decay_with_a_changing_learning_rate(lr_in_momentum, nesterov, weight_decay):
    tx = rmsprop(
        CHANGING,
        eps=1e-3,
        momentum=0.9,
        nesterov=nesterov,
        lr_in_momentum=lr_in_momentum,
        weight_decay=weight_decay,
    )
    ours, _ = trajectory(tx)
    expected = by_hand(lr_in_momentum, nesterov, weight_decay=weight_decay)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)  # float32 against float64, 30 steps


def test_the_place_of_the_learning_rate_matters_only_when_it_changes():
    places = [{"momentum": 0.9, "lr_in_momentum": place} for place in (False, True)]
    (inside, _), (after, _) = (trajectory(rmsprop(0.01, **place)) for place in places)
    chex.assert_trees_all_close(inside, after, rtol=1e-4, atol=1e-6)
    (inside, _), (after, _) = (trajectory(rmsprop(CHANGING, **place)) for place in places)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(inside, after, rtol=1e-2)


@pytest.mark.parametrize("learning_rate", [0.05, CHANGING])
@pytest.mark.parametrize("form", [{}, {"momentum": 0.9}, {"momentum": 0.9, "lr_in_momentum": False}])
def test_weight_decay_is_decoupled_and_masked(form, learning_rate):
    """With zero gradients nothing moves but the weights, by learning_rate * weight_decay of themselves."""
    tx = rmsprop(
        learning_rate, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p), **form
    )
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    step, state = step_of(tx), tx.init(params)
    expected = 1.0
    for t in range(5):
        params, state = step(params, state, jax.tree.map(jnp.zeros_like, params))
        expected *= 1 - 0.1 * (CHANGING(t) if callable(learning_rate) else learning_rate)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(params["bias"], 1.0)


def test_weight_decay_is_that_of_adamw():
    ours, _ = trajectory(rmsprop(CHANGING, 0.99, eps_in_sqrt=False, bias_correction=True, weight_decay=0.1))
    theirs, _ = trajectory(optax.adamw(CHANGING, b1=0.0, b2=0.99, weight_decay=0.1))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


def test_parameters_are_needed_for_weight_decay_alone():
    grads = jnp.ones(2)
    for momentum in (None, 0.9):
        for none in (None, 0, 0.0):
            tx = rmsprop(0.1, momentum=momentum, weight_decay=none)
            tx.update(grads, tx.init(grads))
        tx = rmsprop(0.1, momentum=momentum, weight_decay=0.1)
        with pytest.raises(ValueError, match="params"):
            tx.update(grads, tx.init(grads))


@pytest.mark.parametrize(
    "form", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "weight_decay": 0.1}]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_get_the_float32_step_rounded_once(dtype, form):
    tx = rmsprop(CHANGING, decay=0.999, **form)
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=100), dtype)
    low_state, full_state = tx.init(low), tx.init(low.astype(jnp.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(low_state, full_state)
    for _ in range(10):
        g = jnp.asarray(rng.normal(size=100), dtype)
        low_updates, low_state = tx.update(g, low_state, low)
        full_updates, full_state = tx.update(g.astype(jnp.float32), full_state, low.astype(jnp.float32))
        assert low_updates.dtype == dtype
        # XLA contracts a * b + c as it likes in either program: a unit in the last place of float32
        chex.assert_trees_all_close(low_state, full_state, rtol=1e-6, atol=1e-9)
        half_a_unit = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.float32(low_updates), full_updates, rtol=1.01 * half_a_unit, atol=1e-7)


@pytest.mark.parametrize("learning_rate", [0.3, CHANGING], ids=["number", "schedule"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_decayed_weights_of_a_low_dtype_are_computed_in_float32(momentum, learning_rate):
    """And rounded once: in bfloat16 the factor would be rounded, too."""
    params = jnp.asarray(np.random.default_rng(0).normal(size=100), jnp.bfloat16)
    tx = rmsprop(learning_rate, momentum=momentum, weight_decay=0.07)
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    factor = 0.07 * (0.1 if callable(learning_rate) else learning_rate)
    np.testing.assert_array_equal(updates, (-factor * params.astype(jnp.float32)).astype(jnp.bfloat16))


def test_optax_stalls_in_bfloat16_where_ours_follows():
    """decay 0.999 is 1.0 in bfloat16: optax's accumulator never forgets the first, large gradients."""

    def accumulator(tx):
        gradients = jnp.repeat(jnp.array([100.0, 0.01], jnp.bfloat16), jnp.array([100, 8000]))
        state, _ = scanned(tx, gradients)
        return float(optax.tree.get(state, "nu"))

    exact = 1e4 * (1 - 0.999**100) * 0.999**8000 + 1e-4
    assert accumulator(rmsprop(0.1, decay=0.999)) == pytest.approx(exact, rel=1e-2)
    assert accumulator(optax.rmsprop(0.1, decay=0.999)) > 100 * exact


def test_float16_updates_saturate_instead_of_overflowing():
    tx = rmsprop(1e6)
    updates, _ = tx.update(jnp.array([1.0, jnp.nan], jnp.float16), tx.init(jnp.zeros(2, jnp.float16)))
    np.testing.assert_array_equal(updates, jnp.array([-65504.0, jnp.nan], jnp.float16))


@pytest.mark.parametrize(
    ("momentum_dtype", "kept"), [(None, "float32"), ("bfloat16", "bfloat16"), (jnp.float16, "float16")]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_momentum_dtype_is_how_the_buffer_is_kept(dtype, momentum_dtype, kept):
    tx = rmsprop(0.1, momentum=0.9, momentum_dtype=momentum_dtype)
    history, state = trajectory(tx, dtype=dtype)
    assert {x.dtype.name for x in jax.tree.leaves(optax.tree.get(state, "trace"))} == {kept}
    assert {x.dtype.name for x in jax.tree.leaves(history[-1])} == {dtype}
    full, _ = trajectory(rmsprop(0.1, momentum=0.9))
    # The mean step is 0.1, the buffer about ten of them; bfloat16 keeps it to 2^-9, 30 times in a row.
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), history[-1]),
        full[-1],
        atol=0.1 if kept == dtype == "float32" else 0.5,
    )


def test_a_low_momentum_dtype_rounds_the_buffer_and_not_the_decay():
    """0.999 is 1.0 in bfloat16: a buffer that is computed there would never decay."""
    tx = rmsprop(1.0, decay=0.0, momentum=0.97, momentum_dtype="bfloat16")
    state = tx.init(jnp.zeros(1))
    for g in [1.0] + [0.0] * 50:
        _, state = tx.update(jnp.full(1, g), state)
    assert float(optax.tree.get(state, "trace")[0]) == pytest.approx(-(0.97**50), rel=0.1)


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "float16"])
def test_a_low_momentum_dtype_loses_nothing_in_the_mean(momentum_dtype):
    """To nearest, a buffer at momentum 0.999 would stop short of its end, where its steps are half a unit."""
    txs = [rmsprop(1.0, 0.0, momentum=0.999, momentum_dtype=dtype) for dtype in (None, momentum_dtype)]
    params = jnp.zeros((30, 30))

    def step(states, sign):
        g = jnp.full(params.shape, sign)
        return [tx.update(g, state)[1] for tx, state in zip(txs, states, strict=True)], None

    signs = jnp.where(jnp.arange(3000) < 2000, 1.0, 0.0)
    states, _ = jax.lax.scan(step, [tx.init(params) for tx in txs], signs)
    exact, low = (optax.tree.get(state, "trace").astype(jnp.float32) for state in states)
    np.testing.assert_allclose(low.mean(), exact.mean(), rtol=5e-3)
    np.testing.assert_allclose(low, exact, rtol=0.1)


def test_nu_and_the_momentum_are_rounded_each_by_thresholds_of_its_own():
    """Of two leaves: with the same thresholds, the same numbers would be rounded up in the same elements."""
    half = 1 + 2**-8  # between 1 and bfloat16's next number
    tx = rmsprop(half, 0.0, 0.0, momentum=0.5, accumulator="bfloat16", momentum_dtype="bfloat16")
    g = [jnp.full(1000, np.sqrt(half), jnp.float32)] * 2
    _, state = tx.update(g, tx.init(g))
    stored = [*optax.tree.get(state, "nu")["bfloat16"], *optax.tree.get(state, "trace")]
    up = [np.abs(np.float32(x)) > half for x in stored]
    for i, one in enumerate(up):
        assert 0.3 < one.mean() < 0.7
        assert all(np.mean(one == other) < 0.95 for other in up[:i])


def test_complex_parameters_keep_a_complex_momentum():
    params = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    for momentum_dtype in (None, "bfloat16"):
        tx = rmsprop(0.1, momentum=0.9, momentum_dtype=momentum_dtype)
        updates, state = tx.update(params, tx.init(params), params)
        assert optax.tree.get(state, "trace").dtype == updates.dtype == jnp.complex64


def test_float64_parameters_have_a_float64_state(x64):
    params = jnp.ones(3, jnp.float64)
    tx = rmsprop(CHANGING, momentum=0.9, centered=True, weight_decay=0.1)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates.dtype == jnp.float64
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float64", "int32"}


def test_the_state_has_the_same_tree_for_a_number_and_for_an_array():
    """`optax.inject_hyperparams` makes arrays of all numbers, weight_decay = 0 too."""
    params = jnp.ones(3)
    for momentum in (None, 0.9):
        concrete = rmsprop(0.1, momentum=momentum).init(params)
        traced = rmsprop(jnp.float32(0.1), momentum=momentum, weight_decay=jnp.float32(0)).init(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(concrete, traced)


def test_rmsprop_is_scale_by_rms_and_a_learning_rate():
    form = {"decay": 0.95, "eps": 1e-2, "eps_in_sqrt": False, "bias_correction": True, "centered": True}
    ours, _ = trajectory(rmsprop(0.1, **form))
    chain, _ = trajectory(optax.chain(scale_by_rms(**form), optax.scale_by_learning_rate(0.1)))
    chex.assert_trees_all_equal(ours, chain)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", [-1e-3, float("nan"), float("inf"), np.float32(-1), "1e-3", None]),
        ("momentum", [-0.1, 1.0, float("nan"), "0.9"]),
        ("weight_decay", [-0.1, float("nan")]),
        ("decay", [1.0, -0.1]),
        ("eps", [-1e-8]),
        ("nesterov", [None, 0.9]),
        ("lr_in_momentum", [None, 1]),
        ("momentum_dtype", ["int8", "complex64"]),
    ],
)
def test_bad_hyper_parameters_are_refused_by_name_and_value(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"Invalid {name}.*{name}=") as error:
            rmsprop(**{"learning_rate": 0.1, "momentum": 0.9, name: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "injected",
    [
        {"mask": jnp.array(True)},
        {"mask": jnp.array(0.5), "decay": jnp.float32(0.9)},
        {"mask": True, "decay": jnp.float32(0.9)},
    ],
    ids=str,
)
def test_a_mask_that_came_as_a_number_is_refused(injected):
    """As `optax.inject_hyperparams` passes on what it took for a number or a schedule."""
    with pytest.raises(ValueError, match=r"Invalid mask: .*static_args='mask'"):
        rmsprop(0.1, weight_decay=0.1, **injected)


def test_a_rounded_momentum_is_refused():
    with pytest.raises(ValueError, match=r"Invalid momentum.*hyperparam_dtype=jnp\.float32"):
        rmsprop(0.1, momentum=jnp.bfloat16(0.9))


@pytest.mark.parametrize("bad", [jnp.ones(2, int), np.zeros(2, jax.dtypes.float0), jnp.ones((3, 1))])
def test_gradients_that_do_not_fit_are_refused_by_their_path(bad):
    tx = rmsprop(0.1, momentum=0.9)
    state = tx.init({"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"Gradient 'w'"):
        tx.update({"w": bad}, state)

"""Inside Optax and JAX's transformations, as an Optax transformation is used there."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import each, quick, step_of

from rmsprop_jax import ScaleByRmsState, rmsprop, scale_by_rms, warmup

OPTIMUM = {"w": jnp.array([1.0, -2.0, 3.0]), "b": jnp.array(0.5)}


def loss(params):
    errors = jax.tree.map(lambda p, q: jnp.sum((p - q) ** 2), params, OPTIMUM)
    return sum(jax.tree.leaves(errors))


def start():
    return jax.tree.map(jnp.zeros_like, OPTIMUM)


def train(tx, steps=400, params=None):
    params = start() if params is None else params
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        return step_of(tx)(params, state, jax.grad(loss)(params))

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


ANNEALED = optax.cosine_decay_schedule(0.05, 400)
WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.chain(
        optax.masked(tx, {"w": True, "b": False}), optax.masked(optax.sgd(0.1), {"w": False, "b": True})
    ),
    "partition": lambda tx: optax.partition({"rms": tx, "sgd": optax.sgd(0.1)}, {"w": "rms", "b": "sgd"}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3),
    "flatten": optax.flatten,
    "multi_steps": lambda tx: optax.MultiSteps(tx, every_k_schedule=2).gradient_transformation(),
}


ALL = {"centered": True, "bias_correction": True, "momentum": 0.5, "eps": 1e-2}


@pytest.mark.parametrize("form", quick([ALL, {}, {"momentum": 0.5}], [ALL]))
@each(wrap=WRAPPED)
def test_it_trains_inside_the_wrappers_of_optax(wrap, form):
    params, _ = train(wrap(rmsprop(ANNEALED, **form)), steps=800)
    assert loss(params) < 1e-3


def test_multi_steps_averages_gradients():
    tx = optax.MultiSteps(rmsprop(0.1), every_k_schedule=2)
    params = jnp.zeros(2)
    state = tx.init(params)
    first, state = tx.update(jnp.array([1.0, 3.0]), state, params)
    second, _ = tx.update(jnp.array([3.0, 5.0]), state, params)
    expected, _ = rmsprop(0.1).update(jnp.array([2.0, 4.0]), rmsprop(0.1).init(params))
    np.testing.assert_array_equal(first, 0.0)
    np.testing.assert_allclose(second, expected, rtol=1e-6)


def test_apply_if_finite_skips_a_bad_step_and_keeps_the_state():
    tx = optax.apply_if_finite(rmsprop(0.1, momentum=0.9), max_consecutive_errors=2)
    params = jnp.ones(3)
    _, before = tx.update(jnp.ones(3), tx.init(params), params)
    for bad in (jnp.nan, jnp.inf):
        updates, after = tx.update(jnp.array([1.0, bad, 1.0]), before, params)
        np.testing.assert_array_equal(updates, 0.0)
        chex.assert_trees_all_equal(after.inner_state, before.inner_state)


def test_masked_leaves_and_none_leaves_have_no_state():
    tx = optax.masked(rmsprop(0.1), {"w": True, "step": False})
    params = {"w": jnp.ones(2), "step": jnp.zeros((), int)}
    assert len(jax.tree.leaves(optax.tree.get(tx.init(params), "nu"))) == 1
    tx = rmsprop(0.1, momentum=0.9)
    params = {"w": jnp.ones(2), "frozen": None}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["frozen"] is None


def test_lookahead():
    tx = optax.lookahead(rmsprop(ANNEALED), sync_period=5, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start())

    @jax.jit
    def step(params, state):
        return step_of(tx)(params, state, jax.grad(loss)(params.fast))

    state = tx.init(params)
    for _ in range(800):
        params, state = step(params, state)
    assert loss(params.slow) < 1e-2


def test_schedule_free():
    tx = optax.contrib.schedule_free(rmsprop(0.05), learning_rate=0.05, b1=0.9)
    params, state = train(tx, steps=1000)
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", [{}, {"momentum": 0.9}, {"centered": True, "bias_correction": True}])
def test_inject_hyperparams_changes_them_without_compiling(form, dtype):
    tx = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(
        0.1, decay=0.999, weight_decay=0.01, **form
    )
    params = jnp.ones(4, dtype)
    state = tx.init(params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        return step_of(tx)(params, state, params)

    plain = rmsprop(0.1, decay=0.999, weight_decay=0.01, **form)
    plain_state = plain.init(params)
    for learning_rate, decay in [(0.1, 0.999), (0.05, 0.9), (0.01, 0.99)]:
        state.hyperparams["learning_rate"] = jnp.float32(learning_rate)
        state.hyperparams["decay"] = jnp.float32(decay)
        expected, plain_state = rmsprop(learning_rate, decay=decay, weight_decay=0.01, **form).update(
            params, plain_state, params
        )
        after, state = step(params, state)
        # 1 - decay is formed in float32 here, which has 0.999 to 3e-8: 3e-5 of 1 - 0.999
        np.testing.assert_allclose(
            np.float32(after),
            np.float32(optax.apply_updates(params, expected)),
            rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4,
        )
        params = after
    assert len(traces) == 1


def test_inject_hyperparams_does_not_round_silently():
    """Optax casts hyper-parameters to the parameters' dtype: in bfloat16 decay 0.999 is 1.0."""
    params = jnp.ones(3, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"Invalid decay.*bfloat16.*hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(rmsprop)(0.1, decay=0.999).init(params)
    theirs = optax.inject_hyperparams(optax.rmsprop)(0.1, decay=0.999)
    _, state = theirs.update(params, theirs.init(params), params)
    np.testing.assert_array_equal(optax.tree.get(state, "nu"), 0.0)  # (1 - 1.0) * g^2


def test_centered_and_bias_corrected_through_inject_hyperparams_is_finite():
    g = jnp.array([1e-3, 1.0, -1e3])

    def first_update(rmsprop):
        tx = optax.inject_hyperparams(rmsprop)(0.1, centered=True, bias_correction=True)
        return tx.update(g, tx.init(g), g)[0]

    np.testing.assert_allclose(first_update(rmsprop), -0.1 * np.sign(g) / np.sqrt(0.9), rtol=1e-2)
    assert not jnp.all(jnp.abs(first_update(optax.rmsprop)) < 10)


def test_a_schedule_through_inject_hyperparams_shows_the_learning_rate():
    tx = optax.inject_hyperparams(rmsprop)(learning_rate=warmup(0.1, decay=0.9))
    _, state = train(tx, steps=10)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1 * 10 / 20, rtol=1e-5)


def test_tree_get_set_and_map_params():
    tx = optax.chain(optax.clip(1.0), rmsprop(0.1, centered=True, momentum=0.9))
    _, state = train(tx, steps=3)
    chex.assert_trees_all_equal_shapes(optax.tree.get(state, "nu"), start())
    state = optax.tree.set(state, mu=start())
    chex.assert_trees_all_equal(optax.tree.get(state, "mu"), start())
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    chex.assert_trees_all_close(
        optax.tree.get(doubled, "nu"), jax.tree.map(lambda x: 2 * x, optax.tree.get(state, "nu"))
    )
    assert optax.tree.get(doubled, "count") == 3
    assert isinstance(optax.tree.get(state, "ScaleByRmsState"), ScaleByRmsState)


def test_abstract_state_is_the_state():
    tx = rmsprop(warmup(0.1), centered=True, momentum=0.9, weight_decay=0.1)
    abstract = jax.eval_shape(tx.init, start())
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(start()))


def test_scan_is_the_python_loop():
    tx = rmsprop(0.05, momentum=0.9, centered=True)

    def step(carry, _):
        params, state = carry
        return step_of(tx)(params, state, jax.grad(loss)(params)), None

    scanned, _ = jax.lax.scan(step, (start(), tx.init(start())), length=50)
    chex.assert_trees_all_close(scanned, train(tx, steps=50), rtol=1e-5, atol=1e-6)


def test_vmap_trains_an_ensemble_with_a_learning_rate_each():
    def train_one(learning_rate):
        tx = rmsprop(learning_rate)
        params, state = start(), tx.init(start())
        for _ in range(5):
            params, state = step_of(tx)(params, state, jax.grad(loss)(params))
        return params

    rates = jnp.array([0.01, 0.1, 1.0])
    ensemble, train_one = jax.jit(jax.vmap(train_one))(rates), jax.jit(train_one)
    for i, rate in enumerate(rates):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[i], ensemble), train_one(rate), rtol=1e-5)  # noqa: B023


def test_cond_takes_a_step_or_not():
    tx = rmsprop(0.1, momentum=0.9)
    state, g = tx.init(jnp.ones(2)), jnp.ones(2)

    @jax.jit
    def maybe(take):
        return jax.lax.cond(take, lambda: tx.update(g, state), lambda: (jnp.zeros_like(g), state))

    chex.assert_trees_all_equal(maybe(False)[1], state)
    chex.assert_trees_all_close(maybe(True), tx.update(g, state), rtol=1e-6)


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
@pytest.mark.parametrize("zero", [False, True])
def test_meta_gradients_flow_through_an_update(eps_in_sqrt, zero):
    """d loss after three steps / d learning rate, against finite differences; finite with zero gradients."""

    def after(learning_rate):
        tx = scale_by_rms(eps_in_sqrt=eps_in_sqrt)
        w = jnp.zeros(2) if zero else jnp.array([1.0, -2.0])
        state = tx.init(w)
        for _ in range(3):
            u, state = tx.update(2 * w, state)
            w = w - learning_rate * u
        return jnp.sum(w**2)

    slope, after = jax.jit(jax.grad(after))(0.1), jax.jit(after)
    np.testing.assert_allclose(slope, (after(0.101) - after(0.099)) / 0.002, rtol=1e-2, atol=1e-6)

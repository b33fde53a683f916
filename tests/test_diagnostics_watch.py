"""`watch` measures what `measure` does, and neither changes an update nor copies a parameter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiled_step, copies, step_of

from rmsprop_jax import diagnostics, rmsprop


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
    np.testing.assert_allclose(
        history.bias_correction_factor["w"], 1 - 0.99 ** np.array([1, 5, 9]), rtol=1e-5
    )

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
    assert history.bias_correction_factor["b"] == pytest.approx(1 - 0.9**history.step, rel=1e-5)


def test_watch_around_optax_and_around_chains():
    """Whose states do not count, and whose gradients are clipped before."""
    tx = optax.chain(optax.clip(0.5), diagnostics.watch(optax.rmsprop(0.01, decay=0.5), 2, decay=0.5))
    _, state, _ = train_quadratic(tx, 5)
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1, 3, 5])
    np.testing.assert_allclose(history.bias_correction_factor["b"], 1 - 0.5**history.step)
    np.testing.assert_allclose(history.gradient_rms["w"], 0.5)


def test_watch_compiles_once_and_needs_no_copy_of_the_parameters():
    """The branch that measures reads what the step has; the state is overwritten in place."""
    size = 1 << 16
    tx = diagnostics.watch(rmsprop(0.01), decay=0.9, capacity=2)
    params = {"w": jnp.ones(size)}
    compiled = compiled_step(tx, params)
    assert not [line for line in copies(compiled) if f"f32[{size}]" in line]
    # What there is are the gradients, the new accumulators, the updates and a mask, in the branch.
    assert compiled.memory_analysis().temp_size_in_bytes < 4.5 * 4 * size
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(step_of(tx), n=1), donate_argnums=(0, 1))
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
    assert set(history.bias_correction_factor) == {
        f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")
    }
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

"""`watch` measures what `measure` does, and neither changes an update nor copies a parameter; its output."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import compiled_step, copies, step_of

from rmsprop_jax import Settings, diagnostics, rmsprop
from rmsprop_jax.diagnostics._figures import FIGURES

PARAMS = {"dense": {"kernel": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}}


def steps_of(tx, params=PARAMS):
    """A compiled step down a bowl, and where it starts."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: 2 * p, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step, params, tx.init(params)


def stepped(tx, steps, params=PARAMS):
    """The updates of some steps, and the last state."""
    step, params, state = steps_of(tx, params)
    updates = []
    for _ in range(steps):
        params, state, now = step(params, state)
        updates.append(now)
    return updates, state


def test_watch_changes_no_update_and_measures_what_measure_does():
    tx = rmsprop(0.01, decay=0.99)
    expected, _ = stepped(tx, 10)
    updates, state = stepped(diagnostics.watch(tx, every=4), 10)
    chex.assert_trees_all_equal(updates, expected)
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1, 5, 9])
    factors = history.bias_correction_factor["dense/bias"]
    np.testing.assert_allclose(factors, 1 - 0.99 ** np.array([1, 5, 9]), rtol=1e-5)

    grads = jax.tree.map(lambda x: 2 * x, PARAMS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    first = jax.jit(partial(diagnostics.measure, tx=tx))(grads, state, updates, PARAMS)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], history), first, rtol=1e-5)


def test_a_long_run_is_spanned_evenly_by_few_measurements():
    step, params, state = steps_of(diagnostics.watch(rmsprop(0.01), every=1, capacity=8), {"w": jnp.ones(4)})
    for steps in range(1, 65):
        params, state, _ = step(params, state)
        history = diagnostics.history(state)
        assert len(history.step) <= 8
        assert steps < 8 or len(history.step) >= 4
        stride = 1 if steps < 2 else history.step[1] - history.step[0]
        np.testing.assert_array_equal(history.step, np.arange(1, steps + 1, stride)[: len(history.step)])
        assert steps - history.step[-1] < stride + 1
        assert history.bias_correction_factor["w"] == pytest.approx(1 - 0.9**history.step, rel=1e-5)


def test_watch_around_optax_and_in_chains():
    """Whose states do not count, and whose gradients are clipped before."""
    watched = diagnostics.watch(optax.rmsprop(0.01, decay=0.5), 2, settings=Settings(0.5))
    _, state = stepped(optax.chain(optax.clip(0.5), watched), 5)
    history = diagnostics.history(state)
    np.testing.assert_array_equal(history.step, [1, 3, 5])
    np.testing.assert_allclose(history.bias_correction_factor["dense/bias"], 1 - 0.5**history.step)
    np.testing.assert_allclose(history.gradient_rms["dense/kernel"], 0.5)


def test_watch_compiles_once_and_needs_no_copy_of_the_parameters():
    """The branch that measures reads what the step has; the state is overwritten in place."""
    size = 1 << 16
    tx = diagnostics.watch(rmsprop(0.01), capacity=2)
    params = {"w": jnp.ones(size)}
    compiled = compiled_step(tx, params)
    assert not [line for line in copies(compiled) if f"f32[{size}]" in line]
    # The gradients, the new accumulators, the updates and a mask, in the branch.
    assert compiled.memory_analysis().temp_size_in_bytes < 4.5 * 4 * size
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(step_of(tx), n=1), donate_argnums=(0, 1))
    state = tx.init(params)
    for _ in range(3):
        params, state = counted(params, state, {"w": jnp.ones(size)})


def test_the_latest_is_a_dictionary_of_numbers():
    _, state = stepped(optax.chain(optax.clip(1.0), diagnostics.watch(rmsprop(0.1), every=2)), 4)
    latest, history = diagnostics.latest(state), diagnostics.history(state)
    assert {type(x) for x in latest.values()} == {float}
    assert len(latest) == 1 + len(FIGURES) * 2
    assert latest["step"] == 3
    for figure in FIGURES:
        for name, values in getattr(history, figure).items():
            np.testing.assert_equal(latest[f"{figure}/{name}"], float(values[-1]))
    assert "gradient_rms/dense/kernel" in latest


def test_nothing_measured_yet():
    state = diagnostics.watch(rmsprop(0.1)).init(PARAMS)
    history = diagnostics.history(state)
    assert len(history.step) == 0
    assert list(history.gradient_rms) == ["dense/bias", "dense/kernel"]
    assert diagnostics.advise(history) == diagnostics.advise(history, []) == diagnostics.advise([]) == []
    assert diagnostics.latest(state) == {}
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    with pytest.raises(ValueError, match="no measurements"):
        diagnostics.plot(history)


def test_a_population_has_a_history_for_each_member():
    """`jax.vmap` of a watched optimizer, once and twice: what each member's own run gives."""

    def run(params):
        tx = diagnostics.watch(rmsprop(0.1, accumulator="factored"), every=1, capacity=16)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), jnp.sum(jnp.square(params["w"]))

        (_, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=9)
        return state, losses

    kernels = jnp.ones((2, 3, 8, 4)) * jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    states, losses = jax.jit(jax.vmap(jax.vmap(run)))({"w": kernels})
    alone, its_losses = jax.jit(run)({"w": kernels[1, 2]})
    history = diagnostics.history(states, member=(1, 2))
    chex.assert_trees_all_close(history, diagnostics.history(alone), rtol=1e-5)
    assert diagnostics.latest(states, member=(1, 2)) == pytest.approx(diagnostics.latest(alone), nan_ok=True)
    findings = diagnostics.advise(history, losses[1, 2])
    assert [x.trouble for x in findings] == [x.trouble for x in diagnostics.advise(history, its_losses)]

    row = jax.tree.map(lambda x: x[0], states)
    first = jax.tree.map(lambda x: x[0], row)
    chex.assert_trees_all_equal(diagnostics.history(row, member=0), diagnostics.history(first))
    for state, member, expected in [
        (states, None, r"member=None, expected one up to \(1, 2\): .* several runs, made under jax\.vmap"),
        (row, None, "member=None, expected one up to 2: "),
        (row, 3, "member=3, expected one up to 2: "),
        (row, -1, "member=-1, expected one up to 2: "),
        (first, 0, "member=0, expected None: the state is of one run"),
    ]:
        for read in (diagnostics.history, diagnostics.latest):
            with pytest.raises(ValueError, match=f"Invalid member: {expected}"):
                read(state, member)
    several = diagnostics.Measurement(np.ones((3, 9)), history.names, np.ones((3, 9, len(FIGURES), 1)))
    for use in (diagnostics.advise, diagnostics.plot):
        with pytest.raises(ValueError, match=r"Invalid history: its steps have shape \(3, 9\)"):
            use(several)


def test_a_picture_for_notebooks():
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    _, state = stepped(diagnostics.watch(rmsprop(0.1)), 1)
    assert diagnostics.plot(diagnostics.history(state))._repr_png_().startswith(b"\x89PNG")


def test_flax_nnx_in_one_line():
    nnx = pytest.importorskip("flax.nnx", reason="the examples' extra is not installed")
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(1))
    tx = optax.chain(optax.clip(1.0), diagnostics.watch(rmsprop(0.01), every=2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2))(model))

    for _ in range(5):
        step(model, optimizer)
    history = diagnostics.history(optimizer.opt_state)
    np.testing.assert_array_equal(history.step, [1, 3, 5])
    assert set(history.names) == {"bias", "kernel"}
    np.testing.assert_allclose(history.learning_rate["kernel"], 0.01, rtol=1e-4)
    assert diagnostics.latest(optimizer.opt_state)["step"] == 5


def test_another_thing_than_a_state_is_refused():
    nnx = pytest.importorskip("flax.nnx", reason="the examples' extra is not installed")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = diagnostics.watch(rmsprop(0.1))
    params = nnx.state(model, nnx.Param)
    for ask in (
        lambda: diagnostics.history(model),
        lambda: diagnostics.latest(model),
        lambda: diagnostics.measure(params, model, params, params, tx=tx),
        lambda: tx.update(params, nnx.Optimizer(model, tx, wrt=nnx.Param), params),
    ):
        with pytest.raises(ValueError, match=r"Invalid state: .*optimizer\.opt_state"):
            ask()
    with pytest.raises(ValueError, match=r"Invalid state: it is tuple.*tx\.init\(params\)"):
        tx.update(PARAMS, tuple(tx.init(PARAMS)), PARAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "every=0"), ({"every": True}, "every=True"), ({"capacity": 3}, "capacity=3")],
)
def test_watch_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.watch(rmsprop(0.1), **arguments)


def test_watch_needs_parameters_and_history_a_watch():
    tx = diagnostics.watch(rmsprop(0.1))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    with pytest.raises(ValueError, match="it has 0 of watch's"):
        diagnostics.history(rmsprop(0.1).init(jnp.ones(3)))

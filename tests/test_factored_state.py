"""Means of rows and of columns as a state: with JAX and Optax, in checkpoints, in what XLA makes of it."""

import copy
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_equal_leaves_are_lowered_once,
    assert_the_second_step_compiles_nothing,
    assert_trees_close,
    compiled_step,
    copies,
    each,
    forms,
    step_of,
)
from jax import export

from rmsprop_jax import accumulators, diagnostics, interop, rmsprop, rows, scale_by_rms, warmup

FACTORED = accumulators.Factored(2)
PARAMS = {
    "w": jnp.ones((6, 4)),
    "b": jnp.ones(4),
    "none": None,
    "empty": jnp.ones((0, 5, 3)),
    "s": jnp.ones(()),
}


def optimizer(**options):
    return rmsprop(0.1, accumulator=FACTORED, **options)


def grads(t=0):
    return jax.tree.map(lambda p: jnp.cos(jnp.arange(float(p.size)) + t).reshape(p.shape), PARAMS)


def after(tx, steps=3):
    state = tx.init(PARAMS)
    for t in range(steps):
        _, state = tx.update(grads(t), state, PARAMS)
    return state


def means_of(state):
    """Of "w"."""
    ((_, nu),) = state.nu.items()
    return nu["row_mean"]["w"], nu["column_mean"]["w"]


def test_what_is_stored():
    state = after(optimizer())[0]
    nu = state.nu["factored(2)"]
    shapes = {part: jax.tree.map(jnp.shape, tree) for part, tree in nu.items()}
    assert shapes == {
        "row_mean": {"w": (6, 1), "b": (4,), "none": None, "empty": (0, 5, 1), "s": ()},
        "column_mean": {"w": (1, 4), "b": (1,), "none": None, "empty": (0, 1, 3), "s": (1,)},
    }
    assert {x.dtype for x in jax.tree.leaves(nu)} == {np.dtype("float32")}
    start = rmsprop(0.1, initial_scale=0.3, accumulator=FACTORED).init(PARAMS)[0]
    assert {x.item() for x in means_of(start)[0].ravel()} == {np.float32(0.3)}


def test_a_transformer_takes_a_twentieth_of_a_byte():
    from benchmarks.step import transformer

    params = jax.eval_shape(transformer)
    state = jax.eval_shape(rmsprop(1e-3, accumulator="factored").init, params)
    nbytes, size = (sum(x.size * n for x in jax.tree.leaves(tree)) for tree, n in ((state, 4), (params, 1)))
    assert nbytes / size < 0.05


def test_from_dense_the_means_are_exact():
    """And back it is what the rule divides by. To roundings."""
    _, dense = (tx := rmsprop(0.1)).update(grads(), tx.init(PARAMS))
    state = accumulators.convert(dense, FACTORED)
    nu = np.float64(dense[0].nu["w"])
    for mean, axis in zip(means_of(state[0]), (1, 0), strict=True):
        np.testing.assert_allclose(mean, nu.mean(axis, keepdims=True), rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, optimizer().init(PARAMS))
    optimizer().update(grads(), state)
    again = accumulators.convert(state, "float32")[0].nu["w"]
    expected = nu.mean(1, keepdims=True) * nu.mean(0, keepdims=True) / nu.mean()
    np.testing.assert_allclose(again, expected, rtol=1e-6)
    assert_trees_close(
        accumulators.convert(accumulators.convert(state, "float32"), FACTORED), state, rtol=1e-6
    )


@each(save={"pickle": lambda state: pickle.loads(pickle.dumps(state)), "deepcopy": copy.deepcopy})
def test_a_copy_goes_on(save):
    state = after(optimizer())
    chex.assert_trees_all_equal(save(state), state)
    optimizer().update(grads(), save(state))


def test_flax_writes_and_reads_it():
    serialization = pytest.importorskip("flax.serialization")
    state = after(optimizer())
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(optimizer().init(PARAMS), data)
    assert_trees_close(jax.tree.leaves(restored), jax.tree.leaves(state), rtol=0)


def test_boxes_of_flax_linen_name_no_axis_that_a_mean_is_over():
    """And all their axes where nu is stored whole or as codes."""
    linen = pytest.importorskip("flax.linen")
    names = {"kernel": ("rows", "columns"), "bias": ("columns",)}
    shapes = {"kernel": (130, 140), "bias": (140,)}
    params = {name: linen.Partitioned(jnp.ones(shapes[name]), names[name]) for name in names}

    def names_of(tree):
        return {name: box.names for name, box in tree.items()}

    nu = {name: scale_by_rms(accumulator=name).init(params).nu for name in ("float32", "uint8", "factored")}
    assert names_of(nu["float32"]) == names_of(nu["uint8"]["uint8"]) == names
    means = nu["factored"]["factored"]
    assert names_of(means["row_mean"]) == {"kernel": ("rows", None), "bias": ("columns",)}
    assert names_of(means["column_mean"]) == {"kernel": (None, "columns"), "bias": (None,)}


def test_inside_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(130, 140, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(1e-3, accumulator="factored"), wrt=nnx.Param)
    x = jnp.ones((2, 130))

    @nnx.jit
    def step(model, optimizer):
        loss, g = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, g)
        return loss

    with jax.numpy_rank_promotion("allow"):  # Flax's own
        first, second = step(model, optimizer), step(model, optimizer)
    assert second < first
    sizes = {x.size for x in jax.tree.leaves(optimizer.opt_state)}
    assert 130 * 140 not in sizes
    (measured,) = set(diagnostics._measure.names_of(optimizer.opt_state)) - {"bias"}
    assert measured == "kernel"


def test_vmap_stacks_states():
    tx = optimizer()
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    states = jax.vmap(tx.init)(stacked)
    updates, states = jax.vmap(lambda g, s: tx.update(g, s))(stacked, states)
    for i in range(2):
        alone, state = tx.update(jax.tree.map(lambda x: x[i], stacked), tx.init(PARAMS))  # noqa: B023
        assert_trees_close(jax.tree.map(lambda x: x[i], updates), alone, rtol=1e-6)  # noqa: B023
        assert_trees_close(jax.tree.map(lambda x: x[i], states), state, rtol=1e-6)  # noqa: B023
    dense = accumulators.convert(states, "float32")[0].nu["w"]
    assert dense.shape == (2, 6, 4)


def test_a_none_gradient_leaves_its_means():
    tx = optimizer()
    state = after(tx)
    updates, new = tx.update({**grads(), "w": None}, state)
    assert updates["w"] is None
    chex.assert_trees_all_equal(means_of(new[0]), means_of(state[0]))
    b = [x[0].nu["factored(2)"]["row_mean"]["b"] for x in (new, state)]
    assert not np.array_equal(*b)


def test_names_of_leaves_are_the_parameters():
    tx = optimizer()
    state = tx.init(PARAMS)
    shapes = r"\[\(4, 1\), \(1, 6\)\], the state has \[\(6, 1\), \(1, 4\)\]"
    with pytest.raises(ValueError, match=rf"Gradient 'w' has shape \(4, 6\).* {shapes}"):
        tx.update({**grads(), "w": jnp.ones((4, 6))}, state)
    with pytest.raises(ValueError, match=r"they lack 'w' and"):
        tx.update({name: g for name, g in grads().items() if name != "w"}, state)


def test_a_state_of_another_least_size_is_refused():
    with pytest.raises(ValueError, match=r"'factored\(2\)' stores its nu, .* accumulator='factored'"):
        rmsprop(0.1, accumulator="factored").update(grads(), optimizer().init(PARAMS))


@each(refuse={"exact": rows.exact, "lazy": rows.lazy, "inside": lambda tx: rows.lazy(optax.chain(tx))})
def test_rows_refuse_it_by_name(refuse):
    with pytest.raises(ValueError, match=r"Invalid .*factored.* a whole table"):
        refuse(optimizer()).init(jnp.ones((5, 4)))


# Other frameworks and diagnostics read numbers.


def test_it_goes_to_torch_and_back():
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    params = {"w": PARAMS["w"], "b": PARAMS["b"]}
    names = {"0.weight": ("w", (1, 0)), "0.bias": "b"}
    state = optimizer().init(params)
    _, state = optimizer().update({name: grads()[name] for name in params}, state)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    theirs = torch.optim.RMSprop(model.named_parameters()).state_dict()
    theirs = interop.to_torch(state, theirs, params, names)
    dense = accumulators.convert(state, "float32")[0].nu["w"]
    np.testing.assert_array_equal(theirs["state"][0]["square_avg"].numpy().T, dense)
    back = interop.from_torch(theirs, optimizer().init(params), params, names)
    assert_trees_close(back[0], state[0], rtol=1e-6)  # of means over a product of means
    interop.from_optax(interop.to_optax(state, optax.rmsprop(0.1).init(params)), state)  # asks for no count


def test_diagnostics_see_the_numbers():
    tx = diagnostics.watch(optimizer(), every=1)
    _, state = tx.update(grads(), tx.init(PARAMS), PARAMS)
    updates, inner = optimizer().update(grads(), optimizer().init(PARAMS))
    measured = diagnostics.measure(grads(), inner, updates, PARAMS, tx=optimizer())
    dense = accumulators.convert(inner, "float32")[0].nu["w"]
    history = diagnostics.history(state)
    assert set(history.accumulator_rms) == {"w", "b", "s"}
    for found in (measured.accumulator_rms["w"], history.accumulator_rms["w"][0]):
        np.testing.assert_allclose(found, np.sqrt(np.mean(dense)), rtol=1e-6)


# What XLA and JAX make of it.


@each(form=forms("plain", "outside", "corrected", "momentum"))
def test_a_donated_step_holds_no_squares(form, monkeypatch):
    """Blocks of 2^16, and a thirty-second of each leaf; not one of all squares."""
    if jax.default_backend() != "cpu":
        pytest.skip("the blocks are for CPUs; tests/accelerators has the compilers for GPUs and TPUs")
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # whatever other tests of this process asked for
    params = [jnp.ones((2048, 512)), jnp.ones((64, 9000)), jnp.ones(500)]
    compiled = compiled_step(rmsprop(warmup(1e-3), accumulator=FACTORED, **form), params)
    memory = compiled.memory_analysis()
    nbytes = sum(p.nbytes for p in params)
    assert memory.temp_size_in_bytes < 0.2 * nbytes
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - 1024
    assert not any(f"[{p.shape[0]},{p.shape[1]}]" in line for line in copies(compiled) for p in params[:2])


def test_equal_leaves_are_lowered_once():
    tx = rmsprop(1e-3, accumulator=FACTORED)
    assert_equal_leaves_are_lowered_once(tx)

    def lowered(leaves):
        params = [jnp.ones((8, 8))] * leaves
        return len(jax.jit(tx.update).lower(params, tx.init(params)).as_text())

    per_leaf = (lowered(20) - lowered(10)) / 10
    assert per_leaf < (lowered(2) - 2 * per_leaf) / 2


def test_the_second_step_compiles_nothing():
    tx = rmsprop(warmup(1e-3), accumulator=FACTORED, momentum=0.9)
    params = {"w": jnp.ones((300, 400), jnp.bfloat16), "b": jnp.ones(2)}
    assert_the_second_step_compiles_nothing(tx, params)


def test_with_and_without_jit_in_a_scan_and_in_blocks():
    """A program of its own contracts a * b + c as it likes: to roundings."""
    tx = rmsprop(0.01, accumulator=FACTORED, momentum=0.9)
    g = jnp.sin(jnp.arange(300.0 * 700)).reshape(300, 700)

    def step(carry, factor):
        return step_of(tx)(*carry, factor * g), None

    start, factors = (g, tx.init(g)), jnp.arange(1.0, 4.0)
    expected = start
    for factor in factors:
        expected, _ = step(expected, factor)
    assert_trees_close(jax.jit(lambda: jax.lax.scan(step, start, factors)[0])(), expected, rtol=2e-6)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda", "tpu")])
def test_export_with_a_size_that_is_left_open(platforms):
    """As long as it says on which side of `min_dim` it is."""
    tx = scale_by_rms(accumulator=FACTORED)
    n = export.symbolic_shape("n", constraints=["n >= 2"])
    shape = jax.ShapeDtypeStruct((*n, 3), jnp.float32)
    exported = export.export(jax.jit(tx.update), platforms=platforms)(shape, jax.eval_shape(tx.init, shape))
    exported = export.deserialize(exported.serialize())
    for size in (2, 500):
        g = jnp.arange(3.0 * size).reshape(size, 3)
        assert_trees_close(exported.call(g, tx.init(g)), jax.jit(tx.update)(g, tx.init(g)), rtol=1e-6)

"""Each state of RMSProp in a tree is read, and filled, by its own accumulator and by its leaves' one name."""

from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Float16Root

from rmsprop_jax import accumulators, interop, rmsprop, scale_by_rms


@dataclass(frozen=True)
class Quadrupled(accumulators.Codes):
    """float32, as if nothing was encoded."""

    def encode(self, nu, threshold):
        return nu * 4

    def decode(self, codes):
        return codes / 4


UNNAMED = [accumulators.Uint8(-40), Float16Root(), Quadrupled()]
PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}
KERAS_NAMES = {"fc/kernel": "fc/kernel", "fc/bias": "fc/bias"}


def after_three_updates(tx):
    state = tx.init(PARAMS)
    for t in range(3):
        grads = jax.tree.map(lambda p: jnp.sin(jnp.arange(1.0 + t, 1 + t + p.size)).reshape(p.shape), PARAMS)  # noqa: B023
        _, state = tx.update(grads, state, PARAMS)
    return state


def torch_state(*whats):
    """`torch.optim.RMSprop.state_dict()` with NumPy's arrays, 2^-30 * [1, 2, ..]."""
    shapes = {"fc.weight": (3, 5), "fc.bias": (3,)}
    arrays = {
        n: np.arange(1, 1 + np.prod(s), dtype=np.float32).reshape(s) * 2.0**-30 for n, s in shapes.items()
    }
    state = {
        i: {"step": 7, **{what: x.astype(np.float32) for what in whats}}
        for i, x in enumerate(arrays.values())
    }
    return {"state": state, "param_groups": [{"lr": 0.1, "params": [0, 1], "param_names": list(arrays)}]}


def keras_variables(*whats):
    shapes = {"fc_kernel": (5, 3), "fc_bias": (3,)}
    arrays = {f"rmsprop/{n}_{what}": np.zeros(s, np.float32) for n, s in shapes.items() for what in whats}
    return {"rmsprop/iteration": np.int32(0), "rmsprop/learning_rate": np.float32(0.1), **arrays}


def through_torch(state, empty):
    pytest.importorskip("torch", reason="torch is not installed: make peers")
    theirs = interop.to_torch(state, torch_state("square_avg"), PARAMS, NAMES)
    raw = {
        "kernel": theirs["state"][0]["square_avg"].numpy().T,
        "bias": theirs["state"][1]["square_avg"].numpy(),
    }
    return raw, interop.from_torch(theirs, empty, PARAMS, NAMES)


@pytest.mark.parametrize("is_number", [False, True])
def test_a_step_stays_the_number_or_the_tensor_that_it_is(is_number):
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    theirs = torch_state("square_avg")
    for entry in theirs["state"].values():
        entry["step"] = 7 if is_number else torch.tensor(7.0)
    new = interop.to_torch(rmsprop(0.1, bias_correction=True).init(PARAMS), theirs, PARAMS, NAMES)
    for entry in new["state"].values():
        assert type(entry["step"]) is (int if is_number else torch.Tensor)
        assert entry["step"] == 0


def through_keras(state, empty):
    theirs = interop.to_keras(state, keras_variables("velocity"), PARAMS, KERAS_NAMES)
    raw = {name: theirs[f"rmsprop/fc_{name}_velocity"] for name in ("kernel", "bias")}
    return raw, interop.from_keras(theirs, empty, PARAMS, KERAS_NAMES)


def through_optax(state, empty):
    theirs = interop.to_optax(state, optax.rmsprop(0.1).init(PARAMS))
    raw = optax.tree.get(theirs, "nu")["fc"]
    return raw, interop.from_optax(theirs, empty, count=3)


@pytest.mark.parametrize("through", [through_torch, through_keras, through_optax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("accumulator", ["float32", "bfloat16", "uint8", *UNNAMED], ids=str)
def test_a_state_leaves_as_numbers_and_comes_back_as_it_was(accumulator, through):
    tx = rmsprop(0.1, accumulator=accumulator)
    state = after_three_updates(tx)
    raw, back = through(state, tx.init(PARAMS))
    expected = accumulators.convert(state, "float32")[0].nu["fc"]
    chex.assert_trees_all_equal(raw, expected)
    chex.assert_trees_all_equal(back[0], state[0])  # what an accumulator can store, it stores as it is


@pytest.mark.parametrize("accumulator", UNNAMED, ids=str)
def test_centred_the_raw_moment_leaves(accumulator):
    state = after_three_updates(rmsprop(0.1, centered=True, accumulator=accumulator))
    theirs = interop.to_optax(state, optax.rmsprop(0.1, centered=True).init(PARAMS))
    plain = accumulators.convert(state, "float32")[0]
    expected = jax.tree.map(lambda nu, mu: nu + mu**2, plain.nu, plain.mu)
    # One rounding of float32 each.
    chex.assert_trees_all_close(optax.tree.get(theirs, "nu"), expected, rtol=2e-7)


@pytest.mark.parametrize(
    "of_leaf",
    [
        {"kernel": "uint8", "bias": "float32"},
        {"kernel": "float32", "bias": "uint8"},
        {"kernel": "uint8", "bias": accumulators.Uint8(-40)},
        {"kernel": Float16Root(), "bias": "bfloat16"},
    ],
    ids=str,
)
def test_each_part_of_a_partition_has_its_own_accumulator(of_leaf):
    parts = {name: rmsprop(0.1, accumulator=accumulator) for name, accumulator in of_leaf.items()}
    tx = optax.partition(parts, {"fc": {"kernel": "kernel", "bias": "bias"}})
    empty = tx.init(PARAMS)
    theirs = torch_state("square_avg")
    state = interop.from_torch(theirs, empty, PARAMS, NAMES)
    chex.assert_trees_all_equal_structs(state, empty)
    chex.assert_trees_all_equal_dtypes(state, empty)

    plain = {
        name: part.inner_state[0]
        for name, part in accumulators.convert(state, "float32").inner_states.items()
    }
    # A code of Uint8 is at most a factor of 2^(1/4) away, those of the others less.
    np.testing.assert_allclose(
        plain["kernel"].nu["fc"]["kernel"].T, theirs["state"][0]["square_avg"], rtol=0.2
    )
    np.testing.assert_allclose(plain["bias"].nu["fc"]["bias"], theirs["state"][1]["square_avg"], rtol=0.2)


@pytest.mark.parametrize("accumulator", ["uint8", *UNNAMED], ids=str)
def test_fills_a_state_that_is_only_shapes(accumulator):
    tx = rmsprop(0.1, momentum=0.9, accumulator=accumulator)
    theirs = torch_state("square_avg", "momentum_buffer")
    expected = interop.from_torch(theirs, tx.init(PARAMS), PARAMS, NAMES)
    state = interop.from_torch(theirs, jax.eval_shape(tx.init, PARAMS), PARAMS, NAMES)
    chex.assert_trees_all_equal(state, expected)


def test_codes_are_rounded_without_bias():
    theirs = {"rmsprop/iteration": 7, "rmsprop/w_velocity": np.full(10_000, 1.1)}
    params = {"w": jnp.zeros(10_000)}
    tx = scale_by_rms(accumulator=accumulators.Uint8(-40))
    state = interop.from_keras(theirs, tx.init(params), params, {"w": "w"})
    # 1.1 becomes 1 or 1.19; of 10,000 the mean's standard deviation is 0.001, Uint8's own bias 0.003 at most.
    np.testing.assert_allclose(accumulators.convert(state, "float32").nu["w"].mean(), 1.1, rtol=0.006)


def test_codes_that_nobody_can_read_are_refused():
    state = scale_by_rms(accumulator="float32").init(PARAMS)
    state = state._replace(nu={"Float8(3)": state.nu})
    with pytest.raises(ValueError, match=r"'Float8\(3\)' stores its nu, an accumulator that is not defined"):
        interop.to_optax(state, optax.scale_by_rms().init(PARAMS))


@dataclass
class Layer:
    """As an Equinox module: a tree with what is no array among its leaves."""

    kernel: Any
    activation: Any
    bias: Any = None
    rate: Any = 0.5


jax.tree_util.register_dataclass(Layer, data_fields=["kernel", "activation", "bias", "rate"], meta_fields=[])


def test_leaves_that_are_no_arrays_have_no_path_and_stay():
    model = {"fc": Layer(jnp.ones((5, 3)), jnp.tanh), "key": jax.random.key(0)}
    names = {"fc.weight": ("fc/kernel", (1, 0))}
    assert interop.paths(model) == {"fc/kernel": (5, 3)}
    filled = interop.params_from({"fc.weight": np.zeros((3, 5))}, model, names)
    np.testing.assert_array_equal(filled["fc"].kernel, 0)
    assert (filled["fc"].activation, filled["fc"].bias, filled["fc"].rate) == (jnp.tanh, None, 0.5)
    assert filled["key"] is model["key"]
    with pytest.raises(ValueError, match=r"'fc\.act' is mapped to 'fc/activation', which is no path"):
        interop.params_from({"fc.act": np.zeros(3)}, model, {**names, "fc.act": "fc/activation"})


def test_the_state_of_the_arrays_among_other_leaves():
    model = {"fc": Layer(jnp.ones((5, 3)), jnp.tanh)}
    tx = rmsprop(0.1, accumulator="uint8")
    empty = tx.init({"fc": Layer(model["fc"].kernel, None, rate=None)})  # as equinox.filter(model, is_array)
    theirs = {"rmsprop/iteration": 7, "rmsprop/fc_kernel_velocity": np.ones((5, 3))}
    state = interop.from_keras(theirs, empty, model, {"fc/kernel": "fc/kernel"})
    chex.assert_trees_all_equal_structs(state, empty)
    np.testing.assert_array_equal(accumulators.convert(state, "float32")[0].nu["fc"].kernel, 1)
    back = interop.to_keras(state, theirs, model, {"fc/kernel": "fc/kernel"})
    np.testing.assert_array_equal(back["rmsprop/fc_kernel_velocity"], 1)


def test_python_numbers_as_parameters():
    params = {"w": 1.0}
    theirs = {"rmsprop/iteration": 7, "rmsprop/w_velocity": np.float32(2.0)}
    state = interop.from_keras(theirs, rmsprop(0.1).init(params), params, {"w": "w"})
    assert state[0].nu["w"] == 2
    assert interop.to_keras(state, theirs, params, {"w": "w"}) == theirs


def test_a_module_of_equinox():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")
    model = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    names = {name: name for name in interop.paths(model)}
    assert set(names) == {f"layers/{i}/{what}" for i in (0, 1) for what in ("weight", "bias")}
    arrays, rest = eqx.partition(model, eqx.is_array)
    tensors = {name: np.ones(shape) for name, shape in interop.paths(arrays).items()}
    filled = interop.params_from(tensors, model, names)
    chex.assert_trees_all_equal(filled, eqx.combine(jax.tree.map(jnp.ones_like, arrays), rest))


def test_variables_of_nnx_are_named_as_their_arrays():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
    params = nnx.state(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert interop.paths(params) == {"bias": (3,), "kernel": (5, 3)}
    names = {"fc.weight": ("kernel", (1, 0)), "fc.bias": "bias"}
    tensors = {"fc.weight": np.ones((3, 5)), "fc.bias": np.ones(3)}
    filled = interop.params_from(tensors, params, names)
    chex.assert_trees_all_equal_structs(filled, params)
    tx = rmsprop(0.1, accumulator="uint8")
    state = interop.from_torch(torch_state("square_avg"), tx.init(params), params, names)
    chex.assert_trees_all_equal_structs(state, tx.init(params))
    with pytest.raises(ValueError, match="'kernel' has no name in `names`"):
        interop.from_torch(torch_state("square_avg"), tx.init(params), params, {"fc.bias": "bias"})


def test_parameters_that_are_one_array():
    (path,) = interop.paths(jnp.zeros(3))
    filled = interop.params_from({"w": np.ones(3)}, jnp.zeros(3), {"w": path})
    np.testing.assert_array_equal(filled, 1)


@pytest.mark.parametrize("accumulator", ["float32", "bfloat16", accumulators.Uint8(-40)], ids=str)
def test_float64_is_rounded_and_what_is_finite_stays_finite(accumulator):
    params = {"w": np.zeros(3)}
    assert params["w"].dtype == np.float64
    tx = rmsprop(0.1, momentum=0.9, accumulator=accumulator)
    theirs = {
        "rmsprop/iteration": 7,
        "rmsprop/w_velocity": np.array([0.0, 1.0, 1e300]),
        "rmsprop/w_momentum": np.array([0.0, -1e300, 1]),
    }
    state = interop.from_keras(theirs, tx.init(params), params, {"w": "w"})
    chex.assert_trees_all_equal_dtypes(state, tx.init(params))
    nu = accumulators.convert(state, "float32")[0].nu["w"]
    np.testing.assert_array_equal(nu[:2], [0, 1])
    assert jnp.isfinite(nu).all()
    assert jnp.isfinite(optax.tree.get(state, "trace")["w"]).all()
    filled = interop.params_from({"w": np.arange(3.0)}, params, {"w": "w"})
    np.testing.assert_array_equal(filled["w"], np.arange(3, dtype=np.float32))


@pytest.mark.parametrize("accumulator", ["float32", "uint8"])
def test_codes_are_placed_as_the_state_was(accumulator):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"w": jnp.zeros(4)}
    tx = scale_by_rms(accumulator=accumulator)
    abstract = jax.eval_shape(tx.init, params)
    abstract = abstract._replace(nu=jax.tree.map(lambda x: x.update(sharding=sharding), abstract.nu))
    concrete = tx.init(params)
    concrete = concrete._replace(nu=jax.device_put(concrete.nu, sharding))
    for empty in (abstract, concrete):
        state = interop.from_keras({"rmsprop/w_velocity": np.ones(4)}, empty, params, {"w": "w"}, count=1)
        for x, old in zip(jax.tree.leaves(state.nu), jax.tree.leaves(concrete.nu), strict=True):
            assert (x.sharding, x.dtype) == (sharding, old.dtype)

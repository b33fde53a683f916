"""From PyTorch's and Keras' states and back, without these packages: names, shapes, and what is reported."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from rmsprop_jax import conventions, interop, rmsprop

PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "scale": jnp.float32(1.0)}
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias", "scale": "scale"}
ORDER = ["fc.bias", "fc.weight", "scale"]  # not the order of NAMES, nor of the tree
SHAPES = {"fc.weight": (3, 5), "fc.bias": (3,), "scale": ()}


def torch_state(*whats, lr=0.1):
    """What `torch.optim.RMSprop.state_dict()` returns, with NumPy's arrays."""
    rng = np.random.default_rng(0)
    state = {
        index: {"step": np.float32(7.0), **{w: rng.random(SHAPES[name], np.float32) for w in whats}}
        for index, name in enumerate(ORDER)
    }
    return {"state": state, "param_groups": [{"lr": lr, "params": [0, 1, 2]}]}


def flat(state):
    """The same as torch.distributed.checkpoint writes it with flatten_optimizer_state_dict."""
    arrays = {f"state.{ORDER[i]}.{what}": x for i, e in state["state"].items() for what, x in e.items()}
    lrs = {f"param_groups.{name}.lr": np.float32(state["param_groups"][0]["lr"]) for name in ORDER}
    return {k: np.asarray(x) for k, x in (arrays | lrs).items()}


def test_from_torch_fills_the_state_by_name():
    theirs = torch_state("square_avg", "momentum_buffer")
    tx = conventions.torch(optax.constant_schedule(0.1), momentum=0.9)
    state = interop.from_torch(theirs, tx.init(PARAMS), PARAMS, NAMES, order=ORDER)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    for what, field in (("square_avg", "nu"), ("momentum_buffer", "trace")):
        filled = optax.tree.get(state, field)
        np.testing.assert_array_equal(filled["fc"]["kernel"], theirs["state"][1][what].T)
        np.testing.assert_array_equal(filled["fc"]["bias"], theirs["state"][0][what])
        np.testing.assert_array_equal(filled["scale"], theirs["state"][2][what])
    counts = [count for _, count in optax.tree.get_all_with_path(state, "count")]
    assert len(counts) == 2  # the accumulator's and the schedule's
    assert all(count == 7 and count.dtype == jnp.int32 for count in counts)


def test_the_mean_leaves_the_second_moment():
    theirs = torch_state("square_avg", "grad_avg")
    theirs["state"][0]["square_avg"] = theirs["state"][0]["grad_avg"] ** 2 * np.float32(
        0.999
    )  # rounded badly
    tx = conventions.torch(centered=True)
    rms = optax.tree.get(interop.from_torch(theirs, tx.init(PARAMS), PARAMS, NAMES, order=ORDER), "nu")
    np.testing.assert_array_equal(rms["fc"]["bias"], 0)
    entry = {k: v.astype(np.float64) for k, v in theirs["state"][1].items()}
    expected = np.maximum(entry["square_avg"] - entry["grad_avg"] ** 2, 0)
    np.testing.assert_allclose(rms["fc"]["kernel"], expected.T, rtol=1e-6)


@pytest.mark.parametrize(("ours", "factor"), [(None, 1.0), (False, 1.0), (True, -0.1)])
def test_the_learning_rate_in_the_buffer(ours, factor):
    theirs = torch_state("square_avg", "momentum_buffer", lr=0.1)
    state = rmsprop(0.1, momentum=0.9).init(PARAMS)
    state = interop.from_torch(theirs, state, PARAMS, NAMES, order=ORDER, lr_in_momentum=ours)
    expected = factor * theirs["state"][1]["momentum_buffer"].T
    np.testing.assert_allclose(optax.tree.get(state, "trace")["fc"]["kernel"], expected, rtol=1e-6)


def test_a_learning_rate_of_zero_cannot_move_out_of_the_buffer():
    theirs = torch_state("square_avg", "momentum_buffer", lr=0.0)
    state = rmsprop(0.1, momentum=0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"Invalid learning_rate=0\.0"):
        interop.from_torch(theirs, state, PARAMS, NAMES, order=ORDER, lr_in_momentum=True)


@pytest.mark.parametrize("wrap", ["chain", "inject", "masked", "multi_steps"])
def test_finds_the_accumulators_inside_any_wrapper(wrap):
    theirs = torch_state("square_avg", "momentum_buffer")
    inner = conventions.torch(optax.constant_schedule(0.1), momentum=0.9)
    tx = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.apply_if_finite(inner, 3)),
        "inject": lambda: optax.inject_hyperparams(conventions.torch)(
            lr=optax.constant_schedule(0.1), momentum=0.9
        ),
        "masked": lambda: optax.masked(inner, {"fc": True, "scale": False}),
        "multi_steps": lambda: optax.MultiSteps(inner, 2).gradient_transformation(),
    }[wrap]()
    state = interop.from_torch(theirs, tx.init(PARAMS), PARAMS, NAMES, order=ORDER)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
    for what, field in (("square_avg", "nu"), ("momentum_buffer", "trace")):
        kernel = optax.tree.get(state, field)["fc"]["kernel"]
        np.testing.assert_array_equal(kernel, theirs["state"][1][what].T)
    counts = [count for _, count in optax.tree.get_all_with_path(state, "count")]
    assert counts
    assert all(count == 7 for count in counts)


def test_the_flat_form_and_a_safetensors_file(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    theirs = torch_state("square_avg", "momentum_buffer")
    state = conventions.torch(momentum=0.9).init(PARAMS)
    expected = interop.from_torch(theirs, state, PARAMS, NAMES, order=ORDER)
    numpy.save_file(flat(theirs), tmp_path / "optimizer.safetensors")
    for source in (flat(theirs), tmp_path / "optimizer.safetensors", str(tmp_path / "optimizer.safetensors")):
        assert_trees_close(interop.from_torch(source, state, PARAMS, NAMES), expected, rtol=0)

    tensors = {name: np.random.default_rng(0).random(shape, np.float32) for name, shape in SHAPES.items()}
    numpy.save_file(tensors, tmp_path / "model.safetensors")
    params = interop.params_from(tmp_path / "model.safetensors", PARAMS, NAMES)
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)


@pytest.mark.parametrize("count", [2**31, -1, 1.5, np.nan, np.ones(2), "many"])
def test_a_count_is_a_whole_number_that_int32_has(count):
    state = rmsprop(0.1, bias_correction=True).init(PARAMS)
    theirs = optax.rmsprop(0.1).init(PARAMS)
    with pytest.raises(ValueError, match="expected a whole number of updates"):
        interop.from_optax(theirs, state, count=count)


def test_random_keys_are_no_arrays_of_numbers():
    assert interop.paths({"w": jnp.zeros(3), "dropout": jax.random.key(0), "step": 7}) == {"w": (3,)}


def test_fills_a_state_that_is_only_shapes():
    tx = conventions.torch(optax.constant_schedule(0.1), momentum=0.9)
    theirs = torch_state("square_avg", "momentum_buffer")
    expected = interop.from_torch(theirs, tx.init(PARAMS), PARAMS, NAMES, order=ORDER)
    state = interop.from_torch(theirs, jax.eval_shape(tx.init, PARAMS), PARAMS, NAMES, order=ORDER)
    assert_trees_close(state, expected, rtol=0)


def test_opens_no_other_file(tmp_path):
    with pytest.raises(ValueError, match=r"expected a dictionary of arrays or a file that ends with"):
        interop.params_from(tmp_path / "model.pkl", PARAMS, NAMES)
    with pytest.raises(ValueError, match=r"is a directory.*dcp_to_torch_save"):
        interop.params_from(tmp_path, PARAMS, NAMES)
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        interop.params_from(tmp_path / "model.pt", PARAMS, NAMES)


def test_reports_all_that_is_missing_or_misshapen_at_once():
    theirs = torch_state("square_avg")
    theirs["state"][1]["square_avg"] = np.zeros((5, 3))
    names = {"fc.weight": ("fc/kernel", (1, 0)), "fc.b": "fc/bias", "extra": "fc/extra"}
    with pytest.raises(ValueError, match="The states do not fit") as error:
        interop.from_torch(theirs, conventions.torch().init(PARAMS), PARAMS, names, order=ORDER)
    assert str(error.value).splitlines()[1:] == [
        "  'extra' is mapped to 'fc/extra', which is no path of a parameter.",
        "  'scale' has no name in `names` (nearest: 'scale').",
        "  'fc.b' has no square_avg, which 'fc/bias' needs (nearest: 'fc.bias').",
        "  'fc.weight' has a square_avg of shape (5, 3), not (3, 5), which 'fc/kernel' needs.",
    ]


@pytest.mark.parametrize(
    ("settings", "whats", "message"),
    [
        ({"momentum": 0.9}, ["square_avg"], "'scale' has no momentum_buffer, which 'scale' needs."),
        ({"centered": True}, ["square_avg"], "'scale' has no grad_avg, which 'scale' needs."),
        ({}, ["square_avg", "grad_avg"], "'scale' has a grad_avg, for which this optimizer has no place."),
        (
            {},
            ["square_avg", "momentum_buffer"],
            "has a momentum_buffer, for which this optimizer has no place.",
        ),
    ],
)
def test_reports_accumulators_that_only_one_side_has(settings, whats, message):
    state = conventions.torch(**settings).init(PARAMS)
    with pytest.raises(ValueError, match=message):
        interop.from_torch(torch_state(*whats), state, PARAMS, NAMES, order=ORDER)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({**NAMES, "again": "scale"}, "'again' is mapped to 'scale', as 'scale' is."),
        ({**NAMES, "fc.bias": ("fc/bias", (1, 0))}, r"'fc.bias' is to be transposed with \(1, 0\)"),
    ],
)
def test_reports_a_mapping_that_cannot_be(names, message):
    with pytest.raises(ValueError, match=message):
        interop.params_from({name: np.zeros(shape) for name, shape in SHAPES.items()}, PARAMS, names)


def test_pytorch_needs_an_order_where_it_has_no_names():
    state, theirs = conventions.torch().init(PARAMS), torch_state("square_avg")
    with pytest.raises(ValueError, match=r"does not name them: pass order=.*group after group"):
        interop.from_torch(theirs, state, PARAMS, NAMES)
    with pytest.raises(ValueError, match="order has 2 names, PyTorch's optimizer 3 parameters"):
        interop.from_torch(theirs, state, PARAMS, NAMES, order=ORDER[:2])
    theirs["param_groups"][0]["param_names"] = ORDER
    interop.from_torch(theirs, state, PARAMS, NAMES)


def test_to_torch_reports_what_is_missing():
    pytest.importorskip("torch", reason="torch is not installed: make peers")
    state, theirs = conventions.torch().init(PARAMS), torch_state("square_avg")
    with pytest.raises(ValueError, match="'scale' has no name in `names`") as error:
        interop.to_torch(state, theirs, PARAMS, {"w": "fc/kernel", "fc.bias": "fc/bias"}, order=ORDER)
    assert "'w' is not among the other optimizer's parameters." in str(error.value)
    with pytest.raises(ValueError, match="it has no param_groups"):
        interop.to_torch(state, flat(theirs), PARAMS, NAMES)


def keras_variables(*whats):
    rng = np.random.default_rng(0)
    shapes = {"model/fc/kernel": (5, 3), "model/fc/bias": (3,), "model/scale": ()}
    variables = {"rmsprop/iteration": np.int32(7), "rmsprop/learning_rate": np.float32(0.1)}
    for name, shape in shapes.items():
        for what in whats:
            variables[f"rmsprop/{name.replace('/', '_')}_{what}"] = rng.random(shape, np.float32)
    return variables, {name: name.removeprefix("model/") for name in shapes}


@pytest.mark.parametrize("in_buffer", [True, False])
def test_keras_there_and_back(in_buffer):
    variables, names = keras_variables("velocity", "momentum", "average_gradient")
    for name in names:  # a variance that rounding does not touch
        variables[f"rmsprop/{name.replace('/', '_')}_velocity"] += 1
    tx = rmsprop(0.1, centered=True, momentum=0.9, lr_in_momentum=in_buffer)
    state = interop.from_keras(variables, tx.init(PARAMS), PARAMS, names, lr_in_momentum=in_buffer)
    b = variables["rmsprop/model_scale_momentum"]
    np.testing.assert_allclose(
        optax.tree.get(state, "trace")["scale"], -b if in_buffer else b / 0.1, rtol=1e-6
    )

    empty = {**{k: np.zeros_like(v) for k, v in variables.items()}, "rmsprop/learning_rate": np.float32(0.1)}
    back = interop.to_keras(state, empty, PARAMS, names, lr_in_momentum=in_buffer)
    assert_trees_close(back, variables, rtol=1e-6)


def test_to_keras_reports_what_is_missing():
    variables, names = keras_variables("velocity")
    state = conventions.keras(momentum=0.9).init(PARAMS)
    with pytest.raises(ValueError, match=r"'model_scale' has no momentum of shape \(\)"):
        interop.to_keras(state, variables, PARAMS, names)
    with pytest.raises(ValueError, match="'other' is not among the other optimizer's parameters"):
        interop.to_keras(state, variables, PARAMS, {**names, "other": "fc/bias"})


def test_keeps_dtypes_and_shardings():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS), sharding)
    tx = rmsprop(0.1, 0.99, momentum=0.9, momentum_dtype="bfloat16", lr_in_momentum=False)
    old = jax.device_put(tx.init(params), sharding)
    theirs = torch_state("square_avg", "momentum_buffer")
    state = interop.from_torch(theirs, old, params, NAMES, order=ORDER)
    params = interop.params_from({name: np.ones(shape) for name, shape in SHAPES.items()}, params, NAMES)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), state) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), old
    )
    assert params["fc"]["kernel"].dtype == jnp.bfloat16

"""Every form in which Keras and TensorFlow write an RMSprop's variables, and what cannot be read."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import conventions, interop

PARAMS = {"fc": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}}
SHAPES = {"fc/kernel": (5, 3), "fc/bias": (3,)}
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"
CONFIG = {"learning_rate": 0.1, "rho": 0.95, "momentum": 0.9, "epsilon": 1e-7, "centered": True}


def value(field, name):
    """Other numbers for each."""
    seed = 10 * ("square", "mean", "buffer").index(field) + len(name)
    return np.random.default_rng(seed).random(SHAPES[name], np.float32) + (field == "square")


def variables(key, square, mean, buffer, **scalars):
    """The dictionary of a writer that names an array by `key`, of the variable's name and its own word."""
    words = {"square": square, "mean": mean, "buffer": buffer}
    arrays = {key(name, word): value(field, name) for name in SHAPES for field, word in words.items()}
    return {k.replace("__", "/"): np.asarray(v) for k, v in scalars.items()} | arrays


def places(*heads, key="optimizer/vars/{}", first=0):
    """The dictionary of a writer that counts: what comes before the arrays, and these."""
    arrays = [value(field, name) for field in ("square", "buffer", "mean") for name in SHAPES]
    return {key.format(first + i): np.asarray(x) for i, x in enumerate([*heads, *arrays])}


# Names as these packages write them: Keras 3.15, tf_keras 2.21 and TensorFlow 2.21.
KERAS_3 = ("velocity", "average_gradient", "momentum")
SLOTS = ("rms", "mg", "momentum")
BESIDE = {"optimizer/_iterations" + VARIABLE: np.asarray(7), "_CHECKPOINTABLE_OBJECT_GRAPH": b"graph"}
DIALECTS = {  # variables, the prefix of the model's names, their end, the configuration
    "Keras 3": (
        variables(lambda n, w: f"rmsprop/net_{n.replace('/', '_')}_{w}", *KERAS_3, rmsprop__iteration=7),
        *("net/", "", None),
    ),
    "Keras 2": (variables(lambda n, w: f"RMSprop/{w}/{n}:0", *KERAS_3, **{"iteration:0": 7}), "", ":0", None),
    "Keras 2, legacy": (
        variables(lambda n, w: f"RMSprop/{n}/{w}:0", *SLOTS, **{"RMSprop/iter:0": 7}),
        *("", ":0", None),
    ),
    "Keras 1 in TensorFlow 1": (
        variables(lambda n, w: f"training/RMSprop/{n}/{w}:0", *SLOTS, **{"training/RMSprop/iter:0": 7}),
        *("", ":0", None),
    ),
    "a checkpoint of Keras 2, legacy": (
        variables(
            lambda n, w: f"model/{n}/.OPTIMIZER_SLOT/optimizer/{w}{VARIABLE}",
            *SLOTS,
            **{f"optimizer/iter{VARIABLE}": 7, f"model/fc/kernel{VARIABLE}": 3},
        ),
        *("model/", VARIABLE, None),
    ),
    "tf.compat.v1": (
        variables(lambda n, w: f"{n}/RMSProp{w}", "", "_1", "_2", global_step=7),
        *("", "", None),
    ),
    "a file of Keras 3": (places(7, 0.1), "", "", CONFIG),
    "a file of Keras 3 with a schedule": (places(7), "", "", CONFIG | {"learning_rate": {"class_name": "x"}}),
    "a file of Keras 2": (places(7), "", "", CONFIG | {"is_legacy_optimizer": False}),
    "a checkpoint of Keras 2": (
        places(key="optimizer/_variables/{}" + VARIABLE, first=1) | BESIDE,
        *("", ":0", CONFIG | {"is_legacy_optimizer": False}),
    ),
    "a checkpoint of Keras 3": (
        places(key="critic/_variables/{}" + VARIABLE, first=2)
        | {key.replace("optimizer", "critic"): x for key, x in BESIDE.items()},
        *("", "", CONFIG),
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read(dialect):
    theirs, prefix, end, config = DIALECTS[dialect]
    names = {f"{prefix}{name}{end}": name for name in SHAPES}
    tx = conventions.keras(optax.constant_schedule(0.1), momentum=0.9, centered=True)
    state = interop.from_keras(theirs, tx.init(PARAMS), PARAMS, names, order=list(names), config=config)
    state_fields = {field: optax.tree.get(state, field) for field in ("nu", "mu", "trace")}
    for name in SHAPES:
        layer, leaf = name.split("/")
        nu, mu, trace = (state_fields[field][layer][leaf] for field in ("nu", "mu", "trace"))
        np.testing.assert_array_equal(mu, value("mean", name))
        np.testing.assert_array_equal(-trace, value("buffer", name))
        np.testing.assert_allclose(nu + mu**2, value("square", name), rtol=1e-6)
    assert all(count == 7 for _, count in optax.tree.get_all_with_path(state, "count"))


def test_tensorflow_1_has_a_buffer_in_any_case():
    theirs = {"w/RMSProp": np.ones(3), "w/RMSProp_1": np.full(3, 0.5), "global_step": 7}
    params = {"w": jnp.zeros(3)}
    for momentum in (None, 0.9):
        tx = conventions.tensorflow(0.1, momentum=momentum)
        state = interop.from_keras(theirs, tx.init(params), params, {"w": "w"})
        np.testing.assert_array_equal(optax.tree.get(state, "nu")["w"], 1)
    np.testing.assert_array_equal(optax.tree.get(state, "trace")["w"], -0.5)


def test_variables_by_places_of_two_optimizers_are_refused():
    theirs = places(7, 0.1) | places(7, 0.1, key="critic/optimizer/vars/{}")
    state = conventions.keras().init(PARAMS)
    with pytest.raises(
        ValueError, match="they are of several optimizers, 'optimizer/' and 'critic/optimizer/'"
    ):
        interop.from_keras(theirs, state, PARAMS, {}, order=list(SHAPES))


LEGACY = {"name": "RMSprop", "decay": 0.0, "rho": 0.95, "momentum": 0.0, "epsilon": 0.1, "centered": False}


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 1 / 1.1), (0.9, 1 / np.sqrt(1.1))])
def test_keras_2_legacy_adds_epsilon_outside_where_it_has_no_momentum(momentum, expected):
    theirs = {"RMSprop/w/rms:0": np.ones(3), "RMSprop/iter:0": 7}
    theirs |= {"RMSprop/w/momentum:0": np.zeros(3)} if momentum else {}
    config = {"class_name": "RMSprop", "config": LEGACY | {"momentum": momentum, "learning_rate": 0.1}}
    params = {"w": jnp.zeros(3)}
    tx, state = interop.resume_keras(theirs, params, {"w:0": "w"}, config=config)
    updates, _ = tx.update({"w": jnp.ones(3)}, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * expected, rtol=1e-6)


def test_keras_2_has_defaults():
    theirs = {"RMSprop/w/rms:0": np.zeros(3), "RMSprop/iter:0": 7}
    config = {"class_name": "RMSprop", "config": {"rho": 0.95, "decay": 0.0, "learning_rate": 0.1}}
    tx, _ = interop.resume_keras(theirs, {"w": jnp.zeros(3)}, {"w:0": "w"}, config=config)
    assert (tx.settings.decay, tx.settings.eps, tx.settings.centered) == (0.95, 1e-7, False)


def test_a_decaying_learning_rate_of_keras_2_is_asked_for():
    theirs = {"RMSprop/w/rms:0": np.ones(3), "RMSprop/iter:0": 7}
    config = LEGACY | {"decay": 0.01, "learning_rate": 0.1}
    arguments = theirs, {"w": jnp.zeros(3)}, {"w": "w"}
    with pytest.raises(ValueError, match=r"decay=0\.01 has no counterpart .* pass such a learning_rate="):
        interop.resume_keras(*arguments, config=config)
    interop.resume_keras(*arguments, config=config, learning_rate=lambda count: 0.1 / (1 + 0.01 * count))
    with pytest.raises(ValueError, match="Keras 2 does not hold the variables of its legacy optimizers"):
        interop.resume_keras({"layers/dense/vars/0": np.ones(3)}, *arguments[1:], config=config)


@pytest.mark.parametrize(
    ("name", "kind", "prefix"),
    [
        ("model.ckpt-7", "checkpoint", "model.ckpt-7"),
        ("model.ckpt-7.index", "checkpoint", "model.ckpt-7"),
        ("model.ckpt-7.data-00000-of-00001", "checkpoint", "model.ckpt-7"),
        ("saved", "SavedModel", "saved/variables/variables"),
    ],
)
def test_tensorflows_files_are_named_with_what_makes_a_dictionary_of_them(name, kind, prefix, tmp_path):
    (tmp_path / "model.ckpt-7.index").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").touch()
    with pytest.raises(ValueError, match=f"is a TensorFlow {kind}") as error:
        interop.from_keras(tmp_path / name, None, PARAMS, {})
    assert f"tf.train.load_checkpoint('{tmp_path}/{prefix}')" in str(error.value)


# PyTorch's.


def torch_state(**arrays):
    """A checkpoint of one parameter."""
    state = {0: {"step": 7, **arrays}}
    return {"state": state, "param_groups": [{"params": [0], "param_names": ["w"]}]}


ODD = {
    "negative": ({"square_avg": np.array([[1.0, -1e-9]])}, "'w' has a square_avg with numbers below 0 in it"),
    "NaN": ({"square_avg": np.array([[1.0, np.nan]])}, "'w' has a square_avg with NaN in it"),
    "a mean of NaN": (
        {"square_avg": np.ones((1, 2)), "grad_avg": np.array([[1.0, np.nan]])},
        "'w' has a grad_avg with NaN in it",
    ),
    "of complex numbers": (
        {"square_avg": np.ones((1, 2), np.complex64)},
        "'w' has a square_avg of complex numbers, two reals there",
    ),
    "ZeRO's": (
        {"square_avg": np.ones(7), "grad_avg": np.ones(7)},
        r"shape \(7,\), not \(1, 2\), which 'w' needs \(flattened, as FSDP and DeepSpeed's ZeRO.*_universal",
    ),
    "bitsandbytes', 8 bits": (
        {"__bnb_optimizer_quant_state__": {"state1": np.ones(2), "qmap1": np.ones(256)}},
        r"bitsandbytes' \(whose 'state1' is 'square_avg'.*dequantize_blockwise",
    ),
    "bitsandbytes', before 0.44": ({"state1": np.ones((1, 2))}, "it is bitsandbytes'"),
}


@pytest.mark.parametrize("which", ODD)
def test_moments_that_cannot_be_taken_are_refused(which):
    arrays, message = ODD[which]
    params = {"w": jnp.zeros((1, 2))}
    state = conventions.torch(centered="grad_avg" in arrays).init(params)
    with pytest.raises(ValueError, match=message):
        interop.from_torch(torch_state(**arrays), state, params, {"w": "w"})


COLLIDING = {"a": {"b/c": jnp.zeros(2)}, "a/b": {"c": jnp.zeros(2)}}
BY_NAME = {
    "paths": lambda state: interop.paths(COLLIDING),
    "params_from": lambda state: interop.params_from({"x": np.ones(2)}, COLLIDING, {"x": "a/b/c"}),
    "from_torch": lambda state: interop.from_torch(
        torch_state(square_avg=np.ones(2)), state, COLLIDING, {"w": "a/b/c"}
    ),
    "from_optax": lambda state: interop.from_optax(optax.rmsprop(0.1).init(COLLIDING), state, count=1),
    "to_optax": lambda state: interop.to_optax(state, optax.rmsprop(0.1).init(COLLIDING)),
}


@pytest.mark.parametrize("function", BY_NAME)
def test_two_leaves_of_one_name_are_both_named(function):
    tx = conventions.torch()
    _, state = tx.update(COLLIDING, tx.init(COLLIDING), COLLIDING)  # which names no leaf
    with pytest.raises(ValueError, match=r"at \['a'\]\['b/c'\] and \['a/b'\]\['c'\] are both named 'a/b/c'"):
        BY_NAME[function](state)

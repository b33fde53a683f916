"""Runs resumed from the files and variables of Keras, optimizer and all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import step_of
from installed import package

from rmsprop_jax import conventions, interop

# Keras' variables, as NumPy reads them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
        "ignore:You are saving your model as an HDF5 file",
    ),
]
LRS = 2.0**-7 * (0.55 + 0.45 * np.cos(0.3 * np.arange(200)))
NAMES = {
    "net/fc/kernel": "fc/kernel",
    "net/fc/bias": "fc/bias",
    "net/head/kernel": "head/kernel",
    "net/head/bias": "head/bias",
}


def empty(dtype):
    shapes = {"fc": {"kernel": (5, 3), "bias": (3,)}, "head": {"kernel": (3, 2), "bias": (2,)}}
    return jax.tree.map(lambda s: jnp.zeros(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))


def net(optimizer, dtype="float64", frozen=()):
    keras = package("keras")
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Input((5,)),
        *(keras.layers.Dense(n, name=name, dtype=dtype) for n, name in ((3, "fc"), (2, "head"))),
    ]
    model = keras.Sequential(layers, name="net")
    for layer in model.layers:
        layer.trainable = layer.name not in frozen
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    optimizer.build(model.trainable_variables)
    return model


def grads_at(t, params):
    rng = np.random.default_rng(t)
    return {k: p + rng.normal(size=p.shape).astype(p.dtype) * 3 for k, p in sorted(params.items())}


def values(model):
    return {v.path: np.array(v.value) for v in model.trainable_variables}


def there(model, start, steps):
    """Steps of Keras's, and the parameters after each."""
    path = []
    for t in range(start, start + steps):
        model.optimizer.learning_rate = float(LRS[t])
        grads = grads_at(t, values(model))
        model.optimizer.apply([jnp.asarray(grads[v.path]) for v in model.trainable_variables])
        path.append(values(model))
    return path


def apply_scaled(optimizer, model, grads):
    """A step of a LossScaleOptimizer, which with JAX has to be without side effects."""
    trainable, own = [v.value for v in model.trainable_variables], [v.value for v in optimizer.variables]
    trainable, own = optimizer.stateless_apply(own, grads, trainable)
    for variables, new in ((model.trainable_variables, trainable), (optimizer.variables, own)):
        for v, value in zip(variables, new, strict=True):
            v.assign(value)


def here(tx, params, state, start, steps):
    update, path = jax.jit(step_of(tx)), []
    for t in range(start, start + steps):
        named = {n: np.asarray(params[p.split("/")[0]][p.split("/")[1]]) for n, p in NAMES.items()}
        grads = grads_at(t, named)
        tree = {layer: {w: grads[f"net/{layer}/{w}"] for w in leaves} for layer, leaves in params.items()}
        params, state = update(params, state, tree)
        path.append({n: np.asarray(params[p.split("/")[0]][p.split("/")[1]]) for n, p in NAMES.items()})
    return path


def assert_same(path, expected, rtol):
    for got, want in zip(path, expected, strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol)


def variables(model, folder):
    return {v.path: np.array(v.value) for v in model.optimizer.variables}, model.optimizer.get_config()


def keras_file(model, folder):
    model.save(folder / "model.keras")
    return folder / "model.keras", None


def h5_file(model, folder):
    model.save(folder / "model.h5")
    return folder / "model.h5", None


def weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    return folder / "model.weights.h5", model.optimizer.get_config()


WRITERS = [variables, keras_file, h5_file, weights_file]
SETTINGS = {
    "plain": {},
    "all": {"momentum": 0.9, "centered": True, "weight_decay": 1e-2, "rho": 0.95},
    "clipped, an EMA beside it": {"global_clipnorm": 3.0, "use_ema": True, "momentum": 0.5},
}


def resumed(model, writer, folder, **settings):
    source, config = writer(model, folder)
    order = [v.path for v in model.trainable_variables]
    params = {name: np.array(v.value) for v in model.variables for name in [v.path]}
    dtype = model.trainable_variables[0].dtype
    params = interop.params_from(params, empty(dtype), NAMES)
    # Keras keeps the learning rate in float32.
    settings = {"learning_rate": lambda count: jnp.asarray(np.float32(LRS), dtype)[count], **settings}
    tx, state = interop.resume_keras(source, params, NAMES, config=config, order=order, **settings)
    return params, tx, state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("writer", WRITERS, ids=lambda f: f.__name__)
def test_whatever_form_it_lies_in(writer, settings, tmp_path):
    package("h5py")
    model = net(package("keras").optimizers.RMSprop(1.0, **SETTINGS[settings]))
    there(model, 0, 100)
    params, tx, state = resumed(model, writer, tmp_path)
    assert optax.tree.get(state, "nu")["fc"]["bias"].dtype == jnp.float64
    # Of 1e-17 in the clip's norm, the sum over all parameters in another order, 100 steps make 1e-13.
    assert_same(here(tx, params, state, 100, 100), there(model, 100, 100), 1e-13)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda f: f.__name__)
def test_mixed_float16_has_another_iteration_around_it(writer, tmp_path):
    package("h5py")
    optimizer = package("keras").optimizers.LossScaleOptimizer(
        package("keras").optimizers.RMSprop(1.0, momentum=0.9), initial_scale=4.0
    )
    model = net(optimizer, "mixed_float16")
    for t in range(3):
        optimizer.learning_rate = float(LRS[t])
        grads = grads_at(t, values(model))
        apply_scaled(optimizer, model, [jnp.asarray(grads[v.path] * 4) for v in model.trainable_variables])
    skipped = [jnp.full(v.shape, np.inf) for v in model.trainable_variables]
    apply_scaled(optimizer, model, skipped)  # halves the scale, and is no update
    scale = float(np.array(optimizer.dynamic_scale.value))
    params, tx, state = resumed(model, writer, tmp_path, learning_rate=LRS[3])
    assert optax.tree.get(state, "count") == 3
    optimizer.learning_rate = LRS[3]
    grads = grads_at(3, values(model))
    apply_scaled(optimizer, model, [jnp.asarray(grads[v.path] * scale) for v in model.trainable_variables])
    tree = {layer: {w: grads[f"net/{layer}/{w}"] for w in leaves} for layer, leaves in params.items()}
    params, state = step_of(tx)(params, state, tree)
    for name, path in NAMES.items():
        layer, leaf = path.split("/")
        np.testing.assert_allclose(params[layer][leaf], values(model)[name], rtol=1e-5, atol=1e-6)


def test_a_frozen_layer_keeps_what_init_made(tmp_path):
    package("h5py")
    model = net(package("keras").optimizers.RMSprop(0.01), "float32", frozen=["fc"])
    there(model, 0, 3)
    source, _ = keras_file(model, tmp_path)
    params, order = empty("float32"), [v.path for v in model.trainable_variables]
    with pytest.raises(ValueError, match="'net/fc/kernel' has no velocity, which 'fc/kernel' needs"):
        interop.resume_keras(source, params, NAMES, order=order)
    reports = []
    _, state = interop.resume_keras(source, params, NAMES, order=order, strict=False, report=reports.append)
    kept = "fc/bias", "fc/kernel"
    assert reports == [interop.Report(("head/kernel", "head/bias"), kept, (), kept, 3)]
    assert not optax.tree.get(state, "nu")["fc"]["kernel"].any()
    assert optax.tree.get(state, "nu")["head"]["kernel"].any()


def test_what_the_configuration_says_is_taken_or_named(tmp_path):
    package("h5py")
    keras = package("keras")
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 100)
    model = net(keras.optimizers.RMSprop(schedule), "float32")
    model.optimizer.apply([jnp.ones(v.shape) for v in model.trainable_variables])
    source, _ = keras_file(model, tmp_path)
    arguments = source, empty("float32"), NAMES
    order = [v.path for v in model.trainable_variables]
    with pytest.raises(ValueError, match=r"is the schedule CosineDecay: pass learning_rate="):
        interop.resume_keras(*arguments, order=order)
    _, state = interop.resume_keras(*arguments, order=order, learning_rate=optax.constant_schedule(0.1))
    assert optax.tree.get_all_with_path(state, "count")[-1][1] == 1

    with pytest.raises(ValueError, match=r"pass order=\[v.path for v in model.trainable_variables\]"):
        interop.from_keras(source, state, empty("float32"), NAMES)
    for settings, found in (
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"use_ema": True, "ema_overwrite_frequency": 7}, "ema_overwrite_frequency=7"),
    ):
        model = net(keras.optimizers.RMSprop(0.1, **settings), "float32")
        source, _ = keras_file(model, tmp_path)
        with pytest.raises(ValueError, match=f"{found} has no counterpart"):
            interop.resume_keras(source, empty("float32"), NAMES, order=order)
    model = net(keras.optimizers.Adam(0.1), "float32")
    source, _ = keras_file(model, tmp_path)
    with pytest.raises(ValueError, match="is that of Adam, expected RMSprop's"):
        interop.resume_keras(source, empty("float32"), NAMES, order=order)
    own = {v.path: np.array(v.value) for v in model.optimizer.variables}
    with pytest.raises(ValueError, match="they are those of 'adam', expected"):
        interop.from_keras(own, state, empty("float32"), NAMES)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.75}, {"momentum": 0.75, "centered": True}], ids=str)
def test_a_checkpoint_of_tensorflow_1(settings, tmp_path):
    # TensorFlow's constants go through float32, as which these are exact.
    settings = {"learning_rate": 2**-7, "decay": 0.875, "epsilon": 2.0**-30, **settings}
    tf = package("tensorflow")
    v1, start = tf.compat.v1, np.random.default_rng(0).normal(size=(3, 2))

    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("net/fc/kernel", initializer=start, use_resource=True)
        g = v1.placeholder(w.dtype, w.shape)
        count = v1.train.get_or_create_global_step()
        optimizer = v1.train.RMSPropOptimizer(**settings)
        step = optimizer.apply_gradients([(g, w)], global_step=count)
        session.run(v1.global_variables_initializer())

        def steps(first, number):
            path = []
            for t in range(first, first + number):
                gradient = grads_at(t, {"w": session.run(w)})["w"]
                session.run(step, {g: gradient})
                path.append({"w": session.run(w)})
            return path

        steps(0, 50)
        file = v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
        params = {"w": jnp.zeros((3, 2))}
        with pytest.raises(ValueError, match=r"is a TensorFlow checkpoint"):
            interop.params_from(file, params, {})
        reader = tf.train.load_checkpoint(file)
        variables = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
        expected = steps(50, 50)

    names = {"net/fc/kernel": "w"}
    params = interop.params_from(variables, params, names)
    tx = conventions.tensorflow(**settings)
    state = interop.from_keras(variables, tx.init(params), params, names)
    assert optax.tree.get(state, "count") == 50
    update, path = jax.jit(step_of(tx)), []
    for t in range(50, 100):
        params, state = update(params, state, grads_at(t, {"w": np.asarray(params["w"])}))
        path.append({"w": np.asarray(params["w"])})
    assert_same(path, expected, 1e-12)

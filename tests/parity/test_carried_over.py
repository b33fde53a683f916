"""A run that is carried over, either way, goes on as it would have gone on where it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from helpers import step_of
from installed import package

from rmsprop_jax import conventions, interop, rmsprop

LRS = 2.0**-7 * (0.55 + 0.45 * np.cos(0.3 * np.arange(200)))
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}
KERAS_NAMES = {"fc_weight": ("fc/kernel", (1, 0)), "fc_bias": "fc/bias"}
SETTINGS = [
    {},
    {"momentum": 0.9},
    {"centered": True},
    {"momentum": 0.9, "centered": True},
]


def grads_at(t, params):
    """Gradients under PyTorch's names, of parameters under them."""
    rng = np.random.default_rng(t)
    return {k: (p + rng.normal(size=p.shape) * 3).astype(p.dtype) for k, p in sorted(params.items())}


def torch_start(dtype):
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(dtype) for k, s in (("fc.weight", (3, 5)), ("fc.bias", (3,)))}


def empty(dtype):
    return {"fc": {"kernel": jnp.zeros((5, 3), dtype), "bias": jnp.zeros(3, dtype)}}


def continued(tx, params, state, start, steps):
    """The parameters, under PyTorch's names, after each further step of `tx`."""

    update = jax.jit(step_of(tx))
    path = []
    for t in range(start, start + steps):
        named = {
            "fc.weight": np.asarray(params["fc"]["kernel"].T),
            "fc.bias": np.asarray(params["fc"]["bias"]),
        }
        grads = grads_at(t, named)
        grads = {"fc": {"kernel": grads["fc.weight"].T, "bias": grads["fc.bias"]}}
        params, state = update(params, state, grads)
        path.append({"fc.weight": params["fc"]["kernel"].T, "fc.bias": params["fc"]["bias"]})
    return path, params, state


def assert_same(path, expected, rtol):
    for got, want in zip(path, expected, strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=rtol, atol=rtol)


def torch_steps(tensors, tx, start, steps):
    step, path = peers.torch_step(tensors, tx), []
    for t in range(start, start + steps):
        grads = grads_at(t, {name: p.detach().numpy() for name, p in tensors.items()})
        path.append(step(grads, float(LRS[t])))
    return path


TORCH = [
    (conventions.torch, peers.torch_rmsprop),
    (conventions.timm, peers.timm_rmsprop),
    (conventions.stable_baselines3, peers.stable_baselines3_rmsprop),
]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("convention", "optimizer"), TORCH, ids=lambda x: x.__name__)
# In float32 each of 100 steps rounds to 6e-8, and momentum adds up ten of them; 1e-5 leaves a factor of 10.
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 1e-5)])
def test_from_torch(convention, optimizer, settings, dtype, rtol):
    tensors, theirs = peers.torch_optimizer(optimizer, torch_start(dtype), LRS[0], **settings)
    torch_steps(tensors, theirs, 0, 100)

    tx = convention(lambda count: jnp.asarray(LRS)[count], **settings)
    order = list(tensors)
    params = interop.params_from(tensors, empty(dtype), NAMES)
    state = interop.from_torch(theirs.state_dict(), tx.init(params), params, NAMES, order=order)
    path, _, state = continued(tx, params, state, 100, 100)
    assert_same(path, torch_steps(tensors, theirs, 100, 100), rtol)
    assert optax.tree.get(state, "nu")["fc"]["kernel"].dtype == dtype


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("convention", "optimizer"), TORCH, ids=lambda x: x.__name__)
def test_to_torch(convention, optimizer, settings):
    tx = convention(lambda count: jnp.asarray(LRS)[count], **settings)
    params = interop.params_from(torch_start("float64"), empty("float64"), NAMES)
    path, params, state = continued(tx, params, tx.init(params), 0, 100)

    tensors, theirs = peers.torch_optimizer(optimizer, path[-1], LRS[100], **settings)
    new = interop.to_torch(state, theirs.state_dict(), params, NAMES, order=list(tensors))
    back = interop.from_torch(new, tx.init(params), params, NAMES, order=list(tensors))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), back, state)

    theirs.load_state_dict(new)
    path, _, _ = continued(tx, params, state, 100, 100)
    assert_same(path, torch_steps(tensors, theirs, 100, 100), 1e-12)


@pytest.mark.usefixtures("x64")
def test_the_learning_rate_moves_into_and_out_of_the_buffer():
    tensors, theirs = peers.torch_optimizer(peers.torch_rmsprop, torch_start("float64"), LRS[0], momentum=0.9)
    torch_steps(tensors, theirs, 0, 100)
    lr = theirs.param_groups[0]["lr"]

    # From here on the learning rate stays, and the two kinds of buffer take the same steps.
    tx = rmsprop(lr, 0.99, eps_in_sqrt=False, momentum=0.9)
    params = interop.params_from(tensors, empty("float64"), NAMES)
    arguments = {"order": list(tensors), "lr_in_momentum": True}
    state = interop.from_torch(theirs.state_dict(), tx.init(params), params, NAMES, **arguments)
    back = interop.to_torch(state, theirs.state_dict(), params, NAMES, **arguments)
    for index, entry in theirs.state_dict()["state"].items():
        for key, value in entry.items():
            np.testing.assert_allclose(back["state"][index][key], value, rtol=1e-12)

    plain = conventions.torch(lr, momentum=0.9)
    expected = interop.from_torch(theirs.state_dict(), plain.init(params), params, NAMES, order=list(tensors))
    path, *_ = continued(tx, params, state, 100, 100)
    assert_same(path, continued(plain, params, expected, 100, 100)[0], 1e-12)


def test_parameters_are_named_by_pytorch_itself_where_it_knows_them():
    torch = package("torch")
    model = torch.nn.Sequential(torch.nn.Linear(5, 3))
    theirs = torch.optim.RMSprop(model.named_parameters())
    model(torch.ones(5)).sum().backward()
    theirs.step()
    names = {"0.weight": ("fc/kernel", (1, 0)), "0.bias": "fc/bias"}
    params = interop.params_from(model.state_dict(), empty("float32"), names)
    state = interop.from_torch(theirs.state_dict(), conventions.torch().init(params), params, names)
    np.testing.assert_array_equal(
        optax.tree.get(state, "nu")["fc"]["kernel"].T, theirs.state[model[0].weight]["square_avg"]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_keras_there_and_back(settings):
    keras = package("keras")
    variables = [keras.Variable(p, dtype="float64", name=n.replace(".", "_")) for n, p in start_items()]
    theirs = keras.optimizers.RMSprop(float(LRS[0]), **settings)
    theirs.build(variables)

    def keras_steps(start, steps):
        path = []
        for t in range(start, start + steps):
            theirs.learning_rate = float(LRS[t])
            named = {v.name.replace("_", "."): np.array(v.value) for v in variables}
            grads = grads_at(t, named)
            theirs.apply([jnp.asarray(grads[v.name.replace("_", ".")]) for v in variables], variables)
            path.append({v.name.replace("_", "."): np.array(v.value) for v in variables})
        return path

    def own():
        return {v.path: np.array(v.value) for v in theirs.variables}

    keras_steps(0, 100)
    # Keras keeps the learning rate in float32.
    tx = conventions.keras(lambda count: jnp.asarray(np.float32(LRS), jnp.float64)[count], **settings)
    weights = {v.path: v.value for v in variables}
    params = interop.params_from(weights, empty("float64"), KERAS_NAMES)
    state = interop.from_keras(own(), tx.init(params), params, KERAS_NAMES)
    path, params, state = continued(tx, params, state, 100, 50)
    assert_same(path, keras_steps(100, 50), 1e-12)

    # Back, after the other optimizer has been led astray.
    new = interop.to_keras(state, own(), params, KERAS_NAMES)
    kept = [np.array(v.value) for v in variables]
    keras_steps(7, 3)
    for v in theirs.variables:
        v.assign(new[v.path])
    for v, value in zip(variables, kept, strict=True):
        v.assign(value)
    path, _, _ = continued(tx, params, state, 150, 50)
    assert_same(keras_steps(150, 50), path, 1e-12)
    assert int(np.array(theirs.iterations.value)) == 200


def start_items():
    return sorted(torch_start("float64").items())

"""The frameworks' own optimizers behind one interface, each with the settings that it is compared for.

A peer is a function of the first parameters, a dictionary of NumPy arrays, the first learning rate and the
optimizer's settings. It returns `step(grads, lr) -> params`, which takes one step of that framework.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import numpy as np
from installed import module, package

from rmsprop_jax import conventions


class Peer(NamedTuple):
    convention: Callable
    start: Callable
    settings: tuple[dict, ...]
    signature: Callable | None


PEERS = []


def peer(convention, *settings, signature=None):
    """Compares `convention` with the decorated peer, for each of the settings.

    Beside the convention's arguments, settings may have `lr`, another first learning rate than usual, and
    `changing_lr`. `signature` returns the framework's optimizer, whose arguments are the convention's.
    """

    def register(start):
        PEERS.append(Peer(convention, start, settings, signature))
        return start

    return register


# PyTorch, and optimizers written in it -------------------------------------------------------------------


def torch_rmsprop():
    return package("torch").optim.RMSprop


def timm_rmsprop():
    package("torch")
    return module("timm", "timm/optim", "rmsprop_tf").RMSpropTF


def stable_baselines3_rmsprop():
    package("torch")
    return module("stable-baselines3", "stable_baselines3/common/sb2_compat", "rmsprop_tf_like").RMSpropTFLike


def torch_optimizer(optimizer, params, lr, **settings):
    """Tensors, and the optimizer of these."""
    torch = package("torch")
    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    return tensors, optimizer()(tensors.values(), lr=lr, **settings)


def torch_step(tensors, tx):
    torch = package("torch")

    def step(grads, lr):
        for group in tx.param_groups:
            group["lr"] = lr
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        tx.step()
        return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

    return step


@peer(
    conventions.torch,
    # The eight of torch/testing/_internal/common_optimizers.py's optim_inputs_func_rmsprop, and one more.
    {},
    {"lr": 2.0**-10},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 0.1, "centered": True},
    {"maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "centered": True, "momentum": 0.1},
    {"weight_decay": 0.1, "centered": True, "momentum": 0.1, "maximize": True},
    {"momentum": 0.9, "changing_lr": True},
    signature=torch_rmsprop,
)
def torch(params, lr, **settings):
    return torch_step(*torch_optimizer(torch_rmsprop, params, lr, **settings))


@peer(
    conventions.timm,
    {},
    {"eps": 1e-3, "momentum": 0.9, "weight_decay": 1e-2, "changing_lr": True},
    {"momentum": 0.9, "lr_in_momentum": False, "changing_lr": True},
    {"centered": True, "momentum": 0.5},
    {"decoupled_decay": True, "weight_decay": 0.1, "momentum": 0.9, "changing_lr": True},
    {"decoupled_decay": True, "weight_decay": 0.1, "corrected_weight_decay": True},
    {"momentum": 0.9, "caution": True, "weight_decay": 0.1, "changing_lr": True},
    {"momentum": 0.9, "caution": True, "lr_in_momentum": False, "decoupled_decay": True, "weight_decay": 0.1},
    {"caution": True},
    signature=timm_rmsprop,
)
def timm(params, lr, **settings):
    return torch_step(*torch_optimizer(timm_rmsprop, params, lr, **settings))


@peer(
    conventions.stable_baselines3,
    {},
    {"weight_decay": 0.1, "momentum": 0.9, "changing_lr": True},
    {"centered": True, "momentum": 0.9, "eps": 1e-5, "changing_lr": True},
    signature=stable_baselines3_rmsprop,
)
def stable_baselines3(params, lr, **settings):
    return torch_step(*torch_optimizer(stable_baselines3_rmsprop, params, lr, **settings))


# Keras, TensorFlow and MLX -------------------------------------------------------------------------------


def keras_rmsprop():
    return package("keras").optimizers.RMSprop


def tensorflow_rmsprop():
    return package("tensorflow").compat.v1.train.RMSPropOptimizer


def sonnet_rmsprop():
    package("tensorflow")
    return package("sonnet").optimizers.RMSProp


def mlx_rmsprop():
    return package("mlx.optimizers").RMSprop


@peer(
    conventions.keras,
    {},
    {"rho": 0.95, "momentum": 0.9, "changing_lr": True},
    {"centered": True, "epsilon": 1e-3},
    {"centered": True, "momentum": 0.9, "weight_decay": 0.01, "changing_lr": True},
    {"clipnorm": 0.5},
    {"clipvalue": 0.1, "weight_decay": 0.004},
    {"global_clipnorm": 0.5, "momentum": 0.5},
    {"clipnorm": 0.0},
    signature=keras_rmsprop,
)
def keras(params, lr, **settings):
    keras = package("keras")
    variables = {name: keras.Variable(p, dtype=p.dtype.name, name=name) for name, p in params.items()}
    tx = keras_rmsprop()(lr, **settings)

    def step(grads, lr):
        tx.learning_rate = lr
        tx.apply([keras.ops.array(grads[name]) for name in variables], list(variables.values()))
        return {name: np.array(variable.value) for name, variable in variables.items()}

    return step


TENSORFLOW_SETTINGS = [
    {},
    {"decay": 0.95, "epsilon": 1e-3},
    {"momentum": 0.9, "epsilon": 1e-3, "changing_lr": True},
    {"centered": True, "epsilon": 1e-5},
    {"decay": 0.95, "centered": True, "momentum": 0.9, "epsilon": 1e-5, "changing_lr": True},
]


def _in_float64(optimizer, settings):
    """The settings, with the defaults, as TensorFlow's constants: numbers go through float32 there."""
    tf = package("tensorflow")
    parameters = inspect.signature(optimizer.__init__).parameters.values()
    settings = {**{p.name: p.default for p in parameters if type(p.default) is float}, **settings}
    return {k: v if isinstance(v, bool) else tf.constant(v, tf.float64) for k, v in settings.items()}


@peer(conventions.tensorflow, *TENSORFLOW_SETTINGS, signature=tensorflow_rmsprop)
def tensorflow(params, lr, **settings):
    tf = package("tensorflow")
    variables = {name: tf.Variable(p) for name, p in params.items()}
    current = [lr]
    settings = _in_float64(tensorflow_rmsprop(), settings)
    tx = tensorflow_rmsprop()(lambda: tf.constant(current[0], tf.float64), **settings)

    def step(grads, lr):
        current[0] = lr
        tx.apply_gradients([(tf.constant(grads[name]), v) for name, v in variables.items()])
        return {name: v.numpy() for name, v in variables.items()}

    return step


@peer(conventions.sonnet, *TENSORFLOW_SETTINGS, signature=sonnet_rmsprop)
def sonnet(params, lr, **settings):
    tf = package("tensorflow")
    variables = {name: tf.Variable(p) for name, p in params.items()}
    tx = sonnet_rmsprop()(lr, **_in_float64(sonnet_rmsprop(), settings))

    def step(grads, lr):
        tx.learning_rate = lr
        tx.apply([tf.constant(grads[name]) for name in variables], list(variables.values()))
        return {name: v.numpy() for name, v in variables.items()}

    return step


@peer(conventions.mlx, {}, {"alpha": 0.9, "eps": 1e-3, "changing_lr": True}, signature=mlx_rmsprop)
def mlx(params, lr, **settings):
    mx = package("mlx.core")
    mx.set_default_device(mx.cpu)
    tx = mlx_rmsprop()(lr, **settings)
    arrays = {name: mx.array(p, dtype=mx.float64) for name, p in params.items()}

    def step(grads, lr):
        nonlocal arrays
        tx.learning_rate = lr
        grads = {name: mx.array(g, dtype=mx.float64) for name, g in grads.items()}
        arrays = tx.apply_gradients(grads, arrays)
        return {name: np.array(p) for name, p in arrays.items()}

    return step


# Published equations -------------------------------------------------------------------------------------


def equations(update):
    """A peer from its published equations: `update(g, p, lr, memory, **settings) -> p` for one leaf."""

    @wraps(update)
    def start(params, lr, **settings):
        memories = {name: {"v": 0.0, "m": 0.0, "b": 0.0} for name in params}
        params = dict(params)

        def step(grads, lr):
            for name, g in grads.items():
                params[name] = update(g, params[name], lr, memories[name], **settings)
            return dict(params)

        return step

    return start


@peer(conventions.hinton, {"beta": 0.9, "epsilon": 1e-8})
@equations
def hinton(g, p, lr, memory, beta, epsilon):
    """Tieleman and Hinton, Lecture 6.5, 2012, slide 29, with epsilon added to the root."""
    memory["v"] = beta * memory["v"] + (1 - beta) * g**2
    return p - lr * g / (np.sqrt(memory["v"]) + epsilon)


@peer(conventions.graves, {"decay": 0.95, "momentum": 0.9, "eps": 1e-4, "changing_lr": True})
@equations
def graves(g, p, lr, memory, decay, momentum, eps):
    """Graves, https://arxiv.org/abs/1308.0850v5, equations 38 to 45."""
    memory["v"] = decay * memory["v"] + (1 - decay) * g**2
    memory["m"] = decay * memory["m"] + (1 - decay) * g
    memory["b"] = momentum * memory["b"] - lr * g / np.sqrt(memory["v"] - memory["m"] ** 2 + eps)
    return p + memory["b"]


@peer(conventions.dqn, {"decay": 0.95, "eps": 0.01})
@equations
def dqn(g, p, lr, memory, decay, eps):
    """Mnih et al., 2015: `qLearnMinibatch` of the published NeuralQLearner.lua."""
    memory["m"] = decay * memory["m"] + (1 - decay) * g
    memory["v"] = decay * memory["v"] + (1 - decay) * g**2
    return p - lr * g / np.sqrt(memory["v"] - memory["m"] ** 2 + eps)


@peer(
    conventions.mxnet,
    *(
        {"rho": 0.9, "momentum": 0.9, "epsilon": 1e-8, "centered": centered, "wd": wd}
        for centered in (False, True)
        for wd in (0.0, 0.1)
    ),
)
@equations
def mxnet(g, p, lr, memory, rho, momentum, epsilon, centered, wd):
    """`RMSProp.step` of MXNet 2.0's python/mxnet/optimizer/rmsprop.py."""
    g = g + wd * p
    memory["v"] = rho * memory["v"] + (1 - rho) * g**2
    if not centered:
        return p - lr * g / (np.sqrt(memory["v"]) + epsilon)
    memory["m"] = rho * memory["m"] + (1 - rho) * g
    memory["b"] = momentum * memory["b"] - lr * g / np.sqrt(memory["v"] - memory["m"] ** 2 + epsilon)
    return p + memory["b"]

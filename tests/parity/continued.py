"""A small network's steps in PyTorch and in JAX, with the same gradients and changing learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import step_of
from installed import package

LRS = 2.0**-7 * (0.55 + 0.45 * np.cos(0.3 * np.arange(200)))
# In float64 each of 100 steps rounds to 1e-16, and momentum adds up ten of them.
RTOL = 1e-13
NAMES = {
    "fc.weight": ("fc/kernel", (1, 0)),
    "fc.bias": "fc/bias",
    "head.weight": ("head/kernel", (1, 0)),
    "head.bias": "head/bias",
}
EMPTY = {"fc": {"kernel": (5, 3), "bias": (3,)}, "head": {"kernel": (3, 2), "bias": (2,)}}


def schedule(factor=1.0):
    return lambda count: factor * jnp.asarray(LRS)[count]


def empty():
    return jax.tree.map(lambda s: jnp.zeros(s, jnp.float64), EMPTY, is_leaf=lambda x: isinstance(x, tuple))


def grads_at(t, params):
    """Gradients under PyTorch's names, of parameters under them."""
    rng = np.random.default_rng(t)
    return {k: p + rng.normal(size=p.shape) * 3 for k, p in sorted(params.items())}


def net():
    torch = package("torch")
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.fc, model.head = (torch.nn.Linear(*n, dtype=torch.float64) for n in ((5, 3), (3, 2)))
    return model


def there(parameters, optimizer, start, steps, factors=(1.0,)):
    """Steps of PyTorch's, and the parameters after each."""
    torch = package("torch")
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    path = []
    for t in range(start, start + steps):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = float(LRS[t] * factor)
        grads = grads_at(t, {name: p.detach().numpy() for name, p in parameters.items()})
        for name, p in parameters.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
        path.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
    return path


def here(tx, params, state, start, steps, names=NAMES):
    """The same steps of ours."""
    update = jax.jit(step_of(tx))
    path = []
    by_path = {
        target if isinstance(target, str) else target[0]: (name, not isinstance(target, str))
        for name, target in names.items()
    }

    def named(params):
        return {
            name: np.asarray(params[layer][leaf]).T if is_turned else np.asarray(params[layer][leaf])
            for place, (name, is_turned) in by_path.items()
            for layer, leaf in [place.split("/")]
        }

    for t in range(start, start + steps):
        theirs = grads_at(t, named(params))
        grads = {layer: {} for layer in params}
        for place, (name, is_turned) in by_path.items():
            layer, leaf = place.split("/")
            grads[layer][leaf] = theirs[name].T if is_turned else theirs[name]
        params, state = update(params, state, grads)
        path.append(named(params))
    return path


def largest_difference(path, expected):
    return max(
        np.max(np.abs(got[name] - want[name]) / (1 + np.abs(want[name])))
        for got, want in zip(path, expected, strict=True)
        for name in want
    )

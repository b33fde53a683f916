"""Steps with the installed package, and with nothing of this repository: `python -I packaging/smoke.py`."""

import sys
from importlib import metadata, resources

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from rmsprop_jax import conventions, diagnostics, rows

assert "site-packages" in rmsprop_jax.__file__, rmsprop_jax.__file__
assert metadata.version("rmsprop_jax") == rmsprop_jax.__version__
assert resources.files("rmsprop_jax").joinpath("py.typed").is_file()


def distance(params):
    return sum(jnp.sum((p - 1) ** 2) for p in jax.tree.leaves(params))


optimizers = {
    "rmsprop": rmsprop_jax.rmsprop(rmsprop_jax.warmup(0.05), centered=True, momentum=0.5),
    "one byte": rmsprop_jax.rmsprop(0.05, accumulator="uint8"),
    "torch": conventions.torch(0.05, alpha=0.9),
    "watched": diagnostics.watch(rmsprop_jax.rmsprop(0.05), every=10),
}
for name, tx in optimizers.items():
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    state = tx.init(params)

    @jax.jit
    def step(params, state, tx=tx):
        updates, state = tx.update(jax.grad(distance)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = distance(params)
    for _ in range(100):
        params, state = step(params, state)
    assert distance(params) < 0.1 * before, name

table = jnp.zeros((1000, 2))
tx = rows.exact(rmsprop_jax.rmsprop(0.1))
grads = rows.RowGradient(jnp.array([7]), jnp.ones((1, 2)), num_rows=1000)
updates, _ = tx.update(grads, tx.init(table))
assert jnp.count_nonzero(rmsprop_jax.apply_updates(table, updates)) == 2

unasked = {"flax", "keras", "matplotlib", "safetensors", "tensorflow", "torch"} & set(sys.modules)
assert not unasked, unasked
print(
    f"rmsprop_jax {rmsprop_jax.__version__} steps on Python {sys.version.split()[0]}, JAX {jax.__version__}"
)

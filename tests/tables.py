"""What the tests of embedding tables share: rare rows, runs on them, and a training step with a table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import step_of

from rmsprop_jax import apply_updates, rmsprop, rows
from rmsprop_jax.rows import RowGradient


def rare_rows(steps, batch, num_rows, width, seed=0):
    """Ids [steps, batch] and values [steps, batch, width]: row 0 in every batch, the last row in none,
    the one before it in the first and the last, the others ever more rarely; with duplicates."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.5, (steps, batch)) - 1, num_rows - 3).astype(np.int32)
    ids[:, 0] = 0
    ids[[0, -1], 1] = num_rows - 2
    return ids, rng.normal(size=(steps, batch, width)).astype(np.float32)


def run_rows(tx, table, ids, values):
    """The table and the state after a step with each batch of gradients of rows."""
    return _run(step_of(tx, apply_updates), tx, table, ids, values)


def run_dense(tx, table, ids, values):
    """The same with gradients of the whole table."""
    step = step_of(tx)
    return _run(lambda table, state, g: step(table, state, g.to_dense()), tx, table, ids, values)


def _run(step, tx, table, ids, values):
    def one(carry, batch):
        return step(*carry, RowGradient(*batch, table.shape[0])), None

    return jax.jit(lambda carry: jax.lax.scan(one, carry, (ids, values))[0])((table, tx.init(table)))


def squared(found, params, target):
    return jnp.mean((found @ params - target) ** 2)


def both(on_rows=rows.exact, **options):
    """An optimizer of a table and of other parameters, in this order."""
    tables = on_rows(rmsprop(1e-2, **options))
    return optax.partition({"rows": tables, "dense": rmsprop(1e-2)}, ("rows", "dense"))

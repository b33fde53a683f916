"""Tables in Flax's models, by the recipes of the module's docstring."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cross_entropy
from tables import both

from rmsprop_jax import apply_updates, rmsprop, rows


def test_flax_nnx_recipe():
    """The model of the module's docstring: the same losses and parameters as with everything dense."""
    nnx = pytest.importorskip("flax.nnx")

    class Tagger(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(30, 8, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, tokens):
            return self.out(self.embed(tokens) * (tokens > 0)[..., None])

    graphdef, tables, params = nnx.split(Tagger(nnx.Rngs(0)), nnx.PathContains("embed"), ...)

    def loss_fn(found, params, tokens, labels):
        model = nnx.merge(graphdef, tables, params)
        model.embed = lambda tokens: found["embed"]["embedding"][...]
        return cross_entropy(model(tokens), labels)

    def by_rows(tables, params, tokens, labels):
        ids = jax.tree.map(lambda table: tokens, tables)
        return rows.value_and_grad(loss_fn)(tables, ids, params, tokens, labels)

    def dense_loss(both, tokens, labels):
        return cross_entropy(nnx.merge(graphdef, *both)(tokens), labels)

    check_against_dense(by_rows, jax.value_and_grad(dense_loss), tables, params)


def test_flax_linen_recipe():
    nn = pytest.importorskip("flax.linen")

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            found = nn.Embed(30, 8, name="embed")(tokens)
            return nn.Dense(3)(found * (tokens > 0)[..., None])

    model = Tagger()
    params = model.init(jax.random.key(0), jnp.zeros((2, 4), jnp.int32))["params"]
    tables = {"embed": params.pop("embed")}

    def loss_fn(found, params, tokens, labels):
        def lookup(next_call, args, kwargs, context):
            is_lookup = context.module.name == "embed" and context.method_name == "__call__"
            return found["embed"]["embedding"] if is_lookup else next_call(*args, **kwargs)

        with nn.intercept_methods(lookup):
            return cross_entropy(model.apply({"params": params | tables}, tokens), labels)

    def by_rows(tables, params, tokens, labels):
        ids = {"embed": {"embedding": tokens}}
        return rows.value_and_grad(loss_fn)(tables, ids, params, tokens, labels)

    def dense_loss(both, tokens, labels):
        tables, params = both
        return cross_entropy(model.apply({"params": params | tables}, tokens), labels)

    check_against_dense(by_rows, jax.value_and_grad(dense_loss), tables, params)


def check_against_dense(by_rows, dense, tables, params):
    tx, dense_tx = (
        both(decay=0.99),
        optax.partition({"rows": rmsprop(1e-2, decay=0.99), "dense": rmsprop(1e-2)}, ("rows", "dense")),
    )
    ours = tables, params
    theirs = jax.tree.map(jnp.copy, ours)
    state, dense_state = tx.init(ours), dense_tx.init(theirs)

    @jax.jit
    def step(ours, state, tokens, labels):
        loss, grads = by_rows(*ours, tokens, labels)
        updates, state = tx.update(grads, state, ours)
        return loss, apply_updates(ours, updates), state

    @jax.jit
    def dense_step(theirs, state, tokens, labels):
        loss, grads = dense(theirs, tokens, labels)
        updates, state = dense_tx.update(grads, state, theirs)
        return loss, optax.apply_updates(theirs, updates), state

    rng = np.random.default_rng(0)
    losses = []
    for _ in range(30):
        tokens = np.minimum(rng.zipf(1.5, (2, 4)) - 1, 29).astype(np.int32)
        loss, ours, state = step(ours, state, tokens, tokens % 3)
        dense_loss, theirs, dense_state = dense_step(theirs, dense_state, tokens, tokens % 3)
        losses.append(loss)
        np.testing.assert_allclose(loss, dense_loss, rtol=1e-4)
    assert losses[-1] < losses[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Sums in another order, through 30 normalised steps of 1e-2.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)

"""RMSProp for embedding tables: gradients, accumulators and updates of the touched rows only.

A step that looks up n rows has a gradient that is zero everywhere else. The dense rule reads and writes the
whole table all the same; but where g = 0 it does not move the parameter, and the accumulator just decays::

    nu_t = decay^(t - s) * nu_s                               a row last touched by update s
    p_t  = p_s

So `exact` stores s for each row, in `last`, and catches `nu` up when the row is touched again: the dense
trajectory, at a cost that does not depend on the table's size. Momentum, centring and weight decay move rows
whose gradient is zero; with those, `lazy` does what TensorFlow and Sonnet do: rows that are not touched
neither move nor decay. It takes any optimizer whose state follows its parameters, `optax.adam` too.

A training step, with `tables` one table or a tree of them, and `params` everything else; the loss
is `loss_fn(rows, params, batch)`::

    tx = optax.partition({"rows": rows.exact(rmsprop(1e-2)), "dense": rmsprop(1e-2)}, ("rows", "dense"))

    @partial(jax.jit, donate_argnums=(0, 1, 2))    # donated: tables and state are updated in place
    def step(tables, params, state, ids, batch):
        loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, batch)
        updates, state = tx.update(grads, state, (tables, params))
        tables, params = apply_updates((tables, params), updates)
        return tables, params, state, loss

**Ids out of range**, negative ones included, are dropped: they look up zeros, and no row moves for them. They
do not count from the end. `check_ids` finds them, outside of jit.

**Flax.** Neither kind of `Embed` has to change; in the loss, the rows take the place of its lookup. NNX::

    graphdef, tables, params = nnx.split(model, nnx.PathContains("embed"), ...)

    def loss_fn(rows, params, tokens):
        model = nnx.merge(graphdef, tables, params)
        model.embed = lambda tokens: rows["embed"]["embedding"][...]
        return loss_of(model(tokens))

    ids = jax.tree.map(lambda table: tokens, tables)
    loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, tokens)

and `tx` of above, after gradient clipping, which takes tables and parameters together::

    tx = optax.chain(rows.values_only(optax.clip_by_global_norm(1.0)), tx)

Linen, where `lookup` is asked first at each call of a module within the model::

    params = model.init(key, tokens)["params"]
    tables = {"embed": params.pop("embed")}

    def loss_fn(rows, params, tokens):
        def lookup(next_call, args, kwargs, context):
            is_embed = context.module.name == "embed" and context.method_name == "__call__"
            return rows["embed"]["embedding"] if is_embed else next_call(*args, **kwargs)

        with nn.intercept_methods(lookup):
            return loss_of(model.apply({"params": params | tables}, tokens))

    loss, grads = rows.value_and_grad(loss_fn)(tables, {"embed": {"embedding": tokens}}, params, tokens)
"""

from rmsprop_jax.rows._gradient import RowGradient
from rmsprop_jax.rows._lookup import check_ids, value_and_grad
from rmsprop_jax.rows._touched import RowsState, exact, lazy
from rmsprop_jax.rows._values import global_norm, values_only

__all__ = [
    "RowGradient",
    "RowsState",
    "check_ids",
    "exact",
    "global_norm",
    "lazy",
    "value_and_grad",
    "values_only",
]

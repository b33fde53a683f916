"""Which layers an optimizer's state has, and their figures in one update: `measure`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax import accumulators
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import Tree, array_of, is_ours, named_leaves, rms_states
from rmsprop_jax.diagnostics._figures import FIGURES, Measurement, figures
from rmsprop_jax.rows._gradient import is_gradient, is_row_gradient


def measure(
    grads: Tree,
    state: Tree,
    updates: Tree,
    params: Tree,
    *,
    tx: optax.GradientTransformation | None = None,
    settings: Settings | None = None,
    count: jax.typing.ArrayLike | None = None,
) -> Measurement:
    """Measures one update: a pure function, for use inside `jax.jit` and `jax.lax.scan` too.

    Args:
      grads: the gradients that RMSProp was given.
      state: the optimizer's, after the update: this package's or Optax's RMSProp inside any chain or wrapper.
        Layers that have no accumulator in it are left out, and so are layers without elements, and those
        whose gradient is None.
      updates: what the optimizer returned.
      params: the parameters before the update.
      tx: the optimizer, as :func:`rmsprop_jax.rmsprop` or one of :mod:`rmsprop_jax.conventions` returns it;
        its settings are read from it. Inside Optax's chains and wrappers they cannot be found.
      settings: of an optimizer that is not given as `tx`: its decay, eps and eps_in_sqrt, such as
        ``rmsprop_jax.Settings(decay=0.9, eps=1e-8)``.
      count: updates so far, this one included; needed where the state does not count them, as that of
        ``optax.rmsprop(1e-3)`` does not.

    Returns:
      A :class:`Measurement`.

    Raises:
      ValueError: for settings that are missing, or given although `tx` has them, a state without RMSProp in
        it or without `count`, trees that do not fit the state, and row-sparse gradients, naming the argument
        or the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import diagnostics, rmsprop
      >>> params, grads = {"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.1, 0.1])}
      >>> tx = rmsprop(0.01, decay=0.99)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> measured = diagnostics.measure(grads, state, updates, params, tx=tx)
      >>> print(f"{measured.update_ratio['w']:.4f} {measured.learning_rate['w']:.4f}")
      0.0283 0.0100
    """
    settings = settings_from(tx, settings, "Pass tx=, rmsprop itself from inside the chain")
    step, columns = columns_of(grads, state, updates, params, settings, count)
    columns = {name: column for name, column in columns.items() if column is not None}
    return Measurement(step, tuple(columns), stacked(columns))


def settings_from(tx: Any, settings: Settings | None, remedy: str) -> Settings:
    """The optimizer's own settings, or those that are given for one that has none."""
    own = getattr(tx, "settings", None)
    if own is not None and settings is not None:
        raise ValueError(
            f"Invalid settings: {settings=}, but the optimizer has its own, {own}: leave them out."
        )
    if not isinstance(found := own or settings, Settings):
        raise ValueError(
            f"Invalid settings: {settings=}, and the optimizer has none to read, as one of Optax or inside "
            f"one of Optax's chains or wrappers. {remedy}, or pass its numbers, such as "
            "settings=rmsprop_jax.Settings(decay=0.9, eps=1e-8)."
        )
    return found


def layers_of(state: Tree, decoded: Any = accumulators.decoded) -> dict[str, tuple]:
    """nu, mu (None where not centred), whether they are ours, and the updates so far, of each layer.

    Layers without elements are left out.
    """
    nodes = list(rms_states(state))
    if not nodes:
        raise ValueError(
            "Invalid state: it has no accumulator of RMSProp in it. Of Flax NNX, pass optimizer.opt_state."
        )
    found: dict[str, tuple] = {}
    for node in nodes:
        mu = named_leaves(getattr(node, "mu", None))
        count = array_of(node.count) if "count" in node._fields else None
        for name, nu in named_leaves(decoded(node) if is_ours(node) else node.nu).items():
            if name in found:
                raise ValueError(f"Invalid state: it has two accumulators for layer {name!r}.")
            if 0 not in nu.shape:
                found[name] = (nu, mu.get(name), is_ours(node), count)
    return found


def names_of(state: Tree, members: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The layers' names, of the state of a `jax.vmap` over so many members too. Computes nothing."""

    def decoded(node):
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[len(members) :], x.dtype), node)
        return jax.eval_shape(accumulators.decoded, one)

    return tuple(layers_of(state, decoded))


def columns_of(grads, state, updates, params, settings, count, per_device_axes=frozenset()):
    """The step, and the figures of each layer that has an accumulator, None where it has no gradient."""
    arguments = {"grads": grads, "updates": updates, "params": params}
    trees = {name: named_leaves(tree, is_gradient) for name, tree in arguments.items()}
    columns: dict[str, Any] = {}
    step = count
    for name, (nu, mu, ours, counted) in layers_of(state).items():
        step = counted if count is None else count
        if step is None:
            raise ValueError("The state does not count its updates, as Optax's: pass count=, or use watch.")
        g, u, p = (_leaf(argument, tree, name, nu.shape) for argument, tree in trees.items())
        if g is None or u is None or p is None:
            columns[name] = None
        else:
            columns[name] = figures(g, u, p, nu, mu, jnp.asarray(step), settings, ours, per_device_axes)
    return jnp.asarray(0 if step is None else step, jnp.int32), columns


def stacked(columns: dict[str, Any]) -> jax.Array:
    """The table of some layers' columns, NaN where a layer has none: float32 of shape (figures, layers)."""
    absent = jnp.full(len(FIGURES), jnp.nan, jnp.float32)
    some = [absent if column is None else column for column in columns.values()]
    return jnp.stack(some, axis=1) if some else jnp.zeros((len(FIGURES), 0), jnp.float32)


def _leaf(argument, tree, name, shape):
    """The leaf of that name, None for one that is None, by itself or with all of its subtree."""
    if name not in tree:
        if any(leaf is None and name.startswith(f"{above}/") for above, leaf in tree.items()):
            return None
        raise ValueError(
            f"Invalid {argument}: they have no layer {name!r}, for which the state has an accumulator."
        )
    leaf = tree[name]
    if is_row_gradient(leaf):
        raise ValueError(
            f"Invalid {argument}: layer {name!r} is row-sparse, whose accumulators are not measured. With "
            "optax.partition, watch the part that is dense."
        )
    if leaf is not None and jnp.shape(leaf) != shape:
        raise ValueError(
            f"Invalid {argument}: layer {name!r} has shape {jnp.shape(leaf)}, its accumulator {shape}."
        )
    return leaf

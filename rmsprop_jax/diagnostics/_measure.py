"""Which layers an optimizer's state has, and their figures by name: `measure`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmsprop_jax import _checks, accumulators
from rmsprop_jax._rule import Settings
from rmsprop_jax._tree import Tree, array_of, is_ours, named_leaves, rms_states
from rmsprop_jax.diagnostics._figures import FIELDS, Measurement, figures
from rmsprop_jax.rows._gradient import is_gradient, is_row_gradient


def measure(
    grads: Tree,
    state: Tree,
    updates: Tree,
    params: Tree,
    *,
    tx: optax.GradientTransformation | None = None,
    decay: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike | None = None,
    eps_in_sqrt: bool | None = None,
    accumulator: str | accumulators.Accumulator | None = None,
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
      decay: of an optimizer that is not given as `tx`.
      eps: as `decay`, and as Optax has it by default, 1e-8.
      eps_in_sqrt: as `eps`, by default True.
      accumulator: how `nu` is stored, where neither the state nor what is stored tells.
      count: updates so far, this one included; needed where the state does not count them, as that of
        ``optax.rmsprop(1e-3)`` does not.

    Returns:
      A :class:`Measurement`.

    Raises:
      ValueError: for settings that are missing, out of range or not those of `tx`, a state without RMSProp in
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
    settings = settings_of(
        tx, decay, eps, eps_in_sqrt, accumulator, "Pass tx=, rmsprop itself from inside the chain"
    )
    columns, step = columns_of(grads, state, updates, params, settings, count)
    return by_name(step, {name: column for name, column in columns.items() if column is not None})


def settings_of(tx: Any, decay: Any, eps: Any, eps_in_sqrt: Any, accumulator: Any, instead: str) -> Settings:
    """The optimizer's settings, as it says, or as they are given for one that does not say.

    Its accumulator is the given one, None where the state has to tell.

    Raises:
      ValueError: for a decay that neither says, and for settings that contradict the optimizer's.
    """
    given: dict[str, Any] = {}
    if decay is not None:
        given["decay"] = _checks.decay("decay", decay)
    if eps is not None:
        given["eps"] = _checks.precise_number("eps", eps)
    if eps_in_sqrt is not None:
        given["eps_in_sqrt"] = _checks.flag("eps_in_sqrt", eps_in_sqrt)
    if accumulator is not None:
        given["accumulator"] = accumulators.resolve(accumulator)
    settings = getattr(tx, "settings", None)
    if settings is None:
        if decay is None:
            raise ValueError(
                "Invalid decay: decay=None, and this optimizer does not tell its own, as one of Optax or in "
                f"one of Optax's chains or wrappers. {instead}, or pass decay=, eps=, eps_in_sqrt=."
            )
        return Settings(**{"accumulator": None, **given})
    for name, value in given.items():
        known = getattr(settings, name)
        if name == "accumulator":
            differ, value, known = value != known, value.name, known.name
        else:
            differ = _differ(value, known)
        if differ:
            raise ValueError(
                f"Invalid {name}: {name}={value!r}, but the optimizer has {name}={known!r}, which need not "
                "be given."
            )
    return replace(settings, accumulator=given.get("accumulator"))


def _differ(a, b):
    """Whether two numbers do, in float32; of traced ones that cannot be told."""
    traced = isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer)
    return not traced and np.float32(a) != np.float32(b)


class Accumulators(NamedTuple):
    """A layer's: nu and mu (None where not centred), who stores them and how, and the updates so far."""

    nu: Any
    mu: Any
    ours: bool
    accumulator: accumulators.Accumulator | None
    count: Any


def accumulators_of(state: Tree) -> dict[str, Accumulators]:
    """The accumulators in a state, by layer, but for those of layers without elements.

    Raises:
      ValueError: if there is no state of RMSProp, or two accumulators of one name.
    """
    nodes = list(rms_states(state))
    if not nodes:
        raise ValueError(
            "Invalid state: it has no accumulator of RMSProp in it. Of Flax NNX, pass optimizer.opt_state."
        )
    found: dict[str, Accumulators] = {}
    for node in nodes:
        mu = named_leaves(getattr(node, "mu", None))
        count = array_of(node.count) if "count" in node._fields else None
        numbers = accumulators.decoded(node) if is_ours(node) else node.nu
        for name, nu in named_leaves(numbers).items():
            if name in found:
                raise ValueError(f"Invalid state: it has two accumulators for layer {name!r}.")
            if 0 not in nu.shape:
                found[name] = Accumulators(nu, mu.get(name), is_ours(node), None, count)
    return found


def columns_of(
    grads: Any,
    state: Tree,
    updates: Any,
    params: Any,
    settings: Settings,
    count: jax.typing.ArrayLike | None,
    apart: frozenset = frozenset(),
) -> tuple[dict[str, jax.Array | None], jax.Array]:
    """The figures of each layer that has an accumulator, None where it has no gradient, and the step."""
    trees = {
        what: named_leaves(tree, is_gradient)
        for what, tree in (("grads", grads), ("updates", updates), ("params", params))
    }
    columns: dict[str, jax.Array | None] = {}
    step = count
    for name, (nu, mu, ours, accumulator, counted) in accumulators_of(state).items():
        step = counted if count is None else count
        if step is None:
            raise ValueError("The state does not count its updates, as Optax's: pass count=, or use watch.")
        g, u, p = (_layer(what, tree, name, nu.shape) for what, tree in trees.items())
        if g is None or u is None or p is None:
            columns[name] = None
            continue
        accumulator = accumulator or settings.accumulator
        columns[name] = figures(g, u, p, nu, mu, jnp.asarray(step), settings, ours, accumulator, apart)
    return columns, jnp.asarray(0 if step is None else step, jnp.int32)


def _layer(what, tree, name, shape):
    """The leaf of that name, None for one that is None, by itself or with all of its subtree."""
    if name not in tree:
        if any(leaf is None and name.startswith(f"{above}/") for above, leaf in tree.items()):
            return None
        raise ValueError(
            f"Invalid {what}: they have no layer {name!r}, for which the state has an accumulator."
        )
    leaf = tree[name]
    if is_row_gradient(leaf):
        raise ValueError(
            f"Invalid {what}: layer {name!r} is row-sparse, whose accumulators are not measured. With "
            "optax.partition, watch the part that is dense."
        )
    if leaf is not None and jnp.shape(leaf) != shape:
        raise ValueError(
            f"Invalid {what}: layer {name!r} has shape {jnp.shape(leaf)}, its accumulator {shape}."
        )
    return leaf


def by_name(step: Any, columns: dict[str, Any]) -> Measurement:
    """A Measurement from the layers' figures, each of shape (..., fields)."""
    figures_of = {
        field: {name: column[..., i] for name, column in columns.items()} for i, field in enumerate(FIELDS)
    }
    return Measurement(step, **figures_of)


def stacked(history: Measurement | Sequence[Measurement]) -> Any:
    """A Measurement of NumPy arrays with a leading axis of time, of one or of a list of them."""
    if not isinstance(history, Measurement):
        if not history:
            return by_name(np.zeros(0, np.int32), {})
        history = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *history)
    return jax.tree.map(np.atleast_1d, history)

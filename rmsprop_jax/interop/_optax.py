"""The states of `optax.rmsprop`, whose tree is the parameters', as here."""

import jax
import numpy as np

from rmsprop_jax._tree import Tree
from rmsprop_jax.interop._arrays import placed
from rmsprop_jax.interop._carry import carry
from rmsprop_jax.interop._match import Reporter, Source
from rmsprop_jax.interop._moments import Moments, is_multi_steps, moments_of


def from_optax(
    optax_state: Tree,
    state: Tree,
    *,
    count: int | None = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """The state of `optax.rmsprop` as this package's; the parameters' tree is the same.

    Args:
      optax_state: a state of Optax's RMSProp, inside any chain. Of `optax.MultiSteps` what it has gathered
        so far goes over too.
      state: what ``init`` returns for the target optimizer. Its momentum buffer is Optax's as it is, so
        both have the learning rate in it, or neither.
      count: number of updates so far. By default Optax's, which counts them where there is a schedule or bias
        correction. To be given where it does not and the target has a schedule, rounds what it stores, or
        corrects the bias; the last does not show in a state, and a count of 0 is logged.
      strict, report: as for :func:`from_torch`.

    Returns:
      A state as `state`.

    Raises:
      ValueError: listing every path where the two do not have the same accumulators, of the same shapes; for
        a count that is missing; for a state in mid-accumulation of `optax.MultiSteps` where the target has
        none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, rmsprop
      >>> theirs = optax.rmsprop(0.1, decay=0.75)
      >>> _, state = theirs.update(jnp.array([2.0, 4.0]), theirs.init(jnp.zeros(2)))
      >>> ours = rmsprop(0.1, decay=0.75, accumulator="bfloat16")
      >>> print(interop.from_optax(state, ours.init(jnp.zeros(2)), count=1)[0])
      ScaleByRmsState(count=Array(1, dtype=int32), nu={'bfloat16': Array([1, 4], dtype=bfloat16)}, mu=None)
    """
    state = _accumulated(state, optax_state)
    return carry(state, None, None, OptaxSource(optax_state), count=count, strict=strict, report=report)


def to_optax(state: Tree, optax_state: Tree) -> Tree:
    """This package's state as that of `optax.rmsprop`; the parameters' tree is the same.

    Args:
      state: this package's, inside any chain.
      optax_state: what ``init`` returns for the target optimizer.

    Returns:
      A state as `optax_state`.

    Raises:
      ValueError: as :func:`from_optax`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from rmsprop_jax import interop, scale_by_rms
      >>> ours = scale_by_rms(decay=0.75, centered=True)
      >>> _, state = ours.update(jnp.array([2.0, 4.0]), ours.init(jnp.zeros(2)))
      >>> theirs = interop.to_optax(state, optax.scale_by_stddev(decay=0.75).init(jnp.zeros(2)))
      >>> print(state.nu, theirs.nu, state.mu)  # the variance, the raw moment, the mean
      [0.75 3.  ] [1. 4.] [0.5 1. ]
    """
    source = OptaxSource(state)
    return carry(_accumulated(optax_state, state), None, None, source, count=source.count or 0)


class OptaxSource(Source):
    """A state of this package or of Optax, whose names are paths."""

    labels = Moments("nu", "mu", "trace")
    needs_count = False
    count = None

    def __init__(self, state: Tree) -> None:
        self.names, self.count = moments_of(state)

    def find(self, name: str) -> str | None:
        return name if name in self.names else None

    def arrays(self, name: str) -> Moments:
        return self.names[name]


def _accumulated(state, source):
    """`state` with what each `optax.MultiSteps` in `source` has gathered."""

    def found(tree):
        return list(filter(is_multi_steps, jax.tree.leaves(tree, is_leaf=is_multi_steps)))

    def shapes(nodes):
        return [jax.tree.map(np.shape, x.acc_grads) for x in nodes]

    theirs = found(source)
    if shapes(theirs) != shapes(found(state)):
        if steps := [int(x.mini_step) for x in theirs if int(x.mini_step)]:
            raise ValueError(
                f"The states do not fit: one is at mini_step {steps[0]} of optax.MultiSteps, its acc_grads "
                "half full, and the other has no place for them: finish the update, or wrap it in one too."
            )
        return state
    others = iter(theirs)

    def with_gathered(node):
        if not is_multi_steps(node):
            return node
        other, fields = next(others), ("mini_step", "acc_grads")
        return node._replace(**{x: jax.tree.map(placed, getattr(other, x), getattr(node, x)) for x in fields})

    return jax.tree.map(with_gathered, state, is_leaf=is_multi_steps)

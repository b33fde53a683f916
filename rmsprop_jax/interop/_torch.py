"""The state of PyTorch's optimizers, see `_checkpoints` for its forms."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rmsprop_jax._tree import Tree
from rmsprop_jax.interop._carry import buffer_factor, carry, outward
from rmsprop_jax.interop._checkpoints import Order, entries_of, groups_in_doubt, stepped
from rmsprop_jax.interop._files import Tensors, load
from rmsprop_jax.interop._match import Reporter, Source
from rmsprop_jax.interop._moments import Moments
from rmsprop_jax.interop._names import Names, finder


def from_torch(
    optimizer_state: Tensors,
    state: Tree,
    params: Tree,
    names: Names,
    *,
    order: Order | None = None,
    learning_rate: float | None = None,
    lr_in_momentum: bool | None = None,
    count: int | None = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """The state of `torch.optim.RMSprop`, or of timm's or Stable-Baselines3's, as this package's.

    Args:
      optimizer_state: ``optimizer.state_dict()``, or its form by names or flat,
        ``{"state.fc.weight.square_avg": ...}``, as `torch.distributed.checkpoint` and FSDP have it; what
        Lightning, Accelerate and others put around it; or the path of a file of any of these.
      state: what ``init`` returns for the target optimizer, such as `conventions.torch`'s.
      params: the parameters.
      names: from PyTorch's parameter names to paths in `params`. What `torch.compile`, DDP and FSDP put
        before a name (`_orig_mod.`, `module.`) may be there or not.
      order: the names of the parameters in the optimizer's order, by which its state counts them: group after
        group, not as ``named_parameters()``. With ``names = {p: n for n, p in model.named_parameters()}``
        it is ``[[names[p] for p in group["params"]] for group in optimizer.param_groups]``, a list for each
        group, whose sizes are checked, or one for all; for one group ``list(names.values())`` will do. Not
        needed where the state has the names itself (an optimizer that was built from ``named_parameters()``,
        or the forms by names); an `order` that they contradict is refused.
      learning_rate: the one that PyTorch's next step would take; by default ``param_groups``'. Only used
        where one of the two momentum buffers has it in and the other has not.
      lr_in_momentum: whether the learning rate is in the buffer of the target optimizer, the argument
        of :func:`rmsprop_jax.rmsprop`; by default as in PyTorch's, where only timm's has it in.
      count: number of updates so far, where the state does not say; by default its largest `step`.
      strict, report: whether all has to have a name and a state, and who is called with the :class:`Report`:
        "In part" in the module.

    Returns:
      A state as `state`. Its `nu` is a variance where it is centred, at least 0.

    Raises:
      ValueError: listing every name that is missing, with the nearest ones, every shape that does not fit and
        every second moment below 0 or NaN; for two leaves of one path; for what is no state of RMSProp's,
        saying what it is; for a file that cannot be read.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from rmsprop_jax import conventions, interop
      >>> theirs = {  # as optimizer.state_dict() of PyTorch's
      ...     "state": {0: {"step": np.array(7.0), "square_avg": np.array([[1.0, 2.0, 3.0]])}},
      ...     "param_groups": [{"lr": 0.01, "params": [0]}],
      ... }
      >>> params = {"kernel": jnp.zeros((3, 1))}
      >>> state = conventions.torch(lr=0.01).init(params)
      >>> names = {"fc.weight": ("kernel", (1, 0))}
      >>> state = interop.from_torch(theirs, state, params, names, order=["fc.weight"])
      >>> print(optax.tree.get(state, "count"), optax.tree.get(state, "nu")["kernel"].T)
      7 [[1. 2. 3.]]

      Two groups, the head's first:

      >>> theirs["state"][1] = {"step": np.array(7.0), "square_avg": np.array([4.0])}
      >>> theirs["param_groups"] = [{"lr": 0.1, "params": [0]}, {"lr": 0.01, "params": [1]}]
      >>> params = {"head": jnp.zeros((1, 3)), "scale": jnp.zeros(1)}
      >>> state = conventions.torch(lr=0.01).init(params)
      >>> names, order = {"scale": "scale", "head.weight": "head"}, [["head.weight"], ["scale"]]
      >>> state = interop.from_torch(theirs, state, params, names, order=order)
      >>> print(optax.tree.get(state, "nu"))
      {'head': Array([[1., 2., 3.]], dtype=float32), 'scale': Array([4.], dtype=float32)}
    """
    source = TorchSource(load(optimizer_state), order, learning_rate, lr_in_momentum)
    return carry(state, params, names, source, count=count, strict=strict, report=report)


def to_torch(
    state: Tree,
    optimizer_state: Mapping[str, Any],
    params: Tree,
    names: Names,
    *,
    order: Order | None = None,
    learning_rate: float | None = None,
    lr_in_momentum: bool | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """This package's state as that of `torch.optim.RMSprop`, for ``optimizer.load_state_dict``.

    Args:
      state: this package's, inside any chain.
      optimizer_state: ``optimizer.state_dict()`` of the target optimizer, which may be new, with any groups;
        or that of `torch.distributed.checkpoint` by names.
      params: the parameters.
      names, order, learning_rate: as for :func:`from_torch`.
      lr_in_momentum: whether the learning rate is in the buffer in `state`.
      strict: False leaves out what has no name in `names`, or no parameter there, which keep their state.

    Returns:
      A new dictionary as `optimizer_state`, with PyTorch's tensors in place of the parameters' states:
      float32, or float64 where `state` is. Parameters without a moment in `state`, such as masked ones, keep
      theirs.

    Raises:
      ValueError: listing every name that is missing.
    """
    import torch

    if "param_groups" not in optimizer_state:
        raise ValueError("Invalid optimizer_state: it has no param_groups, expected optimizer.state_dict().")
    source = TorchSource(optimizer_state, order, learning_rate, lr_in_momentum)
    arrays, count = outward(state, params, names, source, strict)
    new = {}
    for name, moments in arrays.items():
        entry = source.names[name]
        step = count if isinstance(entry.state.get("step"), int) else torch.tensor(float(count))
        found = zip(source.labels, moments, strict=True)
        tensors = {label: torch.from_numpy(np.array(x)) for label, x in found if x is not None}
        new[entry.key] = {"step": step, **tensors}
    return {**optimizer_state, "state": {**optimizer_state["state"], **new}}


class TorchSource(Source):
    """An optimizer's state in any of the forms of `_checkpoints`."""

    labels = Moments("square_avg", "grad_avg", "momentum_buffer")

    def __init__(
        self,
        checkpoint: Any,
        order: Order | None = None,
        learning_rate: float | None = None,
        lr_in_momentum: bool | None = None,
    ) -> None:
        self.names = entries_of(checkpoint, order)
        self.find = finder(self.names)
        self.groups = groups_in_doubt(self.names, order)
        self._learning_rate, self._lr_in_momentum = learning_rate, lr_in_momentum

    @property
    def count(self) -> int | None:
        return stepped(self.names)

    def arrays(self, name: str) -> Moments:
        return Moments(*map(self.names[name].state.get, self.labels))

    def factor(self, name: str) -> float:
        group = self.names[name].group
        theirs = bool(group.get("lr_in_momentum", False))
        ours = theirs if self._lr_in_momentum is None else self._lr_in_momentum
        return buffer_factor(
            theirs, ours, group.get("lr") if self._learning_rate is None else self._learning_rate
        )

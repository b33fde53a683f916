"""What a PyTorch checkpoint has of each parameter, in whichever form and at whichever depth it lies there.

{"state": {index: {"square_avg": ...}}, "param_groups": [{"params": [index, ...], "lr": ...}]}
{"state": {name: {"square_avg": ...}}, "param_groups": [{"params": [name, ...], "lr": ...}]}
{"state.fc.weight.square_avg": ..., "param_groups.fc.weight.lr": ...}

The second and third are those of `torch.distributed.checkpoint` and FSDP. Lightning has
``optimizer_states``, a list, around it, Accelerate and others ``optimizer``, also as a prefix.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rmsprop_jax.interop._arrays import whole_number
from rmsprop_jax.interop._names import FLATTENED, bare

_NESTS = ("optimizer_states", "optimizer", "optimizer_state_dict")
_BITSANDBYTES = (
    "bitsandbytes' (whose 'state1' is 'square_avg', where it has 'qmap1' after "
    "bitsandbytes.functional.dequantize_blockwise(state1, absmax=absmax1, code=qmap1))"
)
_OTHERS = {
    "exp_avg": "Adam's",
    "exp_inf": "Adamax's",
    "acc_delta": "Adadelta's",
    "sum": "Adagrad's",
    "prev": "Rprop's",
    **dict.fromkeys(("state1", "__bnb_optimizer_quant_state__"), _BITSANDBYTES),
}


class Entry(NamedTuple):
    """One parameter of the optimizer's."""

    state: Mapping[str, Any]  # empty where it has none
    key: Any  # by which PyTorch's `state` has it
    group: Mapping[str, Any]  # the hyper-parameters of its group
    number: int  # of its group
    is_ordered: bool = False  # whether `order` named it


Order = Sequence[str] | Sequence[Sequence[str]]

ADVICE = (
    "pass order=, the names of the parameters in the optimizer's order, which is group after group: "
    "names = {p: name for name, p in model.named_parameters()}; "
    'order=[[names[p] for p in group["params"]] for group in optimizer.param_groups]'
)


def entries_of(checkpoint: Any, order: Order | None = None) -> dict[str, Entry]:
    """Each parameter of the optimizer's by its name."""
    optimizer_state = _unwrapped(checkpoint, "optimizer_state")
    if "param_groups" not in optimizer_state:
        return _numbered(_flat(optimizer_state), order)
    groups, states = optimizer_state["param_groups"], optimizer_state["state"]
    _check(groups, states)
    by_name: dict[str, Entry] = {}
    for number, (group, names) in enumerate(zip(groups, _names(groups, order), strict=True)):
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        is_ordered = _own_names(group) is None
        for name, key in zip(names, group["params"], strict=True):
            if name in by_name:
                raise ValueError(f"Invalid optimizer_state: it has two parameters named {name!r}.")
            by_name[name] = Entry(states.get(key, {}), key, settings, number, is_ordered)
    return by_name


def _check(groups, states):
    def is_group(x):
        return isinstance(x, Mapping) and isinstance(x.get("params"), list | tuple)

    if not (isinstance(groups, list | tuple) and all(map(is_group, groups))):
        raise ValueError("Invalid optimizer_state: its param_groups are no list of groups with 'params'.")
    if not (isinstance(states, Mapping) and all(isinstance(x, Mapping) for x in states.values())):
        raise ValueError("Invalid optimizer_state: its 'state' is no dictionary of dictionaries.")


def groups_in_doubt(entries: Mapping[str, Entry], order: Order | None) -> tuple[tuple[str, ...], ...]:
    """The names by group, where `order` alone says so, and another could have been meant: `Report.groups`."""
    if order is None or _is_by_group(order) or not all(entry.is_ordered for entry in entries.values()):
        return ()
    names: dict[int, tuple[str, ...]] = {}
    kinds = set()
    for name, entry in entries.items():
        names[entry.number] = (*names.get(entry.number, ()), name)
        if entry.state:
            kinds.add((tuple(getattr(entry.state.get("square_avg"), "shape", ())), entry.number))
    return tuple(names.values()) if len({shape for shape, _ in kinds}) < len(kinds) else ()


def stepped(entries: Mapping[str, Entry]) -> int | None:
    """The number of updates so far, the most of any parameter; None where none says.

    An optimizer that is none of RMSProp's, or has no state at all, is refused.
    """
    states = [entry.state for entry in entries.values() if entry.state]
    if not states:
        raise ValueError("Invalid optimizer_state: it is empty, its optimizer has not taken a step.")
    keys = dict.fromkeys(str(key) for state in states for key in state)
    whose = list(filter(None, map(_OTHERS.get, keys)))
    if whose or "square_avg" not in keys:
        raise ValueError(
            f"Invalid optimizer_state: it is {[*whose, 'that of another optimizer'][0]}, with "
            f"{', '.join(map(repr, keys))}, expected RMSprop's, with 'square_avg'."
        )
    return max((whole_number(state["step"], "step") for state in states if "step" in state), default=None)


def _unwrapped(checkpoint, place):
    """The optimizer's state at a known place in a checkpoint."""
    if _is_state(checkpoint):
        return checkpoint
    inner = _inner(checkpoint)
    if len(inner) == 1:
        ((key, value),) = inner.items()
        return _unwrapped(value, place if key is None else f"{place}[{key!r}]")
    hint = " or ".join(f"{place}{where}" for where in _places(checkpoint))
    raise ValueError(
        f"Invalid {place}: it is {_described(checkpoint)}, expected optimizer.state_dict()"
        f"{hint and f': pass {hint}'}."
    )


def _inner(checkpoint):
    """What stands in its known places, by its key; by None what has a prefix."""
    if isinstance(checkpoint, list | tuple):
        return dict(enumerate(checkpoint))
    if not isinstance(checkpoint, Mapping):
        return {}
    prefix = "optimizer."
    inner = {k.removeprefix(prefix): v for k, v in checkpoint.items() if _starts(k, prefix)}
    if _is_state(inner):
        return {None: inner}
    return {key: x for key in _NESTS if isinstance(x := checkpoint.get(key), Mapping | list | tuple)}


def _is_state(x):
    return isinstance(x, Mapping) and (
        ("state" in x and "param_groups" in x) or any(_starts(key, "state.") for key in x)
    )


def _starts(key, prefix):
    return isinstance(key, str) and key.startswith(prefix)


def _places(x: Any, depth: int = 4) -> Iterator[str]:
    """Where in it an optimizer's state is."""
    if _is_state(x):
        yield ""
    elif depth:
        items = x.items() if isinstance(x, Mapping) else enumerate(x) if isinstance(x, list | tuple) else ()
        for key, value in items:
            for place in _places(value, depth - 1):
                yield f"[{key!r}]{place}"


def _described(x):
    """A value that is no optimizer's state, for an error."""
    if not isinstance(x, Mapping):
        return f"a {type(x).__name__}" + (f" of {len(x)}" if isinstance(x, list | tuple) else "")
    if not x:
        return "an empty dictionary"
    if "state" in x:
        return "an optimizer's state without param_groups"
    keys = ", ".join(map(repr, list(x)[:4])) + (", ..." if len(x) > 4 else "")
    if _is_states(x):
        return f"the 'state' of an optimizer alone, with {keys}"
    if all(hasattr(value, "shape") for value in x.values()):
        return f"a dictionary of arrays, with {keys}, as a model's state_dict"
    return f"a dictionary with {keys}"


def _is_states(x):
    inner = [value for value in x.values() if isinstance(value, Mapping)]
    return len(inner) == len(x) and not {"square_avg", *_OTHERS}.isdisjoint(set().union(*inner))


def _flat(state):
    states: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        for kind, entries in (("state.", states), ("param_groups.", settings)):
            name, _, field = key.removeprefix(kind).rpartition(".") if _starts(key, kind) else ("", "", "")
            if name:
                entries.setdefault(name, {})[field] = value
    numbers: dict[str, int] = {}
    flat = {}
    for name in dict.fromkeys([*states, *settings]):
        group = settings.get(name, {})
        number = numbers.setdefault(repr(sorted(group.items())), len(numbers))
        flat[name] = Entry(states.get(name, {}), name, group, number)
    return flat


def _numbered(entries, order):
    """Entries by their names in `order`, where the flat form has numbers for names."""
    if order is None or not all(name.isdecimal() for name in entries):
        return entries
    order = [name for group in order for name in group] if _is_by_group(order) else order
    if any(int(name) >= len(order) for name in entries):
        raise ValueError(f"order has {len(order)} names, PyTorch's optimizer a parameter {max(entries)}.")
    return {order[int(name)]: entry for name, entry in entries.items()}


def _names(groups, order):
    """The names of the parameters of each group."""
    own = list(map(_own_names, groups))
    if order is None or all(isinstance(key, str) for group in groups for key in group["params"]):
        if None in own:
            raise ValueError(f"PyTorch's state counts its parameters and does not name them: {ADVICE}.")
        return own
    names = _by_group(groups, order)
    for number, (given, known) in enumerate(zip(names, own, strict=True)):
        for ours, theirs in zip(given, given if known is None else known, strict=True):
            if bare(ours) != bare(theirs):
                raise ValueError(
                    f"order has {ours!r} where group {number} of the checkpoint says {theirs!r}: "
                    "leave order= out, the checkpoint has the names."
                )
    return names


def _by_group(groups, order):
    """`order` group after group."""
    sizes = [len(group["params"]) for group in groups]
    if _is_by_group(order):
        if (given := [len(names) for names in order]) != sizes:
            raise ValueError(f"order has groups of {given} names, PyTorch's optimizer of {sizes}.")
        return order
    if len(order) != sum(sizes):
        hint = f" (fewer where a state is {FLATTENED})" if len(order) > sum(sizes) else ""
        raise ValueError(f"order has {len(order)} names, PyTorch's optimizer {sum(sizes)} parameters{hint}.")
    rest = iter(order)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _is_by_group(order):
    return any(not isinstance(name, str) for name in order)


def _own_names(group):
    """The names that a group has for its parameters, None if it has none."""
    if all(isinstance(key, str) for key in group["params"]):
        return group["params"]
    return group.get("param_names")

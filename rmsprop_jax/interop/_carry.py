"""Another framework's state into this package's and back, by names: what all dialects have in common."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from rmsprop_jax._tree import Tree
from rmsprop_jax.interop._arrays import as_numpy, whole_number
from rmsprop_jax.interop._moments import Moments, count_reasons, filled, moments_of, older, shapes_of
from rmsprop_jax.interop._names import Names, by_paths, nearest, paths
from rmsprop_jax.interop._report import LOGGER, Report, Reporter, tell


class Source(Protocol):
    """Another framework's optimizer, or its weights: one class for each dialect.

    Attributes:
      labels: its words for what it has of a parameter, a `Moments` of an optimizer.
      names: of its parameters.
      find: says which of `names` a name is that the user wrote, None if none.
      count: the number of its updates so far, None where it does not say.
      needs_count: whether a count that it does not say is asked for in any case.
      spare: fields of `labels` that it has whether it uses them or not.
      groups: as in :class:`Report`.
    """

    labels: Any
    names: Collection[str]
    find: Callable[[str], str | None]
    needs_count: bool = True
    spare: Collection[str] = ()
    groups: tuple[tuple[str, ...], ...] = ()

    @property
    def count(self) -> int | None: ...

    def arrays(self, name: str) -> tuple:
        """What it has of one of its parameters, as `labels`, None for what it has not."""

    def factor(self, name: str) -> float:
        """From its momentum buffer of one of its parameters to ours."""
        return 1.0


def carry(
    state: Tree,
    params: Tree,
    names: Names | None,
    source: Source,
    *,
    count: Any = None,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """`state` with what is in `source`; without `names`, its names are paths.

    Raises:
      ValueError: see `matched` and `count_for`, and for a state of shapes of which a part would be kept.
    """
    count = count_for(state, count, source)
    needed, pairs, shapes = _needed(state, params)
    names = {path: path for path in shapes} if names is None else names
    found, told = matched(needed, shapes, names, source, strict, pairs)
    new = {path: Moments(*arrays) for path, arrays in found.items()}
    for path in pairs:
        if z := new.pop(path, None):
            for end, part in (("real", np.real), ("imaginary", np.imag)):
                new[f"{path}/{end}"] = Moments(*(None if x is None else part(x) for x in z))
    if told.kept and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        kept = ", ".join(map(repr, told.kept))
        raise ValueError(
            f"Invalid state: it is only shapes, and {kept} keep what is in it: pass tx.init(params)."
        )
    state = filled(state, new, count)
    aged = older(state, told.kept)
    tell(told._replace(older=aged, updates=count if aged else 0, groups=source.groups), report, strict)
    return state


def outward(
    state: Tree, params: Tree, names: Names, source: Source, strict: bool = True
) -> tuple[dict[str, Moments], int]:
    """The moments in `state` by the names in `source`, laid out and scaled as there, and the count.

    Raises:
      ValueError: listing every path without a name, and every name that `source` does not know; not with
        ``strict=False``.
    """
    arrays, count = moments_of(state)
    needed, pairs, shapes = _needed(state, params)
    by_path, problems, missing = by_paths(names, shapes, needed, source.names)
    missing += [
        f"{name!r} is not among the other optimizer's parameters." for name in names if not source.find(name)
    ]
    raise_if([*missing, *problems] if strict else problems)
    found = {}
    for path, moments in _joined(arrays, pairs, _complex).items():
        name, axes = by_path.get(path, ("", None))
        if (key := source.find(name)) is not None:
            if moments.buffer is not None:
                moments = moments._replace(buffer=moments.buffer / source.factor(key))
            turned = (x if x is None or axes is None else x.transpose(np.argsort(axes)) for x in moments)
            found[key] = Moments(*turned)
    return found, 0 if count is None else count


def matched(
    needed: Mapping[str, tuple],
    shapes: Mapping[str, tuple[int, ...]],
    names: Names,
    source: Source,
    strict: bool = True,
    pairs: Collection[str] = (),
) -> tuple[dict[str, tuple], Report]:
    """The arrays that are needed, laid out as here, by path.

    Args:
      needed: the shapes of each path's arrays, None for one that is not needed.
      shapes: of all parameters.
      names: from their names to paths.
      source: where the arrays come from.
      strict: whether every parameter has to have a name, a place and a state.
      pairs: the paths of complex parameters that are two reals, here as there.

    Raises:
      ValueError: listing all that is missing, left over or misshapen; with ``strict=False`` all that is there
        in part or does not fit, or that nothing at all is left.
    """
    by_path, problems, missing = by_paths(names, shapes, needed, source.names)
    found: dict[str, tuple] = {}
    taken: dict[str, str] = {}
    for path, (name, axes) in by_path.items():
        key = source.find(name)
        if key is not None and taken.setdefault(key, name) != name:
            problems.append(f"{name!r} and {taken[key]!r} are both {key!r} there: which is it?")
        elif key is None or not _has_any(source, key):
            near = nearest(name, source.names) if key is None else ""
            if path in needed:
                missing.append(f"{name!r} has no {source.labels[0]}, which {path!r} needs{near}.")
        elif path in needed:
            found[path], wrong = _fitted(source, key, path, needed[path], axes, path in pairs)
            problems += [f"{name!r} has {problem}." for problem in wrong]
    raise_if([*missing, *problems] if strict or not found else problems)
    used = {source.find(by_path[path][0]) for path in found}
    left = tuple(name for name in source.names if name not in used and _has_any(source, name))
    return found, Report(tuple(found), tuple(path for path in needed if path not in found), left)


def _has_any(source, name):
    return any(x is not None for x in source.arrays(name))


def _fitted(source, name, path, shapes, axes, is_complex):
    """One parameter's arrays as here, and what is wrong with them."""
    arrays, problems = [], []
    fields = zip(source.labels._fields, source.labels, source.arrays(name), shapes, strict=True)
    for field, label, array, shape in fields:
        fitted = None
        if shape is None and array is not None and field not in source.spare:
            problems.append(f"{_a(label)}, for which this optimizer has no place")
        elif shape is not None and array is None:
            problems.append(f"no {label}, which {path!r} needs")
        elif shape is not None:
            try:
                fitted = _laid_out(as_numpy(array), field, path, shape, axes, is_complex)
            except ValueError as error:
                problems.append(f"{_a(label)} {error}")
            else:
                fitted = fitted * source.factor(name) if field == "buffer" else fitted
        arrays.append(fitted)
    return tuple(arrays), problems


def _laid_out(array, field, path, shape, axes, is_complex):
    """An array of the other framework's as here.

    Raises:
      ValueError: for one that does not fit, with what to say of it.
    """
    if field == "square" and np.iscomplexobj(array) and not is_complex:
        raise ValueError(
            "of complex numbers, two reals there: optax.contrib.split_real_and_imaginary(tx) has such"
        )
    if is_complex and not np.iscomplexobj(array):
        raise ValueError(f"of real numbers, {path!r} is complex")
    is_turned = axes is not None and array.ndim == len(axes)
    expected = tuple(shape[axes.index(i)] for i in range(len(axes))) if is_turned else tuple(shape)
    if array.shape != expected:
        raise ValueError(f"of shape {array.shape}, not {expected}, which {path!r} needs{_flat(array, shape)}")
    if field in Moments._fields and np.isnan(array).any():
        raise ValueError("with NaN in it")
    if field == "square" and (np.minimum(array.real, array.imag) < 0).any():
        raise ValueError("with numbers below 0 in it")
    return array if axes is None else array.transpose(axes)


def _flat(array, shape):
    """What to say of an array without a shape."""
    if array.ndim != 1 or len(shape) < 2:
        return ""
    return (
        ": flattened, as FSDP and DeepSpeed's ZeRO store it. FSDP.optim_state_dict, or "
        "deepspeed.checkpoint.ds_to_universal, gives each parameter's own"
    )


def count_for(state: Tree, count: Any, source: Source) -> int:
    """How many updates there were: `count`, the caller's, or what `source` says.

    Raises:
      ValueError: where neither says, and something in `state` depends on it or the source has to.
    """
    found = source.count
    if count is not None:
        return whole_number(count, "count")
    if found is not None:
        return found
    reasons = list(dict.fromkeys(count_reasons(state)))
    if source.needs_count or reasons:
        needs = f", which {' and '.join(reasons)} needs" if reasons else ""
        raise ValueError(f"The other state does not say how many updates it has seen{needs}: pass count=.")
    LOGGER.warning("The other state has no count of updates, 0 is stored: bias_correction would need count=.")
    return 0


def buffer_factor(theirs_has_it: bool, ours_has_it: bool, learning_rate: Any) -> float:
    """The factor from their momentum buffer to ours, given which of them has the learning rate in it.

    Ours is what Optax's trace holds: with the learning rate it is what is added to the parameters, -lr * b.
    """
    sign = -1.0 if ours_has_it else 1.0
    if theirs_has_it == ours_has_it:
        return sign
    lr = 0.0 if learning_rate is None else float(learning_rate)
    if not 0 < lr < float("inf"):
        raise ValueError(
            f"Invalid {learning_rate=}: the momentum buffers differ in it, expected one above 0."
        )
    return sign * (lr if ours_has_it else 1 / lr)


def raise_if(problems: Collection[str]) -> None:
    """Raises ValueError with all of them."""
    if problems:
        raise ValueError("\n  ".join(["The states do not fit:", *problems]))


def _a(label):
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"


def _needed(state, params):
    """The shapes of what a state holds, which of the parameters are two reals in it, and all their shapes."""
    needed, parameters = shapes_of(state), paths(params)
    pairs = [path for path in parameters if f"{path}/real" in needed and f"{path}/real" not in parameters]
    needed = _joined(needed, pairs, lambda real, imaginary: real)
    # Of the state's, also those of what is no array, such as a Python number.
    own = {path: next(x for x in moments if x is not None) for path, moments in needed.items()}
    return needed, pairs, {**own, **parameters}


def _joined(moments: Mapping[str, Moments], pairs: Collection[str], join: Callable) -> dict[str, Moments]:
    """With one in place of two, for complex parameters in `optax.contrib.split_real_and_imaginary`."""
    new = dict(moments)
    for path in pairs:
        parts = zip(new.pop(f"{path}/real"), new.pop(f"{path}/imaginary"), strict=True)
        new[path] = Moments(*(None if real is None else join(real, imaginary) for real, imaginary in parts))
    return new


def _complex(real, imaginary):
    z = np.empty(real.shape, np.result_type(real, np.complex64))
    z.real, z.imag = real, imaginary
    return z

"""Which array of another framework's goes where, what does not fit, and the report of both."""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from rmsprop_jax.interop._arrays import as_numpy
from rmsprop_jax.interop._moments import Moments
from rmsprop_jax.interop._names import FLATTENED, Names, by_paths, nearest

LOGGER = logging.getLogger("rmsprop_jax.interop")


class Source(Protocol):
    """Another framework's optimizer, or its weights: one class for each dialect."""

    labels: Any  # its words for the arrays that it has of a parameter, a `Moments` of an optimizer
    names: Collection[str]  # of its parameters
    find: Callable[[str], str | None]  # which of `names` a name is that the user wrote, None if none
    needs_count: bool = True  # whether the count is asked for in any case where it does not say
    spare: Collection[str] = ()  # fields of `labels` that it has whether it uses them or not
    groups: tuple[tuple[str, ...], ...] = ()  # as in `Report`

    @property
    def count(self) -> int | None:
        """The number of its updates so far, None where it does not say."""

    def arrays(self, name: str) -> tuple:
        """What it has of one of its parameters, as `labels`, None for what it has not."""

    def factor(self, name: str) -> float:
        """From its momentum buffer of one of its parameters to ours."""
        return 1.0


class Report(NamedTuple):
    """What became of each parameter when a state was carried over.

    Attributes:
      carried: the paths of those that have their state, or their value, from there.
      kept: the paths of those that have what was in the tree before: they have no name in `names`, or nothing
        under that name there (a new head, a frozen layer, one that was never stepped).
      left_behind: the names of those there that have no place here.
      older: those of `kept` that start anew beside a count that goes on.
      updates: that count.
      groups: the names in each of PyTorch's groups, where `order` alone says so and arrays of one shape are
        in several groups, so that another order would have fitted too.

    Example:
      >>> from rmsprop_jax import interop
      >>> print(interop.Report(("fc/kernel",), ("head/kernel",), ("fc2.weight",)))
      1 carried over. Kept as init made them: 'head/kernel'. Left behind: 'fc2.weight'.
    """

    carried: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    updates: int = 0
    groups: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.carried)} carried over."]
        if self.kept:
            parts.append(f"Kept as init made them: {_listed(self.kept)}.")
        if self.left_behind:
            parts.append(f"Left behind: {_listed(self.left_behind)}.")
        if self.older:
            parts.append(
                f"The count of {self.updates} updates holds for {_listed(self.older)} too: first steps are "
                "up to 1/sqrt(1 - decay) times too long with bias_correction, a warm-up is over. A part of "
                "optax.partition, as resume_torch(new_group=) makes one, has a count that starts at 0."
            )
        if self.groups:
            groups = "; ".join(f"group {i}: {_listed(group)}" for i, group in enumerate(self.groups))
            parts.append(f"By `order` alone, which nothing in the checkpoint confirms, {groups}.")
        return " ".join(parts)


Reporter = Callable[[Report], object]


def hand_over(report: Report, reporter: Reporter | None, strict: bool) -> None:
    """Hands the report over; without anybody to take it, logs one that is not strict or has a doubt."""
    if reporter is not None:
        reporter(report)
    elif not strict or report.groups:
        is_whole = not (report.kept or report.left_behind or report.groups)
        LOGGER.log(logging.INFO if is_whole else logging.WARNING, "%s", report)


def _listed(names):
    return ", ".join(map(repr, names))


def matched(
    needed: Mapping[str, tuple],
    shapes: Mapping[str, tuple[int, ...]],
    names: Names,
    source: Source,
    strict: bool = True,
    pairs: Collection[str] = (),
) -> tuple[dict[str, tuple], Report]:
    """The arrays that are needed, laid out as here, by path.

    `needed` has the shapes of each path's arrays, None for one that is not needed, `shapes` those of all
    parameters, `pairs` the paths of complex parameters that are two reals here.

    All that is missing, left over or misshapen is one error; with ``strict=False`` only what is there in part
    or does not fit, or that nothing at all is left.
    """
    by_path, problems, missing = by_paths(names, shapes, needed, source.names)
    keys = {path: source.find(name) for path, (name, _) in by_path.items()}
    problems += _doubles(by_path, keys)
    found = {}
    for path in filter(needed.__contains__, by_path):
        (name, axes), key = by_path[path], keys[path]
        if not _has_any(source, key):
            near = nearest(name, source.names) if key is None else ""
            missing.append(f"{name!r} has no {source.labels[0]}, which {path!r} needs{near}.")
        else:
            found[path], wrong = _fitted(source, key, path, needed[path], axes, path in pairs)
            problems += [f"{name!r} has {problem}." for problem in wrong]
    raise_if([*missing, *problems] if strict or not found else problems)
    return found, _report(found, needed, source, {keys[path] for path in found})


def _report(found, needed, source, used):
    left = tuple(name for name in source.names if name not in used and _has_any(source, name))
    return Report(tuple(found), tuple(path for path in needed if path not in found), left)


def _doubles(by_path, keys):
    """What is wrong where two names are one there."""
    first: dict[str, str] = {}
    for path, (name, _) in by_path.items():
        key = keys[path]
        if key is not None and first.setdefault(key, name) != name:
            yield f"{name!r} and {first[key]!r} are both {key!r} there: which is it?"


def _has_any(source, name):
    return name is not None and any(x is not None for x in source.arrays(name))


def _fitted(source, name, path, shapes, axes, is_complex):
    """One parameter's arrays as here, and what is wrong with them."""
    arrays, problems = [], []
    fields = zip(source.labels._fields, source.labels, source.arrays(name), shapes, strict=True)
    for field, label, array, shape in fields:
        fitted = None
        if shape is None:
            if array is not None and field not in source.spare:
                problems.append(f"{_a(label)}, for which this optimizer has no place")
        elif array is None:
            problems.append(f"no {label}, which {path!r} needs")
        else:
            try:
                fitted = _laid_out(as_numpy(array), path, shape, axes)
                if field in Moments._fields:
                    _check_moment(fitted, field, path, is_complex)
            except ValueError as error:
                problems.append(f"{_a(label)} {error}")
            else:
                fitted = fitted * source.factor(name) if field == "buffer" else fitted
        arrays.append(fitted)
    return tuple(arrays), problems


def _laid_out(array, path, shape, axes):
    """An array of the other framework's as here; ValueError for another shape, with what to say of it."""
    is_turned = axes is not None and array.ndim == len(axes)
    expected = tuple(shape[axes.index(i)] for i in range(len(axes))) if is_turned else tuple(shape)
    if array.shape != expected:
        hint = f" ({FLATTENED})" if array.ndim == 1 < len(shape) else ""
        raise ValueError(f"of shape {array.shape}, not {expected}, which {path!r} needs{hint}")
    return array if axes is None else array.transpose(axes)


def _check_moment(array, field, path, is_complex):
    """Raises ValueError for numbers that a moment cannot be, with what to say of them."""
    if is_complex and not np.iscomplexobj(array):
        raise ValueError(f"of real numbers, {path!r} is complex")
    if np.isnan(array).any():
        raise ValueError("with NaN in it")
    if field == "square":
        if np.iscomplexobj(array) and not is_complex:
            raise ValueError(
                "of complex numbers, two reals there: optax.contrib.split_real_and_imaginary(tx) has such"
            )
        if (np.minimum(array.real, array.imag) < 0).any():
            raise ValueError("with numbers below 0 in it")


def raise_if(problems: Collection[str]) -> None:
    """Raises ValueError with all of them."""
    if problems:
        raise ValueError("\n  ".join(["The states do not fit:", *problems]))


def _a(label):
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"

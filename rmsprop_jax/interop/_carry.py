"""Another framework's state into this package's and back, by names: what all dialects have in common."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from rmsprop_jax._tree import Tree
from rmsprop_jax.interop._arrays import whole_number
from rmsprop_jax.interop._moments import count_reasons, filled, moments, shapes_of
from rmsprop_jax.interop._names import Key, Names, Theirs, by_paths, matched, paths, raise_if
from rmsprop_jax.interop._report import LOGGER, Reporter, tell


def carried(
    state: Tree,
    params: Tree,
    names: Names,
    theirs: Theirs,
    count: int,
    strict: bool = True,
    report: Reporter | None = None,
) -> Tree:
    """`state` with what is under the other framework's names, see `matched`."""
    shapes = _shapes(params, shapes_of(state))
    pairs = _pairs(params, state)
    needed = _joined(shapes_of(state), pairs)
    arrays, told = matched(needed, shapes, names, theirs, strict, pairs)
    for what, path in list(arrays):
        if path in pairs:
            z = arrays.pop((what, path))
            arrays |= {(what, f"{path}/real"): z.real, (what, f"{path}/imaginary"): z.imag}
    if told.kept and any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        kept = ", ".join(map(repr, told.kept))
        raise ValueError(
            f"Invalid state: it is only shapes, and {kept} keep what is in it: pass tx.init(params)."
        )
    new = filled(state, arrays, count)
    tell(told, report, strict)
    return new


def named(
    state: Tree, params: Tree, names: Names, theirs: Theirs, strict: bool = True
) -> tuple[dict[Key, np.ndarray], int]:
    """The moments in `state` by the names in `theirs`, laid out as there, and the count.

    Raises:
      ValueError: listing every path without a name, and every name that `theirs` does not know; not with
        ``strict=False``.
    """
    arrays, count = moments(state)
    pairs = _pairs(params, state)
    by_path, problems, lax = by_paths(
        names, _shapes(params, shapes_of(state)), _joined(arrays, pairs), theirs.known
    )
    lax += [
        f"{name!r} is not among the other optimizer's parameters." for name in names if not theirs.find(name)
    ]
    raise_if([*lax, *problems] if strict else problems)
    for path in pairs:
        for what in ("E[g^2]", "E[g]", "b"):
            if (what, f"{path}/real") in arrays:
                real, imaginary = (arrays.pop((what, f"{path}/{part}")) for part in ("real", "imaginary"))
                z = np.empty(real.shape, np.result_type(real, np.complex64))
                z.real, z.imag = real, imaginary
                arrays[what, path] = z
    found = {}
    for (what, path), array in arrays.items():
        name, axes = by_path.get(path, ("", None))
        if (source := theirs.find(name)) is not None:
            found[what, source] = array if axes is None else array.transpose(np.argsort(axes))
    return found, 0 if count is None else count


def count_for(state: Tree, count: Any, found: int | None, always: bool = True) -> int:
    """How many updates there were: `count`, or what was `found` with the state.

    Args:
      state: the target.
      count: the caller's, None where not given.
      found: None where the other state does not say.
      always: whether to ask for one also where nothing in `state` shows that it depends on it.

    Raises:
      ValueError: where neither says, and something depends on it.
    """
    if count is not None:
        return whole_number(count, "count")
    if found is not None:
        return found
    reasons = list(dict.fromkeys(count_reasons(state)))
    if always or reasons:
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


def _shapes(params, needed):
    """Of all parameters: the arrays, and what else the state has moments of, such as a Python number's."""
    return {**{path: shape for (_, path), shape in needed.items()}, **paths(params)}


# Complex parameters in `optax.contrib.split_real_and_imaginary`: two leaves here for one there.


def _pairs(params: Tree, state: Tree) -> Collection[str]:
    """The paths of complex parameters whose moments are those of two reals."""
    needed = {path for _, path in shapes_of(state)}
    parameters = paths(params)
    return [path for path in parameters if f"{path}/real" in needed and f"{path}/real" not in parameters]


def _joined(keys, pairs):
    """Keys with one in place of each two, and what stands with them."""
    joined = dict.fromkeys(keys) if not isinstance(keys, Mapping) else dict(keys)
    for path in pairs:
        for what in ("E[g^2]", "E[g]", "b"):
            if (what, f"{path}/real") in joined:
                joined[what, path] = joined.pop((what, f"{path}/real"))
                del joined[what, f"{path}/imaginary"]
    return joined

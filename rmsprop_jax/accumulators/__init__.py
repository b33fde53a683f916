"""Accumulators stored in fewer bytes, and one for all the elements of a row or of a column.

What each takes and how close it stays::

    accumulator    bytes    stored rms / exact rms, standard deviation at decay 0.9 / 0.99 / 0.999
    "float32"      4        0
    "bfloat16"     2        0.2 / 0.6 / 1.5%
    "uint8"        1        6 / 11 / 12%
    "factored"     0.01     what a matrix of rank one leaves out

**Codes**, one for each element: a code has its parameter's shape and stands for its element alone, so that it
is sharded, masked, donated and saved as the parameter is, and XLA fuses encoding and decoding with the step.
Rounding follows :mod:`rmsprop_jax.rounding`: without bias, and it leaves nothing behind when the gradients
shrink.

**Means**, one for each row and one for each column: :class:`Factored`, of matrices, kernels and whatever else
has two large dimensions. A step moves no accumulators then, and the means are sharded as the rows and columns
are.

In a state, `nu` is the parameters' tree for "float32". Other accumulators' arrays stand in such trees under
the accumulator's name: ``{"uint8": tree}``, ``{"uint8(-40)": tree}``,
``{"factored": {"row_mean": tree, "column_mean": tree}}``. So checkpoints and serialisers keep the accumulator
with the arrays, and an optimizer refuses the state of another one; :func:`convert` turns one into the other.

**One of your own** is a hashable object of a subclass of :class:`Accumulator`, passed as ``accumulator=``.
Frozen dataclasses are, and two that are equal then share their compiled code. Of :class:`Codes` there are two
methods to write::

    @dataclass(frozen=True)
    class Float16Root(Codes):
        def encode(self, nu, threshold):
            return rounding.to_dtype(jnp.sqrt(nu), jnp.float16, threshold)

        def decode(self, codes):
            return jnp.square(codes.astype(jnp.float32))
"""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax

from rmsprop_jax._dtypes import dtype_of, is_wide
from rmsprop_jax._tree import SameTree, is_none, is_ours, map_rms_states, rms_states
from rmsprop_jax.accumulators._base import (
    Accumulator,
    Float32,
    Stored,
    Thresholds,
    from_stored,
    nu_of,
    thresholds_of,
    to_stored,
)
from rmsprop_jax.accumulators._codes import Bfloat16, Codes, Uint8
from rmsprop_jax.accumulators._factored import Factored

__all__ = [
    "NAMED",
    "Accumulator",
    "Bfloat16",
    "Codes",
    "Factored",
    "Float32",
    "Name",
    "Stored",
    "Thresholds",
    "Uint8",
    "convert",
    "decoded",
    "resolve",
    "stored_by",
]

Name: TypeAlias = Literal["float32", "bfloat16", "uint8", "factored"]
"""What `accumulator=` takes as a string, see `NAMED`."""

NAMED: dict[str, Accumulator] = {
    accumulator.name: accumulator for accumulator in (Float32(), Bfloat16(), Uint8(), Factored())
}


def convert(state: SameTree, accumulator: "Name | str | Accumulator") -> SameTree:
    """A state with its `nu` stored by another accumulator, such as a checkpoint's for a new setting.

    Args:
      state: this package's, inside any chain or wrapper; all else in it stays as it is.
      accumulator: what is to store `nu`, as for :func:`rmsprop_jax.rmsprop`; "float32" leaves float64 as it
        is.

    Returns:
      A state as ``init`` returns it for `accumulator`.

    Raises:
      ValueError: where there is no state of this package, or one of an accumulator whose class is not
        imported, and for a centred state and "factored".

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import accumulators, scale_by_rms
      >>> tx = scale_by_rms(accumulator="uint8")
      >>> _, state = tx.update(jnp.array([10.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> print(state.nu, accumulators.convert(state, "float32").nu)
      {'uint8': Array([213,   0], dtype=uint8)} [9.513657 0.      ]
    """
    target = resolve(accumulator)
    if not any(map(is_ours, rms_states(state))):
        hint = ", of a Flax NNX optimizer optimizer.opt_state" if hasattr(state, "opt_state") else ""
        raise ValueError(
            f"Invalid state: there is no ScaleByRmsState in this {type(state).__name__}. Pass what tx.init "
            f"or tx.update returned{hint}."
        )

    def converted(node):
        if not is_ours(node) or stored_by(node) == target:
            return node
        check_centered(target, node.mu is not None)
        numbers = decoded(node)
        leaves = enumerate(jax.tree.leaves(numbers))
        new = [to_stored(target, nu, thresholds_of(leaf, node.count)) for leaf, nu in leaves]
        return node._replace(nu=nu_of(target, [numbers] * (len(target.parts) or 1), new))

    return map_rms_states(converted, state)


def resolve(accumulator: "str | Accumulator") -> Accumulator:
    """The accumulator of that name, as a state has it too, or `accumulator` itself.

    Raises:
      ValueError: if it is neither.

    Example:
      >>> from rmsprop_jax import accumulators
      >>> print(accumulators.resolve("uint8(-40)"), accumulators.Uint8(-40).name)
      Uint8(exponent=-40) uint8(-40)
    """
    found = _by_name(accumulator) if isinstance(accumulator, str) else accumulator
    if not isinstance(found, Accumulator) or type(found).__hash__ is None:
        names = ", ".join(map(repr, NAMED))
        raise ValueError(
            f"Invalid accumulator: {accumulator=}, expected {names}, as a string, or a hashable object, such "
            "as of a frozen dataclass, that derives from accumulators.Accumulator; with encode and decode, "
            "from accumulators.Codes."
        )
    return found


def _by_name(name: str) -> Accumulator | None:
    """The accumulator of that `Accumulator.name`, None where no imported class makes one."""
    if name in NAMED:
        return NAMED[name]
    match = re.fullmatch(r"(\w+)\((.*)\)", name)
    for cls in reversed(list(_classes(Accumulator))) if match else ():  # type: ignore[type-abstract]
        if match and match[1] in (vars(cls).get("_title"), cls.__name__):
            try:
                return cls(*ast.literal_eval(f"({match[2]},)" if match[2] else "()"))
            except (SyntaxError, TypeError, ValueError):
                continue
    return None


def _classes(cls: type[Accumulator]) -> Iterator[type[Accumulator]]:
    for derived in cls.__subclasses__():
        if not inspect.isabstract(derived):
            yield derived
        yield from _classes(derived)


def stored_by(state: Any) -> Accumulator:
    """The accumulator that stores the `nu` of a :class:`rmsprop_jax.ScaleByRmsState`.

    Raises:
      ValueError: for one of one's own whose class is not imported.
    """
    nu = state.nu
    if isinstance(nu, Mapping) and len(nu) == 1 and isinstance(name := next(iter(nu)), str):
        accumulator = _by_name(name)
        if accumulator is not None and not _is_a_parameter(accumulator, nu):
            return accumulator
        if re.fullmatch(r"\w+\(.*\)", name):
            raise ValueError(
                f"Invalid state: {name!r} stores its nu, an accumulator that is not defined here. Import the "
                "module that defines its class."
            )
    return NAMED["float32"]


def _is_a_parameter(accumulator, nu):
    """Whether the name is that of a parameter, as float32 stores it, such as of a layer called "uint8"."""
    trees = accumulator.trees(nu)
    if accumulator.name.endswith(")") or trees is None or accumulator.parts:
        return trees is None
    return any(is_wide(dtype_of(x)) for x in jax.tree.leaves(trees))


def decoded(state: Any) -> Any:
    """The numbers of a state's `nu`: the parameters' tree, float32 or float64, in the parameters' shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import accumulators, scale_by_rms
      >>> state = scale_by_rms(initial_scale=1.0, accumulator="uint8").init({"w": jnp.zeros(2)})
      >>> print(accumulators.decoded(state))
      {'w': Array([1., 1.], dtype=float32)}
    """
    accumulator = stored_by(state)
    if accumulator == NAMED["float32"]:
        return state.nu
    trees = accumulator.trees(state.nu) or ()
    stored = zip(*map(jax.tree.leaves, trees), strict=True)
    numbers = [from_stored(accumulator, of_leaf) for of_leaf in stored]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), numbers)


def with_numbers(state: Any, numbers: Any, count: jax.typing.ArrayLike) -> Any:
    """A state whose `nu` stores other numbers, rounded as at update `count`.

    Args:
      state: of this package.
      numbers: the parameters' tree of arrays; where it has None, `nu` stays as it is.
      count: updates so far, an integer.
    """
    accumulator = stored_by(state)
    trees = accumulator.trees(state.nu) or ()
    new = list(zip(*map(jax.tree.leaves, trees), strict=True))
    for leaf, nu in enumerate(jax.tree.leaves(numbers, is_leaf=is_none)):
        if nu is not None:
            new[leaf] = to_stored(accumulator, nu, thresholds_of(leaf, count))
    return state._replace(nu=nu_of(accumulator, trees, new))


def check_centered(accumulator: Accumulator, centered: bool) -> None:
    """Raises ValueError for an accumulator whose savings `mu`, of the parameter's size, would undo."""
    if centered and not accumulator.elementwise:
        raise ValueError(
            f"Invalid accumulator: {accumulator.name!r} is not for centered=True, whose mu has the "
            "parameters' size; 'uint8' and 'bfloat16' are."
        )

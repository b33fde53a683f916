"""What a compiled program does, read from its text: kernels, copies, collectives, and bytes of memory."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "after-all",
}
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_SLICES = {"dynamic-slice", "gather", "slice"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # the operand that is written into the first one


class Operation(NamedTuple):
    """One line of a program.

    Attributes:
      kind: such as "fusion" or "copy".
      type: of the result, as text.
      operands: names of operations in the same computation; of a parameter, its number.
      rest: the attributes, as text.
      is_root: whether it is its computation's result.
    """

    kind: str
    type: str
    operands: list[str]
    rest: str
    is_root: bool

    def calls(self, key: str) -> list[str]:
        """The computations that an attribute names."""
        return re.findall(rf"\b{key}=%?([\w.-]+)", self.rest)

    @property
    def is_free(self) -> bool:
        """Whether nothing runs for it."""
        return self.kind in _FREE or self.kind.endswith("-done") or bool(_FREE_CALLS.search(self.rest))

    @property
    def is_prefetch(self) -> bool:
        """Whether it moves an array between a TPU's memory and its fast memory, beside the kernels."""
        return self.kind in ("copy-start", "slice-start")


class Program:
    """A compiled program, `Program(compiled.as_text())`, as far as one device runs it."""

    def __init__(self, text: str):
        self._parts: dict[str, dict[str, Operation]] = {}
        for line in text.splitlines():
            if begun := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
                part = self._parts[begun[2]] = {}
                if begun[1]:
                    self._entry = begun[2]
            elif found := _OPERATION.match(line):
                root, name, type_, kind, operands, rest = found.groups()
                names = [operands] if kind == "parameter" else re.findall(r"%([\w.-]+)", operands)
                part[name] = Operation(kind, type_, names, rest, root is not None)

    def kinds(self) -> Counter[str]:
        """How many operations of each kind there are in the entry and in what that calls."""
        return Counter(operation.kind for operation, _, _ in self._run(self._entry))

    def counts(self, least: int = 1024) -> dict[str, Any]:
        """What runs, but for the branches of conditionals.

        Args:
          least: an operation on arrays of fewer bytes is none of `kernels` and `copies`.

        Returns:
          kernels: operations on arrays, a loop's once.
          copies: those of them that copy an array.
          bytes: of memory, read and written, a loop's as often as it turns.
          collectives: by kind, the bytes that one device puts into each.
        """
        kernels, copies, moved, collectives = 0, 0, 0.0, {}
        for operation, types, times in self._run(self._entry):
            if operation.is_free:
                continue
            moved += times * self._moved(operation, types)
            for kind, put_in in self._collectives(operation, types):
                collectives.setdefault(kind, []).append(put_in)
            if not operation.is_prefetch and max(_bytes(t) for t in [operation.type, *types]) >= least:
                kernels += 1
                copies += operation.kind == "copy"
        return {"kernels": kernels, "copies": copies, "bytes": round(moved), "collectives": collectives}

    def _run(self, name: str, times: int = 1) -> Iterator[tuple[Operation, list[str], int]]:
        """Operations that run, with their operands' types, and how often."""
        part = self._parts[name]
        for operation in part.values():
            key = {"call": "to_apply", "async-start": "calls", "while": "body"}.get(operation.kind)
            inner = operation.calls(key) if key else []
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest)
            for called in inner:
                yield from self._run(called, times * (int(turns[1]) if turns else 1))
            if operation.kind == "while" or not inner:
                yield operation, [part[x].type for x in operation.operands if x in part], times

    def _moved(self, operation, types):
        """Bytes of memory that an operation reads and writes."""
        if operation.is_prefetch:
            ends = _arrays(operation.type)[:2]
            return min(size for size, _ in ends) * sum(in_memory for _, in_memory in ends)
        if operation.kind.endswith("-start"):
            return 2 * sum(map(_in_memory, types))
        if operation.kind == "fusion":
            inner = self._parts[operation.calls("calls")[0]]
        else:  # as a fusion of one
            names = [f"operand {i}" for i in range(len(types))]
            inner = {
                name: Operation("parameter", types[i], [str(i)], "", False) for i, name in enumerate(names)
            }
            inner["root"] = operation._replace(operands=names, is_root=True)
        return _fusion(inner, operation.type, types)

    def _collectives(self, operation, types):
        """Kind and bytes of the collectives in an operation: on a TPU, also inside of a fusion."""
        if (kind := operation.kind.removesuffix("-start")) in _COLLECTIVES:
            yield kind, sum(map(_bytes, types))
        elif operation.kind == "fusion":
            (called,) = operation.calls("calls")
            inner = self._parts[called]
            for other in inner.values():
                operands = [inner[x].type for x in other.operands if x in inner]
                for kind, put_in in self._collectives(other, operands):
                    yield "reduce-scatter" if called.startswith("all-reduce-scatter") else kind, put_in


def _fusion(inner, type_, types):
    """Bytes that a fusion reads and writes: each operand and each result once.

    What slices or updates its first operand touches that part of it alone.
    """

    def through_bitcasts(name):
        return through_bitcasts(inner[name].operands[0]) if inner[name].kind == "bitcast" else name

    def touched(operation):
        if operation.kind in _SLICES:
            return _bytes(operation.type)
        return _bytes(inner[operation.operands[_UPDATES[operation.kind]]].type)

    root = next(name for name, operation in inner.items() if operation.is_root)
    written, moved = _arrays(type_), 0.0
    results = inner[root].operands if inner[root].kind == "tuple" else [root] * len(written)
    for name, (size, in_memory) in zip(results, written, strict=True):
        result = inner[through_bitcasts(name)]
        moved += in_memory * (min(size, touched(result)) if result.kind in _UPDATES else size)
    users = {name: [] for name in inner}
    for operation in inner.values():
        if operation.kind not in ("parameter", "bitcast"):
            for at, name in enumerate(map(through_bitcasts, operation.operands)):
                in_part = at == 0 and (operation.kind in _SLICES or operation.kind in _UPDATES)
                users[name].append(touched(operation) if in_part else math.inf)
    for name, operation in inner.items():
        if operation.kind == "parameter":
            whole = _in_memory(types[int(operation.operands[0])])
            moved += min(whole, sum(users[name])) if users[name] else whole
    return moved


def _arrays(type_: str) -> list[tuple[float, bool]]:
    """Bytes of each array of a type, and whether it lies in memory.

    In a TPU's layouts S(1) is the fast memory on the chip, and other numbers are smaller ones.
    """
    return [
        (
            math.prod(map(int, filter(None, sizes.split(",")))) * _item(dtype),
            not re.search(r"S\([1-9]\)", layout),
        )
        for dtype, sizes, layout in _ARRAY.findall(type_)
    ]


def _item(dtype):
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else {"pred": 1}.get(dtype, 0)


def _bytes(type_):
    return sum(size for size, _ in _arrays(type_))


def _in_memory(type_):
    return sum(size for size, in_memory in _arrays(type_) if in_memory)

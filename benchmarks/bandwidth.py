"""The memory's bandwidth, by four kernels after STREAM (McCalpin, 1995), jitted, on the threads a step has.

    copy              b = s * a            8 bytes per element
    triad             c = a + s * b       12
    copy in place     a = s * a            8
    triad in place    a = a + s * b       12

A processor that writes to another place reads that place first, which STREAM does not count: in place,
nothing is hidden. An optimizer's step is in place, so the fastest of the four is its limit.
"""

import statistics

import jax
import jax.numpy as jnp

KERNELS = {  # bytes per element, kernel; the first argument's buffer takes the result
    "copy": (8, lambda out, a: 0.999 * a),
    "triad": (12, lambda out, a, b: a + 0.001 * b),
    "copy in place": (8, lambda a: 0.999 * a),
    "triad in place": (12, lambda a, b: a + 0.001 * b),
}


class Stream:
    """A side for `side_by_side.alternate`."""

    def __init__(self, name, size):
        per_element, kernel = KERNELS[name]
        self.bytes = per_element * size
        count = kernel.__code__.co_argcount
        self.arrays = [jnp.full(size, 0.1 + i) for i in range(count)]
        self.run = jax.jit(kernel, donate_argnums=0, keep_unused=True).lower(*self.arrays).compile()

    def __call__(self):
        self.arrays[0] = self.run(*self.arrays)
        return self.arrays[0]


def streams(size: int) -> dict[str, Stream]:
    return {name: Stream(name, size) for name in KERNELS}


def gigabytes_per_second(sides: dict[str, Stream], seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of every kernel, from its median time."""
    return {name: side.bytes / statistics.median(seconds[name]) / 1e9 for name, side in sides.items()}

"""The classes of older versions' pickles.

A pickle names a class by its module. Where that module is gone or its class has changed, this one stands in:
then `pickle.load` works, and :func:`rmsprop_jax.interop.upgrade` has something to read.
"""

import sys
from typing import Any, NamedTuple

import jax

from rmsprop_jax import _tree
from rmsprop_jax.accumulators import Factored
from rmsprop_jax.diagnostics import WatchState

__all__ = ["Factored", "FactoredMoments", "ScaleByRmsState", "WatchState"]


class ScaleByRmsState(_tree.ScaleByRmsState):
    """0.2.0's, in `_states`, with an accumulator that has no name in an attribute beside the fields."""

    accumulator: Any = None


class FactoredMoments(NamedTuple):
    """0.2.0's, in `_factored`: what "factored" stored for one parameter."""

    row_mean: jax.Array
    column_mean: jax.Array


# `_measurement` had 0.1.0's WatchState, `_states` and `_factored` the classes of 0.2.0.
for _name in ("_measurement", "_states", "_factored"):
    sys.modules[f"rmsprop_jax.{_name}"] = sys.modules[__name__]

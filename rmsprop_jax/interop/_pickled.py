"""The classes that pickles of older versions name, in the modules where those versions had them.

A pickle names a class by its module. What was in one that is gone, or had another form, is found here, so that
:func:`rmsprop_jax.interop.upgrade` can read it.
"""

import sys
from typing import Any, NamedTuple

import jax

from rmsprop_jax import _tree
from rmsprop_jax.accumulators import Factored
from rmsprop_jax.diagnostics import WatchState

__all__ = ["Factored", "FactoredMoments", "ScaleByRmsState", "WatchState"]


class ScaleByRmsState(_tree.ScaleByRmsState):
    """Of 0.2.0, in `_states`: with an accumulator that had no name in an attribute, no field."""

    accumulator: Any = None


class FactoredMoments(NamedTuple):
    """Of 0.2.0, in `_factored`: what "factored" stored of one parameter."""

    row_mean: jax.Array
    column_mean: jax.Array


for _name in ("_measurement", "_states", "_factored"):  # 0.1.0's WatchState, then 0.2.0's classes
    sys.modules[f"rmsprop_jax.{_name}"] = sys.modules[__name__]

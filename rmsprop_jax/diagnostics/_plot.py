"""One picture of a run: `plot`."""

import io
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from rmsprop_jax.diagnostics._figures import Measurement
from rmsprop_jax.diagnostics._run import on_host

# What is drawn: the field, its title, the colours and their ends.
_PANELS = (
    ("gradient_rms", "Gradient, rms\ngrey: none, or not finite", "viridis", None),
    ("effective_rate", "Effective learning rate, median\nwhat gradients are multiplied by", "viridis", None),
    (
        "update_ratio",
        "Update / parameter\nblue: hardly moves; red: replaced each time",
        "RdYlBu_r",
        (1e-5, 1),
    ),
    ("staleness", "Accumulator / gradient\nred: steps made for larger gradients", "RdBu_r", (1e-2, 1e2)),
)


def plot(history: Measurement | Sequence[Measurement], path: str | os.PathLike[str] | None = None) -> Any:
    """One picture of a run: four figures as colours, a row for each layer, the steps from left to right.

    Grey is where there is no number: a gradient of zero, or one that is not finite.

    Args:
      history: as for :func:`advise`.
      path: where to save it, by its ending as PNG, PDF or SVG; None for nowhere.

    Returns:
      The :class:`matplotlib.figure.Figure`, which notebooks show as the last line of a cell.

    Raises:
      ImportError: without matplotlib, which nothing else here needs.
      ValueError: for a history without measurements, or of several runs.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError as error:
        raise ImportError("diagnostics.plot draws with matplotlib: pip install matplotlib.") from error

    run = on_host(history)
    names = run.names
    if not names or not len(run.step):
        raise ValueError("Invalid history: there are no measurements in it to plot.")
    figure = Figure(figsize=(13, 3.2 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    edges = _edges(run.step)
    for axes, (field, title, colours, ends) in zip(panels.flat, _PANELS, strict=True):
        values = run.array(field).T
        values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        low, high = ends or _ends(values)
        mesh = axes.pcolormesh(
            edges, np.arange(len(names) + 1), values, norm=LogNorm(low, high), cmap=colours, rasterized=True
        )
        axes.hlines(np.arange(1, len(names)), *edges[[0, -1]], color="white", lw=1)
        axes.set_facecolor("0.75")
        axes.set_title(title, fontsize=10)
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=12, extend="both" if ends else "neither")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].invert_yaxis()
    for axes in panels[1]:
        axes.set_xlabel("step")
    if path is not None:
        figure.savefig(path, dpi=130)
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


def _edges(step):
    """The borders of the columns: each measurement stands until the next."""
    widths = np.diff(step, append=step[-1] + (step[-1] - step[-2] if len(step) > 1 else 1))
    return np.concatenate([step[:1], step + widths])


def _ends(values):
    """The colours' ends: all values but for the farthest hundredth, a decade at least."""
    if not np.any(np.isfinite(values)):
        return 0.1, 1.0
    low, high = np.nanquantile(values, [0.005, 0.995])
    return (low, high) if high > 10 * low else (high / np.sqrt(10), high * np.sqrt(10))

"""What every benchmark has: a command line, rows that are printed as they come, and results that are kept."""

import argparse
import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import rmsprop_jax

RESULTS = Path(__file__).parent / "results"
_EXAMPLES = Path(__file__).parents[1] / "examples"


def parser(name: str, doc: str, short: str) -> argparse.ArgumentParser:
    """With the benchmark's question, and --short, for which `short` says what it leaves out."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=doc.split("\n\n")[0])
    made.add_argument("--short", action="store_true", help=short)
    return made


def printed(heading: str, rows: Iterable[Any], line: Callable[[Any], str], write=print) -> list[Any]:
    """All rows, each printed as soon as it is measured; beside a bar of tqdm, `write` is `tqdm.write`."""
    done = []
    print(heading, flush=True)
    for row in rows:
        write(line(row))
        sys.stdout.flush()
        done.append(row)
    return done


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    above, *below = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([above, "|" + "---|" * len(columns), *below])


def spread(ratio: dict[str, float], digits: int = 2) -> str:
    """What `side_by_side.ratio` returns: the median, and the interquartile range."""
    median, low, high = (f"{ratio[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def keep(name: str, data: dict[str, Any], *packages: str) -> None:
    """Saves the data with the versions that they were measured with, and says where."""
    print(save(name, {"environment": environment(*packages), **data}))


def save(name: str, data: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Keeps the data as NAME.json, or as NAME_gpu.json when that is where they were measured."""
    path = result(name, folder=folder)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    return unfinished.replace(path)


def save_picture(name: str, figure, grid: str = "both") -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, alpha=0.2)
    figure.savefig(result(name, ".png"), dpi=130)


def result(name: str, suffix: str = ".json", folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend = jax.default_backend()
    return folder / f"{name}{'' if backend == 'cpu' else f'_{backend}'}{suffix}"


def stored(name: str) -> dict[str, Any] | None:
    """The data that `save` left, if there are any."""
    path = result(name)
    return json.loads(path.read_text()) if path.exists() else None


def environment(*packages: str) -> dict[str, Any]:
    """What was measured on what."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"CPU, {_processor()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "optax", *packages)},
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def installed(*packages: str) -> tuple[str, ...]:
    """Those of the packages that are installed: the peers are optional, and so are their rows."""
    return tuple(name for name in packages if importlib.util.find_spec(name))


def accumulators() -> tuple[str, ...]:
    """The names of the package's accumulators: whoever adds one has it measured."""
    return tuple(rmsprop_jax.accumulators.NAMED)


def example(name: str):
    """The module of one of the examples, which import each other from where they are."""
    if str(_EXAMPLES) not in sys.path:
        sys.path.append(str(_EXAMPLES))
    return importlib.import_module(name)

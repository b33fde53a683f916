"""Is a published result reproduced? DQN on MinAtar (Young and Tian, 2019), and the same with other RMSProps.

Trains the agent of examples/dqn_minatar.py with PyTorch's centred RMSProp, which is the authors', on three
games; on breakout also with what one may take for it: eps under the root (`conventions.dqn`, which is
`optax.rmsprop(centered=True)`), without centring, and Adam at its default rate. PyTorch's own run, on MinAtar
itself, stands beside. Each run is a process with one thread, two of them at a time; together they take some
eight hours on two cores. After Ctrl-C the same command goes on from what was saved.

    python -m benchmarks minatar                all that is not finished, then the table and a picture
    python -m benchmarks minatar --collect      the table and the picture of what there is
    python -m benchmarks minatar --frames 5000000 --seeds 30 --workers 1     as published, for a GPU
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks._frame import environment, example, installed, markdown, parser, save, save_picture

ROOT = Path(__file__).parents[1]
POINT = 50_000  # frames: of each point of a curve
AUTHORS, TORCH = "conventions.torch", "torch.optim.RMSprop"
_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Job(NamedTuple):
    game: str
    optimizer: str
    frames: int
    seeds: int


JOBS = [
    Job("breakout", AUTHORS, 1_000_000, 3),
    *(Job("breakout", name, 500_000, 3) for name in ("conventions.dqn", "uncentred", "adam")),
    Job("freeway", AUTHORS, 1_000_000, 3),
    Job("asterix", AUTHORS, 1_500_000, 3),
    Job("breakout", TORCH, 200_000, 3),
]


def commands(job: Job, folder: Path) -> list[list[str]]:
    """What has still to be run, one command after the other."""
    options = ["--game", job.game, "--frames", str(job.frames)]
    if job.optimizer == TORCH:
        files = [folder / f"{seed}.json" for seed in range(job.seeds)]
        program = [sys.executable, "-m", "benchmarks.minatar_torch", *options]
        return [
            [*program, "--seed", str(seed), "--out", str(file)]
            for seed, file in enumerate(files)
            if not file.exists()
        ]
    if any(run["frames"] >= job.frames for run in runs(folder)):
        return []
    program = [sys.executable, "examples/dqn_minatar.py", *options, "--optimizer", job.optimizer]
    resume = ["--resume"] if (folder / "returns.json").exists() else []
    return [[*program, "--seeds", str(job.seeds), "--out", str(folder), *resume]]


def runs(folder: Path) -> list[dict[str, Any]]:
    """What has been run in a job's folder: of PyTorch a file for each seed, else one file."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def carried_out(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.environ.get("XLA_FLAGS", "") + ("" if jax.default_backend() != "cpu" else f" {_THREAD}")
    for command in commands(job, folder):
        print(" ".join(command[1:]), flush=True)
        with open(folder / "log.txt", "a") as log:
            env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
            subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=True)


def curve(episodes: list[tuple[int, float]], frames: int) -> list[float]:
    """The mean return of the episodes that ended in each POINT frames, NaN where none did."""
    ends, scores = np.array(episodes, float).reshape(-1, 2).T
    of = ((ends - 1) // POINT).astype(int)
    points = -(-frames // POINT)
    total, number = (np.bincount(of, weights, points) for weights in (scores, None))
    return (total / np.where(number > 0, number, np.nan)).tolist()


def summary(job: Job, folder: Path) -> dict[str, Any] | None:
    """A job's curves, a list for each seed; None where nothing has been run."""
    done = runs(folder)
    if not done:
        return None
    frames = min(run["frames"] for run in done)
    episodes = [seed for run in done for seed in run["episodes"]]
    return {
        "game": job.game,
        "optimizer": job.optimizer,
        "frames": frames,
        "seeds": len(episodes),
        "frames_per_second": sum(run["frames"] * run["seeds"] for run in done)
        / sum(run["seconds"] for run in done),
        "curves": [[round(value, 3) for value in curve(seed, frames)] for seed in episodes],
    }


def of_seeds(row: dict[str, Any], frames: int) -> str:
    """The mean return in the POINT frames up to `frames`, over the seeds, and their lowest and highest."""
    if frames > row["frames"]:
        return "not run"
    values = [seed[frames // POINT - 1] for seed in row["curves"]]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(data: dict[str, Any]) -> str:
    """Published against reached."""
    rows = {row["game"]: row for row in data["rows"] if row["optimizer"] == AUTHORS}
    cells = []
    for game, points in example("dqn_minatar").PUBLISHED.items():
        row = rows.get(game, {"frames": 0, "seeds": "-"})
        for frames, mean in points:
            cells.append(
                [game.replace("_", " "), f"{frames:,}", f"{mean:g}", of_seeds(row, frames), f"{row['seeds']}"]
            )
    return markdown(["game", "frames", "published, 30 seeds", "reached here", "seeds"], cells)


def optimizers(data: dict[str, Any]) -> str:
    """What breakout comes to with each optimizer in JAX."""
    rows = [row for row in data["rows"] if row["game"] == "breakout" and row["optimizer"] != TORCH]
    marks = [100_000, 200_000, 300_000, 500_000]
    cells = [[f"`{row['optimizer']}`", *(of_seeds(row, frames) for frames in marks)] for row in rows]
    return markdown(["frames", *(f"{frames:,}" for frames in marks)], cells)


def beside_torch(data: dict[str, Any]) -> str:
    """Breakout with the authors' optimizer, here and in PyTorch."""
    rows = [row for row in data["rows"] if row["game"] == "breakout" and row["optimizer"] in (AUTHORS, TORCH)]
    marks = [50_000, 100_000, 150_000, 200_000]
    cells = [
        [
            f"`{row['optimizer']}`",
            *(of_seeds(row, frames) for frames in marks),
            f"{row['seeds']}",
            f"{row['frames_per_second']:,.0f}",
        ]
        for row in rows
    ]
    return markdown(["frames", *(f"{frames:,}" for frames in marks), "seeds", "frames a second"], cells)


def draw(rows: list[dict[str, Any]]) -> None:
    published = example("dqn_minatar").PUBLISHED
    games = [game for game in published if any(row["game"] == game for row in rows)]
    figure = Figure(figsize=(4.2 * len(games), 4.2), layout="constrained")
    for axes, game in zip(figure.subplots(1, len(games), squeeze=False)[0], games, strict=True):
        for row in rows:
            if row["game"] == game and row["optimizer"] != TORCH:
                curves = np.array(row["curves"])
                frames = (np.arange(curves.shape[1]) + 0.5) * POINT
                (line,) = axes.plot(frames, curves.mean(axis=0), lw=2, label=row["optimizer"])
                axes.fill_between(
                    frames, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15
                )
        shown = [point for point in published[game] if point[0] <= 2_000_000]
        axes.plot(*zip(*shown, strict=True), "ko", label="published, 30 seeds")
        axes.set(title=game, xlabel="frames", ylim=(0, None), xlim=(0, None))
        axes.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("mean return")
    save_picture("minatar", figure)


def main(argv=None) -> None:
    options = parser("minatar", __doc__, "one run of 6,000 frames, and PyTorch's where it is installed")
    options.add_argument("--collect", action="store_true", help="run nothing")
    options.add_argument("--frames", type=int, help="of every run, in place of the list's")
    options.add_argument("--seeds", type=int, help="of every run, in place of the list's")
    options.add_argument("--workers", type=int, default=2, help="runs at a time")
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "minatar", help="folder for the runs")
    args = options.parse_args(argv)
    jobs = JOBS
    if args.short:
        args.out, args.frames, args.seeds = Path(tempfile.mkdtemp()), 6000, 1
        jobs = [JOBS[0], JOBS[-1]]
    if len(installed("torch", "minatar")) < 2:
        jobs = [job for job in jobs if job.optimizer != TORCH]
    given = {name: value for name in ("frames", "seeds") if (value := getattr(args, name)) is not None}
    folders = {job._replace(**given): args.out / f"{job.game}-{job.optimizer}" for job in jobs}
    if not args.collect:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(carried_out, folders, folders.values()))
    rows = [row for job, folder in folders.items() if (row := summary(job, folder))]
    data = {"environment": environment("flax", "pgx"), "rows": rows}
    print(table(data), optimizers(data), beside_torch(data), sep="\n\n")
    if not args.short:
        draw(rows)
        print(save("minatar", data))


if __name__ == "__main__":
    main()

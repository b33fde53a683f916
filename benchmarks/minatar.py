"""Is a published result reproduced? DQN on MinAtar (Young and Tian, 2019), and the same with other RMSProps.

Trains the agent of examples/dqn_minatar.py with PyTorch's centred RMSProp, which is the authors': four games,
each at the step size of its published curve, and breakout at the other step sizes of the paper's sweep. On
breakout also with what one may take for it, at three step sizes each: eps under the root (`conventions.dqn`,
which is `optax.rmsprop(centered=True)`), without centring, and Adam. PyTorch's own run, on MinAtar itself,
stands beside. Together they take some five hours on two cores, one process after the other; two seeds in a
process take no longer than one. After Ctrl-C the same command goes on; what the results have is not run
again.

    python -m benchmarks minatar                all that is not finished, the data kept after each run
    python -m benchmarks minatar --collect      the tables and pictures of what there is
    python -m benchmarks minatar --frames 5000000 --seeds 30     as published, for a GPU
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks._frame import environment, example, installed, markdown, parser, save, save_picture, stored

ROOT = Path(__file__).parents[1]
POINT = 25_000  # frames between two points of a curve
AUTHORS, TORCH = "conventions.torch", "torch.optim.RMSprop"

dqn = example("dqn_minatar")


class Job(NamedTuple):
    game: str
    optimizer: str
    log2_step_size: int
    frames: int  # of each seed
    seeds: int

    @property
    def name(self) -> str:
        return f"{self.game}-{self.optimizer}-2^{self.log2_step_size}"


def as_published(game: str, frames: int, seeds: int) -> Job:
    return Job(game, AUTHORS, dqn.PUBLISHED[game]["log2_step_size"], frames, seeds)


OTHERS = {"conventions.dqn": (-8, -7, -6), "uncentred": (-10, -9, -8), "adam": (-12, -11, -10)}
JOBS = [
    as_published("breakout", 1_000_000, 3),
    as_published("space_invaders", 500_000, 2),
    as_published("freeway", 1_000_000, 2),
    as_published("asterix", 1_500_000, 2),
    *(Job("breakout", AUTHORS, log2, 500_000, 2) for log2 in (-8, -10, -11, -12, -13)),
    *(Job("breakout", name, log2, 300_000, 2) for name, tried in OTHERS.items() for log2 in tried),
    as_published("breakout", 200_000, 2)._replace(optimizer=TORCH),
]


def command(job: Job, folder: Path) -> list[str] | None:
    """What has still to be run, None where nothing has."""
    options = ["--game", job.game, "--step-size", str(2.0**job.log2_step_size), "--frames", str(job.frames)]
    has = done(folder)
    if has is not None and has["frames"] >= job.frames:
        return None
    options += ["--seeds", str(job.seeds)]
    if job.optimizer == TORCH:
        return [sys.executable, "-m", "benchmarks.minatar_torch", *options, "--out", str(returns(folder))]
    program = [sys.executable, "examples/dqn_minatar.py", *options, "--optimizer", job.optimizer]
    resume = [] if has is None else ["--resume"]
    return [*program, "--out", str(folder), *resume]


def returns(folder: Path) -> Path:
    return folder / "returns.json"


def done(folder: Path) -> dict[str, Any] | None:
    """What a job has come to, if it has begun."""
    return json.loads(returns(folder).read_text()) if returns(folder).exists() else None


def carried_out(job: Job, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (program := command(job, folder)) is None:
        return
    print(" ".join(program[1:]), flush=True)
    with open(folder / "log.txt", "a") as log:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(program, cwd=ROOT, env=env, stdout=log, stderr=log, check=True)


def summary(job: Job, folder: Path) -> dict[str, Any] | None:
    """A job's curves, a list for each seed; None where no point has been reached.

    A curve has the mean return of the last 100 episodes, as the published ones, every POINT frames.
    """
    if (has := done(folder)) is None or has["frames"] < POINT:
        return None
    frames = np.arange(POINT, has["frames"] + 1, POINT)
    curves = [dqn.last_100(episodes, frames) for episodes in has["episodes"]]
    return {
        "game": job.game,
        "optimizer": job.optimizer,
        "log2_step_size": job.log2_step_size,
        "frames": has["frames"],
        "seeds": has["seeds"],
        "frames_per_second": round(has["frames"] * has["seeds"] / has["seconds"]),
        "device": environment()["device"],
        "curves": [np.round(curve, 2).tolist() for curve in curves],
    }


def together(jobs: dict[Job, Path], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each job of which there is something: what was run here, or what was kept if that is more."""
    rows = []
    for job, folder in jobs.items():
        found = [row for row in (summary(job, folder), row_of(kept, job)) if row]
        rows += sorted(found, key=lambda row: (row["frames"], row["seeds"]))[-1:]
    return rows


def row_of(rows: list[dict[str, Any]], job: Job) -> dict[str, Any] | None:
    names = ("game", "optimizer", "log2_step_size")
    same = (row for row in rows if all(row[name] == getattr(job, name) for name in names))
    return next(same, None)


def finished(job: Job, rows: list[dict[str, Any]]) -> bool:
    row = row_of(rows, job)
    return row is not None and row["frames"] >= job.frames and row["seeds"] >= job.seeds


def of_seeds(row: dict[str, Any], frames: int) -> str:
    """The mean return of the last 100 episodes at `frames`, over the seeds, and their lowest and highest."""
    if frames > row["frames"]:
        return "not run"
    values = [seed[frames // POINT - 1] for seed in row["curves"]]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def power(row: dict[str, Any]) -> str:
    return f"2^{row['log2_step_size']}"


def at_published_step_size(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = [row for row in rows if row["optimizer"] == AUTHORS]
    return [row for row in ours if row["log2_step_size"] == dqn.PUBLISHED[row["game"]]["log2_step_size"]]


def table(data: dict[str, Any]) -> str:
    """Published against reached, at a quarter, the half and the whole of each run."""
    cells = []
    for row in at_published_step_size(data["rows"]):
        points = len(row["curves"][0])
        for frames in (POINT * (points // part) for part in (4, 2, 1)):
            line = np.interp(frames, *np.transpose(dqn.PUBLISHED[row["game"]]["curve"]))
            name = row["game"].replace("_", " ")
            seeds = f"{row['seeds']}"
            cells.append([name, power(row), f"{frames:,}", f"{line:.1f}", of_seeds(row, frames), seeds])
    return markdown(["game", "step size", "frames", "published, 30 seeds", "reached here", "seeds"], cells)


def sensitivity(data: dict[str, Any]) -> str:
    """Breakout at the step sizes of the paper's sweep, after as many frames as all of them have."""
    of = {row["log2_step_size"]: row for row in _breakout(data) if row["optimizer"] == AUTHORS}
    final = dict(dqn.PUBLISHED["breakout"]["final_return_by_log2_step_size"])
    frames = POINT * min((len(row["curves"][0]) for row in of.values()), default=0)
    cells = [
        [power(row), f"{final[log2]:.1f}", of_seeds(row, frames), f"{row['seeds']}"]
        for log2, row in sorted(of.items())
    ]
    return markdown(["step size", "published, 5,000,000 frames", f"reached here, {frames:,}", "seeds"], cells)


def optimizers(data: dict[str, Any]) -> str:
    """What breakout comes to with each optimizer in JAX, at each of its step sizes."""
    marks = (100_000, 200_000, 300_000)
    order = [AUTHORS, *OTHERS]
    ours = (row for row in _breakout(data) if row["optimizer"] in order)
    cells = [
        [f"`{row['optimizer']}`", power(row), *(of_seeds(row, frames) for frames in marks), f"{row['seeds']}"]
        for row in sorted(ours, key=lambda row: (order.index(row["optimizer"]), row["log2_step_size"]))
    ]
    return markdown(["", "step size", *(f"{frames:,} frames" for frames in marks), "seeds"], cells)


def beside_torch(data: dict[str, Any]) -> str:
    """Breakout with the authors' optimizer, here and in PyTorch."""
    torch = [row for row in _breakout(data) if row["optimizer"] == TORCH]
    rows = [row for row in at_published_step_size(data["rows"]) if row["game"] == "breakout"] + torch
    marks = (50_000, 100_000, 150_000, 200_000)
    cells = [
        [f"`{row['optimizer']}`", *(of_seeds(row, frames) for frames in marks), f"{row['seeds']}"]
        for row in rows
    ]
    return markdown(["", *(f"{frames:,} frames" for frames in marks), "seeds"], cells)


def _breakout(data):
    return [row for row in data["rows"] if row["game"] == "breakout"]


def draw(rows: list[dict[str, Any]]) -> None:
    """A picture for each game: the published curve, and the runs at its step size."""
    for row in at_published_step_size(rows):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        curves = np.array(row["curves"])
        frames = POINT * np.arange(1, curves.shape[1] + 1)
        label = f"reached here, {row['seeds']} seed{'s' * (row['seeds'] > 1)}"
        (line,) = axes.plot(frames, curves.mean(axis=0), lw=2, label=label)
        axes.fill_between(frames, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.2)
        curve = dqn.PUBLISHED[row["game"]]["curve"]
        axes.plot(*zip(*curve, strict=True), "k--", lw=1.5, label="published, 30 seeds")
        title = f"{row['game'].replace('_', ' ')}, step size {power(row)}"
        axes.set(title=title, xlabel="frames", xlim=(0, 1.5 * frames[-1]), ylim=(0, None))
        axes.set_ylabel("mean return of the last 100 episodes")
        axes.legend(frameon=False, loc="lower right")
        save_picture(f"minatar_{row['game']}", figure)


def main(argv=None) -> None:
    options = parser("minatar", __doc__, "one run of 25,000 frames, and PyTorch's where it is installed")
    options.add_argument("--collect", action="store_true", help="run nothing")
    options.add_argument("--frames", type=int, help="of every run, in place of the list's")
    options.add_argument("--seeds", type=int, help="of every run, in place of the list's")
    options.add_argument("--out", type=Path, default=ROOT / "runs" / "minatar", help="folder for the runs")
    args = options.parse_args(argv)
    jobs, kept = JOBS, (stored("minatar") or {"rows": []})["rows"]
    if args.short:
        args.out, args.frames, args.seeds, kept = Path(tempfile.mkdtemp()), 25_000, 1, []
        jobs = [JOBS[0], JOBS[-1]]
    given = {name: value for name in ("frames", "seeds") if (value := getattr(args, name)) is not None}
    folders = {job._replace(**given): args.out / job.name for job in jobs}

    def data():
        return {"environment": environment("flax", "pgx"), "rows": together(folders, kept)}

    if not args.collect:
        missing = [job for job in folders if not finished(job, kept)]
        if len(installed("torch", "minatar")) < 2:
            missing = [job for job in missing if job.optimizer != TORCH]
        for job in missing:
            carried_out(job, folders[job])
            if not args.short:
                save("minatar", data())
    found = data()
    print(*(show(found) for show in (table, sensitivity, optimizers, beside_torch)), sep="\n\n")
    if not args.short:
        draw(found["rows"])
        print(save("minatar", found))


if __name__ == "__main__":
    main()

"""What the tests of the examples share: one copied and run alone, its module, a look at its picture."""

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
# Programs compile as users' do, not as `make test-all`: so they run four times as fast, and XLA's older code
# for CPUs let actor_critic.py wait for ever in 6 of 20 runs.
AS_USERS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


def copied(name, folder):
    """The example, copied into an empty folder with what its first lines tell to copy with it."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    for file in (f"{name}.py", *re.findall(r"Copy (\S+\.\w+) with this file", source)):
        shutil.copy(EXAMPLES / file, folder)
    return folder / f"{name}.py"


def run_alone(name, folder, *args, change=""):
    """What the example, with this change, prints there, in a process of its own, without warnings."""
    command = [sys.executable, copied(name, folder).name, *map(str, args)]
    if change:
        command[1:2] = ["-c", f"import {name} as example\n{change}\nexample.main()"]
    env = os.environ | AS_USERS | {"PYTHONPATH": str(ROOT)}  # as if the package were installed
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\w+Warning:", done.stderr), done.stderr
    return done.stdout


def example(name):
    """The example's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


def run(name, *args):
    """What the example prints, run in this process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        example(name).main()
    return output.getvalue()


def assert_drawn(path, most=0.5):
    """The picture is there, and is more than a blank sheet; at most so much of it is ink."""
    import matplotlib.image  # of the examples' extra; this file is collected without it too

    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < np.mean(pixels.min(axis=2) < 0.9) < most

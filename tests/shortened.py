"""What the tests of the examples share: running one in this process, and a look at its picture."""

import contextlib
import importlib
import io
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    """The example's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module(name)


def run(name, *args):
    """What the example prints, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        example(name).main([*map(str, args)])
    return output.getvalue()


def assert_drawn(path, most=0.5):
    """The picture is there, and is more than a blank sheet; at most so much of it is ink."""
    import matplotlib.image  # of the examples' extra; this file is collected without it too

    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    assert 0.01 < np.mean(pixels.min(axis=2) < 0.9) < most

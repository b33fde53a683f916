"""examples/resume_from_torch.py, shortened."""

import pytest
from shortened import example


# What Flax, scikit-learn and matplotlib deprecate of their own is theirs.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_loss_does_not_notice(tmp_path):
    for name in ("torch", "flax", "sklearn", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed: make peers")
    difference = example("resume_from_torch").main(["--steps=60", f"--folder={tmp_path}"])
    assert difference["carried over"].max() < 1e-5  # float32, of losses of about 1, over 30 steps
    assert difference["weights only"].max() > 1e-3
    assert (tmp_path / "losses.png").stat().st_size > 10_000

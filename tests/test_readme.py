"""The READMEs' figures are those of the kept results."""

import pytest

from benchmarks import readme


@pytest.mark.parametrize(
    ("path", "whole", "names"),
    [
        (readme.README, False, ["step", "costs", "rows", "memory", "diagnostics"]),
        (
            readme.REPORT,
            True,
            ["step", "step_gpu", "eager", "trace", "train", "scale", "scale_gpu", "quality", "tasks"],
        ),
    ],
    ids=["README.md", "benchmarks/README.md"],
)
def test_the_tables_are_the_results(path, whole, names):
    text = path.read_text()
    for name in names:
        assert f"<!-- {name} -->\n" in text
    assert readme.filled(text, whole) == text, "python -m benchmarks readme"

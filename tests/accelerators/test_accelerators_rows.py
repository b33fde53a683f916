"""Rows of a table of 128 columns: what a step moves does not depend on the table's size."""

from compiled_for import MARKS, on_each_chip

from benchmarks import accelerators

pytestmark = MARKS


@on_each_chip
def test_a_step_moves_what_belongs_to_the_touched_rows(chip):
    row = accelerators.compiled_step(chip, "rows.exact")
    assert row["bytes"] < 200 * row["elements"]
    assert row["temporary"] < 20 * row["elements"]

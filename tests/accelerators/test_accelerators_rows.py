"""Rows of a table: what a step moves does not depend on the table's size."""

import jax
import pytest
from compiled_for import MARKS, on_each_chip
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import _aot, accelerators
from rmsprop_jax import apply_updates, rmsprop, rows

pytestmark = MARKS


@on_each_chip
def test_a_step_moves_what_belongs_to_the_touched_rows(chip):
    row = accelerators.compiled_step(chip, "rows.exact")
    assert row["bytes"] < 200 * row["elements"]
    assert row["temporary"] < 20 * row["elements"]


@pytest.mark.parametrize("is_row_major", [False, True])
def test_on_a_tpu_narrow_rows_need_a_row_major_layout(is_row_major):
    """As docs/embeddings.md says; should XLA choose it by itself one day, the page can be shorter."""
    mesh, num_rows, touched, columns = _aot.devices("v5e"), 1_000_000, 4096, 64
    tx, table = rows.exact(rmsprop(1e-3)), jax.ShapeDtypeStruct((num_rows, columns), "float32")
    kept = table, jax.eval_shape(tx.init, table)

    def step(kept, ids, values):
        table, state = kept
        updates, state = tx.update(rows.RowGradient(ids, values, num_rows), state)
        return apply_updates(table, updates), state

    sharding, options = NamedSharding(mesh, PartitionSpec()), {}
    if is_row_major:
        row_major = Format(Layout(major_to_minor=(0, 1)), sharding)
        layouts = jax.tree.map(lambda x: row_major if x.ndim == 2 else sharding, kept)
        options = {"in_shardings": (layouts, sharding, sharding), "out_shardings": layouts}
    values = jax.ShapeDtypeStruct((touched, columns), "float32")
    arguments = _aot.placed((kept, jax.ShapeDtypeStruct((touched,), "int32"), values), mesh)
    counts = _aot.counts(_aot.compiled(step, *arguments, donate_argnums=0, **options))
    assert (counts["bytes"] < 200 * values.size) == is_row_major
    assert (counts["temporary"] < 1e6) == is_row_major

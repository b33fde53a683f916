"""What XLA makes of a step with a table: nothing of the table's size is computed, nothing compiled twice."""

import jax
import jax.numpy as jnp
import pytest
from helpers import compilations
from tables import both, squared

from rmsprop_jax import apply_updates, rows


def linear(found, params, target):
    return jnp.mean(found @ params) + jnp.mean(target)


def training_step(tx, loss_fn=squared):
    def step(tables, params, state, ids, target):
        loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, target)
        updates, state = tx.update(grads, state, (tables, params))
        tables, params = apply_updates((tables, params), updates)
        return tables, params, state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


@pytest.mark.parametrize("loss_fn", [squared, linear])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias_correction": True},
        {"on_rows": rows.lazy, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    ],
    ids=["exact", "corrected", "lazy"],
)
def test_nothing_of_the_tables_size_is_computed_or_copied(options, loss_fn):
    """In the compiled step, whatever has the table's number of rows is an argument, or written in place."""
    num_rows, temporary = [100_003, 400_009], []
    for n in num_rows:
        table, params = jnp.ones((n, 8)), jnp.ones(8)
        tx = both(**options)
        step = training_step(tx, loss_fn)
        lowered = step.lower(table, params, tx.init((table, params)), jnp.zeros(64, jnp.int32), jnp.ones(64))
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes >= table.nbytes * 2
        for line in compiled.as_text().splitlines():
            result = line.split(" = ")[-1].split("(")[0]
            if str(n) in result:
                operation = result.split()[-1]
                assert operation not in {"copy", "convert", "broadcast", "add", "multiply", "select"}, line
    assert temporary[0] == temporary[1] < 64 * 8 * 4 * 40


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_no_gradient_of_the_tables_shape_is_traced(dtype):
    table, params = jnp.ones((1009, 8), dtype), jnp.ones(8, dtype)
    gradient = rows.value_and_grad(squared)
    jaxpr = jax.make_jaxpr(gradient)(table, jnp.zeros(4, jnp.int32), params, jnp.ones(4, dtype))
    made = [v.aval.shape for equation in jaxpr.jaxpr.eqns for v in equation.outvars]
    assert (1009, 8) not in made
    assert (4, 8) in made


def test_the_second_call_compiles_nothing():
    table, params = jnp.ones((50, 8)), jnp.ones(8)
    tx = both()
    step, state = training_step(tx), tx.init((table, params))
    ids, other_ids, target = jnp.arange(4), jnp.arange(1, 5), jnp.ones(4)
    table, params, state, _ = step(table, params, state, ids, target)
    with compilations(stage="compile") as events:
        table, params, state, _ = jax.block_until_ready(step(table, params, state, other_ids, target))
    assert events == []

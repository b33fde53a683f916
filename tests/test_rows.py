"""Row updates: the dense trajectory in exact mode, TensorFlow's in lazy mode, at a cost of rows."""

import importlib
import math
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import monitoring
from jax.experimental import sparse

from rmsprop_jax import apply_updates, rmsprop, rows, warmup
from rmsprop_jax.rows import RowGradient

EXACT = {
    "default": {"decay": 0.99},
    "long_memory": {"decay": 0.999},
    "outside": {"decay": 0.99, "eps_in_sqrt": False},
    "from_one": {"decay": 0.99, "initial_scale": 1.0},
    "corrected": {"decay": 0.99, "bias_correction": True},
    "short_memory": {"decay": 0.5, "eps": 1e-3},
}
LAZY = {
    "plain": {},
    "outside": {"eps_in_sqrt": False, "initial_scale": 1.0},
    "momentum": {"momentum": 0.8},
    "centered_momentum": {"momentum": 0.8, "centered": True},
    "lr_after_momentum": {"momentum": 0.8, "lr_in_momentum": False, "weight_decay": 0.01},
    "weight_decay": {"weight_decay": 0.01},
}


def rare_rows(steps, batch, num_rows, width, seed=0):
    """Ids [steps, batch] and values [steps, batch, width]: row 0 in every batch, the last row in none,
    the one before it in the first and the last, the others ever more rarely; with duplicates."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.zipf(1.5, (steps, batch)) - 1, num_rows - 3).astype(np.int32)
    ids[:, 0] = 0
    ids[[0, -1], 1] = num_rows - 2
    return ids, rng.normal(size=(steps, batch, width)).astype(np.float32)


def run_rows(tx, table, ids, values):
    def step(carry, batch):
        table, state = carry
        updates, state = tx.update(RowGradient(*batch, table.shape[0]), state, table)
        return (apply_updates(table, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, (ids, values))[0])((table, tx.init(table)))


def run_dense(tx, table, ids, values):
    def step(carry, batch):
        table, state = carry
        gradient = RowGradient(*batch, table.shape[0]).to_dense()
        updates, state = tx.update(gradient, state, table)
        return (optax.apply_updates(table, updates), state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, (ids, values))[0])((table, tx.init(table)))


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("form", EXACT.values(), ids=EXACT)
def test_exact_is_the_dense_trajectory(form, schedule, x64):
    """As close to the dense optimizer in float64 as the dense optimizer in float32 is."""
    learning_rate = warmup(optax.cosine_decay_schedule(1e-2, 4000), steps=500) if schedule else 1e-2
    ids, values = rare_rows(steps=4000, batch=12, num_rows=40, width=3)
    assert np.all(ids[1:-1] != 38)  # a row that is not touched for 3,998 steps
    table = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)), jnp.float32)

    ours, state = run_rows(rows.rmsprop(learning_rate, **form), table, ids, values)
    dense, _ = run_dense(rmsprop(learning_rate, **form), table, ids, values)
    truth, _ = run_dense(
        rmsprop(learning_rate, **form), table.astype(jnp.float64), ids, values.astype(np.float64)
    )
    assert ours.dtype == jnp.float32
    moved = np.abs(truth - table).max()
    assert moved > 0.1
    rounding = np.abs(dense - truth).max()
    assert rounding < 1e-4
    assert np.abs(ours - truth).max() <= 2 * rounding
    np.testing.assert_array_equal(ours[39], table[39])
    assert state.last[39] == 0
    assert state.last[38] == state.last[0] == 4000


@pytest.mark.parametrize("form", EXACT.values(), ids=EXACT)
def test_exact_is_optax_rmsprop_too(form):
    ids, values = rare_rows(steps=1000, batch=8, num_rows=20, width=2)
    table = jnp.ones((20, 2))
    ours, _ = run_rows(rows.rmsprop(1e-3, **form), table, ids, values)
    dense, _ = run_dense(optax.rmsprop(1e-3, **form), table, ids, values)
    # A thousand steps of up to 1e-3, each rounded to the table's 6e-8; optax corrects in another order.
    np.testing.assert_allclose(ours, dense, rtol=0, atol=2e-5)


@pytest.mark.parametrize("missed", [0, 1, 1000, 12_345_678, 2**31 - 2])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 3e-8])
def test_what_was_missed_is_decayed_accurately(decay, missed):
    """To a few float32 roundings, however long it was, of the decay given, not the float32 nearest to it."""
    tx = rows.rmsprop(1.0, decay=decay, eps=0.0)
    state = tx.init(jnp.zeros((1, 1)))
    rms = state.dense[0]._replace(count=jnp.int32(missed), nu=jnp.full((1, 1), 2.0))
    state = state._replace(dense=(rms, *state.dense[1:]))
    gradient = RowGradient(jnp.array([0]), jnp.zeros((1, 1)), 1)
    _, state = tx.update(gradient, state)
    steps = missed + 1
    expected = 2.0 * math.exp(steps * math.log1p(-(1 - decay))) if decay else 0.0
    found = float(state.dense[0].nu[0, 0])
    assert found == pytest.approx(expected, rel=3e-6, abs=1e-37)
    assert state.last[0] == steps


def test_a_traced_decay_is_decayed_to_its_own_precision():
    tx = optax.inject_hyperparams(rows.rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.99)
    table = jnp.ones((3, 2))
    state = tx.init(table)
    step = jax.jit(tx.update)
    dense = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, decay=0.99)
    dense_state, dense_table = dense.init(table), table
    for ids in ([0, 1], [1, 1], [1, 2], [0, 2]):
        gradient = RowGradient(jnp.array(ids), jnp.array([[1.0, 2.0], [3.0, -4.0]]), 3)
        updates, state = step(gradient, state, table)
        table = apply_updates(table, updates)
        dense_updates, dense_state = dense.update(gradient.to_dense(), dense_state, dense_table)
        dense_table = optax.apply_updates(dense_table, dense_updates)
    np.testing.assert_allclose(table, dense_table, rtol=1e-6)


def lazy_reference(table, ids, values, *, lr, decay=0.9, eps=1e-8, eps_in_sqrt=True, initial_scale=0.0,
                   momentum=None, centered=False, lr_in_momentum=True, weight_decay=0.0):  # fmt: skip
    """What TensorFlow's sparse kernels do, row by row, in float64."""
    p, nu = table.astype(float), np.full(table.shape, initial_scale)
    mu, b = np.zeros(table.shape), np.zeros(table.shape)
    for step_ids, step_values in zip(ids, values, strict=True):
        for i in np.unique(step_ids):
            g = step_values[step_ids == i].astype(float).sum(axis=0)
            nu_i = decay * nu[i] + (1 - decay) * g**2
            if centered:
                nu_i = decay * nu[i] + decay * (1 - decay) * (g - mu[i]) ** 2
                mu[i] = decay * mu[i] + (1 - decay) * g
            nu[i] = nu_i
            u = g / np.sqrt(nu[i] + eps) if eps_in_sqrt else g / (np.sqrt(nu[i]) + eps)
            if momentum is None:
                step = lr * u
            elif lr_in_momentum:
                step = b[i] = momentum * b[i] + lr * u
            else:
                b[i] = momentum * b[i] + u
                step = lr * b[i]
            p[i] -= step + lr * weight_decay * p[i]
    return p


@pytest.mark.parametrize("form", LAZY.values(), ids=LAZY)
def test_lazy_leaves_untouched_rows_as_they_are(form):
    ids, values = rare_rows(steps=60, batch=6, num_rows=12, width=2)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(12, 2)), jnp.float32)
    ours, state = run_rows(rows.rmsprop(0.01, eps=1e-3, mode="lazy", **form), table, ids, values)
    expected = lazy_reference(np.asarray(table), ids, values, lr=0.01, eps=1e-3, **form)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-6)  # 60 steps of 0.01 in float32
    never = np.setdiff1d(np.arange(12), ids)
    np.testing.assert_array_equal(ours[never], table[never])
    assert state.last is None


IDS = hnp.arrays(np.int32, st.sampled_from([0, 1, 9]), elements=st.integers(-9, 15))


@settings(max_examples=40, deadline=None)
@given(ids=IDS, data=st.data())
def test_any_ids_are_summed_or_dropped(ids, data):
    """Duplicates, no ids at all, ids out of range on either side."""
    floats = st.floats(-100, 100, width=16)
    values = data.draw(hnp.arrays(np.float32, (len(ids), 2), elements=floats))
    gradient = RowGradient(jnp.asarray(ids), jnp.asarray(values), 7)
    expected = np.zeros((7, 2))
    for i, value in zip(ids, values, strict=True):
        if 0 <= i < 7:
            expected[i] += value
    np.testing.assert_allclose(gradient.to_dense(), expected, rtol=1e-5, atol=1e-4)
    summed = gradient.summed()
    kept = np.asarray(summed.indices)
    assert sorted(kept[kept < 7]) == sorted({i for i in ids.tolist() if 0 <= i < 7})
    assert np.all((kept >= 0) & (kept <= 7))
    np.testing.assert_allclose(summed.to_dense(), expected, rtol=1e-5, atol=1e-4)

    table = jnp.asarray(np.arange(14.0, dtype=np.float32).reshape(7, 2))
    for mode in ("exact", "lazy"):
        tx = rows.rmsprop(0.1, mode=mode)
        updates, state = tx.update(gradient, tx.init(table), table)
        # Sums of numbers up to 100 depend on their order by 1e-4; where those are small, so may the step.
        clear = np.abs(expected) > 0.1
        new, moved = apply_updates(table, updates), 0.1 * expected / np.sqrt(0.1 * expected**2 + 1e-8)
        np.testing.assert_allclose((new - table)[clear], -moved[clear], rtol=1e-3)
        untouched = np.setdiff1d(np.arange(7), ids)
        np.testing.assert_array_equal(new[untouched], table[untouched])
        np.testing.assert_array_equal(state.dense[0].nu[untouched], 0)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_ids_of_every_integer_dtype(dtype):
    table = jnp.arange(600.0).reshape(300, 2)
    ids = jnp.asarray(np.array([0, 100, np.iinfo(dtype).max], dtype))
    value, (grads, _) = rows.value_and_grad(lambda found, _: jnp.sum(found))(table, ids, None)
    inside = [i for i in (0, 100, np.iinfo(dtype).max) if i < 300]
    assert value == table[np.array(inside)].sum()
    assert grads.to_dense().sum() == 2 * len(inside)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tables_of_other_dtypes(dtype, x64):
    """Gradients and updates in the table's dtype, arithmetic and state in float32 at least."""
    ids, values = rare_rows(steps=50, batch=6, num_rows=10, width=2)
    table = jnp.ones((10, 2), dtype)
    ours, state = run_rows(rows.rmsprop(0.05, decay=0.999), table, ids, jnp.asarray(values, dtype))
    assert ours.dtype == dtype
    wide = jnp.float64 if dtype == "float64" else jnp.float32
    assert state.dense[0].nu.dtype == wide
    truth, _ = run_dense(
        rmsprop(0.05, decay=0.999), table.astype(jnp.float64), ids, values.astype(np.float64)
    )
    # Each of the 50 steps, up to 1.6 large, rounds gradient, update and table once.
    tolerance = 50 * 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ours.astype(np.float64), truth, rtol=0, atol=tolerance)


def test_numeric_rules_hold_row_by_row():
    """Zero stays zero, a huge gradient is finite, and NaN is seen in its own row alone."""
    tx = rows.rmsprop(1.0, decay=0.75, eps=0.0)
    gradient = RowGradient(jnp.array([0, 1, 2]), jnp.array([[0.0], [3e38], [jnp.nan]]), 4)
    updates, state = tx.update(gradient, tx.init(jnp.zeros((4, 1))))
    dense = updates.to_dense()[:, 0]
    np.testing.assert_array_equal(dense[jnp.array([0, 3])], 0.0)
    assert dense[1] == pytest.approx(-2.0)
    assert jnp.isnan(dense[2])
    assert jnp.all(jnp.isfinite(state.dense[0].nu[:2]))


def squared(found, params, target):
    return jnp.mean((found @ params - target) ** 2)


def linear(found, params, target):
    return jnp.mean(found @ params) + jnp.mean(target)


def training_step(tx, loss_fn=squared):
    def step(tables, params, state, ids, target):
        loss, grads = rows.value_and_grad(loss_fn)(tables, ids, params, target)
        updates, state = tx.update(grads, state, (tables, params))
        tables, params = apply_updates((tables, params), updates)
        return tables, params, state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def both(**options):
    return optax.partition({"rows": rows.rmsprop(1e-2, **options), "dense": rmsprop(1e-2)}, ("rows", "dense"))


@pytest.mark.parametrize("loss_fn", [squared, linear])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias_correction": True}, {"mode": "lazy", "momentum": 0.9, "centered": True, "weight_decay": 0.1}],
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
    compiled = []

    def listen(event, *_, **__):
        compiled.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        table, params, state, _ = jax.block_until_ready(step(table, params, state, other_ids, target))
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "compile" in event]


def test_value_and_grad_is_that_of_the_dense_loss():
    """Two tables, one of them used twice, ids of any shape, dense parameters, auxiliary output."""
    tables = {"in": jnp.arange(12.0).reshape(6, 2), "out": jnp.arange(10.0).reshape(5, 2) / 7}
    ids = {"in": jnp.array([[1, 1], [4, 0]]), "out": {"near": jnp.array([2, 3]), "far": jnp.array([[2, 4]])}}
    params = {"bias": jnp.array(0.3)}

    def loss_fn(found, params, scale, power=2):
        assert found["in"].shape == (2, 2, 2)
        assert found["out"]["far"].shape == (1, 2, 2)
        scores = jnp.einsum("abk,bk->a", found["in"], found["out"]["near"]) + params["bias"]
        return jnp.sum(scores**power) * scale + jnp.sum(jnp.sin(found["out"]["far"])), {"scores": scores}

    def dense_loss(tables, params):
        found = jax.tree.map(lambda table, some: jax.tree.map(lambda i: table[i], some), tables, ids)
        return loss_fn(found, params, 0.1, power=2)

    (value, aux), (grads, param_grads) = rows.value_and_grad(loss_fn, has_aux=True)(
        tables, ids, params, 0.1, power=2
    )
    (dense_value, dense_aux), (dense_grads, dense_param_grads) = jax.value_and_grad(
        dense_loss, argnums=(0, 1), has_aux=True
    )(tables, params)
    assert value == dense_value
    np.testing.assert_array_equal(aux["scores"], dense_aux["scores"])
    np.testing.assert_allclose(param_grads["bias"], dense_param_grads["bias"], rtol=1e-6)
    for name, gradient in grads.items():
        assert isinstance(gradient, RowGradient)
        assert gradient.shape == tables[name].shape
        np.testing.assert_allclose(gradient.to_dense(), dense_grads[name], rtol=1e-5)


def test_out_of_range_ids_look_up_zeros():
    table = jnp.ones((3, 2))
    gradient = rows.value_and_grad(lambda x, _: (jnp.sum(x), x), has_aux=True)
    (_, found), _ = gradient(table, jnp.array([-1, 0, 3]), None)
    np.testing.assert_array_equal(found[:, 0], [0.0, 1.0, 0.0])


def test_from_bcoo_and_to_dense():
    dense = jnp.zeros((5, 2)).at[jnp.array([1, 3])].set(7.0)
    matrix = sparse.BCOO.fromdense(dense, n_dense=1, nse=4)  # two of its four are padding
    np.testing.assert_array_equal(RowGradient.from_bcoo(matrix).to_dense(), dense)
    with pytest.raises(ValueError, match=r"n_batch=0 and n_sparse=1.*n_sparse=2"):
        RowGradient.from_bcoo(sparse.BCOO.fromdense(dense))


def test_state_goes_through_tree_map_params_and_eval_shape():
    """With `last` a leaf per table, state can be laid out, saved and restored like any other."""
    tables = {"a": jnp.ones((4, 2)), "b": jnp.ones((3, 5)), "c": None}
    tx = rows.rmsprop(0.1)
    state = tx.init(tables)
    shapes = jax.eval_shape(tx.init, tables)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
    marked = optax.tree.map_params(tx, lambda x: "table", state, transform_non_params=lambda x: "other")
    assert marked.last == {"a": "table", "b": "table", "c": None}
    assert marked.dense[0].nu == {"a": "table", "b": "table", "c": None}
    assert marked.dense[0].count == "other"


def test_check_names_the_first_bad_id():
    rows.check(np.arange(5), 5)
    rows.check(jnp.zeros((0,), jnp.int32), 5)
    rows.check([], 5)
    with pytest.raises(ValueError, match=r"Id 5 at position 2 .* 5 rows"):
        rows.check(jnp.array([0, 4, 5, -1]), 5)
    with pytest.raises(ValueError, match=r"Id -7 at position \(1, 0\)"):
        rows.check(np.array([[0, 1], [-7, 9]]), 5)
    with pytest.raises(ValueError, match="float"):
        rows.check(np.array([0.5]), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, r"momentum: .*mode='lazy'"),
        ({"centered": True}, r"centered: .*mode='lazy'"),
        ({"weight_decay": 0.1}, r"weight_decay: .*mode='lazy'"),
        ({"mode": "fast"}, "mode='fast', expected 'exact' or 'lazy'"),
        ({"decay": 1.0}, "Invalid decay"),
        ({"eps": -1.0}, "Invalid eps"),
        ({"mode": "lazy", "momentum": 2.0}, "Invalid momentum"),
        ({"bias_correction": True, "initial_scale": 1.0}, "initial_scale"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        rows.rmsprop(0.1, **options)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (jnp.ones((5, 2)), r"\['t'\] is .*, expected a RowGradient"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 2)), 6), r"\['t'\] has shape \(6, 2\).*\(5, 2\)"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 3)), 5), r"\['t'\] has shape \(5, 3\).*\(5, 2\)"),
        (RowGradient(jnp.array([0, 1]), jnp.ones((1, 2)), 5), r"\['t'\] has indices of shape \(2,\)"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 2), jnp.int32), 5), r"\['t'\] has dtype int32"),
    ],
    ids=["dense", "rows", "width", "lengths", "dtype"],
)
def test_gradients_that_do_not_fit(gradient, message):
    tx = rows.rmsprop(0.1)
    state = tx.init({"t": jnp.ones((5, 2))})
    with pytest.raises(ValueError, match=message):
        tx.update({"t": gradient}, state)


def test_trees_that_do_not_fit():
    tx = rows.rmsprop(0.1)
    gradient = RowGradient(jnp.array([0]), jnp.ones((1, 2)), 5)
    with pytest.raises(ValueError, match=r"lack \['t'\] and add \['u'\]"):
        tx.update({"u": gradient}, tx.init({"t": jnp.ones((5, 2))}))
    with pytest.raises(ValueError, match=r"\['t'\] is a scalar"):
        tx.init({"t": jnp.ones(())})
    with pytest.raises(ValueError, match="tree of ids"):
        rows.value_and_grad(squared)({"t": jnp.ones((5, 2))}, {"u": jnp.array([0])}, None)
    with pytest.raises(ValueError, match=r"Ids for table \['t'\] have dtype float32"):
        rows.value_and_grad(squared)({"t": jnp.ones((5, 2))}, {"t": jnp.array([0.0])}, None)


def test_flax_nnx_recipe():
    """The model of the module's docstring: the same losses and parameters as with everything dense."""
    nnx = pytest.importorskip("flax.nnx")

    class Tagger(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(30, 8, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, tokens):
            return self.out(self.embed(tokens) * (tokens > 0)[..., None])

    def loss_of(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    graphdef, tables, params = nnx.split(Tagger(nnx.Rngs(0)), nnx.PathContains("embed"), ...)

    def loss_fn(found, params, tokens, labels):
        model = nnx.merge(graphdef, tables, params)
        model.embed = lambda tokens: found["embed"]["embedding"][...]
        return loss_of(model(tokens), labels)

    def by_rows(tables, params, tokens, labels):
        ids = jax.tree.map(lambda table: tokens, tables)
        return rows.value_and_grad(loss_fn)(tables, ids, params, tokens, labels)

    def dense_loss(both, tokens, labels):
        return loss_of(nnx.merge(graphdef, *both)(tokens), labels)

    check_against_dense(by_rows, jax.value_and_grad(dense_loss), tables, params)


def test_flax_linen_recipe():
    nn = pytest.importorskip("flax.linen")

    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            found = nn.Embed(30, 8, name="embed")(tokens)
            return nn.Dense(3)(found * (tokens > 0)[..., None])

    def loss_of(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    model = Tagger()
    params = model.init(jax.random.key(0), jnp.zeros((2, 4), jnp.int32))["params"]
    tables = {"embed": params.pop("embed")}

    def loss_fn(found, params, tokens, labels):
        def lookup(next_call, args, kwargs, context):
            is_lookup = context.module.name == "embed" and context.method_name == "__call__"
            return found["embed"]["embedding"] if is_lookup else next_call(*args, **kwargs)

        with nn.intercept_methods(lookup):
            return loss_of(model.apply({"params": params | tables}, tokens), labels)

    def by_rows(tables, params, tokens, labels):
        ids = {"embed": {"embedding": tokens}}
        return rows.value_and_grad(loss_fn)(tables, ids, params, tokens, labels)

    def dense_loss(both, tokens, labels):
        tables, params = both
        return loss_of(model.apply({"params": params | tables}, tokens), labels)

    check_against_dense(by_rows, jax.value_and_grad(dense_loss), tables, params)


def check_against_dense(by_rows, dense, tables, params):
    tx, dense_tx = (
        both(decay=0.99),
        optax.partition({"rows": rmsprop(1e-2, decay=0.99), "dense": rmsprop(1e-2)}, ("rows", "dense")),
    )
    ours = tables, params
    theirs = jax.tree.map(jnp.copy, ours)
    state, dense_state = tx.init(ours), dense_tx.init(theirs)

    @jax.jit
    def step(ours, state, tokens, labels):
        loss, grads = by_rows(*ours, tokens, labels)
        updates, state = tx.update(grads, state, ours)
        return loss, apply_updates(ours, updates), state

    @jax.jit
    def dense_step(theirs, state, tokens, labels):
        loss, grads = dense(theirs, tokens, labels)
        updates, state = dense_tx.update(grads, state, theirs)
        return loss, optax.apply_updates(theirs, updates), state

    rng = np.random.default_rng(0)
    losses = []
    for _ in range(30):
        tokens = np.minimum(rng.zipf(1.5, (2, 4)) - 1, 29).astype(np.int32)
        loss, ours, state = step(ours, state, tokens, tokens % 3)
        dense_loss, theirs, dense_state = dense_step(theirs, dense_state, tokens, tokens % 3)
        losses.append(loss)
        np.testing.assert_allclose(loss, dense_loss, rtol=1e-4)
    assert losses[-1] < losses[0]
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Sums in another order, through 30 normalised steps of 1e-2.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_tables_with_one_axis_and_with_three():
    for shape in ((6,), (6, 2, 3)):
        table = jnp.ones(shape)
        ids = jnp.array([1, 1, 5])
        _, (grads, _) = rows.value_and_grad(lambda x, _: jnp.sum(x**2))(table, ids, None)
        tx = rows.rmsprop(0.1, decay=0.75)
        updates, _ = tx.update(grads, tx.init(table))
        new = apply_updates(table, updates)
        np.testing.assert_allclose(new[jnp.array([1, 5])], 0.8, rtol=1e-5)
        np.testing.assert_array_equal(new[jnp.array([0, 2, 3, 4])], 1.0)


def test_complex_tables():
    tx = rows.rmsprop(1.0, decay=0.75, eps=0.0)
    gradient = RowGradient(jnp.array([1]), jnp.array([[3 + 4j]]), 2)
    updates, _ = tx.update(gradient, tx.init(jnp.zeros((2, 1), jnp.complex64)))
    np.testing.assert_allclose(updates.to_dense(), [[0], [-2 * (0.6 + 0.8j)]], rtol=1e-5)


def test_vmap_over_tables():
    tables = jnp.arange(24.0).reshape(2, 6, 2)
    ids = jnp.array([[0, 0, 3], [5, 1, 9]])
    tx = rows.rmsprop(0.1)

    def step(table, ids):
        _, (grads, _) = rows.value_and_grad(lambda x, _: jnp.sum(jnp.sin(x)))(table, ids, None)
        updates, _ = tx.update(grads, tx.init(table))
        return apply_updates(table, updates)

    together = jax.vmap(step)(tables, ids)
    one_by_one = jnp.stack([step(*pair) for pair in zip(tables, ids, strict=True)])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-6)


def test_the_example_in_short(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    example = importlib.import_module("embeddings")
    example.main(["--steps=150", "--vocabulary", "3000", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(f"{word}: " in printed for word in example.WORDS)
    assert "3,000" in (tmp_path / "report.txt").read_text()
    assert (tmp_path / "embeddings.png").stat().st_size > 10_000
    words, tokens = example.read_text()
    _, losses = example.train(tokens, len(words), 150)
    chance = (1 + example.NEGATIVES) * math.log(2)
    assert losses[0] == pytest.approx(chance, rel=1e-3)
    assert np.mean(losses[-20:]) < 0.8 * chance

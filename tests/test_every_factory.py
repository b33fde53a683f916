"""Each public factory of an optimizer, called in every way in which people call one."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close

from rmsprop_jax import conventions, diagnostics, rmsprop, rows, scale_by_rms

CONVENTIONS = {name: conventions.get(name) for name in conventions.names()}
DENSE = {"rmsprop": rmsprop, "scale_by_rms": scale_by_rms, **CONVENTIONS}
FACTORIES = {
    **DENSE,
    "watch": lambda *args, **options: diagnostics.watch(rmsprop(*args, **options)),
}
P = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}


def each(factories):
    return pytest.mark.parametrize("make", factories.values(), ids=factories)


def stepped(tx, grads=P, params=P):
    return tx.update(grads, tx.init(params), params)


@each(DENSE)
def test_defaults_stay_as_they_are_when_they_arrive_as_arrays(make):
    """The same steps, and no accumulator or momentum buffer more: structure and bytes of the state."""
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(0.5)
    plain = make(0.5)
    assert_trees_close(stepped(injected)[0], stepped(plain)[0], rtol=1e-5)
    assert jax.tree.structure(injected.init(P).inner_state) == jax.tree.structure(plain.init(P))


SWITCHES = [
    (name, argument)
    for name, make in DENSE.items()
    for argument in ("momentum", "weight_decay", "wd")
    if argument in inspect.signature(make).parameters and (name, argument) != ("mxnet", "momentum")
]


@pytest.mark.parametrize(("name", "argument"), SWITCHES)
def test_what_is_injected_on_purpose_is_there_and_may_be_zero(name, argument):
    make = DENSE[name]
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(0.5, **{argument: 0.25})
    assert_trees_close(stepped(injected)[0], stepped(make(0.5, **{argument: 0.25}))[0], rtol=1e-5)
    off = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(0.5, **{argument: 0.0})
    assert_trees_close(stepped(off)[0], stepped(make(0.5))[0], rtol=1e-5)


@pytest.mark.parametrize("argument", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_an_injected_limit_of_zero_clips_nothing(argument):
    def tx(limit):
        return optax.inject_hyperparams(conventions.keras)(0.5, **{argument: limit})

    assert_trees_close(stepped(tx(0.0))[0], stepped(conventions.keras(0.5))[0], rtol=1e-5)
    plain = conventions.keras(0.5, epsilon=1.0, **{argument: 0.5})
    injected = optax.inject_hyperparams(conventions.keras)(0.5, epsilon=1.0, **{argument: 0.5})
    assert_trees_close(stepped(injected)[0], stepped(plain)[0], rtol=1e-5)


@each(FACTORIES)
def test_none_is_left_alone(make):
    params = {"body": {"a": P["w"], "none": None}, "head": P["w"] + 1}
    tx = make(0.5)
    state = tx.init(params)
    updates, after = tx.update({"body": None, "head": P["w"]}, state, params)
    expected, _ = tx.update({**params, "head": P["w"]}, state, params)
    assert updates["body"] is None
    assert_trees_close(updates["head"], expected["head"], rtol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    tx.update(params, after, params)


@each(FACTORIES)
def test_leaves_without_a_gradient_are_nobody_s_business(make):
    params = {**P, "act": jax.nn.relu, "name": "relu", "step": 3}
    grads = {**P, "act": None, "name": None, "step": None}
    options = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(make).parameters else {}
    tx = make(0.5, **options)
    updates, _ = tx.update(grads, tx.init(grads), params)
    expected, _ = tx.update(P, tx.init(P), P)
    assert_trees_close({name: updates[name] for name in P}, expected, rtol=1e-6)


@each(FACTORIES)
def test_numpy_in(make):
    """Parameters, gradients and hyper-parameters, in float64 without x64; a warning is an error here."""
    params = {"w": np.array([[1.0, -2.0], [3.0, 4.0]]), "b": np.array([0.5, -0.5])}
    tx = make(np.float64(0.5))
    assert_trees_close(stepped(tx, params, params)[0], stepped(make(0.5))[0], rtol=1e-6)
    with jax.numpy_rank_promotion("allow"):
        one = {"w": np.ones(1)}
        make(np.array([0.5])).update(one, tx.init(one), one)


@each(FACTORIES)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [(mode, dtype) for mode in ("x32", "x64") for dtype in ("bfloat16", "float32", "complex64")]
    + [("x64", "float64")],
)
def test_strict_promotion(make, mode, dtype, request, strict):
    """Numbers, schedules and arrays, in both x64 modes; the fixture of all tests forbids rank promotion.

    Dtypes are promoted where an update is traced, so that nothing has to be compiled.
    """
    if mode == "x64":
        request.getfixturevalue("x64")
    params = jax.tree.map(lambda p: p.astype(dtype), P)
    options = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(make).parameters else {}
    rates = [0.5, jnp.float32(0.5)]
    rates += [] if make is scale_by_rms else [optax.cosine_decay_schedule(0.5, 10)]
    for value in rates:
        tx = make(value, **options)
        updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
        assert updates["w"].dtype == dtype


@each({"exact": rows.exact, "lazy": rows.lazy})
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
def test_rows_under_strict_promotion_and_with_a_frozen_table(make, dtype, strict):
    tables = {"a": jnp.ones((5, 2), dtype), "b": jnp.ones((4, 2), dtype)}
    gradient = rows.RowGradient(jnp.array([1, 3, 1]), jnp.ones((3, 2), dtype), 5)
    tx = make(rmsprop(0.5))
    state = tx.init(tables)
    updates, after = tx.update({"a": gradient, "b": None}, state, tables)
    assert updates["b"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert_trees_close(after.dense[0].nu["b"], state.dense[0].nu["b"], rtol=0)
    assert np.all(np.asarray(after.dense[0].nu["a"][1]) > 0)


def plain(x, kind):
    """As Orbax without a target, msgpack and JSON bring a state back."""
    return kind(plain(part, kind) for part in x) if isinstance(x, tuple) else x


# What goes wrong says what to do: what was passed, what is expected, what to write.

G = jnp.ones(2)
OUT_OF_PLACE = {
    "the parameters": G,
    "a dictionary of them": {"w": G},
    "nothing": None,
    "plain tuples": lambda state: plain(state, tuple),
    "lists": lambda state: plain(state, list),
    "a dictionary": lambda state: {str(i): part for i, part in enumerate(state)},
}


@each({name: make for name, make in DENSE.items() if name != "scale_by_rms"})
@pytest.mark.parametrize("what", OUT_OF_PLACE)
def test_what_is_no_state(make, what):
    wrong = OUT_OF_PLACE[what]
    tx = make(0.5)
    wrong = wrong(tx.init(G)) if callable(wrong) else wrong
    with pytest.raises(
        ValueError, match=r"Invalid state: it is \w+.*expected what tx\.init\(params\) returned"
    ):
        tx.update(G, wrong)


def test_a_flax_optimizer_is_no_state():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.1), wrt=nnx.Param)
    for tx in (rmsprop(0.1), scale_by_rms(0.1)):
        with pytest.raises(ValueError, match=r"Invalid state: it is \w+.*optimizer\.opt_state"):
            tx.update(nnx.state(model, nnx.Param), optimizer)
        with pytest.raises(ValueError, match=r"Invalid state: it is Linear"):
            tx.update(nnx.state(model, nnx.Param), model)


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", jax.random.key(0), np.array(["a"]), 3])
@each(FACTORIES)
def test_a_parameter_that_is_no_array_is_named(make, leaf):
    with pytest.raises(ValueError, match=r"Parameter 'a/b'.*(eqx\.filter|optax\.masked)"):
        make(0.5).init({"a": {"b": leaf}})


@each(FACTORIES)
def test_trees_of_other_types_are_named(make):
    frozen = pytest.importorskip("flax.core").freeze
    params = {"a": {"b": G}}
    tx = make(0.5)
    with pytest.raises(ValueError, match=r"FrozenDict.*dict"):
        tx.update(frozen(params), tx.init(params), params)


NUMBERS = [
    (name, argument)
    for name, make in DENSE.items()
    for argument in inspect.signature(make).parameters
    if argument
    in ("decay", "beta", "rho", "alpha", "eps", "epsilon", "momentum", "initial_scale", "weight_decay")
]


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_schedule_or_a_string_for_a_number_is_named(name, argument):
    options = {"centered": True} if name == "mxnet" else {}
    with pytest.raises(ValueError, match=rf"Invalid {argument}: .*optax\.inject_hyperparams"):
        DENSE[name](**{**first(name), argument: optax.constant_schedule(0.5), **options})
    with pytest.raises(ValueError, match=rf"Invalid {argument}: {argument}='1e-3', a string.*YAML"):
        DENSE[name](**{**first(name), argument: "1e-3", **options})


def first(name):
    """The learning rate, under its name there."""
    argument = next(iter(inspect.signature(DENSE[name]).parameters))
    return {} if argument == "decay" else {argument: 0.5}


def test_a_mask_function_that_was_taken_for_a_schedule_is_refused():
    """Optax calls it with a count, and no weight would decay."""

    def mask(tree):
        return jax.tree.map(lambda x: x.ndim > 1, tree)

    with pytest.raises(ValueError, match=r"Invalid mask: .*static_args='mask'"):
        optax.inject_hyperparams(rmsprop)(0.1, weight_decay=0.1, mask=mask).init(P)
    tx = optax.inject_hyperparams(rmsprop, static_args="mask")(0.1, weight_decay=0.1, mask=mask)
    plain = rmsprop(0.1, weight_decay=0.1, mask=mask)
    assert_trees_close(stepped(tx)[0], stepped(plain)[0], rtol=1e-5)

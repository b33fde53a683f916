"""Whatever works with `optax.rmsprop` works here: each call form on both, with the same result."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close, unkeyed

from rmsprop_jax import apply_updates, rmsprop

P = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.array([0.5, -0.5])}


def steps(tx, params=P, count=3, add=optax.apply_updates):
    """The parameters after some steps whose gradients are the parameters."""
    state = tx.init(params)
    for _ in range(count):
        updates, state = tx.update(params, state, params)
        params = add(params, updates)
    return params


def linear_to(value):
    return optax.linear_schedule(value, value / 10, 5)


CALLS = {
    "positional": lambda make: make(0.1, 0.95, 1e-3, 0.5, False, True, 0.9, True),
    "keywords": lambda make: make(learning_rate=0.1, decay=0.99, eps=1e-6, eps_in_sqrt=False, momentum=0.8),
    "bias_correction": lambda make: make(0.1, bias_correction=True),
    "schedule": lambda make: make(linear_to(0.1)),
    "array": lambda make: make(jnp.array([0.1])),
    "NumPy array": lambda make: make(np.array([0.1])),
    "NumPy numbers": lambda make: make(np.float64(0.1), np.float32(0.5), np.float64(1e-4)),
    "integer": lambda make: make(1),
    "injected": lambda make: optax.inject_hyperparams(make)(0.1),
    "injected schedule": lambda make: optax.inject_hyperparams(make)(linear_to(0.1), decay=linear_to(0.9)),
    "injected momentum": lambda make: optax.inject_hyperparams(make)(0.1, momentum=0.9),
    "injected initial_scale": lambda make: optax.inject_hyperparams(make)(0.1, initial_scale=0.5),
    "static argument": lambda make: optax.inject_hyperparams(make, static_args=("decay",))(0.1, decay=0.5),
    "chain": lambda make: optax.chain(
        optax.clip_by_global_norm(1.0), make(0.1), optax.add_decayed_weights(0.1)
    ),
    "named chain": lambda make: optax.named_chain(("clip", optax.clip(1.0)), ("rms", make(0.1))),
    "masked": lambda make: optax.masked(make(0.1), {"w": True, "b": False}),
    "masked by a function": lambda make: optax.masked(
        make(0.1), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    "partition": lambda make: optax.partition({"a": make(0.1), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
    "MultiSteps": lambda make: optax.MultiSteps(make(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(0.1, momentum=0.9), 2),
    "skip_not_finite": lambda make: optax.apply_if_finite(optax.chain(optax.zero_nans(), make(0.1)), 2),
    "flatten": lambda make: optax.flatten(make(0.1)),
    "conditionally": lambda make: optax.transforms.conditionally_transform(
        make(0.1), lambda step: step % 2 == 0
    ),
    "extra arguments": lambda make: optax.with_extra_args_support(make(0.1)),
    "split complex": lambda make: optax.contrib.split_real_and_imaginary(make(0.1)),
    "parts after it": lambda make: optax.chain(
        make(0.1), optax.scale(0.5), optax.ema(0.9), optax.scale_by_schedule(linear_to(1.0))
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_optax_is_one_here(call):
    with jax.numpy_rank_promotion("allow"):  # an array of one element is multiplied with any shape
        theirs, ours = (steps(CALLS[call](make)) for make in (optax.rmsprop, rmsprop))
    # A few steps of float32, in which each rounds in its own order.
    assert_trees_close(ours, theirs, rtol=1e-5)


def test_defaults_that_switch_off_stay_off_when_they_arrive_as_arrays():
    tx = optax.inject_hyperparams(rmsprop)(1e-3)
    g = jnp.ones(2)
    updates, _ = tx.update(g, tx.init(g))  # without parameters, which weight decay would need
    np.testing.assert_allclose(updates, -1e-3 / np.sqrt(0.1), rtol=1e-5)


def test_what_is_injected_on_purpose_changes_without_compiling():
    tx = optax.inject_hyperparams(rmsprop, hyperparam_dtype=jnp.float32)(0.1, momentum=0.9, weight_decay=0.0)
    state, step = tx.init(P), jax.jit(tx.update)
    first, _ = step(P, state, P)
    for name, value in (("weight_decay", 0.5), ("momentum", 0.1)):
        changed = state._replace(hyperparams={**state.hyperparams, name: jnp.float32(value)})
        options = {"momentum": 0.9, "weight_decay": 0.0, name: value}
        updates, _ = step(P, changed, P)
        plain = rmsprop(0.1, **options)
        assert_trees_close(updates, plain.update(P, plain.init(P), P)[0], rtol=1e-5)
    assert step._cache_size() == 1
    assert np.all(np.isfinite(first["w"]))


# None for what is frozen, anything for what has no gradient.


@pytest.mark.parametrize("frozen", ["body", "head"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "momentum_dtype": "bfloat16"},
        {"centered": True, "bias_correction": True},
        {"accumulator": "uint8"},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_a_frozen_part_keeps_its_state_and_goes_on_when_it_is_unfrozen(options, frozen):
    """As if the other part alone had been trained meanwhile; Optax returns None too, and drops the state."""
    parts = {"body": {"a": P["w"], "b": P["b"]}, "head": P["w"] + 1}
    tx = rmsprop(0.1, **options)
    update = jax.jit(tx.update)
    _, state = update(parts, jax.jit(tx.init)(parts), parts)
    updates, after = update({**parts, frozen: None}, state, parts)
    assert updates[frozen] is None
    alone, alone_after = update(parts, state, parts)
    other = "head" if frozen == "body" else "body"
    assert_trees_close(updates[other], alone[other], rtol=1e-6)
    for name in ("nu", "mu", "trace"):
        tree = optax.tree.get(after, name)
        if tree is not None:
            assert_trees_close(unkeyed(tree)[frozen], unkeyed(optax.tree.get(state, name))[frozen], rtol=0)
            expected = unkeyed(optax.tree.get(alone_after, name))
            assert_trees_close(unkeyed(tree)[other], expected[other], rtol=1e-6)
    new = apply_updates(parts, updates)
    assert_trees_close(new[frozen], parts[frozen], rtol=0)
    theirs, _ = optax.rmsprop(0.1).update({**parts, "body": None}, optax.rmsprop(0.1).init(parts))
    assert theirs["body"] is None


@pytest.mark.parametrize("key", [None, 0])
def test_the_whole_model_may_be_the_parameters(key):
    model = eqx.nn.MLP(2, 2, 3, 1, activation=jax.nn.relu, key=jax.random.key(0))
    tx = rmsprop(0.1, momentum=0.9, weight_decay=0.1)
    adamw = optax.adamw(0.1)
    grads = eqx.filter(model, eqx.is_inexact_array)
    for optimizer in (adamw, tx):
        updates, _ = optimizer.update(grads, optimizer.init(grads), model)
    new = apply_updates(model, updates, key=None if key is None else jax.random.key(key))
    assert new.activation is model.activation
    assert_trees_close(eqx.filter(new, eqx.is_array), optax.apply_updates(grads, updates), rtol=1e-6)


def test_numpy_parameters_are_taken_without_a_word():
    """float64 without x64; a warning is an error in these tests."""
    params = {"w": np.array([1.0, -2.0]), "n": np.float64(3.0)}
    for options in ({}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}, {"accumulator": "uint8"}):
        tx = rmsprop(0.1, **options)
        assert all(x.dtype != np.float64 for x in jax.tree.leaves(tx.init(params)))
        for update in (tx.update, jax.jit(tx.update)):
            updates, _ = update(params, tx.init(params), params)
            apply_updates(params, updates)
    assert_trees_close(steps(rmsprop(0.1), params), steps(optax.rmsprop(0.1), params), rtol=1e-5)

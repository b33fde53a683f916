"""`Settings`: what an optimizer is, read from it by `watch` and `measure`, or given for one of Optax."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick

from rmsprop_jax import Settings, accumulators, conventions, diagnostics, rmsprop, scale_by_rms

PARAMS = {"dense": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3)}}


def trained(tx, steps=20, scale=1.0):
    """The history and the losses of some steps down a bowl, whose gradients are `scale` times its own."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: scale * optax.tree.norm(p, squared=True))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.jit(partial(jax.lax.scan, step, length=steps))((PARAMS, tx.init(PARAMS)))
    return diagnostics.history(state), losses


def learning_rates(tx, **settings):
    """All that were measured."""
    history, _ = trained(diagnostics.watch(tx, every=1, **settings))
    return history.learning_rate["dense/kernel"]


# The class -----------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_optimizer():
    assert rmsprop(0.1).settings == Settings(0.9)
    options = {"eps_in_sqrt": False, "bias_correction": True, "centered": True, "accumulator": "uint8"}
    assert rmsprop(0.1, 0.99, 1e-3, **options).settings == Settings(0.99, 1e-3, **options)
    assert conventions.torch(0.1).settings == Settings(0.99, 1e-8, eps_in_sqrt=False)
    assert diagnostics.watch(rmsprop(0.1, decay=0.5)).settings == Settings(0.5)
    foreign = diagnostics.watch(optax.rmsprop(0.1, decay=0.5), settings=Settings(0.5))
    assert not hasattr(foreign, "settings")
    assert type(Settings(np.float64(0.5)).decay) is float
    assert Settings(0.9, accumulator="uint8").accumulator == accumulators.Uint8()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"Invalid decay: decay=1\.0, expected a number in \[0, 1\)"),
        ({"decay": None}, "Invalid decay: decay=None"),
        ({"decay": jnp.bfloat16(0.999)}, "Invalid decay: it arrived as bfloat16"),
        ({"eps": -1}, "Invalid eps: eps=-1"),
        ({"eps_in_sqrt": 1}, "Invalid eps_in_sqrt: eps_in_sqrt=1, expected True or False"),
        ({"bias_correction": 0}, "Invalid bias_correction: bias_correction=0"),
        ({"centered": "no"}, "Invalid centered: centered='no'"),
        ({"accumulator": "int4"}, "Invalid accumulator: accumulator='int4'"),
    ],
)
def test_settings_are_checked_where_they_are_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"decay": 0.9} | arguments)
    if arguments.keys() <= {"decay", "eps"}:
        with pytest.raises(ValueError, match=message):
            rmsprop(0.1, **arguments)


def test_settings_are_a_tree_of_their_arrays():
    """Numbers are its structure, which does not change. What JAX puts in an array's place is not checked."""
    numbers, arrays = Settings(0.9), Settings(jnp.float32(0.9), jnp.float32(1e-8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        numbers.decay = 0.99
    assert jax.tree.leaves(numbers) == []
    assert jax.tree.structure(numbers) == jax.tree.structure(Settings(0.9))
    assert jax.tree.structure(numbers) != jax.tree.structure(Settings(0.99))
    assert len(jax.tree.leaves(arrays)) == 2
    assert jax.tree.map(lambda x: None, arrays).decay is None
    assert jax.jit(lambda settings: settings.decay * 2)(arrays) == jnp.float32(1.8)
    stacked = jax.vmap(lambda decay: Settings(decay))(jnp.array([0.9, 0.99]))
    assert stacked.decay.shape == (2,)
    assert jax.tree.map(lambda x: x[1], stacked).decay == jnp.float32(0.99)


# Read from the optimizer ---------------------------------------------------------------------------------


def test_torch_with_a_large_eps_is_measured_as_it_is():
    """Told decay=0.9 and not told eps, `watch` reported a learning rate of 0.002 and nothing to mend."""
    history, losses = trained(
        diagnostics.watch(conventions.torch(lr=1e-2, eps=1e-2), every=1), 400, scale=1e-5
    )
    np.testing.assert_allclose(history.learning_rate["dense/kernel"], 1e-2, rtol=1e-5)
    np.testing.assert_allclose(history.bias_correction_factor["dense/kernel"][:2], [0.01, 0.0199], rtol=1e-5)
    (found,) = diagnostics.advise(history, losses)
    assert found.trouble == "eps dominates"


OPTIMIZERS = {
    "outside": rmsprop(0.01, decay=0.7, eps=0.1, eps_in_sqrt=False),
    "decayed": rmsprop(0.01, decay=0.5, weight_decay=0.0, accumulator="uint8"),
    "rmsprop": rmsprop(0.01, decay=0.99, eps=1e-3),
    "schedule": rmsprop(optax.constant_schedule(0.01), centered=True),
    **{
        name: getattr(conventions, name)(0.01, **options)
        for name, options in [
            *(("hinton", {}), ("torch", {}), ("keras", {}), ("tensorflow", {}), ("timm", {}), ("sonnet", {})),
            *(("mlx", {}), ("graves", {"momentum": 0.0}), ("dqn", {}), ("stable_baselines3", {})),
            *(("mxnet", {"centered": True, "momentum": 0.0}),),
        ]
    },
}


@pytest.mark.parametrize("name", quick(OPTIMIZERS, ["outside", "decayed"]))
def test_the_learning_rate_is_found_without_a_word(name):
    """To 1e-5 of float32 sums; 3e-2 where nu is rounded to steps of 19%, which the rule bounds from below."""
    rtol = 3e-2 if name == "decayed" else 1e-5
    np.testing.assert_allclose(learning_rates(OPTIMIZERS[name]), 0.01, rtol=rtol)


def test_inside_a_chain():
    history, _ = trained(optax.chain(optax.identity(), diagnostics.watch(scale_by_rms(decay=0.99), every=1)))
    np.testing.assert_allclose(history.learning_rate["dense/kernel"], 1, rtol=1e-5)


def test_measure_reads_them_too():
    tx = conventions.torch(lr=1e-2, eps=1e-2)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    arguments = (PARAMS, state, updates, PARAMS)
    measured = diagnostics.measure(*arguments, tx=tx)
    assert measured.learning_rate["dense/kernel"] == pytest.approx(1e-2, rel=1e-5)
    by_hand = diagnostics.measure(*arguments, settings=Settings(0.99, 1e-2, eps_in_sqrt=False))
    chex.assert_trees_all_equal(measured, by_hand)
    chex.assert_trees_all_equal(measured, diagnostics.measure(*arguments, tx=diagnostics.watch(tx)))


@pytest.mark.parametrize(
    "accumulator", [pytest.param("bfloat16", marks=pytest.mark.slow), accumulators.Uint8(-40)]
)
def test_the_state_says_how_nu_is_stored(accumulator):
    """Uint8(-40) read as Uint8() is off by 2^10; the accumulators' own error is up to a fifth."""
    tx = rmsprop(0.01, accumulator=accumulator)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    expected = np.sqrt(np.mean(0.1 * np.square(PARAMS["dense"]["kernel"])))
    for known in ({"tx": tx}, {"settings": Settings(0.9)}):
        measured = diagnostics.measure(PARAMS, state, updates, PARAMS, **known)
        assert measured.accumulator_rms["dense/kernel"] == pytest.approx(expected, rel=0.2)


def test_settings_that_arrive_as_arrays():
    """`optax.inject_hyperparams` around a factory: changed in the state, without another trace."""

    @partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
    def make(learning_rate, decay, eps):
        return diagnostics.watch(rmsprop(learning_rate, decay, eps), every=1)

    tx = make(learning_rate=0.01, decay=0.99, eps=0.1)
    state = tx.init(PARAMS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state):
        return tx.update(PARAMS, state, PARAMS)[1]

    state = step(state)
    state.hyperparams.update(decay=jnp.float32(0.5), learning_rate=jnp.float32(0.02))
    history = diagnostics.history(step(state))
    np.testing.assert_allclose(history.learning_rate["dense/kernel"], [0.01, 0.02], rtol=1e-5)
    np.testing.assert_allclose(history.bias_correction_factor["dense/kernel"], [0.01, 0.75], rtol=1e-5)


# Given ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax.rmsprop(0.01),
        optax.chain(optax.clip(1.0), rmsprop(0.01)),
        optax.inject_hyperparams(rmsprop)(0.01),
        optax.adam(0.01),
    ],
)
def test_a_foreign_optimizer_is_asked_for_its_settings(tx):
    around = r"watch\(...\) around rmsprop itself, inside the chain or what optax\.inject_hyperparams takes"
    measure = partial(diagnostics.measure, PARAMS, (), PARAMS, PARAMS)
    for ask, how in [(diagnostics.watch, around), (measure, "tx=, rmsprop itself from inside the chain")]:
        with pytest.raises(
            ValueError, match=rf"Invalid settings: settings=None.*{how}, or pass .*Settings\("
        ):
            ask(tx=tx)


@pytest.mark.parametrize("make", quick([optax.rmsprop, rmsprop], [optax.rmsprop]))
def test_a_foreign_optimizer_is_measured_by_what_is_given(make):
    chained = optax.chain(optax.identity(), make(0.01, 0.8, 0.1, eps_in_sqrt=False))
    found = learning_rates(chained, settings=Settings(0.8, 0.1, eps_in_sqrt=False))
    np.testing.assert_allclose(found, 0.01, rtol=1e-5)


def test_settings_are_not_said_twice():
    with pytest.raises(ValueError, match=r"settings=Settings\(decay=0.9.*but the optimizer has its own"):
        diagnostics.watch(rmsprop(0.01, decay=0.99), settings=Settings(0.9))

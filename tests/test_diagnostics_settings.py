"""What an optimizer is, `watch` and `measure` read from it; and what is found in a run is open to more."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import accumulators, conventions, diagnostics, rmsprop, scale_by_rms
from rmsprop_jax.diagnostics import _finding

PARAMS = {"dense": {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}}


def trained(tx, steps=20, scale=1.0):
    """The state and the losses after some steps down a bowl, whose gradients are `scale` times its own."""

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: scale * optax.tree.norm(p, squared=True))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (_, state), losses = jax.jit(partial(jax.lax.scan, step, length=steps))((PARAMS, tx.init(PARAMS)))
    return state, losses


def learning_rates(tx, **settings):
    """All that were measured, of all layers."""
    state, _ = trained(diagnostics.watch(tx, every=1, **settings))
    return np.array(list(diagnostics.history(state).learning_rate.values()))


# The settings are read -----------------------------------------------------------------------------------


def test_torch_with_a_large_eps_is_measured_as_it_is():
    """Told decay=0.9 and not told eps, `watch` reported a learning rate of 0.002 and nothing to mend."""
    tx = diagnostics.watch(conventions.torch(lr=1e-2, eps=1e-2), every=1)
    state, losses = trained(tx, 400, scale=1e-5)
    history = diagnostics.history(state)
    np.testing.assert_allclose(history.learning_rate["dense/kernel"], 1e-2, rtol=1e-5)
    np.testing.assert_allclose(history.bias_correction_factor["dense/kernel"][:2], [0.01, 0.0199], rtol=1e-5)
    (found,) = diagnostics.advise(history, losses)
    assert found.trouble == "eps dominates"


OPTIMIZERS = {
    "rmsprop": rmsprop(0.01, decay=0.99, eps=1e-3),
    "outside": rmsprop(0.01, decay=0.7, eps=0.1, eps_in_sqrt=False),
    "schedule": rmsprop(optax.constant_schedule(0.01), centered=True),
    "decayed": rmsprop(0.01, decay=0.5, weight_decay=0.0, accumulator="uint8"),
    "scale": optax.chain(optax.identity(), diagnostics.watch(scale_by_rms(decay=0.99), every=1)),
    **{
        name: getattr(conventions, name)(0.01, **options)
        for name, options in [
            *(("hinton", {}), ("torch", {}), ("keras", {}), ("tensorflow", {}), ("timm", {}), ("sonnet", {})),
            *(("mlx", {}), ("graves", {"momentum": 0.0}), ("dqn", {}), ("stable_baselines3", {})),
            *(("mxnet", {"centered": True, "momentum": 0.0}),),
        ]
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_learning_rate_is_found_without_a_word(name):
    """To 1e-5 of float32 sums; 3e-2 where nu is rounded to steps of 19%, which the rule bounds from below."""
    tx, expected = OPTIMIZERS[name], 0.01
    if name == "scale":
        state, _ = trained(tx)
        found, expected = np.array(list(diagnostics.history(state).learning_rate.values())), 1.0
    else:
        found = learning_rates(tx)
    np.testing.assert_allclose(found, expected, rtol=3e-2 if name == "decayed" else 1e-5)


def test_measure_reads_them_too():
    tx = conventions.torch(lr=1e-2, eps=1e-2)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    arguments = (PARAMS, state, updates, PARAMS)
    measured = diagnostics.measure(*arguments, tx=tx)
    assert measured.learning_rate["dense/bias"] == pytest.approx(1e-2, rel=1e-5)
    by_hand = diagnostics.measure(*arguments, decay=0.99, eps=1e-2, eps_in_sqrt=False)
    chex.assert_trees_all_equal(measured, by_hand)
    chex.assert_trees_all_equal(measured, diagnostics.measure(*arguments, tx=diagnostics.watch(tx)))


@pytest.mark.parametrize("accumulator", ["bfloat16", "uint8", accumulators.Uint8(-40)])
def test_the_state_says_how_nu_is_stored(accumulator):
    """Uint8(-40) read as Uint8() is off by 2^10; the accumulators' own error is up to a fifth."""
    tx = rmsprop(0.01, accumulator=accumulator)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    expected = np.sqrt(np.mean(0.1 * np.square(PARAMS["dense"]["kernel"])))
    for known in ({"tx": tx}, {"decay": 0.9}, {"decay": 0.9, "accumulator": accumulator}):
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
    state.hyperparams["decay"] = jnp.asarray(0.5, jnp.float32)
    history = diagnostics.history(step(state))
    np.testing.assert_allclose(history.learning_rate["dense/kernel"], 0.01, rtol=1e-5)
    np.testing.assert_allclose(history.bias_correction_factor["dense/kernel"], [0.01, 0.75], rtol=1e-5)


# What is given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        optax.rmsprop(0.01),
        optax.chain(optax.clip(1.0), rmsprop(0.01)),
        optax.inject_hyperparams(rmsprop)(0.01),
        optax.adam(0.01),
    ],
)
def test_a_foreign_optimizer_is_asked_for_its_decay(tx):
    for ask, how in [
        (
            diagnostics.watch,
            r"watch\(...\) around rmsprop itself, inside the chain or what optax\.inject_hyperparams takes",
        ),
        (
            partial(diagnostics.measure, PARAMS, (), PARAMS, PARAMS),
            "tx=, rmsprop itself from inside the chain",
        ),
    ]:
        with pytest.raises(ValueError, match=f"Invalid decay.*{how}, or pass decay=, eps=, eps_in_sqrt="):
            ask(tx=tx)


def test_under_injected_hyperparameters_it_stands_inside():
    tx = optax.inject_hyperparams(lambda learning_rate: diagnostics.watch(rmsprop(learning_rate)))(0.01)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    _, state = tx.update(PARAMS, state, PARAMS)
    found = diagnostics.history(state).learning_rate
    np.testing.assert_allclose([*found.values()], 0.02, rtol=1e-5)


def test_measure_without_a_word_asks_too():
    with pytest.raises(ValueError, match="decay=None"):
        diagnostics.measure(PARAMS, rmsprop(0.1).init(PARAMS), PARAMS, PARAMS)


@pytest.mark.parametrize("tx", [optax.rmsprop, rmsprop])
def test_a_foreign_optimizer_is_measured_by_what_is_given(tx):
    chained = optax.chain(optax.identity(), tx(0.01, 0.8, 0.1, eps_in_sqrt=False))
    found = learning_rates(chained, decay=0.8, eps=0.1, eps_in_sqrt=False)
    np.testing.assert_allclose(found, 0.01, rtol=1e-5)


def test_what_is_given_once_more_has_to_agree():
    tx = rmsprop(0.01, decay=0.99, eps=1e-3)
    agreeing = {"decay": 0.99, "eps": np.float32(1e-3), "eps_in_sqrt": True, "accumulator": "float32"}
    diagnostics.watch(tx, **agreeing)
    diagnostics.watch(tx, decay=jnp.float32(0.99))
    for change, known in [
        ({"decay": 0.9}, "decay=0.9, .* decay=0.99"),
        ({"eps": 1e-8}, "eps=1e-08, .* eps=0.001"),
        ({"decay": jnp.float32(0.9)}, "decay=.*0.9.* decay=0.99"),
        ({"eps_in_sqrt": False}, "eps_in_sqrt=False, .* eps_in_sqrt=True"),
        ({"accumulator": "uint8"}, "accumulator='uint8', .* accumulator='float32'"),
        ({"accumulator": accumulators.Uint8(-40)}, r"accumulator=Uint8\(exponent=-40\), "),
    ]:
        for ask in (diagnostics.watch, partial(diagnostics.measure, PARAMS, (), PARAMS, PARAMS)):
            with pytest.raises(ValueError, match=known):
                ask(tx=tx, **agreeing | change)


def test_a_watched_optimizer_still_tells_its_settings():
    assert diagnostics.watch(rmsprop(0.01, decay=0.5)).settings.decay == 0.5
    assert not hasattr(diagnostics.watch(optax.rmsprop(0.01), decay=0.5), "settings")


# One more trouble -------------------------------------------------------------------------------------------


def test_a_trouble_of_ones_own(monkeypatch):
    """It is asked after those that are there, not beside what it is a consequence of, nor of a short run."""
    monkeypatch.setattr("rmsprop_jax.diagnostics._advice.TROUBLES", troubles := dict(_finding.TROUBLES))
    monkeypatch.setattr(_finding, "TROUBLES", troubles)

    @diagnostics.trouble("large bias", consequence_of=["the loss explodes"], least=3)
    def large(run):
        large = np.array(["bias" in name for name in run.names])
        return run.finding({"rms": run.gradient_rms[-1, large].max()}, "...", "less.", layers=large)

    state, losses = trained(diagnostics.watch(rmsprop(0.1), every=1), 20)
    history = diagnostics.history(state)
    (found,) = diagnostics.advise(history, losses)
    assert (found.trouble, found.layers, found.steps) == ("large bias", ("dense/bias",), (1, 20))
    assert str(found).startswith("Large bias in dense/bias, steps 1 to 20: rms ")
    first = jax.tree.map(lambda x: x[:2], history)
    assert diagnostics.advise(first, losses) == []
    state, losses = trained(diagnostics.watch(rmsprop(1e3), every=1), 20)
    assert [found.trouble for found in diagnostics.advise(diagnostics.history(state), losses)] == [
        "the loss explodes"
    ]


def test_findings_hold_plain_numbers():
    state, losses = trained(diagnostics.watch(rmsprop(1e3), every=1), 20)
    (found,) = diagnostics.advise(diagnostics.history(state), losses)
    assert {type(x) for x in found.figures.values()} == {float}
    assert [type(x) for x in found.steps] == [int, int]
    assert [type(x) for x in found.layers] == [str] * len(found.layers)

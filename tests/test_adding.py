"""What CONTRIBUTING.md promises: a convention, an accumulator, a diagnostic: ten lines in one place each."""

import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Float16Root

from rmsprop_jax import accumulators, diagnostics, interop, rmsprop

sys.path.insert(0, str(Path(__file__).parent / "parity"))


def test_a_convention(x64):
    from peers import PEERS, peer
    from test_frameworks import test_takes_the_steps_of_the_framework as takes_the_steps

    def lecture(lr=1e-3, forget=0.1):
        return rmsprop(lr, 1 - forget, eps_in_sqrt=False)

    before = len(PEERS)

    @peer(lecture, {}, {"forget": 0.01, "changing_lr": True})
    def lecture_in_numpy(params, lr, forget=0.1):
        v = {name: np.zeros_like(p) for name, p in params.items()}

        def step(grads, lr):
            for name, g in grads.items():
                v[name] = (1 - forget) * v[name] + forget * g**2
                params[name] = params[name] - lr * g / (np.sqrt(v[name]) + 1e-8)
            return dict(params)

        return step

    added = PEERS.pop()
    assert len(PEERS) == before
    for settings in added.settings:
        takes_the_steps(added.convention, added.start, settings)


def test_an_accumulator_of_codes(monkeypatch):
    monkeypatch.setitem(accumulators.NAMED, "root16", Float16Root())
    tx = rmsprop(0.1, accumulator="root16")
    g = {"w": jnp.full(3, 2.0)}
    _, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(accumulators.convert(state, "float32")[0].nu["w"], 0.4, rtol=2e-3)
    theirs = interop.to_optax(state, optax.rmsprop(0.1).init(g))
    np.testing.assert_allclose(optax.tree.get(theirs, "nu")["w"], 0.4, rtol=2e-3)
    with pytest.raises(ValueError, match=r"'Float16Root\(\)' stores its nu.*accumulator='uint8'"):
        rmsprop(0.1, accumulator="uint8").update(g, state)


@pytest.mark.parametrize("methods", [("store", "read"), ("encode", "decode")])
def test_an_accumulator_needs_both_methods(methods):
    base = accumulators.Accumulator if "read" in methods else accumulators.Codes
    for one, other in (methods, methods[::-1]):
        half = type("Half", (base,), {one: lambda self, *args: args})
        with pytest.raises(TypeError, match=other):
            half()


def test_of_classes_of_one_name_the_newest_that_takes_the_values_is_meant():
    """As of a cell of a notebook that was changed and run again."""

    def power(*values):
        return make_dataclass("Power", [(name, int) for name in values], bases=(Float16Root,), frozen=True)

    _older, newer, other = power("root"), power("root"), power("root", "offset")
    for name, expected in {"Power(3)": newer, "Power(3, 4)": other}.items():
        found = accumulators.resolve(name)
        assert (type(found), found.name) == (expected, name)


@dataclass(frozen=True)
class Mean(accumulators.Accumulator):
    """One second moment for all of a parameter, and an array of one byte for each element for its shape."""

    parts = ("mean_of_all", "shape")
    elementwise = False

    def store(self, nu, thresholds):
        return jnp.mean(nu).reshape((1,) * nu.ndim), jnp.zeros_like(nu, jnp.int8)

    def read(self, stored):
        mean, shape = stored
        return jnp.broadcast_to(mean, shape.shape)


def test_an_accumulator_of_another_kind():
    """What it stores is its own; state, conversion, interop and diagnostics go by its methods."""
    tx = rmsprop(0.1, accumulator=Mean())
    g = {"w": jnp.array([1.0, 3.0])}
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(
        updates["w"], -0.1 * g["w"] / np.sqrt([0.5, 0.9]), rtol=1e-6
    )  # 0.1 * 3^2 > 0.5
    np.testing.assert_allclose(accumulators.convert(state, "float32")[0].nu["w"], 0.5, rtol=1e-6)
    theirs = interop.to_optax(state, optax.rmsprop(0.1).init(g))
    np.testing.assert_allclose(optax.tree.get(theirs, "nu")["w"], 0.5, rtol=1e-6)
    measured = diagnostics.measure(g, state, updates, g, tx=tx)
    np.testing.assert_allclose(measured.accumulator_rms["w"], np.sqrt(0.5), rtol=1e-6)
    with pytest.raises(ValueError, match=r"'Mean\(\)' stores its nu.*accumulator='float32'"):
        rmsprop(0.1).update(g, state)
    with pytest.raises(ValueError, match=r"Mean\(\).*centered"):
        rmsprop(0.1, centered=True, accumulator=Mean())


def test_a_diagnostic():
    def thousands(run):
        found = np.nanmedian(run.gradient_rms, axis=0) > 1e3
        if run.is_short or not found.any():
            return None
        numbers = {"layers": found.sum()}
        return run.finding(
            "gradients in the thousands", numbers, "the loss is a sum.", "a mean.", layers=found
        )

    tx = diagnostics.watch(rmsprop(1e-3), every=1)
    params, grads = {"w": jnp.ones(3), "b": jnp.ones(2)}, {"w": jnp.full(3, 1e4), "b": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(10):
        _, state = tx.update(grads, state, params)
    history = diagnostics.history(state)
    (finding,) = diagnostics.advise(history, troubles=[*diagnostics.TROUBLES, thousands])
    assert finding.trouble == "gradients in the thousands"
    assert finding.layers == ("w",)
    assert diagnostics.advise(history) == []

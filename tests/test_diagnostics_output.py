"""What is handed to loggers and notebooks, before the first measurement too; and what is no state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import diagnostics, rmsprop

PARAMS = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3)}


def test_nothing_measured_yet():
    state = diagnostics.watch(rmsprop(0.1)).init(PARAMS)
    history = diagnostics.history(state)
    assert len(history.step) == 0
    assert list(history.gradient_rms) == ["bias", "kernel"]
    assert diagnostics.advise(history) == diagnostics.advise(history, []) == diagnostics.advise([]) == []
    assert diagnostics.latest(state) == {}
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    with pytest.raises(ValueError, match="no measurements"):
        diagnostics.plot(history)


def test_the_latest_is_a_dictionary_of_numbers():
    params = {"dense": PARAMS}
    tx = optax.chain(optax.clip(1.0), diagnostics.watch(rmsprop(0.1), every=2))
    state = tx.init(params)
    for t in range(4):
        _, state = tx.update(jax.tree.map(lambda x, t=t: (1 + t) * x, params), state, params)
    latest, history = diagnostics.latest(state), diagnostics.history(state)
    assert {type(x) for x in latest.values()} == {float}
    assert len(latest) == 1 + len(history._fields[1:]) * len(PARAMS)
    assert latest["step"] == 3
    for field in history._fields[1:]:
        for name, values in getattr(history, field).items():
            np.testing.assert_equal(latest[f"{field}/{name}"], float(values[-1]))
    assert "gradient_rms/dense/kernel" in latest


def test_a_picture_for_notebooks():
    pytest.importorskip("matplotlib", reason="the examples' extra is not installed")
    tx = diagnostics.watch(rmsprop(0.1))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    history = diagnostics.history(state)
    assert diagnostics.plot(history)._repr_png_().startswith(b"\x89PNG")


def test_what_is_no_state_is_told_where_it_is():
    nnx = pytest.importorskip("flax.nnx", reason="the examples' extra is not installed")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = diagnostics.watch(rmsprop(0.1))
    params = nnx.state(model, nnx.Param)
    for ask in (
        lambda: diagnostics.history(model),
        lambda: diagnostics.latest(model),
        lambda: diagnostics.measure(params, model, params, params, tx=tx),
        lambda: tx.update(params, nnx.Optimizer(model, tx, wrt=nnx.Param), params),
    ):
        with pytest.raises(ValueError, match=r"Invalid state: .*optimizer\.opt_state"):
            ask()
    with pytest.raises(ValueError, match=r"Invalid state: it is tuple.*tx\.init\(params\)"):
        tx.update(PARAMS, tuple(tx.init(PARAMS)), PARAMS)

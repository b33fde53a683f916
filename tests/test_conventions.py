import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import first_argument, step_of

from rmsprop_jax import conventions

ALL = [conventions.get(name) for name in conventions.names()]


# Each argument of each convention that is a number.
NUMBERS = [
    pytest.param(convention, name, id=f"{convention.__name__}-{name}")
    for convention in ALL
    for name, parameter in inspect.signature(convention).parameters.items()
    if not isinstance(parameter.default, bool)
]
DECAYS = [p for p in NUMBERS if p.values[1] in ("alpha", "rho", "decay", "beta", "momentum")]


def built(convention, **arguments):
    return convention(**{first_argument(convention): 1e-3, **arguments})


@pytest.mark.parametrize(("convention", "name"), NUMBERS)
@pytest.mark.parametrize("value", [-1.0, float("nan"), "0.1"], ids=repr)
def test_rejects_what_is_no_number_from_zero_on_by_its_name(convention, name, value):
    others = {"corrected_weight_decay": True} if name == "max_lr" else {}
    if name == "momentum" and convention is conventions.mxnet:
        others = {"centered": True}
    with pytest.raises(ValueError, match=rf"Invalid {name}: {name}={re.escape(repr(value))}"):
        built(convention, **{name: value}, **others)


@pytest.mark.parametrize(("convention", "name"), DECAYS)
def test_rejects_a_decay_of_one(convention, name):
    others = {"centered": True} if convention is conventions.mxnet else {}
    with pytest.raises(ValueError, match=f"Invalid {name}: {name}=1.0"):
        built(convention, **{name: 1.0}, **others)


@pytest.mark.parametrize("convention", ALL, ids=lambda f: f.__name__)
def test_rejects_flags_that_are_not_bool(convention):
    flags = [n for n, p in inspect.signature(convention).parameters.items() if isinstance(p.default, bool)]
    for name in flags:
        with pytest.raises(ValueError, match=f"Invalid {name}: {name}=0.5"):
            built(convention, **{name: 0.5})


def test_keras_takes_one_way_of_clipping():
    with pytest.raises(ValueError, match=re.escape("Invalid clipnorm=1.0, clipvalue=2.0: at most one of")):
        conventions.keras(clipnorm=1.0, clipvalue=2.0)
    with pytest.raises(ValueError, match=re.escape("Invalid clipvalue=2.0, global_clipnorm=0.0")):
        conventions.keras(clipvalue=2.0, global_clipnorm=0.0)


def test_mlx_wants_an_eps_above_zero():
    with pytest.raises(ValueError, match=re.escape("Invalid eps: eps=0.0")):
        conventions.mlx(1e-3, eps=0.0)


def test_timm_wants_the_peak_of_a_schedule_that_corrects_the_weight_decay():
    for arguments in ({"lr": lambda count: 0.1}, {"lr": 0.0}, {"lr": 0.1, "max_lr": 0.0}):
        with pytest.raises(ValueError, match="Invalid max_lr"):
            conventions.timm(**arguments, decoupled_decay=True, corrected_weight_decay=True)


def test_timm_corrects_the_weight_decay_of_a_schedule():
    lrs = jnp.array([0.1, 0.2, 0.05])
    tx = conventions.timm(
        lrs.__getitem__, weight_decay=0.5, decoupled_decay=True, corrected_weight_decay=True, max_lr=0.2
    )
    params, state = jnp.float32(1.0), tx.init(jnp.float32(1.0))
    for lr in lrs:  # a gradient of zero leaves the weight decay
        updates, state = tx.update(jnp.float32(0.0), state, params)
        np.testing.assert_allclose(updates, -(lr**2) / 0.2 * 0.5 * params, rtol=1e-6)
        params = optax.apply_updates(params, updates)


def test_caution_keeps_no_step_up_the_gradient():
    tx = conventions.timm(0.1, momentum=0.9, caution=True)
    params = jnp.zeros(4)
    state = tx.init(params)
    _, state = tx.update(jnp.array([1.0, 1.0, 1.0, 1.0]), state, params)
    updates, _ = tx.update(jnp.array([1.0, -0.01, 1.0, 0.0]), state, params)
    assert updates[1] == updates[3] == 0
    assert updates[0] < 0


@pytest.mark.parametrize("convention", ALL, ids=lambda f: f.__name__)
def test_a_schedule_is_a_function_of_the_number_of_updates(convention):
    lrs = jnp.array([0.1, 0.03, 0.2])

    def path(tx):
        params, state, path = jnp.ones(3), tx.init(jnp.ones(3)), []
        for _ in range(3):
            params, state = step_of(tx)(params, state, params * jnp.array([1.0, -2.0, 0.3]))
            path.append(params)
        return np.stack(path)

    first = first_argument(convention)
    scheduled = convention(**{first: lrs.__getitem__})
    injected = optax.inject_hyperparams(convention)(**{first: lrs.__getitem__})
    expected = path(injected)
    np.testing.assert_allclose(path(scheduled), expected, rtol=1e-6, atol=1e-6)  # float32, of about 1
    assert np.abs(expected[2] - expected[1]).max() > 0


# The arithmetic is float32: in bfloat16 a weight decay of 1e-3 would be rounded away beside a gradient of 1.
def test_weight_decay_is_not_lost_in_bfloat16():
    for convention, name in ((conventions.torch, "weight_decay"), (conventions.mxnet, "wd")):
        tx = convention(1.0, **{name: 1e-3})
        params, grads = jnp.full(3, 1.0, jnp.bfloat16), jnp.full(3, 1.0, jnp.bfloat16)
        updates, state = tx.update(grads, tx.init(params), params)
        nu = optax.tree.get(state, "nu")
        assert updates.dtype == jnp.bfloat16
        assert nu.dtype == jnp.float32
        decay = 0.99 if convention is conventions.torch else 0.9
        np.testing.assert_allclose(nu, (1 - decay) * 1.001**2, rtol=1e-5)


@pytest.mark.parametrize("convention", ALL, ids=lambda f: f.__name__)
def test_one_compilation(convention):
    tx = built(
        convention, **({"momentum": 0.9} if "momentum" in inspect.signature(convention).parameters else {})
    )
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3), "none": None}
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    updates, state = update(params, state, params)
    assert update._cache_size() == 1
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_conventions_by_their_names():
    assert conventions.get("torch") is conventions.torch
    for name in ("get", "_clip", "pytorch"):
        with pytest.raises(ValueError, match=f"Invalid name: name='{name}', expected one of 'dqn', "):
            conventions.get(name)


@pytest.mark.parametrize("convention", ALL)
def test_every_argument_is_explained(convention):
    text = inspect.getdoc(convention).partition("Args:\n")[2].partition("\n\n")[0]
    explained = re.findall(r"^  (\w+): ", text, re.MULTILINE)
    parameters = list(inspect.signature(convention).parameters)
    if convention is conventions.timm:  # "as the arguments after it under timm's names"
        parameters = [name for name in parameters if name in explained]
    assert explained == parameters

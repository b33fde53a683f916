"""What scale_by_rms refuses, and that it names the argument or the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmsprop_jax import scale_by_rms

NOT_NUMBERS = [float("nan"), "0.9", None, [0.9, 0.9]]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("decay", [-0.1, 1.0, 1.5, float("inf"), np.float32(1), *NOT_NUMBERS]),
        ("eps", [-1e-8, float("inf"), 1e39, np.float64(-1), *NOT_NUMBERS]),
        ("initial_scale", [-1.0, float("inf"), *NOT_NUMBERS]),
        ("eps_in_sqrt", [None, 1e-8, "yes"]),
        ("centered", [None, 0.9, 1]),
        ("bias_correction", [None, 0.9, 1]),
        ("accumulator", ["float16", None, jnp.float32]),
    ],
)
def test_bad_hyper_parameters_are_refused_by_name_and_value(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"Invalid {name}.*{name}=") as error:
            scale_by_rms(**{name: value})
        assert repr(value) in str(error.value)


def test_bias_correction_needs_a_start_from_zero():
    with pytest.raises(ValueError, match=r"initial_scale=1\.0: bias_correction"):
        scale_by_rms(initial_scale=1.0, bias_correction=True)


def test_arrays_are_not_checked_but_must_not_be_rounded():
    scale_by_rms(decay=jnp.float32(1.5))
    for name, dtype in [("decay", jnp.bfloat16), ("eps", jnp.float16), ("initial_scale", jnp.bfloat16)]:
        with pytest.raises(
            ValueError, match=rf"Invalid {name}.*{dtype.__name__}.*hyperparam_dtype=jnp.float32"
        ):
            scale_by_rms(**{name: jnp.asarray(0.5, dtype)})


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": jnp.ones((3, 2)), "b": {"c": jnp.ones(2)}}, r"'a' has shape \(3, 2\).*\(2, 3\)"),
        ({"a": jnp.ones((2, 3)), "b": {"c": jnp.ones((), int)}}, r"'b/c' has shape \(\).*\(2,\)"),
        ({"a": jnp.ones((2, 3)), "b": {"c": jnp.ones(2, int)}}, r"'b/c' has dtype int32"),
        ({"a": jnp.ones((2, 3)), "b": {"c": np.zeros(2, jax.dtypes.float0)}}, r"'b/c'.*float0"),
        ({"a": jnp.ones((2, 3))}, r"lack 'b/c'"),
        ({"a": jnp.ones((2, 3)), "b": {"d": jnp.ones(2)}}, r"lack 'b/c' and add 'b/d'"),
        ({"a": jnp.ones((2, 3)), "b": [jnp.ones(2)]}, r"lack 'b/c' and add 'b/0'"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, r"'b' has shape \(2,\).*subtree"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_their_path(grads, message, jit):
    tx = scale_by_rms()
    state = tx.init({"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(2)}})
    update = jax.jit(lambda s: tx.update(grads, s)) if jit else lambda s: tx.update(grads, s)
    with pytest.raises(ValueError, match=message):
        update(state)


def test_parameters_that_cannot_be_trained_are_refused_by_their_path():
    with pytest.raises(ValueError, match=r"Parameter 'step' has dtype int32"):
        scale_by_rms().init({"w": jnp.ones(2), "step": jnp.zeros((), int)})


def test_a_state_of_the_other_form_is_refused():
    with pytest.raises(ValueError, match="initialised with centered=False"):
        scale_by_rms(centered=True).update(jnp.ones(2), scale_by_rms().init(jnp.ones(2)))
    tx = scale_by_rms(centered=True)
    with pytest.raises(ValueError, match=r"Gradient '\(the whole tree\)' has dtype complex64"):
        tx.update(jnp.ones(2, jnp.complex64), tx.init(jnp.ones(2)))

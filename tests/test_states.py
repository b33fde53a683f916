"""What a state of RMSProp is, here and in Optax."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import scale_by_rms
from rmsprop_jax._tree import is_rms_state, map_rms_states, raw_moment, rms_states, variance

PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}}

OPTAX = [
    optax.scale_by_rms(),
    optax.scale_by_rms(bias_correction=True),
    optax.scale_by_stddev(),
    optax.scale_by_stddev(bias_correction=True),
]


@pytest.mark.parametrize("tx", [scale_by_rms(), scale_by_rms(centered=True, accumulator="uint8"), *OPTAX])
def test_a_state_is_found_inside_any_wrapper_and_nothing_else_is(tx):
    chain = optax.chain(optax.scale_by_adam(), optax.masked(tx, {"fc": True}), optax.trace(0.9))
    state = chain.init(PARAMS)
    (found,) = rms_states(state)
    assert is_rms_state(found)
    assert found is state[1].inner_state
    changed = map_rms_states(lambda node: node._replace(nu="seen"), state)
    assert (changed[0], changed[1].inner_state.nu, changed[2]) == (state[0], "seen", state[2])


@pytest.mark.parametrize("module", [np, jnp], ids=lambda module: module.__name__)
@pytest.mark.parametrize("mu", [[0.5, -2.0, 0.0], [0.3 + 0.4j, -2j, 0.0]], ids=["real", "complex"])
def test_the_variance_and_the_raw_moment_are_each_other_back(module, mu):
    nu, mu = module.array([0.0, 1.0, 3.0]), module.array(mu)
    raw = raw_moment(nu, mu)
    np.testing.assert_allclose(raw, [0.25, 5.0, 3.0], rtol=1e-7)  # 0.3^2 + 0.4^2 is rounded
    np.testing.assert_array_equal(variance(raw, mu), nu)
    np.testing.assert_array_equal(variance(raw / 4, mu), [0, 0, 0.75])

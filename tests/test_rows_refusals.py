"""Ids, options, gradients and trees that are refused, by their name."""

import jax.numpy as jnp
import numpy as np
import pytest
from tables import squared

from rmsprop_jax import rmsprop, rows
from rmsprop_jax.rows import RowGradient


def test_check_names_the_first_bad_id():
    rows.check_ids(np.arange(5), 5)
    rows.check_ids(jnp.zeros((0,), jnp.int32), 5)
    rows.check_ids([], 5)
    with pytest.raises(ValueError, match=r"Id 5 at position 2 .* 5 rows"):
        rows.check_ids(jnp.array([0, 4, 5, -1]), 5)
    with pytest.raises(ValueError, match=r"Id -7 at position \(1, 0\)"):
        rows.check_ids(np.array([[0, 1], [-7, 9]]), 5)
    with pytest.raises(ValueError, match="float"):
        rows.check_ids(np.array([0.5]), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, r"momentum: .*rows.lazy"),
        ({"centered": True}, r"centered: .*rows.lazy"),
        ({"weight_decay": 0.1}, r"weight_decay: .*rows.lazy"),
        ({"decay": 1.0}, "Invalid decay"),
        ({"eps": -1.0}, "Invalid eps"),
        ({"momentum": 2.0}, "Invalid momentum"),
        ({"bias_correction": True, "initial_scale": 1.0}, "initial_scale"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        rows.exact(rmsprop(0.1, **options))


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (jnp.ones((5, 2)), r"'t' is .*, expected a RowGradient"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 2)), 6), r"'t' has shape \(6, 2\).*\(5, 2\)"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 3)), 5), r"'t' has shape \(5, 3\).*\(5, 2\)"),
        (RowGradient(jnp.array([0, 1]), jnp.ones((1, 2)), 5), r"'t' has indices of shape \(2,\)"),
        (RowGradient(jnp.array([0]), jnp.ones((1, 2), jnp.int32), 5), r"'t' has dtype int32"),
    ],
    ids=["dense", "rows", "width", "lengths", "dtype"],
)
def test_gradients_that_do_not_fit(gradient, message):
    tx = rows.exact(rmsprop(0.1))
    state = tx.init({"t": jnp.ones((5, 2))})
    with pytest.raises(ValueError, match=message):
        tx.update({"t": gradient}, state)


def test_trees_that_do_not_fit():
    tx = rows.exact(rmsprop(0.1))
    gradient = RowGradient(jnp.array([0]), jnp.ones((1, 2)), 5)
    with pytest.raises(ValueError, match=r"lack 't' and add 'u'"):
        tx.update({"u": gradient}, tx.init({"t": jnp.ones((5, 2))}))
    with pytest.raises(ValueError, match=r"'t' is a scalar"):
        tx.init({"t": jnp.ones(())})
    with pytest.raises(ValueError, match="tree of ids"):
        rows.value_and_grad(squared)({"t": jnp.ones((5, 2))}, {"u": jnp.array([0])}, None)
    with pytest.raises(ValueError, match=r"Ids for table 't' have dtype float32"):
        rows.value_and_grad(squared)({"t": jnp.ones((5, 2))}, {"t": jnp.array([0.0])}, None)

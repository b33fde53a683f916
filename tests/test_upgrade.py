"""States that released versions saved go on in this one. `checkpoints/` holds what each version wrote."""

import functools
import pickle
import re
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import write
from helpers import Float16Root, each

from rmsprop_jax import accumulators, diagnostics, interop, rmsprop

FOLDER = Path(__file__).parent / "checkpoints"
ALL = [*write.optimizers()]
VERSIONS = sorted(path.name for path in FOLDER.glob("[0-9]*"))
TRUTH = {version: dict(np.load(FOLDER / version / "truth.npz")) for version in VERSIONS}
RELEASED = [(version, name) for version in VERSIONS for name in TRUTH[version]]  # 0.1.0 had no "factored"
each_released = pytest.mark.parametrize(("version", "name"), RELEASED)
each_version = pytest.mark.parametrize("version", VERSIONS)


ROUNDED = {"bfloat16": 3e-4, "uint8": 5e-3, "uint8_40": 5e-3, "multi_steps": 5e-3, "momentum_dtype": 3e-3}
ROUNDED |= {"partition": 1e-2, "inject_hyperparams": 1e-2, "watch": 1e-2}


@functools.cache
def pickled(version):
    """The states that a version saved, by the names of their optimizers."""
    return pickle.loads((FOLDER / version / "states.pickle").read_bytes())


@pytest.fixture(scope="module")
def msgpack():
    """The same, as Flax saves and restores them."""
    serialization = pytest.importorskip("flax.serialization", reason="the examples' extra is not installed")
    return functools.cache(
        lambda version: serialization.msgpack_restore((FOLDER / version / "states.msgpack").read_bytes())
    )


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """The same, as Orbax does."""
    ocp = pytest.importorskip("orbax.checkpoint", reason="the examples' extra is not installed")

    @functools.cache
    def restored(version):
        folder = tmp_path_factory.mktemp("orbax")
        shutil.unpack_archive(FOLDER / version / "orbax.zip", folder)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it asks for shardings
            return ocp.PyTreeCheckpointer().restore(folder)

    return restored


@functools.cache
def fresh(name):
    return write.optimizers()[name].init(write.params_of(name))


def assert_fits(state, like):
    assert jax.tree.structure(state) == jax.tree.structure(like)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, False)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each_released
def test_a_state_goes_on_as_in_its_version(version, name):
    state = interop.upgrade(pickled(version)[name], fresh(name))
    assert_fits(state, fresh(name))
    _, found = write.steps(name, state, first=write.STEPS)
    if name in ROUNDED:
        # 0.3.0 rounds by other thresholds: to another neighbour, in steps of 0.01 and sums of ten of them.
        np.testing.assert_allclose(found, TRUTH[version][name], rtol=0, atol=ROUNDED[name])
        old, new = (map(np.asarray, jax.tree.leaves(tree)) for tree in (pickled(version)[name], state))
        assert {x.tobytes() for x in old if x.ndim} <= {x.tobytes() for x in new}
        return
    # Processors and versions of XLA round reciprocal roots and fused products differently, which momentum and
    # centring carry on. A state that is wrong by a thousandth moves these updates by 1e-5 or more.
    np.testing.assert_allclose(found, TRUTH[version][name], rtol=1.2e-7, atol=1e-7)


@each_released
def test_flax_and_orbax_restore_the_same_state(msgpack, orbax, version, name):
    like = fresh(name)
    expected = interop.upgrade(pickled(version)[name], like)
    for restored in (msgpack, orbax):
        state = interop.upgrade(restored(version)[name], like)
        assert_fits(state, like)
        assert_equal(state, expected)


@pytest.mark.parametrize("name", ALL)
def test_a_state_of_this_version_comes_back_as_it_is(name):
    state, _ = write.steps(name, fresh(name), first=0)
    for x, y in zip(
        jax.tree.leaves(interop.upgrade(state, fresh(name))), jax.tree.leaves(state), strict=True
    ):
        assert x is y
    serialization = pytest.importorskip("flax.serialization", reason="the examples' extra is not installed")
    again = interop.upgrade(serialization.to_state_dict(state), fresh(name))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert_equal(again, state)


@each_version
def test_hyperparameters_are_the_old_ones_and_new_ones_those_of_like(version):
    old = pickled(version)["inject_hyperparams"]
    hyperparams = {**old.hyperparams, "learning_rate": jnp.float32(0.5)}
    del hyperparams["momentum"]
    state = interop.upgrade(old._replace(hyperparams=hyperparams), fresh("inject_hyperparams"))
    assert_fits(state, fresh("inject_hyperparams"))
    assert state.hyperparams["learning_rate"] == 0.5
    assert state.hyperparams["momentum"] == np.float32(0.9)


@each_version
def test_measurements_come_back_where_they_fit_and_the_rest_always(version):
    old = pickled(version)["watch"]
    state = interop.upgrade(old, fresh("watch"))
    assert diagnostics.history(state).step.tolist() == [1, 3]
    np.testing.assert_array_equal(state.table, old.table)

    larger = diagnostics.watch(rmsprop(0.01, momentum=0.9, accumulator="uint8"), 2, capacity=6)
    again = interop.upgrade(old, larger.init(write.params_of("watch")))
    assert len(diagnostics.history(again).step) == 0
    assert (again.seen, again.table.shape[0]) == (write.STEPS, 6)
    assert_equal(again.inner, state.inner)


def test_an_accumulator_of_one_s_own():
    codes = np.array([1.5, 0.25], np.float16)
    old = {"0": {"count": np.int32(3), "nu": {"w": codes}, "mu": None}, "1": {}, "2": {}, "3": {}}
    like = rmsprop(0.1, accumulator=Float16Root()).init({"w": jnp.zeros(2)})
    state = interop.upgrade(old, like)
    assert_fits(state, like)
    np.testing.assert_array_equal(state[0].nu["Float16Root()"]["w"], codes)


def test_a_pure_dictionary_of_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="the examples' extra is not installed")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rmsprop(0.1, accumulator="uint8"), wrt=nnx.Param)
    codes = {"bias": np.array([1, 2], np.uint8), "kernel": np.arange(6, dtype=np.uint8).reshape(3, 2)}
    old = {0: {"count": np.int32(3), "nu": codes}}  # `nnx.to_pure_dict` leaves empty states out
    state = interop.upgrade(old, optimizer.opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
    assert_equal(jax.tree.leaves(state), [np.int32(3), *codes.values()])


def test_shapes_are_enough_of_the_new_state():
    tx, params = write.optimizers()["factored_4"], write.params_of("factored_4")
    old = pickled("0.2.0")["factored_4"]
    state = interop.upgrade(old, jax.eval_shape(tx.init, params))
    assert_equal(state, interop.upgrade(old, fresh("factored_4")))


def of(**settings):
    """What `init` makes of other settings."""
    return rmsprop(0.01, **settings).init(write.params_of("plain"))


REFUSED = {
    "numbers for codes": (
        "plain",
        of(accumulator="uint8"),
        "0/nu/uint8/dense/bias is float32 of shape (6,), expected uint8 of shape (6,)",
    ),
    "codes for numbers": ("uint8", of(), "0/nu/dense/bias is uint8 of shape (6,), expected float32"),
    "codes for means": ("uint8", of(accumulator="factored"), "0/nu/factored/column_mean/dense/bias is uint8"),
    "codes of another accumulator": (
        "uint8_40",
        of(accumulator="uint8"),
        "0/nu is stored by 'uint8(-40)', expected 'uint8'",
    ),
    "codes of a named accumulator": (
        "uint8",
        of(accumulator=accumulators.Uint8(-40)),
        "0/nu is stored by one of 'float32', 'bfloat16', 'uint8', 'factored', expected 'uint8(-40)'",
    ),
    "momentum": ("momentum_dtype", of(), "2 is TraceState of 'trace', expected EmptyState()"),
    "no momentum": ("plain", of(momentum=0.9), "2 is EmptyState(), expected TraceState of 'trace'"),
    "momentum in float32": (
        "momentum_dtype",
        of(momentum=0.9),
        "2/trace/dense/bias is bfloat16 of shape (6,), expected float32 of shape (6,)",
    ),
    "centered": ("centered", of(momentum=0.9), "0/mu is dict of 'dense', expected None"),
    "not centered": ("momentum_dtype", of(centered=True), "0/mu is None, expected dict of 'dense'"),
    "another wrapper": ("multi_steps", of(), "the state is MultiStepsState of 'mini_step',"),
    "not watched": (
        "plain",
        fresh("watch"),
        "the state is tuple of '0', '1', '2', '3', expected WatchState of",
    ),
    "other parameters": (
        "plain",
        rmsprop(0.01).init({"dense": {"weight": jnp.ones(6)}}),
        "0/nu/dense is dict of 'bias', 'kernel', expected dict of 'weight'",
    ),
    "another shape": (
        "rows",
        write.optimizers()["rows"].init(jnp.ones((8, 3))),
        "last is int32 of shape (9,), expected int32 of shape (8,)",
    ),
    "one array for a tree": (
        "plain",
        rmsprop(0.01).init(jnp.ones(6)),
        "0/nu is dict of 'dense', expected float32",
    ),
}


@each(case=REFUSED)
def test_a_state_of_other_settings_is_refused(case):
    name, like, message = case
    with pytest.raises(ValueError, match=re.escape(f"Invalid old: {message}")) as error:
        interop.upgrade(pickled("0.2.0")[name], like)
    assert "Build the optimizer of like with the settings" in str(error.value)


def test_a_state_of_this_version_and_of_other_settings_is_refused():
    message = "0/nu/uint8(-40) is dict of 'uint8', expected dict of 'dense'"
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.upgrade(of(accumulator="uint8"), of(accumulator=accumulators.Uint8(-40)))


def test_a_hyperparameter_that_the_optimizer_does_not_take_is_refused_unless_it_is_zero():
    old = pickled("0.1.0")["inject_hyperparams"]
    assert old.hyperparams["weight_decay"] == 0  # the default of 0.1.0
    old = old._replace(hyperparams={**old.hyperparams, "weight_decay": jnp.float32(0.1)})
    with pytest.raises(ValueError, match=r"hyperparams is dict of .*'weight_decay', expected dict of "):
        interop.upgrade(old, fresh("inject_hyperparams"))

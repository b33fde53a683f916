"""States carried over in part, and what is asked for instead of guessed."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ACCUMULATORS, each_accumulator, step_of

from rmsprop_jax import conventions, interop, rmsprop
from rmsprop_jax.interop._match import hand_over  # a checkpoint has several doubts at once
from rmsprop_jax.interop._names import nearest  # an error has the whole sentence about a name

PARAMS = {"fc": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, "head": jnp.ones((3, 2))}
NAMES = {"fc.weight": ("fc/kernel", (1, 0)), "fc.bias": "fc/bias"}
ORDER = ["fc.weight", "fc.bias", "old.weight", "frozen.weight"]
SHAPES = [(3, 5), (3,), (4, 4)]
GROUP = {"lr": 0.1, "alpha": 0.99, "eps": 1e-8, "momentum": 0, "centered": False, "weight_decay": 0}


def torch_state(step=7):
    rng = np.random.default_rng(0)
    state = {i: {"square_avg": rng.random(shape, np.float32)} for i, shape in enumerate(SHAPES)}
    for entry in state.values() if step is not None else ():
        entry["step"] = step
    return {"state": state, "param_groups": [{**GROUP, "params": [0, 1, 2, 3], "param_names": ORDER}]}


def test_a_new_head_keeps_what_init_made():
    state = conventions.timm().init(PARAMS)
    reports = []
    new = interop.from_torch(torch_state(), state, PARAMS, NAMES, strict=False, report=reports.append)
    assert reports == [interop.Report(("fc/kernel", "fc/bias"), ("head",), ("old.weight",), ("head",), 7)]
    nu = optax.tree.get(new, "nu")
    np.testing.assert_array_equal(nu["fc"]["kernel"], torch_state()["state"][0]["square_avg"].T)
    np.testing.assert_array_equal(nu["head"], 1)  # as TensorFlow starts
    assert optax.tree.get(new, "count") == 7
    chex.assert_trees_all_equal_structs(new, state)
    shapes = jax.eval_shape(conventions.timm().init, PARAMS)
    with pytest.raises(ValueError, match="it is only shapes, and 'head' keep what is in it"):
        interop.from_torch(torch_state(), shapes, PARAMS, NAMES, strict=False)


def of_head(nu):
    return [x for path, x in jax.tree_util.tree_leaves_with_path(nu) if "head" in str(path)]


@each_accumulator(ACCUMULATORS)
def test_what_is_kept_stays_as_it_is_stored(accumulator):
    tx = rmsprop(0.1, accumulator=accumulator, initial_scale=1.1)
    state = tx.init(PARAMS)
    new = interop.from_torch(torch_state(), state, PARAMS, NAMES, strict=False, report=print)
    for kept, before in zip(*(of_head(x[0].nu) for x in (new, state)), strict=True):
        assert kept is before


def test_the_report_is_logged_where_nobody_takes_it(caplog):
    state = conventions.torch().init(PARAMS)
    with caplog.at_level(logging.INFO, "rmsprop_jax.interop"):
        interop.from_torch(torch_state(), state, PARAMS, NAMES, strict=False)
        (record,) = caplog.records
        assert record.getMessage().startswith(
            "2 carried over. Kept as init made them: 'head'. Left behind: 'old.weight'. The count of 7 "
        )
        assert caplog.records[0].levelno == logging.WARNING
        caplog.clear()
        interop.from_torch(torch_state(), state, PARAMS, NAMES, strict=False, report=print)
    assert not caplog.records


@pytest.mark.parametrize(
    ("doubts", "level"),
    [
        ({}, logging.INFO),
        ({"kept": ("head",)}, logging.WARNING),
        ({"left_behind": ("old.weight",)}, logging.WARNING),
        ({"groups": (("fc.weight",), ("fc.bias",))}, logging.WARNING),
    ],
)
def test_each_doubt_makes_the_report_a_warning(doubts, level, caplog):
    with caplog.at_level(logging.INFO, "rmsprop_jax.interop"):
        hand_over(interop.Report(("fc/kernel",), **doubts), None, strict=False)
    assert [record.levelno for record in caplog.records] == [level]


def test_the_three_nearest_names_are_told():
    others = [f"fc.{name}" for name in ("weight_g", "weight_v", "weights", "weight")] + ["head"]
    assert nearest("fc/weight", others) == " (nearest: 'fc.weight', 'fc.weights', 'fc.weight_v')"
    assert nearest("x", others) == ""


def test_what_is_there_has_to_fit_also_in_part():
    theirs = torch_state()
    theirs["state"][0]["square_avg"] = np.ones((4, 5))
    state = conventions.torch().init(PARAMS)
    with pytest.raises(ValueError, match=r"'fc.weight' has a square_avg of shape \(4, 5\)"):
        interop.from_torch(theirs, state, PARAMS, NAMES, strict=False)
    with pytest.raises(ValueError, match=r"'fc\.weight' has no momentum_buffer"):
        interop.from_torch(
            torch_state(), conventions.torch(momentum=0.9).init(PARAMS), PARAMS, NAMES, strict=False
        )
    names = {"fc.wieght": ("fc/kernel", (1, 0))}
    with pytest.raises(ValueError, match=r"'fc.wieght' has no .* \(nearest: 'fc.weight', "):
        interop.from_torch(torch_state(), state, PARAMS, names, strict=False)  # nothing at all is left


def test_parameters_in_part():
    tensors = {"fc.weight": np.zeros((3, 5)), "other": np.zeros(3)}
    reports = []
    new = interop.params_from(tensors, PARAMS, NAMES, strict=False, report=reports.append)
    np.testing.assert_array_equal(new["fc"]["kernel"], 0)
    np.testing.assert_array_equal(new["head"], 1)
    assert reports == [interop.Report(("fc/kernel",), ("fc/bias", "head"), ("other",))]
    prefixed = {f"module._orig_mod.{name}": x for name, x in tensors.items()}
    again = interop.params_from({"state_dict": prefixed, "epoch": 3}, PARAMS, NAMES, strict=False)
    chex.assert_trees_all_equal(new, again)


def test_optax_in_part():
    theirs = optax.rmsprop(0.1)
    _, their_state = theirs.update(PARAMS["fc"], theirs.init(PARAMS["fc"]))
    state = rmsprop(0.1).init(PARAMS["fc"] | {"new": jnp.ones(2)})
    reports = []
    new = interop.from_optax(their_state, state, count=1, strict=False, report=reports.append)
    assert reports == [interop.Report(("bias", "kernel"), ("new",), (), ("new",), 1)]
    np.testing.assert_allclose(new[0].nu["kernel"], 0.1, rtol=1e-6)
    with pytest.raises(ValueError, match="'new' has no nu, which 'new' needs"):
        interop.from_optax(their_state, state, count=1)


def test_to_torch_in_part_leaves_what_it_does_not_know():
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    tx = conventions.torch()
    state = interop.from_torch(torch_state(), tx.init(PARAMS), PARAMS, NAMES, strict=False, report=print)
    target = torch_state(step=torch.tensor(3.0))
    with pytest.raises(ValueError, match="'head' has no name in `names`"):
        interop.to_torch(state, target, PARAMS, NAMES)
    new = interop.to_torch(state, target, PARAMS, NAMES, strict=False)
    assert new["state"][2] == target["state"][2]
    assert 3 not in new["state"]
    np.testing.assert_array_equal(new["state"][0]["square_avg"], torch_state()["state"][0]["square_avg"])
    assert new["state"][0]["step"] == 7


# The number of updates.


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_a_count_that_is_nowhere_is_asked_for(framework):
    params, state = (
        {"w": jnp.ones(3)},
        conventions.torch(optax.constant_schedule(0.1)).init({"w": jnp.ones(3)}),
    )
    if framework == "torch":
        theirs = {
            "state": {0: {"square_avg": np.ones(3)}},
            "param_groups": [{"params": [0], "param_names": ["w"]}],
        }
        carry = interop.from_torch
    else:
        theirs, carry = {"rmsprop/w_velocity": np.ones(3)}, interop.from_keras
    with pytest.raises(ValueError, match=r"which a schedule's or another count needs: pass count="):
        carry(theirs, state, params, {"w": "w"})
    new = carry(theirs, state, params, {"w": "w"}, count=5)
    assert all(count == 5 for _, count in optax.tree.get_all_with_path(new, "count"))
    with pytest.raises(ValueError, match="Invalid count: -1"):
        carry(theirs, state, params, {"w": "w"}, count=-1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"learning_rate": optax.constant_schedule(0.1)}, "a schedule's or another count"),
        ({"learning_rate": 0.1, "accumulator": "uint8"}, "the accumulator's rounding"),
        (
            {"learning_rate": 0.1, "momentum": 0.9, "momentum_dtype": "bfloat16"},
            "the momentum buffer's rounding",
        ),
    ],
)
def test_optax_that_has_not_counted_is_asked_where_something_needs_it(settings, reason, caplog):
    momentum = settings.get("momentum")
    theirs = optax.rmsprop(0.1, momentum=momentum).init(PARAMS)
    state = rmsprop(**settings).init(PARAMS)
    with pytest.raises(ValueError, match=f"{reason} needs: pass count="):
        interop.from_optax(theirs, state)
    assert interop.from_optax(theirs, state, count=3)[0].count == 3
    interop.from_optax(theirs, rmsprop(0.1, momentum=momentum).init(PARAMS))
    assert "bias_correction would need count=" in caplog.text


# Two variables with one path.


def test_two_variables_of_keras_with_one_path_are_both_named():
    theirs = {"rmsprop/iteration": 7, "rmsprop/a_b_c_kernel_velocity": np.ones(3)}
    params = {"one": jnp.ones(3), "two": jnp.ones(3)}
    names = {"a/b_c/kernel": "one", "a_b/c/kernel": "two"}
    with pytest.raises(ValueError, match="'a_b/c/kernel' and 'a/b_c/kernel' are both 'a_b_c_kernel' there"):
        interop.from_keras(theirs, rmsprop(0.1).init(params), params, names)


@pytest.mark.parametrize("turned", [False, True])
def test_the_iteration_is_that_of_the_velocities_whatever_the_order(turned):
    theirs = {"loss_scale_optimizer/iteration": 9, "rmsprop/iteration": 7, "rmsprop/w_velocity": np.ones(3)}
    theirs = dict(reversed(theirs.items())) if turned else theirs
    params = {"w": jnp.ones(3)}
    state = rmsprop(0.1).init(params)
    assert interop.from_keras(theirs, state, params, {"w": "w"})[0].count == 7
    back = interop.to_keras(state, theirs, params, {"w": "w"})
    assert (back["rmsprop/iteration"], back["loss_scale_optimizer/iteration"]) == (0, 9)
    with pytest.raises(ValueError, match=r"of several optimizers, '.*' and '.*'"):
        interop.from_keras(theirs | {"other/w_velocity": np.ones(3)}, state, params, {"w": "w"})


# MultiSteps.


@pytest.mark.parametrize("steps", [3, 4])
def test_multi_steps_goes_on_in_mid_accumulation(steps):
    theirs, ours = (optax.MultiSteps(f(0.1, momentum=0.9), 3) for f in (optax.rmsprop, rmsprop))
    start = params = {"w": jnp.arange(1.0, 4)}
    state = theirs.init(params)
    grads = [{"w": jnp.sin(start["w"] * t)} for t in range(1, 12)]
    for g in grads[:steps]:
        params, state = step_of(theirs)(params, state, g)
    new = interop.from_optax(state, ours.init(params))
    assert (new.mini_step, new.gradient_step) == (steps % 3, steps // 3)
    assert optax.tree.get(new, "count") == steps // 3
    chex.assert_trees_all_equal(interop.to_optax(new, theirs.init(params)), state)
    ours_params, step, ours_step = params, jax.jit(step_of(theirs)), jax.jit(step_of(ours))
    for g in grads[steps:]:
        params, state = step(params, state, g)
        ours_params, new = ours_step(ours_params, new, g)
    chex.assert_trees_all_close(ours_params, params, rtol=1e-5)  # float32


def test_a_half_full_accumulator_is_not_dropped():
    theirs = optax.MultiSteps(optax.rmsprop(0.1), 3)
    _, state = step_of(theirs)(PARAMS, theirs.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"one is at mini_step 1 of optax\.MultiSteps"):
        interop.from_optax(state, rmsprop(0.1).init(PARAMS))


# What the groups say.


def test_keys_without_counterpart_are_named():
    params = {"fc": PARAMS["fc"]}
    theirs = torch_state()
    with pytest.raises(ValueError, match=r"convention=conventions.stable_baselines3 or convention="):
        interop.resume_torch(theirs, params, NAMES)
    (group,) = theirs["param_groups"]
    group |= {"foreach": True, "fused": None, "capturable": True, "initial_lr": 0.1, "differentiable": False}
    tx, _ = interop.resume_torch(theirs, params, NAMES)
    assert tx.settings.decay == 0.99
    group |= {"amsgrad": True, "lr_scale": 0.5}
    with pytest.raises(
        ValueError, match=r"has amsgrad=True, without counterpart in conventions.torch: ignore="
    ):
        interop.resume_torch(theirs, params, NAMES)
    interop.resume_torch(theirs, params, NAMES, ignore=["amsgrad"])
    with pytest.raises(ValueError, match=r"lr_scale=0\.5, without counterpart"):
        interop.resume_torch(theirs, params, NAMES, ignore=["amsgrad"], learning_rate=0.1)
    group["lr_scale"] = 1.0  # which scales nothing
    interop.resume_torch(theirs, params, NAMES, ignore=["amsgrad"], learning_rate=0.1)
    del group["alpha"]
    with pytest.raises(ValueError, match="Group 0 of the checkpoint has no 'alpha'"):
        interop.resume_torch(theirs, params, NAMES, ignore=["amsgrad"])


def test_a_new_head_takes_the_hyper_parameters_of_the_group_that_is_named():
    theirs = torch_state()
    theirs["param_groups"] = [
        {**GROUP, "foreach": None, "lr": lr, "params": places, "param_names": [ORDER[i] for i in places]}
        for lr, places in ((0.1, [0, 2]), (0.3, [1, 3]))
    ]
    with pytest.raises(ValueError, match=r"has no 'head', and its groups \[0, 1\] differ: pass new_group="):
        interop.resume_torch(theirs, PARAMS, NAMES, strict=False)
    tx, state = interop.resume_torch(theirs, PARAMS, NAMES, strict=False, new_group=1, report=print)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    np.testing.assert_allclose(updates["head"], -0.3 / np.sqrt(0.01), rtol=1e-5)

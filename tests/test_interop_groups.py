"""Groups of PyTorch's in any order, and new parameters beside a count that goes on."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmsprop_jax import conventions, interop, rmsprop, warmup

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")

NAMES = {
    "backbone.weight": ("backbone/kernel", (1, 0)),
    "backbone.bias": "backbone/bias",
    "head.weight": ("head/kernel", (1, 0)),
    "head.bias": "head/bias",
}
LRS = {"head": 0.1, "backbone": 0.01}


def net(head=3):
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.backbone, model.head = torch.nn.Linear(3, 3), torch.nn.Linear(3, head)
    return model


def trained(model, named=False, added=False):
    """After two steps, with the head's group first; `added` by add_param_group."""

    def group(layer):
        own = getattr(model, layer)
        parameters = [(f"{layer}.{n}", p) for n, p in own.named_parameters()] if named else own.parameters()
        return {"params": list(parameters), "lr": LRS[layer]}

    optimizer = torch.optim.RMSprop([group("head")] if added else [group("head"), group("backbone")])
    if added:
        optimizer.add_param_group(group("backbone"))
    for t in range(2):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 1.0 + i + t)
        optimizer.step()
    return optimizer


def advised(model, optimizer):
    """What the error says, word for word."""
    with pytest.raises(ValueError, match="pass order=") as error:
        interop.from_torch(optimizer.state_dict(), *empty(model))
    line = str(error.value).partition("names = ")[2]
    scope = {"model": model, "optimizer": optimizer}
    exec("names = " + line.removesuffix("."), scope)
    return scope["order"]


def empty(model):
    params = interop.params_from(
        model.state_dict(),
        {layer: {"kernel": jnp.zeros(p.weight.shape[::-1]), "bias": jnp.zeros(p.bias.shape)}
         for layer, p in model.named_children()},
        NAMES,
    )  # fmt: skip
    return conventions.torch().init(params), params, NAMES


def by_group(model, optimizer):
    return [name for names in advised(model, optimizer) for name in names]


def as_named_parameters(model, optimizer):
    return [name for name, _ in model.named_parameters()]


def assert_as_there(state, optimizer, model):
    nu = optax.tree.get(state, "nu")
    for layer, p in model.named_children():
        np.testing.assert_array_equal(nu[layer]["kernel"].T, optimizer.state[p.weight]["square_avg"])
        np.testing.assert_array_equal(nu[layer]["bias"], optimizer.state[p.bias]["square_avg"])


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("order", [advised, by_group])
def test_the_advised_order_gives_each_layer_its_own(order, added):
    model = net()
    optimizer = trained(model, added=added)
    names = order(model, optimizer)
    state, params, _ = empty(model)
    theirs = optimizer.state_dict()
    assert_as_there(interop.from_torch(theirs, state, params, NAMES, order=names), optimizer, model)
    tx, state = interop.resume_torch(theirs, params, NAMES, order=names)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, jax.tree.map(jnp.zeros_like, state), params)
    for layer, lr in LRS.items():
        np.testing.assert_allclose(updates[layer]["bias"], -10 * lr, rtol=1e-5)


def test_a_flat_order_of_several_groups_is_shown(caplog):
    """Arrays of one shape may stand in another group than was meant: nothing tells, so one look has to."""
    model = net()
    theirs = trained(model).state_dict()
    state, params, _ = empty(model)
    with caplog.at_level(logging.WARNING, "rmsprop_jax.interop"):
        interop.from_torch(theirs, state, params, NAMES, order=as_named_parameters(model, None))
    (record,) = caplog.records
    assert (
        "group 0: 'backbone.weight', 'backbone.bias'; group 1: 'head.weight', 'head.bias'"
        in record.getMessage()
    )
    caplog.clear()
    for order in (advised, by_group):
        optimizer, reports = trained(model), []
        names = order(model, optimizer)
        interop.from_torch(theirs, state, params, NAMES, order=names, report=reports.append)
        assert (
            reports[0].groups
            == ((("head.weight", "head.bias"), ("backbone.weight", "backbone.bias")), ())[order is advised]
        )
    assert not caplog.records


REFUSED = {
    "of other shapes": (
        {"head": 2},
        {},
        lambda names: [*names[2:], *names[:2]],
        r"'backbone.weight' has a square_avg of shape \(2, 3\), not \(3, 3\)",
    ),
    "of other names": (
        {},
        {"named": True},
        lambda names: [*names[2:], *names[:2]],
        "order has 'backbone.weight' where group 0 of the checkpoint says 'head.weight': leave order= out",
    ),
    "of other sizes": (
        {},
        {},
        lambda names: [names[:1], names[1:]],
        r"order has groups of \[1, 3\] names, PyTorch's optimizer of \[2, 2\]",
    ),
    "of what was flattened": (
        {},
        {},
        lambda names: [*names, "fc.weight"],
        "order has 5 names, PyTorch's optimizer 4 parameters .*flattened, as FSDP",
    ),
    "too short": ({}, {}, lambda names: names[:3], "order has 3 names, PyTorch's optimizer 4 parameters"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_an_order_that_the_checkpoint_contradicts_is_refused(which):
    sizes, how, change, message = REFUSED[which]
    model = net(**sizes)
    theirs = trained(model, **how).state_dict()
    names = ["head.weight", "head.bias", "backbone.weight", "backbone.bias"]
    with pytest.raises(ValueError, match=message):
        interop.from_torch(theirs, *empty(model), order=change(names))


def test_names_that_the_checkpoint_has_need_no_order_and_are_confirmed_by_one():
    model = net()
    optimizer = trained(model, named=True)
    theirs = optimizer.state_dict()
    for order in (None, ["module.head.weight", "head.bias", "backbone.weight", "backbone.bias"]):
        names = {
            name.replace("head.weight", order[0]) if order else name: path for name, path in NAMES.items()
        }
        state, params, _ = empty(model)
        assert_as_there(interop.from_torch(theirs, state, params, names, order=order), optimizer, model)


# New parameters.


OLD = {"w": jnp.ones(3)}
PARAMS = {"w": jnp.ones(3), "head": jnp.ones(2)}


def checkpoint(step=10_000):
    group = {"lr": 0.1, "alpha": 0.999, "eps": 1e-8, "momentum": 0, "centered": False, "weight_decay": 0}
    group |= {"foreach": None, "params": [0], "param_names": ["w"]}
    return {"state": {0: {"step": step, "square_avg": np.ones(3)}}, "param_groups": [group]}


def test_a_part_of_its_own_starts_a_new_head_at_its_own_count():
    def tx():
        return rmsprop(warmup(0.1, 0.999), 0.999, bias_correction=True)

    together = tx().init(PARAMS)
    parts = optax.partition({"old": tx(), "new": tx()}, {"w": "old", "head": "new"})
    reports = []
    for target in (together, parts.init(PARAMS)):
        state = interop.from_torch(
            checkpoint(), target, PARAMS, {"w": "w"}, strict=False, report=reports.append
        )
    assert [(report.older, report.updates) for report in reports] == [(("head",), 10_000), ((), 0)]
    assert "up to 1/sqrt(1 - decay) times too long" in str(reports[0])
    counts = {
        label: [int(count) for _, count in optax.tree.get_all_with_path(part, "count")]
        for label, part in state.inner_states.items()
    }
    assert counts == {"old": [10_000] * 2, "new": [0] * 2}
    fresh = tx()
    updates, _ = parts.update(PARAMS, state, PARAMS)
    expected, _ = fresh.update({"head": PARAMS["head"]}, fresh.init({"head": PARAMS["head"]}))
    np.testing.assert_array_equal(updates["head"], expected["head"])


def test_a_new_complex_head_is_reported_where_it_is_two_leaves():
    tx = optax.contrib.split_real_and_imaginary(rmsprop(0.1, bias_correction=True))
    params = {**PARAMS, "head": jnp.ones(2, jnp.complex64)}
    reports = []
    arguments = checkpoint(), tx.init(params), params, {"w": "w"}
    interop.from_torch(*arguments, strict=False, report=reports.append)
    assert (reports[0].kept, reports[0].older) == (("head",), ("head",))


def test_resume_makes_the_part_of_a_new_head():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    arguments = checkpoint(), PARAMS, {"w": "w"}
    reports = []
    tx, state = interop.resume_torch(
        *arguments, learning_rate=schedule, strict=False, new_group=0, report=reports.append
    )
    assert reports == [interop.Report(("w",), ("head",))]
    updates, _ = tx.update(PARAMS, state, PARAMS)
    assert not updates["head"].any()  # its warm-up begins
    assert updates["w"].all()
    with pytest.raises(ValueError, match=r"Invalid new_group=3: the checkpoint has the groups \[0\]"):
        interop.resume_torch(*arguments, strict=False, new_group=3)

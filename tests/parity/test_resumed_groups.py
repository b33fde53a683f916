"""Hyper-parameters, groups, parts of a model and complex parameters of runs that are resumed from PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from continued import LRS, NAMES, RTOL, empty, grads_at, here, largest_difference, net, schedule, there
from helpers import step_of
from installed import package

from rmsprop_jax import conventions, interop

pytestmark = pytest.mark.slow

GROUPS = {  # of the two layers
    "alike": ({}, {}),
    "learning rates": ({"lr": 1.0}, {"lr": 0.25}),
    "momentum": ({"momentum": 0.9}, {"momentum": 0.0}),
    "centred": ({"centered": True, "alpha": 0.9}, {"weight_decay": 1e-2, "eps": 1e-2}),
    "maximize": ({"maximize": True}, {"momentum": 0.5}),
}
OPTIMIZERS = {
    "torch": (peers.torch_rmsprop, conventions.torch, {}),
    "timm": (peers.timm_rmsprop, conventions.timm, {"momentum": 0.9}),
    "timm, decoupled": (
        peers.timm_rmsprop,
        conventions.timm,
        {
            "decoupled_decay": True,
            "corrected_weight_decay": True,
            "weight_decay": 1e-2,
            "momentum": 0.9,
            "caution": True,
            "lr_in_momentum": False,
        },
    ),
    "Stable-Baselines3": (peers.stable_baselines3_rmsprop, conventions.stable_baselines3, {"momentum": 0.9}),
}
CASES = [
    *(("torch", groups) for groups in GROUPS),
    *((o, groups) for o in OPTIMIZERS if o != "torch" for groups in ("alike", "learning rates", "centred")),
]


def grouped(optimizer, groups):
    model = net()
    parameters = dict(model.named_parameters())
    peer, convention, settings = OPTIMIZERS[optimizer]
    factors = [group.get("lr", 1.0) for group in GROUPS[groups]]
    param_groups = [
        {**group, "params": list(layer.parameters())}
        for group, layer in zip(GROUPS[groups], (model.fc, model.head), strict=True)
    ]
    theirs = peer()(param_groups, **{"lr": float(LRS.max()), **settings})
    return parameters, theirs, factors, convention if optimizer == "Stable-Baselines3" else None


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("optimizer", "groups"), CASES)
def test_groups_there_and_back(optimizer, groups):
    parameters, theirs, factors, convention = grouped(optimizer, groups)
    there(parameters, theirs, 0, 100, factors)
    params = interop.params_from({k: p.detach() for k, p in parameters.items()}, empty(), NAMES)
    order = list(parameters)
    tx, state = interop.resume_torch(
        theirs.state_dict(),
        params,
        NAMES,
        order=order,
        learning_rate=[schedule(factor) for factor in factors],
        convention=convention,
    )
    path = here(tx, params, state, 100, 100)
    again, target, *_ = grouped(optimizer, groups)
    new = interop.to_torch(state, target.state_dict(), params, NAMES, order=order)
    for index, entry in theirs.state_dict()["state"].items():
        for key, value in entry.items():
            # A centred float64 second moment leaves as variance + mean^2, which may round otherwise.
            rtol = 1e-14 if "grad_avg" in entry else 0
            np.testing.assert_allclose(new["state"][index][key], value, rtol=rtol, err_msg=key)
    expected = there(parameters, theirs, 100, 100, factors)
    assert largest_difference(path, expected) < RTOL

    target.load_state_dict(new)
    values = interop.paths(params)
    assert set(values) == {target if isinstance(target, str) else target[0] for target in NAMES.values()}
    for name, target_path in NAMES.items():
        place, turn = (target_path, False) if isinstance(target_path, str) else (target_path[0], True)
        layer, leaf = place.split("/")
        value = np.asarray(params[layer][leaf])
        again[name].data[:] = package("torch").tensor(value.T.copy() if turn else value)
    assert largest_difference(there(again, target, 100, 100, factors), expected) < RTOL


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("frozen", ["fc", "head"])
def test_the_rest_of_a_model_of_which_a_part_is_new_or_frozen(frozen):
    torch, model = package("torch"), net()
    for p in getattr(model, frozen).parameters():
        p.requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.RMSprop(parameters.values(), momentum=0.9)
    there(parameters, optimizer, 0, 100)
    params = interop.params_from(model.state_dict(), empty(), NAMES)
    with pytest.raises(ValueError, match=f"'{frozen}.bias' has no square_avg, which '{frozen}/bias' needs"):
        interop.resume_torch(optimizer.state_dict(), params, NAMES, order=list(parameters))
    reports = []
    tx, state = interop.resume_torch(
        optimizer.state_dict(),
        params,
        NAMES,
        order=list(parameters),
        learning_rate=schedule(),
        strict=False,
        report=reports.append,
    )
    (report,) = reports
    assert set(report.kept) == {f"{frozen}/kernel", f"{frozen}/bias"}
    np.testing.assert_array_equal(optax.tree.get(state, "nu")[frozen]["bias"], 0)
    names = {name: target for name, target in NAMES.items() if not name.startswith(frozen)}
    tx = optax.chain(tx, optax.masked(optax.set_to_zero(), {k: k == frozen for k in params}))
    zero = jax.tree.map(jnp.zeros_like, params[frozen])
    init = tx.init(params)
    state = interop.from_torch(
        *(optimizer.state_dict(), init, params, names), order=list(parameters), strict=False, report=print
    )
    step, path = jax.jit(step_of(tx)), []
    kept = "head" if frozen == "fc" else "fc"
    for t in range(100, 200):
        now = {
            f"{kept}.weight": np.asarray(params[kept]["kernel"]).T,
            f"{kept}.bias": np.asarray(params[kept]["bias"]),
        }
        grads = grads_at(t, now)
        ours = {"kernel": grads[f"{kept}.weight"].T, "bias": grads[f"{kept}.bias"]}
        params, state = step(params, state, {kept: ours, frozen: zero})
        path.append(
            {
                f"{kept}.weight": np.asarray(params[kept]["kernel"]).T,
                f"{kept}.bias": np.asarray(params[kept]["bias"]),
            }
        )
    assert largest_difference(path, there(parameters, optimizer, 100, 100)) < RTOL


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("centered", [False, True])
def test_complex_parameters_are_two_reals(centered):
    torch = package("torch")
    rng = np.random.default_rng(0)

    def complex_at(t):
        rng = np.random.default_rng(t)
        return rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2))

    w = torch.nn.Parameter(torch.tensor(complex_at(1000)))
    b = torch.nn.Parameter(torch.tensor(rng.normal(size=2)))
    optimizer = torch.optim.RMSprop([("w", w), ("b", b)], momentum=0.9, centered=centered)

    def steps(start, count):
        path = []
        for t in range(start, start + count):
            optimizer.param_groups[0]["lr"] = float(LRS[t])
            w.grad, b.grad = torch.tensor(complex_at(t)), torch.ones_like(b)
            optimizer.step()
            path.append({"w": w.detach().numpy().copy(), "b": b.detach().numpy().copy()})
        return path

    steps(0, 100)
    params = {"w": jnp.zeros((3, 2), jnp.complex128), "b": jnp.zeros(2)}
    names = {"w": "w", "b": "b"}
    params = interop.params_from({"w": w, "b": b}, params, names)
    tx, state = interop.resume_torch(optimizer.state_dict(), params, names, learning_rate=schedule())
    back = interop.to_torch(state, optimizer.state_dict(), params, names)
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert back["state"][index][key].dtype == value.dtype
            np.testing.assert_allclose(back["state"][index][key], value, rtol=1e-14 if centered else 0)
    update, path = jax.jit(step_of(tx)), []
    for t in range(100, 200):
        # JAX's gradient is the conjugate of PyTorch's; here both get the same numbers.
        params, state = update(params, state, {"w": jnp.asarray(complex_at(t)), "b": jnp.ones(2)})
        path.append({name: np.asarray(x) for name, x in params.items()})
    assert largest_difference(path, steps(100, 100)) < RTOL

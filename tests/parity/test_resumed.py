"""Runs resumed from what PyTorch writes, optimizer and all, go on as they would have gone on there."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import pytest
from helpers import step_of
from installed import package

from rmsprop_jax import conventions, interop

LRS = 2.0**-7 * (0.55 + 0.45 * np.cos(0.3 * np.arange(200)))
# In float64 each of 100 steps rounds to 1e-16, and momentum adds up ten of them.
RTOL = 1e-13
NAMES = {
    "fc.weight": ("fc/kernel", (1, 0)),
    "fc.bias": "fc/bias",
    "head.weight": ("head/kernel", (1, 0)),
    "head.bias": "head/bias",
}
EMPTY = {"fc": {"kernel": (5, 3), "bias": (3,)}, "head": {"kernel": (3, 2), "bias": (2,)}}


def schedule(factor=1.0):
    return lambda count: factor * jnp.asarray(LRS)[count]


def empty():
    return jax.tree.map(lambda s: jnp.zeros(s, jnp.float64), EMPTY, is_leaf=lambda x: isinstance(x, tuple))


def grads_at(t, params):
    """Gradients under PyTorch's names, of parameters under them."""
    rng = np.random.default_rng(t)
    return {k: p + rng.normal(size=p.shape) * 3 for k, p in sorted(params.items())}


def net():
    torch = package("torch")
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.fc, model.head = (torch.nn.Linear(*n, dtype=torch.float64) for n in ((5, 3), (3, 2)))
    return model


def there(parameters, optimizer, start, steps, factors=(1.0,)):
    """Steps of PyTorch's, and the parameters after each."""
    torch = package("torch")
    parameters = {name: p for name, p in parameters.items() if p.requires_grad}
    path = []
    for t in range(start, start + steps):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = float(LRS[t] * factor)
        grads = grads_at(t, {name: p.detach().numpy() for name, p in parameters.items()})
        for name, p in parameters.items():
            p.grad = torch.tensor(grads[name])
        optimizer.step()
        path.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
    return path


def here(tx, params, state, start, steps, names=NAMES):
    """The same steps of ours."""
    update = jax.jit(step_of(tx))
    path = []
    by_path = {
        target if isinstance(target, str) else target[0]: (name, not isinstance(target, str))
        for name, target in names.items()
    }

    def named(params):
        return {
            name: np.asarray(params[layer][leaf]).T if is_turned else np.asarray(params[layer][leaf])
            for place, (name, is_turned) in by_path.items()
            for layer, leaf in [place.split("/")]
        }

    for t in range(start, start + steps):
        theirs = grads_at(t, named(params))
        grads = {layer: {} for layer in params}
        for place, (name, is_turned) in by_path.items():
            layer, leaf = place.split("/")
            grads[layer][leaf] = theirs[name].T if is_turned else theirs[name]
        params, state = update(params, state, grads)
        path.append(named(params))
    return path


def largest_difference(path, expected):
    return max(
        np.max(np.abs(got[name] - want[name]) / (1 + np.abs(want[name])))
        for got, want in zip(path, expected, strict=True)
        for name in want
    )


# Each writer takes the model, the optimizer and a folder, and returns what is read, and `order`.

STATE_DICT = "torch.distributed.checkpoint.state_dict"


def state_dict(model, optimizer, folder):
    return optimizer.state_dict(), [name for name, _ in model.named_parameters()]


def pt_file(model, optimizer, folder):
    package("torch").save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt", [name for name, _ in model.named_parameters()]


def lightning(model, optimizer, folder):
    checkpoint = {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 3}],
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    package("torch").save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt", [name for name, _ in model.named_parameters()]


def accelerate(model, optimizer, folder):
    package("torch").save(optimizer.state_dict(), folder / "optimizer.bin")
    return folder / "optimizer.bin", [name for name, _ in model.named_parameters()]


def with_ema(model, optimizer, folder):
    order = [name for name, _ in model.named_parameters()]
    return {"state_dict_ema": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, order


def by_names(model, optimizer, folder):
    return package(STATE_DICT).get_optimizer_state_dict(model, optimizer), None


def flat(model, optimizer, folder):
    module = package(STATE_DICT)
    options = module.StateDictOptions(flatten_optimizer_state_dict=True)
    return module.get_optimizer_state_dict(model, optimizer, options=options), None


def safetensors_file(model, optimizer, folder):
    state, _ = flat(model, optimizer, folder)
    tensors = {f"optimizer.{k}": np.asarray(v) for k, v in state.items() if v is not None}
    package("safetensors.numpy").save_file(tensors, folder / "optimizer.safetensors")
    return folder / "optimizer.safetensors", None


def distributed_files(model, optimizer, folder):
    state, _ = by_names(model, optimizer, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package("torch.distributed.checkpoint").save(
            {"optimizer": state, "model": model.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True
        )
        package("torch.distributed.checkpoint.format_utils").dcp_to_torch_save(
            folder / "dcp", folder / "both.pt"
        )
    return folder / "both.pt", None


def compiled(model, optimizer, folder):
    names = [f"_orig_mod.{name}" for name, _ in model.named_parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert names == [name for name, _ in package("torch").compile(model).named_parameters()]
    return optimizer.state_dict(), names


def data_parallel(model, optimizer, folder):
    return optimizer.state_dict(), [f"module.{name}" for name, _ in model.named_parameters()]


def capturable(model, optimizer, folder):
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"capturable": True, "lr": package("torch").tensor(group["lr"])}
    return state, [name for name, _ in model.named_parameters()]


WRITERS = [
    *(state_dict, pt_file, lightning, accelerate, with_ema, by_names, flat, safetensors_file),
    *(distributed_files, compiled, data_parallel, capturable),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("writer", WRITERS, ids=lambda f: f.__name__)
def test_whatever_form_it_lies_in(writer, tmp_path):
    torch, model = package("torch"), net()
    parameters = dict(model.named_parameters())
    settings = {"momentum": 0.9, "centered": True, "weight_decay": 1e-3, "eps": 1e-3}
    optimizer = torch.optim.RMSprop(parameters.values(), foreach=True, **settings)
    there(parameters, optimizer, 0, 100)
    checkpoint, order = writer(model, optimizer, tmp_path)

    params = interop.params_from(model.state_dict(), empty(), NAMES)
    tx, state = interop.resume_torch(checkpoint, params, NAMES, order=order, learning_rate=schedule())
    path = here(tx, params, state, 100, 100)
    assert largest_difference(path, there(parameters, optimizer, 100, 100)) < RTOL


@contextlib.contextmanager
def one_process(folder):
    distributed = package("torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=0, world_size=1)
    try:
        yield package("torch.distributed.device_mesh").init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("full", [False, True])
def test_what_a_fully_sharded_optimizer_has(full, tmp_path):
    torch, module = package("torch"), package(STATE_DICT)
    model, plain = net(), net()
    with one_process(tmp_path) as mesh:
        package("torch.distributed.fsdp").fully_shard(model, mesh=mesh)
        optimizer = torch.optim.RMSprop(model.parameters(), lr=0.1, momentum=0.9)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        options = module.StateDictOptions(full_state_dict=full)
        checkpoint = module.get_optimizer_state_dict(model, optimizer, options=options)
        params = interop.params_from(model.state_dict(), empty(), NAMES)
        tx, state = interop.resume_torch(checkpoint, params, NAMES)
    parameters = dict(plain.named_parameters())
    optimizer = torch.optim.RMSprop(parameters.values(), lr=0.1, momentum=0.9)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    tx, state = (tx, interop.from_torch(checkpoint, tx.init(params), params, NAMES)) if full else (tx, state)
    there(parameters, optimizer, 1, 9)
    assert float(optax.tree.get(state, "count")) == 1
    for name, buffer in (("fc", "kernel"), ("head", "kernel")):
        np.testing.assert_allclose(optax.tree.get(state, "nu")[name][buffer], 0.01, rtol=1e-12)
        np.testing.assert_allclose(optax.tree.get(state, "trace")[name][buffer], 10, rtol=1e-6)


# Hyper-parameters, of groups too.

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

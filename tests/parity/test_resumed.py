"""Runs resumed from what PyTorch writes, optimizer and all, go on as they would have gone on there."""

import contextlib
import warnings

import numpy as np
import optax
import pytest
from continued import NAMES, RTOL, empty, here, largest_difference, net, schedule, there
from installed import package

from rmsprop_jax import interop

pytestmark = pytest.mark.slow

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

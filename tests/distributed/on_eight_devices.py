"""The optimizer on meshes of simulated devices: tests/test_sharding.py runs them in a process of its own.

By hand: python -m pytest tests/distributed/on_eight_devices.py
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import forms, quick
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import LAYOUTS, assert_equal, data_mesh, mesh_of, placed, shardings

from rmsprop_jax import apply_updates, rmsprop, rows, warmup
from rmsprop_jax.sharding import state_sharding

FORMS = forms("plain", "centered_momentum") | {
    "outside": {"eps_in_sqrt": False, "bias_correction": True},
    "nesterov_after": {"momentum": 0.9, "nesterov": True, "lr_in_momentum": False, "weight_decay": 0.01},
    "bfloat16": {"accumulator": "bfloat16", "momentum": 0.9, "momentum_dtype": jnp.bfloat16},
    "uint8": {"accumulator": "uint8", "centered": True},
}
SHAPES = {"kernel": (16, 24), "scale": (8,), "odd": (3, 5), "scalar": ()}


def filled(x):
    """The mesh axes of each dimension."""
    return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


def random(rng, dtype=jnp.float32):
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def updated(tx, dtype, place=lambda tree: tree, zero=None):
    """Parameters and state after twelve steps with gradients that do not depend on the parameters."""
    rng = np.random.default_rng(0)
    params = place(random(rng, dtype))
    layout = None if zero is None else state_sharding(tx, params, zero, "data")
    state = jax.jit(tx.init, out_shardings=layout)(params)
    before = shardings((params, state))

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=None if zero is None else before)
    def step(params, state, grads, key):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates, key=key), state

    for t in range(12):
        params, state = step(params, state, place(random(rng, dtype)), jax.random.key(t))
    for x, sharding in zip(jax.tree.leaves((params, state)), jax.tree.leaves(before), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    return params, state


@pytest.mark.parametrize(
    ("form", "dtype"),
    quick(
        [("uint8", jnp.bfloat16), *((form, jnp.float32) for form in FORMS)],
        [("plain", jnp.float32), ("uint8", jnp.bfloat16)],
    ),
)
def test_same_numbers_on_every_mesh(form, dtype):
    """Bit for bit: the rule is elementwise, and rounding goes by an element's place in the whole array."""
    tx = rmsprop(warmup(0.01), 0.99, **FORMS[form])
    expected = jax.device_get(updated(tx, dtype))
    for devices, layout, zero in [
        (2, "replicated", True),
        (4, "fully sharded", False),
        (8, "tensor-parallel", True),
    ]:
        mesh = mesh_of(devices)
        actual = updated(
            tx, dtype, lambda tree, m=mesh, s=LAYOUTS[layout]: placed(tree, m, s), mesh if zero else None
        )
        assert_equal(actual, expected, err_msg=f"{devices=}, {layout}, {zero=}")
    mesh = mesh_of(8, AxisType.Explicit)
    actual = updated(tx, dtype, lambda tree: placed(tree, mesh, LAYOUTS["both"]))
    assert_equal(actual, expected, err_msg="explicit")


def initialised(tx, params, mesh, kind):
    """States made eagerly, jitted and, on explicit axes, where shapes alone have shardings, in eval_shape."""
    states = [tx.init(params), jax.jit(tx.init)(params)]
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            states.append(jax.eval_shape(tx.init, params))
    return states


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_init_takes_the_parameters_shardings(kind):
    """Eagerly, jitted, and where the shapes alone have them, on explicit axes, in eval_shape too."""
    tx = rmsprop(0.01, accumulator="uint8", centered=True, momentum=0.9)
    mesh = mesh_of(8, kind)
    params = random(np.random.default_rng(0))
    params = placed({name: params[name] for name in ("kernel", "odd")}, mesh, LAYOUTS["both"])
    states = initialised(tx, params, mesh, kind)
    for state in states:
        for tree in (state[0].nu, state[0].mu, state[2].trace):
            for x, p in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
                assert filled(x) == filled(p)
    table = {"table": params["kernel"]}
    state = jax.jit(rows.exact(rmsprop(0.01)).init)(table)
    assert state.last["table"].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data")), 1)


# Training a model: its sums are taken in another order on every mesh -------------------------------------


def model(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 24), "bias": (1, 24), "out": (24, 8)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 4, dtype) for name, shape in shapes.items()}
    inputs = rng.normal(size=(32, 16)).astype(np.float32)
    return params, (inputs, np.sin(inputs[:, :8]))


def loss_fn(params, batch):
    inputs, targets = batch
    outputs = jnp.tanh(inputs @ params["kernel"] + params["bias"]) @ params["out"]
    return jnp.mean((outputs - targets) ** 2)


def trained(tx, mesh=None, spec=None, zero=False, steps=20):
    """Parameters, state and losses of the model, and its compiled step."""
    params, batch = model()
    if mesh is not None:
        params = placed(params, mesh, spec)
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    state, layout = tx.init(params), None  # jitted, Optax's Adam would place it on one device
    if mesh is not None:
        on_all = NamedSharding(mesh, PartitionSpec())
        in_parts = state_sharding(tx, params, mesh, "data")
        as_params = jax.tree.map(lambda x: x.sharding if x.ndim else on_all, state)
        layout = (shardings(params), in_parts if zero else as_params, on_all)
        state = jax.device_put(state, layout[1])

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=layout)
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = step.lower(params, state, batch).compile()
    losses = []
    for _ in range(steps):
        params, state, loss = step(params, state, batch)
        losses.append(loss.item())
    return params, state, losses, step


FIRST = [(8, "replicated", True), (4, "both", False)]
MORE = [
    (1, "replicated", False),
    (2, "replicated", True),
    (4, "fully sharded", False),
    (8, "tensor-parallel", False),
]
ON = {"float32": ("float32", FIRST), "uint8": ("uint8", FIRST), "more": ("float32", MORE)}


@pytest.mark.parametrize("name", quick(ON, ["float32", "uint8"]))
def test_a_training_run_is_the_same_on_every_mesh(name):
    """To the rounding of the model's sums, which a mesh cuts up: 1e-6 of a gradient, in 20 steps of 0.01."""
    accumulator, meshes = ON[name]
    tx = rmsprop(warmup(0.01), 0.99, accumulator=accumulator)
    params, _, losses, _ = trained(tx)
    assert losses[-1] < losses[0] / 10
    # A step has the learning rate's size even where a gradient is all rounding; and a code of one byte that
    # falls on the other side of its threshold is 19% off for some steps.
    rtol = 1e-2 if accumulator == "uint8" else 1e-3
    for devices, name, zero in meshes:
        actual, _, others, _ = trained(tx, mesh_of(devices), LAYOUTS[name], zero)
        np.testing.assert_allclose(others, losses, rtol=rtol, err_msg=f"{devices=}, {name}, {zero=}")
        for leaf, expected in params.items():
            np.testing.assert_allclose(actual[leaf], expected, rtol=0, atol=rtol, err_msg=leaf)


@pytest.mark.parametrize(
    "form", quick(["plain", "centered_momentum", "uint8", "adam"], ["centered_momentum", "uint8"])
)
def test_zero_keeps_an_eighth_on_each_device(form):
    """And the compiled step gathers the new parameters, and nothing else."""
    tx = optax.adam(0.01) if form == "adam" else rmsprop(0.01, **FORMS[form])
    mesh = data_mesh()
    whole = trained(tx, mesh, PartitionSpec())
    parts = trained(tx, mesh, PartitionSpec(), zero=True)
    on_one_device = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, parts[1])
    for x, nbytes in zip(jax.tree.leaves(parts[1]), jax.tree.leaves(on_one_device), strict=True):
        assert nbytes == x.nbytes / (8 if x.ndim else 1)
    compiled, before = parts[3], whole[3]
    saved = sum(x.nbytes for x in jax.tree.leaves(parts[1]) if x.ndim) * 7 // 8
    bytes_of = lambda step: step.memory_analysis().argument_size_in_bytes  # noqa: E731
    assert bytes_of(before) - bytes_of(compiled) == saved
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    shapes = [x.shape for x in jax.tree.leaves(parts[0])]
    assert sorted(gathered) == sorted(("f32", ",".join(map(str, shape))) for shape in shapes)
    for x, expected in zip(jax.tree.leaves(parts[0]), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-3)  # as of a run on another mesh, above


def test_zero_in_flax_nnx():
    """The recipe of sharding.py: the state is created in parts, and stays so."""
    nnx = pytest.importorskip("flax.nnx")
    mesh = data_mesh()
    _, (inputs, targets) = model()

    def train(zero):
        net = nnx.Sequential(
            nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 8, rngs=nnx.Rngs(1))
        )
        nnx.update(net, jax.device_put(nnx.state(net), NamedSharding(mesh, PartitionSpec())))
        tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(warmup(0.01), momentum=0.9))
        if zero:
            in_parts = state_sharding(tx, nnx.state(net, nnx.Param), mesh, "data")
            tx = tx._replace(init=jax.jit(tx.init, out_shardings=in_parts))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

        @nnx.jit
        def step(net, optimizer):
            grads = nnx.grad(lambda net: jnp.mean((net(inputs) - targets) ** 2))(net)
            optimizer.update(net, grads)

        with jax.numpy_rank_promotion("allow"):  # Flax's own
            for _ in range(5):
                step(net, optimizer)
        return nnx.state(net, nnx.Param), optimizer.opt_state

    (params, state), (expected, _) = train(True), train(False)
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)  # the norm is summed in another order
    for tree in (state[1][0].nu, state[1][2].trace):
        for x in jax.tree.leaves(tree):
            assert x.addressable_shards[0].data.nbytes == x.nbytes / 8


def test_accumulators_in_the_hosts_memory():
    """The recipe of sharding.py."""
    kinds = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    if "pinned_host" not in kinds:
        pytest.skip(f"the recipe needs pinned_host, this backend has {kinds}")
    if jax.__version_info__ < (0, 10) and jax.default_backend() == "cpu":
        pytest.skip("XLA of that time places nothing in the host's memory on a mesh of CPU devices")
    mesh = data_mesh()
    tx = rmsprop(0.01, momentum=0.9)
    expected = trained(tx, mesh, PartitionSpec(), zero=True, steps=5)[0]
    params, batch = model()
    params = placed(params, mesh, PartitionSpec())
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    in_parts = state_sharding(tx, params, mesh, "data")
    on_host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), in_parts)
    state = jax.jit(tx.init, out_shardings=on_host)(params)

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(shardings(params), on_host))
    def step(params, state, batch):
        state = jax.device_put(state, in_parts)
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state, batch)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"pinned_host"}
    assert_equal(params, jax.device_get(expected))


SPLIT = [(name, made) for name in FORMS if name != "uint8" for made in ("inside", "outside")]


@pytest.mark.parametrize(
    ("name", "made"),
    quick(SPLIT, [("plain", "outside"), ("centered_momentum", "inside"), ("bfloat16", "outside")]),
)
def test_inside_shard_map_with_varying_axes_checked(name, made):
    """Each device its part; thresholds count the elements of a part, so bytes are left out."""
    tx = rmsprop(warmup(0.1), **FORMS[name])
    params = {"w": jnp.arange(1.0, 33.0).reshape(16, 2), "b": jnp.arange(1.0, 9.0)}
    state = tx.init(params)

    def two_steps(params, state):
        state = tx.init(params) if made == "inside" else state
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(lambda p: p * 0.1, params), state, params)
            params = apply_updates(params, updates)
        return params

    split = PartitionSpec("data")
    specs = jax.tree.map(lambda x: split if x.ndim else PartitionSpec(), state)
    inside = jax.shard_map(
        two_steps, mesh=data_mesh(), in_specs=(split, specs), out_specs=split, check_vma=True
    )
    rounding = 1e-2 if name == "bfloat16" else 1e-6
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=rounding),
        jax.jit(inside)(params, state),
        jax.jit(two_steps)(params, state),
    )

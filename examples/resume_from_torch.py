"""Half a training run in PyTorch, the other half in JAX: does the loss notice?

A small convolutional network learns scikit-learn's digits with `torch.optim.RMSprop`, momentum and a learning
rate that changes with every step, and writes a checkpoint at half time. `rmsprop_jax.interop` reads weights
and optimizer from the file into Flax NNX; from then on both go on, on the same batches, and their losses are
compared. A third run, for comparison, takes the weights over and starts with new accumulators; a fourth
carries over the convolution alone, and learns with a new head whether a digit is odd.

    python resume_from_torch.py            (needs PyTorch: pip install 'rmsprop_jax[examples,torch]')

draws the losses and prints the largest difference between them.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

from rmsprop_jax import interop


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 64, 3, padding=1)
        self.linear = torch.nn.Linear(64, 10)

    def forward(self, x):  # (batch, 1, 8, 8)
        return self.linear(torch.relu(self.conv(x)).amax((2, 3)))


class FlaxNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(1, 64, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):  # (batch, 8, 8, 1)
        return self.linear(nnx.relu(self.conv(x)).max((1, 2)))


# PyTorch's names, the paths in Flax, and the axes: (out, in, height, width) to (height, width, in, out).
NAMES = {
    "conv.weight": ("conv/kernel", (2, 3, 1, 0)),
    "conv.bias": "conv/bias",
    "linear.weight": ("linear/kernel", (1, 0)),
    "linear.bias": "linear/bias",
}


def carried_over(file, classes, names, learning_rate, **options):
    """The network with the checkpoint's weights, and the optimizer with its settings and its state."""
    graph, params = nnx.split(FlaxNet(classes, nnx.Rngs(0)))
    params = interop.params_from(file, params, names, **options)
    order = list(NAMES)  # of model.parameters()
    tx, state = interop.resume_torch(file, params, names, order=order, learning_rate=learning_rate, **options)
    return graph, params, tx, state


@partial(jax.jit, static_argnames=("graph", "tx"))
def jax_step(graph, params, tx, state, x, y):
    def loss_fn(params):
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="in all, half of them before the carry-over")
    parser.add_argument("--out", type=Path, default=Path("runs/resume_from_torch"), help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    half = args.steps // 2
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(labels), 128, replace=False) for _ in range(args.steps)]

    def learning_rate(count):  # of Python numbers and of JAX's
        return 1e-3 * (0.55 + 0.45 * jnp.cos(math.pi * count / args.steps))

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is small
    model = TorchNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1.0, alpha=0.99, eps=1e-3, momentum=0.9)

    def torch_step(t):
        optimizer.param_groups[0]["lr"] = float(learning_rate(t))
        x, y = torch.from_numpy(images[batches[t], None]), torch.from_numpy(labels[batches[t]])
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    torch_losses = [torch_step(t) for t in tqdm(range(half), desc="PyTorch", unit="step")]
    file = args.out / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    graph, params, tx, state = carried_over(file, 10, NAMES, learning_rate)
    fresh = optax.tree.set(tx.init(params), count=jnp.int32(half))  # the schedule goes on where it was
    # In part: `names` leaves out the head, which is new. `report` prints what was carried over.
    names = {name: path for name, path in NAMES.items() if name.startswith("conv")}
    new_head = carried_over(file, 2, names, learning_rate, strict=False, report=print)
    runs = {
        "carried over": (graph, params, tx, state),
        "weights only": (graph, params, tx, fresh),
        "new head: is it odd?": new_head,
    }
    losses = {name: [] for name in runs}
    for t in tqdm(range(half, args.steps), desc="PyTorch and JAX", unit="step"):
        torch_losses.append(torch_step(t))
        x, y = images[batches[t], ..., None], labels[batches[t]]
        for name, (graph, params, tx, state) in runs.items():
            params, state, loss = jax_step(graph, params, tx, state, x, y % 2 if "odd" in name else y)
            runs[name] = graph, params, tx, state
            losses[name].append(float(loss))

    print(f"Largest difference from PyTorch's loss over {args.steps - half} further steps:")
    difference = {}
    for name in ("carried over", "weights only"):
        difference[name] = np.abs(np.subtract(losses[name], torch_losses[half:]))
        print(f"  {name}: {difference[name].max():.1e}")
    draw(args.out / "resume_from_torch.png", torch_losses, losses, difference)
    print(f"The picture is {args.out / 'resume_from_torch.png'}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, torch_losses, losses, difference):
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    colors = {"weights only": "tab:gray", "carried over": "tab:blue", "new head: is it odd?": "tab:green"}
    top.semilogy(torch_losses, color="tab:orange", lw=5, alpha=0.4, label="PyTorch, all the way")
    for name, color in colors.items():
        after = np.arange(len(torch_losses) - len(losses[name]), len(torch_losses))
        top.semilogy(after, losses[name], color=color, lw=1, label=f"JAX, {name}")
        if name in difference:
            bottom.semilogy(after, np.maximum(difference[name], 1e-9), color=color, lw=1)
    top.set(ylabel="loss of the batch", title="A run of torch.optim.RMSprop, continued by conventions.torch")
    top.legend()
    bottom.set(xlabel="step", ylabel="difference (0 as 1e-9)")
    for axes in (top, bottom):
        axes.axvline(after[0], color="black", lw=0.8, ls="--")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

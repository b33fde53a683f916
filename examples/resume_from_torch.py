"""Half a training run in PyTorch, the other half in JAX: does the loss notice?

A small convolutional network learns scikit-learn's digits with `torch.optim.RMSprop`, momentum and a learning
rate that changes with every step, and writes a checkpoint at half time. `rmsprop_jax.interop` reads weights
and optimizer from the file into Flax NNX; from then on both go on, on the same batches, and their losses are
compared. A third run, for comparison, takes the weights over and starts with new accumulators; a fourth
carries over the convolution alone, and learns with a new head whether a digit is odd.

    python examples/resume_from_torch.py            (needs PyTorch: make peers)

Ends with runs/resume_from_torch/losses.png, and prints the largest difference between the two losses.
"""

import importlib.util
import math
import sys
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from _options import parser_for
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

from rmsprop_jax import interop

SETTINGS = {"alpha": 0.99, "eps": 1e-3, "momentum": 0.9}

# PyTorch's names, the paths in Flax, and the axes: (out, in, height, width) to (height, width, in, out).
NAMES = {
    "conv.weight": ("conv/kernel", (2, 3, 1, 0)),
    "conv.bias": "conv/bias",
    "linear.weight": ("linear/kernel", (1, 0)),
    "linear.bias": "linear/bias",
}


def torch_net():
    import torch  # not above: --help is for those, too, who have yet to install it

    class TorchNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 64, 3, padding=1)
            self.linear = torch.nn.Linear(64, 10)

        def forward(self, x):  # (batch, 1, 8, 8)
            return self.linear(torch.relu(self.conv(x)).amax((2, 3)))

    return TorchNet()


class FlaxNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(1, 64, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):  # (batch, 8, 8, 1)
        return self.linear(nnx.relu(self.conv(x)).max((1, 2)))


def compare(steps, folder):
    """Each run's difference from PyTorch's loss, step for step from half time on."""
    import torch

    half = steps // 2
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    rng = np.random.default_rng(0)
    batches = [rng.choice(len(labels), 128, replace=False) for _ in range(steps)]

    def learning_rate(count):  # of Python numbers and of JAX's
        return 1e-3 * (0.55 + 0.45 * jnp.cos(math.pi * count / steps))

    torch.manual_seed(0)
    torch.set_num_threads(1)  # the network is small
    model = torch_net()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1.0, **SETTINGS)

    def torch_step(t):
        optimizer.param_groups[0]["lr"] = float(learning_rate(t))
        x, y = torch.from_numpy(images[batches[t], None]), torch.from_numpy(labels[batches[t]])
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    torch_losses = [torch_step(t) for t in tqdm(range(half), desc="PyTorch", unit="step")]

    file = folder / "checkpoint.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    order = [name for name, _ in model.named_parameters()]

    # Carry over: the weights, and the optimizer with its hyper-parameters and its state.
    graph, params = nnx.split(FlaxNet(10, nnx.Rngs(0)))
    params = interop.params_from(file, params, NAMES)
    tx, state = interop.resume_torch(file, params, NAMES, order=order, learning_rate=learning_rate)

    # In part: `names` leaves out the head, which is new. What was carried over is printed.
    odd_graph, odd_params = nnx.split(FlaxNet(2, nnx.Rngs(0)))
    part = {"strict": False, "report": print}
    names = {name: path for name, path in NAMES.items() if name.startswith("conv")}
    odd_params = interop.params_from(file, odd_params, names, **part)
    _, odd_state = interop.resume_torch(
        file, odd_params, names, order=order, learning_rate=learning_rate, **part
    )

    @partial(jax.jit, static_argnums=0)
    def jax_step(graph, params, state, x, y):
        def loss(params):
            logits = nnx.merge(graph, params)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    fresh = optax.tree.set(tx.init(params), count=jnp.int32(half))  # the schedule goes on where it was
    runs = {
        "carried over": (graph, params, state, labels),
        "weights only": (graph, params, fresh, labels),
        "new head: is it odd?": (odd_graph, odd_params, odd_state, labels % 2),
    }
    losses = {name: [] for name in runs}
    for t in tqdm(range(half, steps), desc="PyTorch and JAX", unit="step"):
        torch_losses.append(torch_step(t))
        for name, (graph, params, state, targets) in runs.items():
            x, y = images[batches[t], ..., None], targets[batches[t]]
            params, state, loss = jax_step(graph, params, state, x, y)
            runs[name] = graph, params, state, targets
            losses[name].append(float(loss))

    difference = {
        name: np.abs(np.subtract(losses[name], torch_losses[half:]))
        for name in ("carried over", "weights only")
    }
    picture = folder / "losses.png"
    draw(torch_losses, losses, difference, picture)
    print(f"Largest difference from PyTorch's loss over {steps - half} further steps:")
    for name, path in difference.items():
        print(f"  {name}: {path.max():.1e}")
    print(f"Drawn in {picture}")
    return difference


def draw(torch_losses, losses, difference, path):
    after = np.arange(len(torch_losses) - len(losses["carried over"]), len(torch_losses))
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6.5), height_ratios=[3, 2])
    top.semilogy(torch_losses, color="tab:orange", lw=5, alpha=0.4, label="PyTorch, all the way")
    for name, color in (("weights only", "tab:gray"), ("carried over", "tab:blue")):
        top.semilogy(after, losses[name], color=color, lw=1, label=f"JAX, {name}")
        bottom.semilogy(after, np.maximum(difference[name], 1e-9), color=color, lw=1)
    name = "new head: is it odd?"
    top.semilogy(after, losses[name], color="tab:green", lw=1, label=f"JAX, {name}")
    top.set(ylabel="loss of the batch", title="A run of torch.optim.RMSprop, continued by conventions.torch")
    top.legend()
    bottom.set(xlabel="step", ylabel="difference (0 as 1e-9)")
    for axes in (top, bottom):
        axes.axvline(after[0], color="black", lw=0.8, ls="--")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = parser_for(__doc__, "resume_from_torch", help="where the picture goes", option="--folder")
    parser.add_argument("--steps", type=int, default=600, help="in all, half of them before the carry-over")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        sys.exit("PyTorch is not installed. `make peers` installs it.")
    return compare(args.steps, args.folder)


if __name__ == "__main__":
    main()

"""How do I train a Flax Linen model with it?

`rmsprop` goes into Linen's `TrainState` where any Optax optimizer goes. A convolutional network learns
scikit-learn's 1,797 handwritten digits, of 8 x 8 pixels each; the learning rate warms up over twice the
accumulator's memory, 2 / (1 - decay) steps, and then falls along a cosine:

    python digits_cnn.py

trains on four fifths of the digits for 20 epochs, half a minute on two cores, and draws the loss, the
accuracy on the other fifth, and those of its digits that the network finds hardest.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import trange

from rmsprop_jax import rmsprop, warmup

LEARNING_RATE, DECAY, BATCH = 2e-3, 0.9, 64


class Network(nn.Module):
    @nn.compact
    def __call__(self, images):  # [batch, 8, 8, 1], brightness from 0 to 1
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def new_state(steps):
    model = Network()
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    learning_rate = warmup(optax.cosine_decay_schedule(LEARNING_RATE, steps), decay=DECAY)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(learning_rate, decay=DECAY))
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def evaluate(state, images, labels):
    """Mean loss, accuracy, and the logits they are of."""
    logits = state.apply_fn({"params": state.params}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(logits.argmax(axis=-1) == labels), logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/digits_cnn.png"), help="the picture")
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    rng = np.random.default_rng(0)
    train, valid = np.split(rng.permutation(len(labels)), [len(labels) * 4 // 5])
    batches = len(train) // BATCH
    state, losses, history = new_state(args.epochs * batches), [], []
    progress = trange(1, args.epochs + 1, unit="epoch")
    for epoch in progress:
        for batch in rng.permutation(train)[: batches * BATCH].reshape(batches, BATCH):
            state, loss = train_step(state, images[batch], labels[batch])
            losses.append(loss)
        valid_loss, accuracy, logits = evaluate(state, images[valid], labels[valid])
        history.append((epoch, float(valid_loss), float(accuracy)))
        progress.set_postfix(loss=f"{valid_loss:.3f}", accuracy=f"{accuracy:.1%}")
    print(f"validation: cross-entropy {valid_loss:.3f}, accuracy {accuracy:.1%} of {len(logits)} digits")
    draw(args.out, np.array(losses), np.array(history).T, images[valid], labels[valid], np.asarray(logits))
    print(f"The picture is {args.out}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, losses, history, images, labels, logits):
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    curve, accuracy = left.subplots(1, 2)
    epochs, valid, correct = history
    curve.semilogy(np.linspace(0, epochs[-1], len(losses)), losses, lw=0.7, alpha=0.5, label="each batch")
    curve.semilogy(epochs, valid, label=f"validation, at last {valid[-1]:.3f}")
    curve.set(xlabel="epoch", title="Cross-entropy")
    curve.legend()
    accuracy.plot(epochs, 100 * correct, color="tab:orange")
    accuracy.set(xlabel="epoch", ylabel="%", ylim=(90, 100.2))
    accuracy.set_title(f"Validation: accuracy, at last {correct[-1]:.1%}")
    for axes in (curve, accuracy):
        axes.grid(alpha=0.25)
    right.suptitle("The hardest: read as (in truth)")
    log_p = np.array(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels]
    for axes, i in zip(right.subplots(2, 3).flat, np.argsort(log_p), strict=False):
        read = logits[i].argmax()
        axes.imshow(images[i, ..., 0], cmap="gray_r")
        axes.set_title(f"{read} ({labels[i]})", color="black" if read == labels[i] else "tab:red")
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

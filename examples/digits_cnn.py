"""How do I train a Flax Linen model with it?

A convolutional network learns scikit-learn's 1,797 handwritten digits, of 8 x 8 pixels each. `rmsprop` goes
into Linen's `TrainState` where an Optax optimizer goes, clipping before it; its learning rate warms up over
twice the accumulator's memory, 2 / (1 - decay) steps, and then falls along a cosine:

    python examples/digits_cnn.py

trains on four fifths of the digits for 20 epochs, half a minute on two cores, and draws the loss, the
accuracy on the other fifth, and those of its digits that the network finds hardest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import at_least, parser_for
from _pictures import save_figure
from flax import linen as nn
from flax.training.train_state import TrainState
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import trange

from rmsprop_jax import rmsprop, warmup

DECAY, BATCH = 0.9, 64


class Network(nn.Module):
    @nn.compact
    def __call__(self, images):  # [batch, 8, 8, 1], brightness from 0 to 1
        x = nn.relu(nn.Conv(32, (3, 3))(images))
        x = nn.relu(nn.Conv(64, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def read_digits(seed=0):
    """Images and labels, to train on and to validate on."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = (images[order] / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train = len(labels) * 4 // 5
    return (images[:train], labels[order[:train]]), (images[train:], labels[order[train:]])


def new_state(learning_rate, steps, seed):
    schedule = warmup(optax.cosine_decay_schedule(learning_rate, steps), decay=DECAY)
    tx = optax.chain(optax.clip_by_global_norm(1.0), rmsprop(schedule, decay=DECAY))
    model = Network()
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=gradients), loss


@jax.jit
def evaluate(state, images, labels):
    """Mean loss, accuracy, and the logits they are of."""
    logits = state.apply_fn({"params": state.params}, images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, jnp.mean(logits.argmax(axis=-1) == labels), logits


def draw(path, losses, history, images, labels, logits):
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    curve, accuracy = left.subplots(1, 2)
    epochs, valid, right_share = np.array(history).T
    curve.semilogy(np.linspace(0, epochs[-1], len(losses)), losses, lw=0.7, alpha=0.5, label="each batch")
    curve.semilogy(epochs, valid, label=f"validation, at last {valid[-1]:.3f}")
    curve.set(xlabel="epoch", title="Cross-entropy")
    curve.legend(frameon=False)
    accuracy.plot(epochs, 100 * right_share, color="tab:orange")
    accuracy.set(
        xlabel="epoch",
        title=f"Validation: accuracy, at last {right_share[-1]:.1%}",
        ylabel="%",
        ylim=(90, 100.2),
    )
    log_share = np.array(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels]
    right.suptitle("The hardest: read as (in truth)")
    for axes, i in zip(right.subplots(2, 3).flat, np.argsort(log_share), strict=False):
        axes.imshow(images[i, ..., 0], cmap="gray_r")
        read = logits[i].argmax()
        axes.set_title(f"{read} ({labels[i]})", color="black" if read == labels[i] else "tab:red")
        axes.axis("off")
    save_figure(figure, path)


def main(argv=None):
    parser = parser_for(__doc__, "digits_cnn.png")
    parser.add_argument("--epochs", type=at_least(1), default=20)
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=2e-3, help="after the warm-up")
    parser.add_argument(
        "--seed", type=at_least(0), default=0, help="of the split, the weights and the batches"
    )
    args = parser.parse_args(argv)

    (images, labels), valid = read_digits(args.seed)
    batches = len(labels) // BATCH
    state = new_state(args.learning_rate, args.epochs * batches, args.seed)
    rng, losses, history = np.random.default_rng(args.seed), [], []
    progress = trange(args.epochs, unit="epoch")
    for epoch in progress:
        for batch in rng.permutation(len(labels))[: batches * BATCH].reshape(batches, BATCH):
            state, loss = train_step(state, images[batch], labels[batch])
            losses.append(loss)
        valid_loss, accuracy, logits = evaluate(state, *valid)
        history.append((epoch + 1, float(valid_loss), float(accuracy)))
        progress.set_postfix(loss=f"{valid_loss:.3f}", accuracy=f"{accuracy:.1%}")
    print(f"validation: cross-entropy {valid_loss:.3f}, accuracy {accuracy:.1%} of {len(logits)} digits")
    draw(args.out, np.array(losses), history, *valid, np.asarray(logits))
    print(f"The picture is {args.out}")


if __name__ == "__main__":
    main()

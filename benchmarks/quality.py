"""Do small accumulators and bfloat16 parameters train as well as float32? Validation losses of three tasks.

text: a recurrent network (GRU) predicts the next character of Python's documentation. digits: a convolutional
network on scikit-learn's 8 x 8 digits. words: skip-gram vectors with negative sampling from the same
documentation. Each is trained with decay 0.9, 0.99 and 0.999 and every setting, from the same seeds, which
are vmapped; the learning rate falls to 0 by a cosine. "8 bytes": bfloat16 parameters and gradients, one-byte
accumulators, all rounded without bias; "nearest": the same, but parameters rounded to nearest.

Beside them Optax's Adam (its b2 is the decay), Adafactor, and its second moments alone
(`optax.scale_by_factored_rms`), at the same learning rate: Adafactor without the factor of the parameters'
own size, and its decay is a schedule of its own. These networks' leaves are small: factored are those whose
two largest sizes are 16 or more, instead of 128. For rates tuned to each method, see tasks.py.

    python -m benchmarks quality                  5 seeds, the figures and a picture
    python -m benchmarks quality --only digits    one task, put among what is kept of the others
    python -m benchmarks quality --short          2 seeds, a few steps, one decay
"""

import re
from dataclasses import replace
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import rmsprop_jax
from benchmarks._frame import accumulators, environment, markdown, parser, save, save_picture, stored

SMALL = 16  # the least of a leaf's two largest sizes with which it is factored


def accumulator(name):
    """What to write for `accumulator=`."""
    return replace(rmsprop_jax.accumulators.NAMED[name], min_dim=SMALL) if name == "factored" else name


def ours(name):
    """From a schedule and a decay, the optimizer with the accumulator of that name."""

    def make(rate, decay):
        return rmsprop_jax.rmsprop(rate, decay, bias_correction=True, accumulator=accumulator(name))

    return make


def factored_rms(rate, decay):
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=SMALL)
    return optax.chain(factored, optax.scale_by_learning_rate(rate))


def adafactor(rate, decay):
    return optax.adafactor(rate, min_dim_size_to_factor=SMALL, multiply_by_parameter_scale=False)


SETTINGS = {  # the optimizer, the parameters' dtype, whether they are rounded without bias
    **{name: (ours(name), jnp.float32, False) for name in accumulators()},
    "8 bytes": (ours("uint8"), jnp.bfloat16, True),
    "nearest": (ours("uint8"), jnp.bfloat16, False),
    "6 bytes": (ours("factored"), jnp.bfloat16, True),
    "factored rms": (factored_rms, jnp.float32, False),
    "adafactor": (adafactor, jnp.float32, False),
    "adam": (lambda rate, decay: optax.adam(rate, b2=decay), jnp.float32, False),
}
DECAYS = (0.9, 0.99, 0.999)


def normal(key, *shape):
    """Weights for inputs of variance 1, of which there are shape[:-1]."""
    return jax.random.normal(key, shape) / np.sqrt(max(1, np.prod(shape[:-1])))


def split(arrays):
    """Each array in two, the last tenth for validation."""
    return zip(*(np.split(array, [len(array) * 9 // 10]) for array in arrays), strict=True)


def text_task(hidden=64, window=32):
    text = " ".join(topics[name] for name in sorted(topics))
    alphabet, tokens = np.unique(list(text), return_inverse=True)
    size = len(alphabet)
    tokens = tokens[: len(tokens) // window * window].reshape(-1, window).astype(np.int32)

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "embed": normal(keys[0], size, hidden) * np.sqrt(size),
            "gates": normal(keys[1], 2 * hidden, 2 * hidden),
            "new": normal(keys[2], 2 * hidden, hidden),
            "out": normal(keys[3], hidden, size),
        }

    def loss(params, batch):
        (tokens,) = batch

        def cell(h, x):
            z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([x, h], -1) @ params["gates"]), 2, -1)
            h_new = jnp.tanh(jnp.concatenate([x, r * h], -1) @ params["new"])
            h = (1 - z) * h + z * h_new
            return h, h

        x = params["embed"][tokens[:, :-1]].swapaxes(0, 1)
        _, h = jax.lax.scan(cell, jnp.zeros_like(x[0]), x)
        logits = (h @ params["out"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:].T).mean()

    return init, loss, *split([tokens])


def digits_task(width=16):
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images[order].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)

    def init(key):
        keys = jax.random.split(key, 3)
        return {
            "conv_1": normal(keys[0], 3, 3, 1, width),
            "conv_2": normal(keys[1], 3, 3, width, 2 * width),
            "out": normal(keys[2], 8 * width, 10),
            "bias": jnp.zeros(10),
        }

    def loss(params, batch):
        x, y = batch
        x = x.astype(params["out"].dtype)
        for name in ("conv_1", "conv_2"):
            x = jax.lax.conv_general_dilated(
                x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        logits = (x.reshape(len(x), -1) @ params["out"] + params["bias"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return init, loss, *split([images, labels[order].astype(np.int32)])


def words_task(width=32, negatives=5, reach=5):
    words = re.findall("[a-z]{2,}", " ".join(topics[name] for name in sorted(topics)).lower())
    _, tokens, counts = np.unique(words, return_inverse=True, return_counts=True)
    rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    size = int((counts >= 5).sum())
    tokens = rank[tokens]
    tokens = tokens[tokens < size].astype(np.int32)
    rng = np.random.default_rng(0)
    place = rng.permutation(np.arange(reach, len(tokens) - reach))
    distance = rng.integers(1, reach + 1, len(place)) * rng.choice([-1, 1], len(place))
    far = rng.choice(tokens, (len(place), negatives))

    def init(key):
        return {"word": jax.random.normal(key, (size, width)) / width, "context": jnp.zeros((size, width))}

    def loss(params, batch):
        word, near, far = batch
        word = params["word"][word]
        near = jnp.einsum("bd,bd->b", word, params["context"][near]).astype(jnp.float32)
        far = jnp.einsum("bd,bkd->bk", word, params["context"][far]).astype(jnp.float32)
        return jnp.mean(jax.nn.softplus(-near) + jax.nn.softplus(far).sum(axis=1))

    return init, loss, *split([tokens[place], tokens[place + distance], far])


# The task, learning rate, steps and batch size.
TASKS = {
    "text": (text_task, 3e-3, 600, 32),
    "digits": (digits_task, 3e-3, 500, 64),
    "words": (words_task, 3e-3, 600, 256),
}


def final_losses(task, learning_rate, steps, batch, decay, setting, seeds):
    """Validation losses after training, one for each seed."""
    init, loss, train, valid = task
    make, dtype, unbiased = setting
    tx = make(optax.cosine_decay_schedule(learning_rate, steps), decay)
    train, valid = ([jnp.asarray(array) for array in arrays] for arrays in (train, valid))
    valid = [array[:2000] for array in valid]

    def step(carry, key):
        params, state = carry
        for_batch, for_rounding = jax.random.split(key)
        some = jax.random.randint(for_batch, (batch,), 0, len(train[0]))
        grads = jax.grad(loss)(params, [array[some] for array in train])
        updates, state = tx.update(grads, state, params)
        params = rmsprop_jax.apply_updates(params, updates, key=for_rounding if unbiased else None)
        return (params, state), None

    @jax.jit
    @jax.vmap
    def trained(seed):
        for_params, for_steps = jax.random.split(jax.random.key(seed))
        params = optax.tree.cast(init(for_params), dtype)
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(for_steps, steps))
        return loss(optax.tree.cast(carry[0], jnp.float32), valid)

    return np.asarray(trained(jnp.arange(seeds))).tolist()


def table(data):
    """Mean over the seeds, and their standard deviation."""
    rows = [
        (row["task"], f"{row['decay']}", *(mean_and_deviation(losses) for losses in row["losses"].values()))
        for row in data["rows"]
    ]
    return markdown(["task", "decay", *data["rows"][0]["losses"]], rows)


def mean_and_deviation(losses):
    return f"{np.mean(losses):.3f} ({np.std(losses, ddof=1):.3f})"


def draw(rows):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    width = 0.8 / len(SETTINGS)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        some = [row for row in rows if row["task"] == task]
        for i, name in enumerate(SETTINGS):
            for j, row in enumerate(some):
                losses = row["losses"][name]
                x = j + (i - len(SETTINGS) / 2 + 0.5) * width
                axes.plot([x] * len(losses), losses, "o", ms=3, color=f"C{i}", alpha=0.6)
                axes.plot(
                    [x - width / 3, x + width / 3],
                    [np.mean(losses)] * 2,
                    color=f"C{i}",
                    label=None if j else name,
                )
        axes.set_xticks(range(len(some)), [f"{row['decay']}" for row in some])
        axes.set(title=task, xlabel="decay")
    figure.axes[0].set_ylabel("validation loss, a dot for each seed")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def compare(name, decay, seeds, short):
    make, learning_rate, steps, batch = TASKS[name]
    task, steps = make(), 10 if short else steps
    losses = {
        setting: final_losses(task, learning_rate, steps, batch, decay, SETTINGS[setting], seeds)
        for setting in SETTINGS
    }
    return {"task": name, "decay": decay, "steps": steps, "losses": losses}


def line(row):
    cells = (f"{mean_and_deviation(losses):>17}" for losses in row["losses"].values())
    return f"{row['task']:7}{row['decay']:7}" + "".join(cells)


def main(argv=None):
    options = parser("quality", __doc__, short="2 seeds, a few steps, one decay, nothing kept")
    options.add_argument("--only", choices=TASKS, nargs="+", default=TASKS, help="put among what is kept")
    args = options.parse_args(argv)
    short = args.short
    seeds, decays = (2, DECAYS[:1]) if short else (5, DECAYS)
    where = environment("scikit-learn")
    print(f"{'':14}" + "".join(f"{name:>17}" for name in SETTINGS), flush=True)
    cases = [(name, decay) for name in TASKS if name in args.only for decay in decays]
    for case in tqdm(cases, desc="quality", leave=False, disable=None):
        row = compare(*case, seeds, short)
        tqdm.write(line(row))
        if not short:
            rows = with_kept(row, where)
            save("quality", {"environment": where, "seeds": seeds, "rows": rows})
            save_picture("quality", draw(rows), grid="y")


def with_kept(row, where):
    """The row and the others that are kept from the same environment, of the same settings."""
    data = stored("quality")
    kept = data["rows"] if data is not None and data["environment"] == where else []
    rows = {
        (some["task"], some["decay"]): some
        for some in (*kept, row)
        if some["losses"].keys() == row["losses"].keys()
    }
    return [rows[name, decay] for name in TASKS for decay in DECAYS if (name, decay) in rows]

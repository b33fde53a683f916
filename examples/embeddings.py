"""What does a step cost when few of a table's rows are in it?

Word vectors by skip-gram with negative sampling (Mikolov et al., 2013) from the text of Python's
documentation: each word's vector learns to tell the words around it from words drawn at random. A step looks
up a few thousand rows of two `nnx.Embed`; the gradients are clipped by their global norm, `rows.exact`
updates those rows and no others, and `rmsprop` the rest:

    python embeddings.py

prints the nearest neighbours of a few words, how far this is from the same training with dense gradients, and
the time of a step of either as the vocabulary grows. Two minutes on two cores, and a picture.
"""

import argparse
import re
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import trange

from rmsprop_jax import apply_updates, rmsprop, rows

WIDTH, BATCH, NEGATIVES, WINDOW = 64, 1024, 5, 5
CLIP = 0.1  # of the gradients' global norm
WORDS = ("integer", "list", "exception", "loop", "import", "true", "method", "string")


class SkipGram(nnx.Module):
    def __init__(self, num_words, rngs):
        table = partial(nnx.Embed, num_words, WIDTH, rngs=rngs)
        self.word = table(embedding_init=nnx.initializers.normal(1 / WIDTH))
        self.context = table(embedding_init=nnx.initializers.zeros)
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(self, ids):
        """The loss for words of shape [batch], and for each one word near it and some far from it."""
        logits = jnp.einsum("bd,bkd->bk", self.word(ids["word"]), self.context(ids["context"])) + self.bias
        return jnp.mean(jax.nn.softplus(-logits[:, 0]) + jax.nn.softplus(logits[:, 1:]).sum(axis=1))


def split_model(num_words):
    """The module without its arrays, and these: (tables, all other parameters)."""
    graphdef, *both = nnx.split(
        SkipGram(num_words, nnx.Rngs(0)), nnx.Any(nnx.PathContains("word"), nnx.PathContains("context")), ...
    )
    return graphdef, tuple(both)


def sparse_step(graphdef, learning_rate):
    tables = rows.exact(rmsprop(learning_rate))
    tx = optax.chain(
        rows.values_only(optax.clip_by_global_norm(CLIP)),
        optax.partition({"rows": tables, "rest": rmsprop(learning_rate)}, ("rows", "rest")),
    )

    def loss_fn(found, params, tables, ids):
        model = nnx.merge(graphdef, tables, params)
        model.word = lambda _: found["word"]["embedding"][...]  # the rows for these ids
        model.context = lambda _: found["context"]["embedding"][...]
        return model(ids)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(both, state, ids):
        tables, params = both
        of_table = jax.tree_util.tree_map_with_path(lambda path, _: ids[path[0].key], tables)
        loss, grads = rows.value_and_grad(loss_fn)(tables, of_table, params, tables, ids)
        updates, state = tx.update(grads, state, both)
        return apply_updates(both, updates), state, loss

    return tx, step


def dense_step(graphdef, learning_rate):
    tx = optax.chain(optax.clip_by_global_norm(CLIP), rmsprop(learning_rate))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(both, state, ids):
        loss, grads = jax.value_and_grad(lambda both: nnx.merge(graphdef, *both)(ids))(both)
        updates, state = tx.update(grads, state, both)
        return optax.apply_updates(both, updates), state, loss

    return tx, step


def read_text(min_count=5):
    """The vocabulary, most frequent first, and the text as an array of indices into it."""
    text = re.findall("[a-z]{2,}", " ".join(topics.values()).lower())
    words, inverse, counts = np.unique(text, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    tokens = rank[inverse]
    known = int((counts >= min_count).sum())
    return words[order[:known]], tokens[tokens < known].astype(np.int32)


def batches(tokens, num_words, rng):
    """Endless ids: words, one that is near each of them in the text, and some that are drawn at random."""
    frequency = np.bincount(tokens, minlength=num_words) / len(tokens)
    # Frequent words are skipped now and then, and drawn less often than they occur, as in the paper.
    kept = tokens[rng.random(len(tokens)) < np.sqrt(1e-3 / frequency[tokens])]
    noise = np.cumsum(frequency**0.75)
    while True:
        place = rng.integers(WINDOW, len(kept) - WINDOW, BATCH)
        distance = rng.integers(1, WINDOW + 1, BATCH) * rng.choice([-1, 1], BATCH)
        far = np.searchsorted(noise, rng.random((BATCH, NEGATIVES)) * noise[-1]).astype(np.int32)
        yield {"word": kept[place], "context": np.column_stack([kept[place + distance], far])}


def train(tokens, num_words, steps, make_step=sparse_step, desc="training"):
    graphdef, both = split_model(num_words)
    tx, step = make_step(graphdef, optax.linear_schedule(0.02, 0.0, steps))
    state, source, losses = tx.init(both), batches(tokens, num_words, np.random.default_rng(0)), []
    progress = trange(steps, desc=desc, mininterval=0.5)
    for t in progress:
        both, state, loss = step(both, state, next(source))
        losses.append(loss)
        if t % 100 == 99:
            progress.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
    return np.asarray(both[0]["word"]["embedding"][...]), np.array(losses)


def difference_of_twins(tokens, num_words, steps=200):
    """How far word vectors trained on rows are from those with dense gradients, relative to the largest."""
    sparse, _ = train(tokens, num_words, steps, sparse_step, "on rows")
    dense, _ = train(tokens, num_words, steps, dense_step, "dense twin")
    return float(np.abs(sparse - dense).max() / np.abs(dense).max())


def neighbours(words, vectors, count=6):
    """Lines with the words whose vectors have the smallest angles to those of WORDS."""
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for word in WORDS:
        (i,) = np.flatnonzero(words == word)
        nearest = np.argsort(-(directions @ directions[i]))[1 : count + 1]
        yield f"{word:>10}: {', '.join(words[nearest])}"


def step_times(vocabularies, turns=9):
    """Milliseconds per step, {vocabulary: (rows, dense)}: medians of both sides taking turns."""
    times = {}
    for num_words in vocabularies:
        # Words as frequent as 1 / rank: the logarithm of the rank is uniform.
        text = np.exp(np.random.default_rng(0).uniform(0, np.log(num_words), 200_000)).astype(np.int32) - 1
        source, sides = batches(text, num_words, np.random.default_rng(1)), []
        for make_step in (sparse_step, dense_step):
            graphdef, both = split_model(num_words)
            tx, step = make_step(graphdef, 0.01)
            sides.append([step, both, tx.init(both), []])
        for _ in trange(turns + 1, desc=f"{num_words:,} words"):
            ids = jax.device_put(next(source))
            for side in sides:
                start = time.perf_counter()
                side[1], side[2], _ = jax.block_until_ready(side[0](side[1], side[2], ids))
                side[3].append(1e3 * (time.perf_counter() - start))
        times[num_words] = tuple(float(np.median(side[3][1:])) for side in sides)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000, help="training steps")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[10**4, 10**5, 10**6], help="to time")
    parser.add_argument("--out", type=Path, default=Path("runs/embeddings.png"), help="the picture")
    args = parser.parse_args()

    words, tokens = read_text()
    print(f"{len(tokens):,} words of text, {len(words):,} of them different")
    vectors, losses = train(tokens, len(words), args.steps)
    difference = difference_of_twins(tokens, len(words), min(args.steps, 200))
    times = step_times(args.vocabulary)
    print("\nNearest neighbours", *neighbours(words, vectors), sep="\n")
    print(
        f"\nThe loss of the first step {losses[0]:.4f}, and at last {losses[-len(losses) // 5 :].mean():.4f}"
    )
    print(f"From the dense twin: {difference:.1e}")
    print(f"\n{'words':>10} {'rows ms':>9} {'dense ms':>9} {'ratio':>7}")
    for n, (sparse, dense) in times.items():
        print(f"{n:10,} {sparse:9.2f} {dense:9.2f} {dense / sparse:7.1f}")
    draw(args.out, times, losses)
    print(f"\nThe picture is {args.out}")


@matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
def draw(path, times, losses):
    figure = Figure(figsize=(10, 4), layout="constrained")
    cost, curve = figure.subplots(1, 2)
    for side, (name, mark) in enumerate({"exact rows": "o-", "dense update": "s--"}.items()):
        cost.loglog(list(times), [pair[side] for pair in times.values()], mark, label=name)
    cost.set(xlabel="words in the vocabulary", ylabel="milliseconds", title="Time per training step")
    cost.legend()
    width = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    curve.plot(np.arange(len(smooth)) + width, smooth)
    curve.set(xlabel="step", ylabel="loss", title=f"Skip-gram loss, mean of {width} steps")
    for axes in (cost, curve):
        axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

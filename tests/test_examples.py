"""The examples, each copied alone into an empty folder and shortened: what they print and draw."""

import ast
import math
import re
import sys

import numpy as np
import pytest

pytest.importorskip("flax", reason="the examples' extra is not installed")

import matplotlib.image
from shortened import EXAMPLES, assert_drawn, example, run_alone

PATHS = sorted(EXAMPLES.glob("[!_]*.py"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def numbers(line):
    return [float(figure) for figure in re.findall(r"-?\d+\.?\d*", line.replace(",", ""))]


@each
def test_every_example_is_in_the_gallery(path):
    """With its question, which its first line asks, and a picture that is quickly loaded."""
    gallery = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"({path.name})" in gallery
    assert path.read_text(encoding="utf-8").splitlines()[0].endswith("?")
    picture = EXAMPLES / "pictures" / f"{path.stem}.png"
    assert f"(pictures/{picture.name})" in gallery
    assert picture.stat().st_size < 150_000
    assert min(matplotlib.image.imread(picture).shape[:2]) > 300


@each
def test_an_example_imports_what_is_installed_and_what_it_tells_to_copy(path):
    source = path.read_text(encoding="utf-8")
    copied = re.findall(r"Copy (\w+)\.py with this file", source)
    installed = {"flax", "jax", "matplotlib", "numpy", "optax", "orbax", "rmsprop_jax", "scipy", "sklearn"}
    installed |= {"torch", "tqdm", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.partition(".")[0] for name in names} <= installed | {*copied}


def test_noisy_gradients_prints_the_textbook_figures(tmp_path):
    output = run_alone("noisy_gradients", tmp_path)
    rows = [line.split() for line in output.splitlines() if re.match(r" *[1-5] ", line)]
    assert [row[3] for row in rows[:3]] == ["0.316", "-0.204", "0.226"]
    assert [row[6] for row in rows[:3]] == ["0.316", "0.229", "0.192"]
    assert_drawn(tmp_path / "runs" / "noisy_gradients.png")


@pytest.mark.slow
def test_char_rnn_learns_draws_and_writes(tmp_path):
    output = run_alone("char_rnn", tmp_path, "--steps=400", "--width=32")
    found = re.findall(r"(unigram|bigram|network) +(\d+\.\d+) nats per character \((\d+\.\d+) bits\)", output)
    loss = {name: float(nats) for name, nats, _ in found}
    assert loss["bigram"] < loss["unigram"] < 3.5
    assert loss["network"] < loss["unigram"]
    for _, nats, bits in found:
        assert float(bits) == pytest.approx(float(nats) / np.log(2), abs=2e-3)  # both are rounded
    assert "the network goes on" in output
    assert_drawn(tmp_path / "runs" / "char_rnn" / "char_rnn.png")
    assert_drawn(tmp_path / "runs" / "char_rnn" / "diagnostics.png", most=0.9)
    assert re.search(r"diagnostics.advise:\n +nothing to mend", output)


def test_char_rnn_reads_a_text_of_ones_own(tmp_path):
    """Short, and with letters that its training part lacks."""
    (tmp_path / "own.txt").write_text("abcdefgh \n" * 100 + "äöü" * 10, encoding="utf-8")
    char_rnn = example("char_rnn")
    alphabet, train, valid = char_rnn.read_text(tmp_path / "own.txt")
    assert "".join(alphabet) == "\n abcdefghäöü"
    assert (len(train), len(valid)) == (927, 103)
    assert "".join(alphabet[valid[-3:]]) == "äöü"
    guessed = char_rnn.references(train, valid, len(alphabet))
    assert 0 < guessed["bigram"] < guessed["unigram"] < 5


@pytest.mark.slow
def test_digits_cnn_reads_most_digits(tmp_path):
    output = run_alone("digits_cnn", tmp_path, "--epochs=3")
    assert float(re.search(r"accuracy (\d+\.\d)%", output)[1]) > 90
    assert_drawn(tmp_path / "runs" / "digits_cnn.png")


@pytest.mark.slow
def test_sweep_finds_the_best_learning_rate_between_those_that_are_too_small_and_too_large(tmp_path):
    output = run_alone("sweep", tmp_path, "--steps=150")
    rows = re.findall(r"decay (\S+) +learning rate (\S+) +loss (\S+)", output)
    decays, rates, losses = np.array(rows, float).T
    sweep = example("sweep")
    assert decays.tolist() == sweep.DECAYS
    assert np.all((rates > sweep.RATES[0]) & (rates < sweep.RATES[-1]))
    assert np.all(losses < 3.24)  # that of each character's frequency
    assert_drawn(tmp_path / "runs" / "sweep.png", most=0.95)


@pytest.mark.slow
def test_embeddings_on_rows_are_those_of_dense_gradients(tmp_path):
    output = run_alone("embeddings", tmp_path, "--steps=150", "--vocabulary", 3000)
    embeddings = example("embeddings")
    assert all(f"{word}: " in output for word in embeddings.WORDS)
    assert re.search(r"^ +3,000( +\d+\.\d+){3}$", output, re.MULTILINE)
    # Float32 rounds sums in another order, and 150 steps carry it on.
    assert float(re.search(r"dense twin: (\S+)", output)[1]) < 1e-5
    first, last = numbers(re.search(r"loss of the first step (.*)", output)[1])
    chance = (1 + embeddings.NEGATIVES) * math.log(2)
    assert first == pytest.approx(chance, rel=1e-3)
    assert last < 0.8 * chance
    assert_drawn(tmp_path / "runs" / "embeddings.png")


@pytest.mark.slow
def test_actor_critic_learns_to_keep_the_pole_up(tmp_path):
    output = run_alone("actor_critic", tmp_path, "--steps=30000", "--seeds=3")
    late = [numbers(line.split("fifth")[1]) for line in output.splitlines() if "last fifth" in line]
    assert np.shape(late) == (2, 3)  # two optimizers, three seeds
    assert np.min(late) > 50  # pushing at random, it falls after 22 steps
    assert np.median(late[0]) > np.median(late[1])  # eps beside the root, as where the numbers come from
    assert_drawn(tmp_path / "runs" / "actor_critic.png")


@pytest.mark.slow
def test_dqn_minatar_plays(tmp_path):
    pytest.importorskip("pgx_minatar", reason="the examples' extra is not installed")
    output = run_alone("dqn_minatar", tmp_path, "--frames=6000")
    assert re.search(r"seed 0: \d{3} episodes, mean return of the last 100 0\.\d+", output)
    assert_drawn(tmp_path / "runs" / "dqn_minatar" / "dqn_minatar.png")


@pytest.mark.slow
def test_wgan_covers_all_gaussians(tmp_path):
    output = run_alone("wgan", tmp_path, "--updates=3000")
    shares = numbers(re.search(r"12.5%:(.*)", output)[1])
    assert len(shares) == 8
    assert min(shares) > 2
    after, before = numbers(re.search(r"distance(.*)", output)[1])
    assert after < before / 2
    assert_drawn(tmp_path / "runs" / "wgan.png")


@pytest.mark.slow
def test_nonstationary_short_and_long_memories_win_where_it_says(tmp_path):
    output = run_alone("nonstationary", tmp_path, "--steps=3000")
    rows = re.findall(r"^(storms|steady|rare) +(.*)", output, re.MULTILINE)
    error = {name: numbers(row)[::2] for name, row in rows}
    assert np.all(np.diff(error["storms"]) > 0.03)  # with decay 0.9, 0.99, 0.999
    assert np.ptp(error["steady"]) < 0.01
    assert np.all(np.diff(error["rare"]) < -0.05)
    assert_drawn(tmp_path / "runs" / "nonstationary.png")


@pytest.mark.slow
def test_troubles_are_found_and_mended(tmp_path):
    output = run_alone("troubles", tmp_path, "--steps=500")
    assert re.findall(r"^(\w[\w ]+), steps|^(\w[\w ]+) in .*, steps", output, re.MULTILINE) == [
        ("The loss explodes", ""), ("Unstable start", ""), ("Stale accumulator", "")
    ]  # fmt: skip
    assert output.count("advise now says nothing") == 3
    pairs = re.findall(r"highest loss (\S+) -> (\S+), mean of the last 50 (\S+) -> (\S+);", output)
    exploded, started, stale = np.array(pairs, float)
    # From other first weights too; what is left of the second's loss in the end is noise.
    assert 10 * exploded[1] < exploded[0]
    assert 10 * exploded[3] < exploded[2]
    assert 4 * started[1] < started[0]
    assert 1.5 * stale[3] < stale[2]
    assert_drawn(tmp_path / "runs" / "troubles.png")


@pytest.mark.slow
def test_finetune_bfloat16_with_a_key_follows_float32(tmp_path):
    output = run_alone("finetune_bfloat16", tmp_path, "--steps=240", "--seeds=2")
    row = r"^(float32|bfloat16, .*?)  +(\d\.\d\d) +(\d\.\d+) "
    found = {name: (float(size), float(loss)) for name, size, loss in re.findall(row, output, re.MULTILINE)}
    sizes, losses = np.array(list(found.values())).T
    # Of three kernels the means, biases whole: 0.13 bytes for each parameter.
    np.testing.assert_array_equal(sizes, [8, 3, 2.13, 3, 4])
    # The gradients are bfloat16, and the accumulator is right to 5%: 1.00 to 1.01 over five seeds.
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[3] > 1.5 * losses[0]
    assert_drawn(tmp_path / "runs" / "finetune_bfloat16.png")


@pytest.mark.slow
def test_resume_from_torch_goes_on_as_pytorch_does(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed: make peers")
    output = run_alone("resume_from_torch", tmp_path, "--steps=60")
    difference = dict(re.findall(r"^  (.*): (\S+)$", output, re.MULTILINE))
    assert float(difference["carried over"]) < 1e-5  # float32, of losses of about 1, over 30 steps
    assert float(difference["weights only"]) > 1e-3
    assert_drawn(tmp_path / "runs" / "resume_from_torch" / "resume_from_torch.png")

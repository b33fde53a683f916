"""`advise` on real runs: each trouble is found, mended by its remedy, and no healthy run is disturbed."""

import inspect
import re

import jax
import numpy as np
import optax
import pytest
from helpers import quick
from models import STEPS, train

from rmsprop_jax import diagnostics, warmup
from rmsprop_jax.diagnostics._figures import FIGURES

FAST = ["linear"]


def slowly(cases, fast):
    """The cases, of which those for other models than `fast` take minutes to compile, all together."""
    return quick(cases, [case for case in cases if (case if isinstance(case, str) else case[0]) in fast])


def number_after(text, words):
    return float(re.search(re.escape(words) + r" ([-+.e\d]*\d)", text)[1])


def the_finding(run, trouble):
    (found,) = run.findings
    assert found.trouble == trouble
    assert str(found).startswith(trouble[:1].upper() + trouble[1:])
    return found


@pytest.mark.parametrize("model", slowly(["mlp", "gru", "linear", "quadratic"], FAST))
def test_too_large_a_rate_is_found_and_the_proposed_one_trains(model):
    broken = train(model, 30.0 if model == "quadratic" else 1.0)
    found = the_finding(broken, "the loss explodes")
    mended = train(model, number_after(found.remedy, "a lower learning rate,"))
    assert mended.findings == []
    assert mended.final < broken.final
    assert mended.losses.mean() < broken.losses.mean() / 2


@pytest.mark.parametrize("model", slowly(["mlp", "gru", "linear", "quadratic"], FAST))
def test_too_small_a_rate_is_found_and_the_proposed_one_trains(model):
    broken = train(model, 1e-6)
    found = the_finding(broken, "steps too small")
    mended = train(model, number_after(found.remedy.replace(" to", " up to"), "up to"))
    assert mended.findings == []
    assert mended.final < 0.8 * broken.final


@pytest.mark.parametrize(
    ("model", "rate", "decay"),
    slowly([("mlp", 0.03, 0.99), ("linear", 0.1, 0.999), ("gru", 0.03, 0.999)], FAST),
)
def test_an_unstable_start_is_found_and_mended(model, rate, decay):
    """By bias correction, and by warm-up where there are as many steps as it takes."""
    broken = train(model, rate, decay)
    found = the_finding(broken, "unstable start")
    assert found.figures["first step over the learning rate"] == pytest.approx(
        1 / np.sqrt(1 - decay), rel=0.7
    )  # less for rows not met
    assert "warmup(" in found.remedy
    assert "bias_correction=True" in found.remedy
    mended = [train(model, rate, decay, bias_correction=True)]
    if decay == 0.99:
        mended.append(train(model, warmup(rate, decay), decay))
    for run in mended:
        assert run.findings == []
        assert run.losses.mean() < broken.losses.mean()
        assert run.losses.max() < broken.losses.max() / 2


@pytest.mark.parametrize(("model", "rate"), slowly([("mlp", 5e-4), ("gru", 1e-3), ("linear", 2e-2)], FAST))
def test_a_stale_accumulator_is_found_and_a_smaller_decay_mends_it(model, rate):
    """One batch early on has a loss ten thousand times too large."""
    settings = {"rate": rate, "factors": {5: 1e4}}
    broken = train(model, decay=0.999, **settings)
    found = the_finding(broken, "stale accumulator")
    mended = train(model, decay=number_after(found.remedy, "a smaller decay, such as"), **settings)
    assert mended.findings == []
    assert mended.final < broken.final


@pytest.mark.parametrize("model", slowly(["mlp", "cnn", "gru"], []))
def test_an_eps_that_dominates_is_found_and_a_smaller_one_mends_it(model):
    """eps = 1, which MobileNet was published with, for gradients that are smaller than MobileNet's."""
    broken = train(model, 1e-3, eps=1.0, factors=dict.fromkeys(range(STEPS), 0.01))
    found = the_finding(broken, "eps dominates")
    eps = number_after(found.remedy, "under the root below")
    mended = train(model, 1e-3, eps=eps, factors=dict.fromkeys(range(STEPS), 0.01))
    assert mended.findings == []
    assert mended.final < 0.9 * broken.final


@pytest.mark.parametrize(
    ("model", "healthy", "layers"),
    slowly(
        [
            ("mlp, switched off", "mlp", ("first/bias", "first/kernel")),
            ("cnn, cut", "cnn", ("conv_1",)),
            ("gru, no bias", "gru", ("bias",)),
        ],
        [],
    ),
)
def test_a_dead_layer_is_found(model, healthy, layers):
    """Switched off by its biases, cut off by stop_gradient, and forgotten. Without the losses, too."""
    broken = train(model, 2e-3)
    found = the_finding(broken, "dead layer")
    assert set(layers) <= set(found.layers)
    assert found in diagnostics.advise(broken.history)
    mended = train(healthy, 2e-3)
    assert mended.findings == []
    assert mended.final < broken.final


@pytest.mark.parametrize("model", slowly(["cnn", "linear", "quadratic"], FAST))
def test_nonfinite_gradients_are_found_and_mended_by_skipping(model):
    broken = train(model, 1e-2, factors={200: np.nan})
    found = the_finding(broken, "non-finite gradients")
    assert found.steps == (201, 396)
    assert "apply_if_finite" in found.remedy
    mended = train(model, 1e-2, factors={200: np.nan}, skip=True)
    assert mended.findings == []
    assert np.isfinite(mended.final)


@pytest.mark.slow
def test_a_root_of_zero_is_found():
    broken = train("mlp, norm", 1e-3)
    assert "root or logarithm of 0" in the_finding(broken, "non-finite gradients").remedy
    mended = train("mlp, safe norm", 1e-3)
    assert mended.findings == []
    assert mended.final < 0.2


@pytest.mark.parametrize(("model", "rate"), slowly([("mlp", 2e-4), ("cnn", 2e-4), ("linear", 1e-3)], []))
def test_an_accumulator_that_is_rounded_away_is_found(model, rate):
    """`optax.rmsprop`'s in bfloat16, for which a decay of 0.999 is 1."""
    broken = train(model, rate, 0.999, dtype="bfloat16", make=optax.rmsprop)
    found = the_finding(broken, "accumulator rounded away")
    assert "rmsprop_jax.rmsprop" in found.remedy
    mended = train(model, rate, 0.999, dtype="bfloat16")
    assert mended.findings == []
    assert mended.final < broken.final


# On figures that are written down ---------------------------------------------------------------------------


def history_of(steps=20, **figures):
    """A healthy history of two layers, with some of its figures replaced in the second."""
    healthy = dict.fromkeys(FIGURES, 0.0) | {
        "gradient_rms": 1.0,
        "accumulator_rms": 1.0,
        "staleness": 1.0,
        "update_rms": 1e-3,
        "update_ratio": 1e-2,
        "learning_rate": 1e-3,
    }
    table = np.ones((steps, len(FIGURES), 2)) * np.array([healthy[name] for name in FIGURES])[:, None]
    for name, values in figures.items():
        table[:, FIGURES.index(name), 1] = values
    step = np.arange(1, steps + 1)
    table[:, FIGURES.index("bias_correction_factor")] = (1 - 0.8**step)[:, None]
    return diagnostics.Measurement(step, ("first", "second"), table)


@pytest.mark.parametrize(
    ("figures", "trouble", "steps"),
    [
        ({}, None, None),
        ({"gradient_rms": np.r_[1, np.zeros(19)]}, "dead layer", (2, 20)),
        ({"gradient_rms": 0.0}, "dead layer", (1, 20)),
        ({"stuck_share": 0.9}, "accumulator rounded away", (1, 20)),
        ({"nonfinite_share": np.r_[np.zeros(19), 0.1]}, "non-finite gradients", (20, 20)),
        ({"nonfinite_share": np.r_[np.zeros(18), 0.1, 0]}, None, None),
        ({"staleness": 20.0, "descent": 0.1}, "stale accumulator", (15, 20)),
        ({"eps_share": 0.9, "update_rms": 1e-6, "update_ratio": 1e-5}, "eps dominates", (1, 20)),
    ],
)
def test_a_trouble_is_found_in_its_layer(figures, trouble, steps):
    found = diagnostics.advise(history_of(**figures), np.ones(20))
    if trouble is None:
        assert found == []
        return
    assert [(x.trouble, x.layers, x.steps) for x in found] == [(trouble, ("second",), steps)]
    assert {type(x) for x in found[0].figures.values()} == {float}
    assert [type(x) for x in found[0].steps] == [int, int]
    short = diagnostics.advise(history_of(steps=7, **{name: np.ravel(x)[-1] for name, x in figures.items()}))
    assert [x.trouble for x in short] == ["non-finite gradients"] * (trouble == "non-finite gradients")


@pytest.mark.parametrize(("steps", "is_found"), [(20, True), (21, False)])
def test_one_measurement_in_ten_that_is_not_finite_is_enough(steps, is_found):
    bad = np.zeros(steps)
    bad[3:5] = 0.1
    found = diagnostics.advise(history_of(steps, nonfinite_share=bad), np.ones(steps))
    assert [x.steps for x in found] == [(4, 5)] * is_found


@pytest.mark.parametrize("losses", [None, np.r_[0.0, np.geomspace(1, 100, 19)], -np.ones(20)])
@pytest.mark.parametrize(
    "figures", [{"staleness": 20.0, "descent": 0.1}, {"eps_share": 0.9, "update_rms": 1e-6}, {}]
)
def test_without_losses_that_compare_nothing_is_said_of_how_they_went(figures, losses):
    """There are none; the first is 0, so that no other is a share of it; and rewards."""
    assert diagnostics.advise(history_of(**figures), losses) == []


@pytest.mark.parametrize("decay", [0.5, 0.7, 0.96, 0.999])
def test_the_memory_of_an_accumulator_is_read_off_its_bias_correction(decay):
    history = history_of()
    history.table[:, FIGURES.index("bias_correction_factor")] = (1 - decay**history.step)[:, None]
    memories = []
    diagnostics.advise(history, troubles=[lambda run: memories.append(run.memory)])
    assert memories == [pytest.approx(1 / (1 - decay))]


def test_the_proposed_decay_forgets_in_half_of_the_steps():
    """Of the last third of 1,000 steps, 250: nu has to fall by 20^2, as gradients were 20 times larger."""
    history = history_of(staleness=20.0, descent=0.1)
    history.table[:, FIGURES.index("bias_correction_factor")] = (1 - 0.999 ** (50 * history.step))[:, None]
    history = diagnostics.Measurement(50 * history.step, history.names, history.table)
    (found,) = diagnostics.advise(history, np.ones(20))
    decay = number_after(found.remedy, "a smaller decay, such as")
    assert np.exp(-125 * (1 - decay)) == pytest.approx(1 / 20**2, rel=0.02)


def test_without_layers_or_steps_nothing_is_said():
    history = history_of()
    for names, table in (((), history.table[:, :, :0]), (history.names, history.table[:0])):
        step = history.step[: len(table)]
        assert diagnostics.advise(diagnostics.Measurement(step, names, table), losses=None) == []


def test_one_run_of_several_is_asked_for():
    history = history_of()
    stacked = jax.tree.map(lambda x: np.stack([x, x]), history)
    with pytest.raises(
        ValueError, match=r"its steps have shape \(2, 20\), those of several runs under jax.vmap"
    ):
        diagnostics.advise(stacked)
    assert diagnostics.advise(jax.tree.map(lambda x: x[0], stacked)) == []


def test_what_a_divergence_brings_about_is_not_reported():
    history = history_of(update_ratio=1.0, nonfinite_share=1.0)
    (found,) = diagnostics.advise(history, np.geomspace(1, 100, 20))
    assert (found.trouble, found.layers) == ("the loss explodes", ())
    (found,) = diagnostics.advise(history)
    assert found.trouble == "non-finite gradients"


def test_losses_have_to_fit_the_history():
    with pytest.raises(ValueError, match="Invalid losses: there are 7, expected one for each of the 20 meas"):
        diagnostics.advise(history_of(), np.ones(7))
    assert diagnostics.advise(history_of(), -np.ones(20)) == []  # rewards


def test_a_trouble_of_ones_own():
    """Looked for after those that there are, and it sees what they found."""

    def small_bias(run):
        assert run.has("dead layer")
        assert not run.is_short
        assert run.names == ("first", "second")
        assert run.memory == pytest.approx(5)
        return run.finding("small bias", {"rms": run.gradient_rms[-1, 1]}, "...", "more.", steps=(3, 4))

    dead, own = diagnostics.advise(history_of(gradient_rms=0.0), troubles=[*diagnostics.TROUBLES, small_bias])
    assert dead.trouble == "dead layer"
    assert str(own).startswith("Small bias, steps 3 to 4: rms 0.\n  Why: ...\n  Try: more.")
    assert diagnostics.advise(history_of(gradient_rms=0.0), troubles=[]) == []


def test_every_trouble_is_named_and_explained():
    names = [find.__name__ for find in diagnostics.TROUBLES]
    assert len(set(names)) == len(names) == 8
    for find in diagnostics.TROUBLES:
        name = find.__name__.replace("_", " ").replace("non finite", "non-finite")
        assert f'"{name}"' in inspect.getsource(find)
        assert find.__doc__.endswith((".", ".\n    "))


# Of runs that learn -----------------------------------------------------------------------------------------

HEALTHY = [
    ("mlp", 1e-3, 0.9, {}),
    ("mlp", 3e-3, 0.999, {}),
    ("mlp", 2e-3, 0.9, {"momentum": 0.9}),
    ("mlp", 1e-2, 0.999, {"bias_correction": True}),
    ("cnn", 3e-3, 0.99, {}),
    ("mlp", 3e-3, 0.9, {"centered": True}),
    ("cnn", 3e-3, 0.9, {"dtype": "bfloat16", "accumulator": "uint8"}),
    ("gru", 3e-3, 0.99, {}),
    ("gru", warmup(1e-2, 0.99), 0.99, {}),
    ("gru", 5e-3, 0.9, {"accumulator": "bfloat16"}),
    ("linear", 1e-2, 0.9, {}),
    ("linear", optax.cosine_decay_schedule(3e-2, STEPS), 0.999, {}),
    ("quadratic", 3e-2, 0.9, {}),
    ("quadratic", optax.cosine_decay_schedule(0.1, STEPS), 0.99, {}),
    ("quadratic", 1e-2, 0.9, {"centered": True}),
]


@pytest.mark.parametrize(("model", "rate", "decay", "form"), slowly(HEALTHY, FAST))
def test_a_healthy_run_is_not_disturbed(model, rate, decay, form):
    run = train(model, rate, decay, **form)
    assert run.losses[-40:].mean() < 0.8 * run.losses[:10].mean()  # it does learn
    assert run.findings == []
    assert diagnostics.advise(run.history) == []
    # With the losses of the measured steps alone, and with a history that is cut short.
    assert diagnostics.advise(run.history, run.losses[run.history.step - 1]) == []
    assert diagnostics.advise(jax.tree.map(lambda x: x[:20], run.history), run.losses[:100]) == []

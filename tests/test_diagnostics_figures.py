"""`advise` on figures that are written down: what is found in them, and what is not."""

import inspect

import jax
import numpy as np
import pytest
from models import number_after

from rmsprop_jax import diagnostics
from rmsprop_jax.diagnostics._figures import FIGURES


def history_of(steps=20, every=1, decay=0.8, **figures):
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
    step = every * np.arange(1, steps + 1)
    table[:, FIGURES.index("bias_correction_factor")] = (1 - decay**step)[:, None]
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
    memories = []
    diagnostics.advise(history_of(decay=decay), troubles=[lambda run: memories.append(run.memory)])
    assert memories == [pytest.approx(1 / (1 - decay))]


def test_the_proposed_decay_forgets_in_half_of_the_steps():
    """Of the last third of 1,000 steps, 250: nu has to fall by 20^2, as gradients were 20 times larger."""
    history = history_of(every=50, decay=0.999, staleness=20.0, descent=0.1)
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

"""`advise` on real runs: each trouble is found, mended by its remedy, and no healthy run is disturbed."""

import jax
import numpy as np
import optax
import pytest
from helpers import quick
from models import STEPS, number_after, train

from rmsprop_jax import diagnostics, warmup

FAST = ["linear"]


def slowly(cases, fast):
    """The cases, of which those for other models than `fast` take minutes to compile, all together."""
    return quick(cases, [case for case in cases if (case if isinstance(case, str) else case[0]) in fast])


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

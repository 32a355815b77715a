"""The overfit watch: found where held-out loss rises, silent where it does not, and never in the way."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import errors
from jtl.overfitting import Losses

T = np.arange(30)
NOISES = (0.005, 0.02, 0.05)  # 1, 4 and 10% of a held-out loss of 0.5

FALLING = 0.05 + 0.9 * np.exp(-T / 6)
SILENT = {  # training loss, held-out loss
    "healthy": (0.3 + 0.7 * np.exp(-T / 8), 0.4 + 0.6 * np.exp(-T / 8)),
    "flat after a fall": (FALLING, 0.5 + 0.5 * np.exp(-T / 2)),
    "flat": (0.8 - 0.02 * T, np.full(30, 0.5)),
    "underfitting": (np.full(30, 1.0), np.full(30, 1.0)),
    "diverging": (0.3 + 0.05 * T, 0.3 + 0.05 * T),
    "still falling, slower than training loss": (FALLING, 0.6 - 0.004 * T),
}
OVERFIT = {
    "slowly": (FALLING, 0.4 + 0.5 * np.exp(-T / 3) + 0.02 * np.maximum(T - 6, 0)),
    "from the start": (FALLING, 0.4 + 0.06 * np.abs(T - 2)),
}


def first(train, held_out):
    """The evaluation after which a run is first warned of, None if never; it is looked at after each."""
    history = [Losses(10 * (i + 1), float(a), float(b)) for i, (a, b) in enumerate(zip(train, held_out, strict=True))]
    return next((n for n in range(1, 31) if jtl.overfit_warning(history[:n])), None)


def runs(curves, noise, count):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        train, held_out = curves
        yield first(train + noise / 2 * rng.normal(size=30), held_out + noise * rng.normal(size=30))


@pytest.mark.parametrize("curves", SILENT.values(), ids=SILENT)
def test_false_alarms_are_rare(curves):
    assert first(*curves) is None
    assert sum(found is not None for noise in NOISES for found in runs(curves, noise, 60)) <= 2  # of 180


@pytest.mark.parametrize(("curves", "least"), [(OVERFIT["slowly"], 8), (OVERFIT["from the start"], 4)], ids=OVERFIT)
def test_overfitting_is_found(curves, least):
    best = int(curves[1].argmin())
    alone = first(*curves)
    assert best + 3 < alone <= best + 1 + least
    for noise in NOISES[:2]:
        found = list(runs(curves, noise, 40))
        assert None not in found
        assert np.median(found) <= alone + 5
        assert min(found) > 5


def test_the_line_says_what_happened_and_what_to_do():
    train = [0.9, 0.6, 0.4, 0.30, 0.2, 0.1, 0.05]
    held_out = [0.9, 0.7, 0.5, 0.41, 0.45, 0.51, 0.56]
    history = [Losses(30 * (i + 1), a, b) for i, (a, b) in enumerate(zip(train, held_out, strict=True))]
    assert jtl.overfit_warning(history, evaluations=2) == (
        "held-out loss has risen for 3 evaluations (0.41 -> 0.56) while training loss fell (0.3 -> 0.05): freeze more, "
        "stop at step 120, or regularise (weight decay, dropout, augmentation)"
    )
    risen = [point._replace(train=0.3 + 0.1 * i) for i, point in enumerate(history)]
    assert jtl.overfit_warning(risen, evaluations=2) is None  # training loss does not fall: something else is wrong


def test_short_histories_and_losses_that_are_not_finite_say_nothing():
    assert jtl.overfit_warning([]) is None
    assert jtl.overfit_warning([Losses(i, 1.0 / (i + 1), 1.0 + i) for i in range(5)]) is None
    history = [Losses(i, 1 / (i + 1), float("nan")) for i in range(20)]
    assert jtl.overfit_warning(history) is None
    with pytest.raises(errors.ConfigError, match="evaluations=0"):
        jtl.overfit_warning(history, evaluations=0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.tanh(nn.Dense(32, name="stem")(x)))


def test_a_run_is_watched_without_being_changed():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 8)).astype(np.float32), rng.integers(0, 2, 40).astype(np.int32)  # nothing to learn
    batch, held_out = {"x": x[:20], "label": y[:20]}, {"x": x[20:], "label": y[20:]}
    loss_fn, tx = jtl.supervised(Net(), jtl.losses.cross_entropy), optax.adam(1e-2)
    state, frozen = jtl.init(Net().init(jax.random.key(0), x), tx, trainable=jtl.everything(), key=jax.random.key(1))

    def fit():
        return jtl.fit(loss_fn, tx, state, frozen, [batch] * 60, held_out=lambda: [held_out], evaluate_every=4)

    said, kept = [], []
    for report in jtl.watch_overfit(fit(), say=said.append):
        kept.append((report.step, float(report.metrics["loss"]), report.evaluation))
    assert kept == [(report.step, float(report.metrics["loss"]), report.evaluation) for report in fit()]
    (line,) = said
    assert line.startswith("held-out loss has risen for ")
    assert list(jtl.watch_overfit(fit())) != []


def test_the_line_goes_to_stderr_by_default(capsys):
    reports = [
        jtl.Report(i, None, {"loss": np.float32(1 / (i + 1))}, {"loss": 1.0 + 0.1 * i}, None, None) for i in range(8)
    ]
    assert list(jtl.watch_overfit(reports)) == reports
    assert capsys.readouterr().err.count("held-out loss has risen") == 1

"""What holds for every strategy on every model: frozen leaves stay, phases compile once, and a run resumes exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import loop, strategies, transforms, tree

from ..covering import long_but  # noqa: TID252
from . import pictures
from .cases import CASES, built

STEPS = 10

# Clip, decay, moving average, a guard against values that are not finite, and accumulation, all at once.
HARDEST = optax.MultiSteps(
    optax.apply_if_finite(
        transforms.exponential_average(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)), 0.9
        ),
        max_consecutive_errors=2,
    ),
    every_k_schedule=2,
).gradient_transformation()

GROUPS = {
    "linen": [("stem",), ("last",), ("head",)],
    "remat": [("stem",), ("last",), ("head",)],
    "scan": [("stem",), ("last",), ("head",)],
    "nnx": [("blocks/0",), ("blocks/1",), ("head",)],
    "function": [("stem",), ("last",), ("head",)],
}

STRATEGIES = {
    "probe": lambda groups: strategies.feature_extraction(HARDEST),
    "last": lambda groups: strategies.last_blocks(HARDEST, groups, 1),
    "first": lambda groups: strategies.first_blocks(HARDEST, groups, 1),
    "full": lambda groups: strategies.full(HARDEST),
    "bitfit": lambda groups: strategies.bitfit(HARDEST),
    "norms": lambda groups: strategies.norms(HARDEST),
    "layerwise": lambda groups: strategies.layerwise_decay(HARDEST, groups, decay=0.5),
    "surgical": lambda groups: strategies.surgical(HARDEST, groups, [3.0, 1.0, 2.0, *[0.0] * (len(groups) - 3)], 2),
    "l2_sp": lambda groups: strategies.l2_sp(HARDEST, rate=0.1, head_rate=0.01),
    "lp_ft": lambda groups: strategies.lp_ft(HARDEST, HARDEST, steps=4),
    "gradual": lambda groups: strategies.gradual_unfreezing(HARDEST, groups, every=3, count=3),
}
# Every strategy on a model with batch normalisation and dropout; the one with most phases on every model.
RUNS = [("linen", name) for name in STRATEGIES]
RUNS += [(case, "gradual") for case in ("remat", "scan", "nnx", "function", "bert", "gpt2", "t5", *pictures.CONFIGS)]
RUNS += [("bert", "layerwise")]
# Three phases of a wide tree compile longest; laws of adapters and of the split run on these models every time.
LONG = [("gpt2", "gradual"), ("vgg", "gradual"), ("efficientnet", "gradual"), ("mobilenet_v2", "gradual")]


@functools.cache
def made(case, name):
    model, variables = built(case)
    groups = GROUPS.get(case) or strategies.depth_groups(model)
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    return loss_fn, STRATEGIES[name](groups), variables


def fit(case, name, state=None, frozen=None, start=0, **settings):
    loss_fn, strategy, variables = made(case, name)
    if state is None:
        state, frozen = jtl.init(variables, strategy, key=jax.random.key(1))
    batches = [CASES[case].batch(seed) for seed in range(start, STEPS)]
    for report in jtl.fit(loss_fn, strategy, state, frozen, batches, **settings):
        yield report._replace(state=jax.tree.map(jnp.array, report.state))


def run(case, name):
    """The reports of ten steps, and how often a step was traced."""
    count, original = [0], loop.train_step

    def counting(*args):
        step = original(*args)

        def traced(*args):
            count[0] += 1
            return step(*args)

        return traced

    loop.compiled_train.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", counting)
        reports = list(fit(case, name))
    return reports, count[0]


def flat(report):
    return {p: np.asarray(leaf) for p, leaf in tree.leaves_with_paths(jtl.variables(report.state, report.frozen))}


# One run takes seconds to compile, so one test looks at all of it.
@pytest.mark.parametrize(("case", "name"), long_but(RUNS, [run for run in RUNS if run not in LONG]))
def test_the_laws_of_strategies(case, name):
    reports, traces = run(case, name)
    frozen_leaves_and_statistics_are_bit_identical_in_every_phase(case, name, reports)
    assert traces == reports[-1].progress.phase + 1 == len(made(case, name)[1].phases), "a phase is traced once"
    the_state_holds_no_leaf_of_what_is_frozen(reports)
    if name in ("gradual", "lp_ft", "l2_sp"):
        it_goes_on_bit_for_bit_from_every_phase(case, name, reports)


def frozen_leaves_and_statistics_are_bit_identical_in_every_phase(case, name, reports):
    _, strategy, variables = made(case, name)
    before = {path: np.asarray(leaf) for path, leaf in tree.leaves_with_paths(variables)}
    for report in reports:
        after = flat(report)
        mask = tree.leaves_with_paths(strategy.phases[report.progress.phase].trainable(variables["params"]))
        trained = {path for path, keep in mask if keep}
        modules = {path.rpartition("/")[0] for path in trained}
        for path, leaf in after.items():
            collection, _, inside = path.partition("/")
            held = inside not in trained if collection == "params" else inside.rpartition("/")[0] not in modules
            assert not held or leaf.tobytes() == before[path].tobytes(), path
        before = after


def the_state_holds_no_leaf_of_what_is_frozen(reports):
    for report in reports[:: STEPS // 3]:
        trained = set(tree.paths(report.state.params))
        shapes = {np.shape(leaf) for leaf in jax.tree.leaves(report.state.params)} | {()}
        for path, leaf in tree.leaves_with_paths(report.state.opt_state):
            assert np.shape(leaf) in shapes
            assert np.shape(leaf) == () or any(path.endswith(f"/{each}") for each in trained)


def it_goes_on_bit_for_bit_from_every_phase(case, name, reports):
    for at in (3, 5, 8):
        report = reports[at]
        rest = list(fit(case, name, report.state, report.frozen, at + 1, progress=report.progress))
        found, expected = flat(rest[-1]), flat(reports[-1])
        assert all(found[path].tobytes() == expected[path].tobytes() for path in expected)
        assert tree.digest(rest[-1].state.opt_state) == tree.digest(reports[-1].state.opt_state)


def test_the_average_is_found_inside_any_chain():
    report = run("linen", "last")[0][-1]
    average = transforms.averaged(report.state)
    assert tree.paths(average.params) == tree.paths(report.state.params)
    assert tree.digest(average.params) != tree.digest(report.state.params)

"""What holds for every model, every mask and every optimizer chain."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import tree

from ..covering import covering  # noqa: TID252
from .cases import CASES, CHAINS, MASKED, QUICK, RUNS, built

STEPS = 5
everywhere = pytest.mark.parametrize(("case", "mask", "chain"), RUNS)


class Run(NamedTuple):
    """Five steps, and what there was before them."""

    given: dict[str, Any]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    state: jtl.TrainState
    frozen: jtl.Frozen
    compiled: int


def flat(variables):
    return {path: np.array(leaf) for path, leaf in tree.leaves_with_paths(variables)}


def moves(case, mask):
    """The paths of variables that may move: trained leaves, and statistics of a module with a trained leaf."""
    _, variables = built(case)
    trained = {path for path, keep in tree.leaves_with_paths(CASES[case].masks[mask](variables["params"])) if keep}
    modules = {path.rpartition("/")[0] for path in trained}
    collections = {name: value for name, value in variables.items() if name != "params"}
    statistics = {path for path in tree.paths(collections) if path.split("/", 1)[1].rpartition("/")[0] in modules}
    return {f"params/{path}" for path in trained} | statistics


@functools.cache
def run(case, mask, chain):
    model, variables = built(case)
    before, tx = flat(variables), CHAINS[chain]()
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})
    state, frozen = jtl.init(variables, tx, trainable=CASES[case].masks[mask], key=jax.random.key(1))
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(jtl.train_step(loss_fn, tx, grad_norm=True), n=1)
    step = jax.jit(traced, donate_argnums=0, compiler_options=QUICK)
    for seed in range(STEPS):
        state, metrics = step(state, frozen, CASES[case].batch(seed))
        assert all(np.isfinite(value) for value in metrics.values())
    return Run(variables, before, flat(jtl.variables(state, frozen)), state, frozen, step._cache_size())


@everywhere
def test_frozen_leaves_and_statistics_are_bit_identical_and_all_others_move(case, mask, chain):
    result, moving = run(case, mask, chain), moves(case, mask)
    changed = {path for path, leaf in result.before.items() if leaf.tobytes() != result.after[path].tobytes()}
    noise = {path for path in moving if any(jtl.rules.matches(f"params/{p}", path) for p in CASES[case].flat)}
    assert changed - noise == moving - noise


@everywhere
def test_a_run_of_one_shape_is_traced_and_compiled_once(case, mask, chain):
    assert run(case, mask, chain).compiled == 1


@everywhere
def test_a_step_returns_only_what_moves(case, mask, chain):
    state = run(case, mask, chain).state
    params = {f"params/{path}" for path in tree.paths(state.params)}
    assert params | set(tree.paths(state.collections)) == moves(case, mask)


@everywhere
def test_the_optimizer_keeps_state_for_trained_leaves_alone(case, mask, chain):
    result = run(case, mask, chain)
    compact = dict(tree.leaves_with_paths(result.state.params))
    alone = jax.eval_shape(CHAINS[chain]().init, compact)
    assert tree.nbytes(result.state.opt_state) == tree.nbytes(alone)


@everywhere
def test_variables_put_the_original_structure_together(case, mask, chain):
    result = run(case, mask, chain)
    whole = jtl.variables(result.state, result.frozen)
    chex.assert_trees_all_equal_structs(whole, result.given)
    chex.assert_trees_all_equal_shapes_and_dtypes(whole, result.given)


@everywhere
def test_the_variables_given_to_init_survive_donation(case, mask, chain):
    result = run(case, mask, chain)
    assert {path: leaf.tobytes() for path, leaf in flat(result.given).items()} == {
        path: leaf.tobytes() for path, leaf in result.before.items()
    }


@pytest.mark.parametrize(("case", "mask"), covering(MASKED))
def test_evaluation_is_deterministic_and_knows_no_mask(case, mask):
    model, variables = built(case)
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    step = jax.jit(jtl.eval_step(loss_fn), compiler_options=QUICK)
    reports = []
    for trainable, seed in ((CASES[case].masks[mask], 1), (jtl.everything(), 2)):
        state, frozen = jtl.init(variables, optax.sgd(1.0), trainable=trainable, key=jax.random.key(seed))
        reports.append(step(state, frozen, CASES[case].batch(0))["loss"].compute())
    np.testing.assert_allclose(*reports, rtol=1e-6)

"""A scan over frozen and trained layers is cut between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jtl

from .cases import assert_exact, leaf, loss, ready, shapes, vectors

FROZEN, TRAINED = leaf(1, 3, 4, 4), leaf(2, 2, 4, 4)
PARAMS = {"low": FROZEN, "high": TRAINED, "head": leaf(3, 4, 3), "bias": leaf(4, 5, 4)}


def layer(h, w):
    return jnp.tanh(h @ w), jnp.sum(h, axis=1)


def scanned(stack, body=layer, **options):
    def forward(params, batch, key):
        h, sums = lax.scan(body, batch["x"], stack(params), **options)
        return h @ params["head"] + jnp.sum(sums * jnp.arange(1.0, 6)[:, None], axis=0)[:, None]

    return loss(forward)


def flops_of_suffix(cut):
    return cut.report.suffix_flops


def test_layers_are_cut_between_frozen_and_trained_ones():
    cut = assert_exact(
        scanned(lambda p: jnp.concatenate([p["low"], p["high"]])),
        {"params": PARAMS},
        ("head", "high"),
        vectors(6),
        vectors(3),
    )
    assert sorted(shapes(cut)) == [(3,), (4,)]  # what the frozen layers give, and their stacked sums
    assert cut.report.notes == ()
    assert 0.9 < cut.report.prefix_flops / (3 * 2 * 4 * 4 + 3 * 4 * 2) < 1.5


def test_a_tree_of_stacks_with_other_boundaries_and_frozen_ones():
    def stack(p):
        return {
            "w": jnp.concatenate([p["low"][:2], p["low"][2:], p["high"]]).astype(jnp.float32),
            "v": [jnp.concatenate([p["low"], p["high"][:1] * 2, p["low"][:1]]), p["bias"]],
        }

    def body(h, w):
        return jnp.tanh(h @ w["w"] + h @ w["v"][0] + jnp.expand_dims(w["v"][1], 0)), jnp.sum(h, axis=1)

    cut = assert_exact(scanned(stack, body), {"params": PARAMS}, ("head", "high"), vectors())
    assert sorted(shapes(cut)) == [(3,), (4,)]


def test_layers_that_are_stacked_one_by_one():
    params = {f"layer_{i}": leaf(i, 4, 4) for i in range(5)} | {"head": leaf(9, 4, 3)}
    loss_fn = scanned(lambda p: jnp.stack([p[f"layer_{i}"] for i in range(5)]))
    cut = assert_exact(loss_fn, {"params": params}, ("head", "layer_[34]"), vectors())
    assert sorted(shapes(cut)) == [(3,), (4,)]


def test_layers_from_the_last_to_the_first():
    loss_fn = scanned(lambda p: jnp.concatenate([p["high"], p["low"]]), reverse=True)
    assert sorted(shapes(assert_exact(loss_fn, {"params": PARAMS}, ("head", "high"), vectors()))) == [(3,), (4,)]
    loss_fn = scanned(lambda p: jnp.concatenate([p["low"], p["high"]]), reverse=True)
    cut = assert_exact(loss_fn, {"params": PARAMS}, ("head", "high"), vectors())
    assert (shapes(cut), cut.report.passed) == ([], ("label", "x"))


def test_checkpointed_and_nested_layers():
    def body(h, w):
        return jax.checkpoint(lambda h, w: layer(h, w))(h, w)

    loss_fn = scanned(lambda p: jnp.concatenate([p["low"], p["high"]]), body)
    assert sorted(shapes(assert_exact(loss_fn, {"params": PARAMS}, ("head", "high"), vectors()))) == [(3,), (4,)]
    jitted = jax.jit(lambda p: jnp.concatenate([p["low"], p["high"]]))
    assert sorted(shapes(assert_exact(scanned(jitted, unroll=2), {"params": PARAMS}, ("head", "high"), vectors()))) == [
        (3,),
        (4,),
    ]


@pytest.mark.parametrize(
    "stack",
    [
        lambda p: jnp.zeros((5, 4, 4)).at[:3].set(p["low"]).at[3:].set(p["high"]),
        lambda p: jnp.where(
            jnp.arange(5)[:, None, None] < 3, jnp.tile(p["low"][:1], (5, 1, 1)), jnp.tile(p["high"][:1], (5, 1, 1))
        ),
    ],
    ids=["set", "where"],
)
def test_a_mixture_is_cut_around_and_the_report_says_how_to_unroll(stack):
    cut = assert_exact(scanned(stack), {"params": PARAMS}, ("head", "high"), vectors())
    assert (shapes(cut), cut.report.passed) == ([], ("label", "x"))
    assert len(cut.report.notes) == 1
    assert "jnp.concatenate([frozen, trained])" in str(cut.report)


def test_a_stack_that_is_trained_as_a_whole_is_nothing_to_report():
    cut = assert_exact(
        scanned(lambda p: jnp.concatenate([p["high"], p["high"][:1], p["high"]])),
        {"params": PARAMS},
        ("head", "high"),
        vectors(),
    )
    assert cut.report.notes == ()


def test_a_loop_that_a_trained_leaf_enters_stays_whole():
    def forward(params, batch, key):
        stack = jnp.concatenate([params["low"], params["high"]])
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), batch["x"] @ params["high"][0], stack)
        return h @ params["head"]

    cut = assert_exact(loss(forward), {"params": PARAMS}, ("head", "high"), vectors())
    assert shapes(cut) == []
    state, frozen = ready({"params": PARAMS}, ("head", "high"))
    assert np.isfinite(jtl.split(loss(forward), state, frozen, vectors()).report.suffix_flops)

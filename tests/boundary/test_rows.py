"""The rules by which examples are told apart, against what perturbing one example does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jtl.boundary.rows import infer_jaxpr
from jtl.boundary.states import Const, Row, opaque

BATCH = 3  # a prime that is no other extent here


def states(function, *examples):
    """The states of a function's results, for arguments that lead with the batch axis."""
    once, twice = (jax.make_jaxpr(function)(*(jnp.tile(x, (k, *[1] * (x.ndim - 1))) for x in examples)) for k in (1, 2))
    return infer_jaxpr(once, twice, [Row(0)] * len(examples))


def assert_sound(function, *examples):
    """Where the rules say that a row depends on its own example alone, it does: others may be anything."""
    found = states(function, *examples)
    outputs = jax.tree.leaves(function(*examples))
    for example in range(BATCH):
        others = jnp.arange(BATCH) != example
        changed = [jnp.where(others.reshape(-1, *[1] * (x.ndim - 1)), jnp.flip(x, 0) * 2 + 1, x) for x in examples]
        for state, before, after in zip(found, outputs, jax.tree.leaves(function(*changed)), strict=True):
            if isinstance(state, Row):
                before, after = (_example(np.asarray(value), state, example) for value in (before, after))
            if isinstance(state, Row | Const):
                np.testing.assert_array_equal(before, after)
    return found


def _example(value, row, example):
    shape = (*value.shape[: row.axis], row.outer, BATCH, row.inner, *value.shape[row.axis + 1 :])
    return value.reshape(shape)[(slice(None),) * (row.axis + 1) + (example,)]


X = jax.random.normal(jax.random.key(0), (BATCH, 4, 8))
ROWS = {
    "stack": (lambda x: jnp.stack([x, x * 2], axis=0), Row(1)),
    "unstack": (lambda x: jnp.unstack(x, axis=1)[2], Row(0)),
    "tile": (lambda x: jnp.tile(x, (1, 2, 1)), Row(0)),
    "top_k": (lambda x: lax.top_k(x, 2)[0], Row(0)),
    "set": (lambda x: x.at[:, 0].set(1.0), Row(0)),
    "add of own": (lambda x: x.at[:, 1].add(x[:, 0]), Row(0)),
    "into zeros": (lambda x: jnp.zeros((4, x.shape[0], 8)).at[2].set(x[:, 0]), Row(1)),
    "update": (lambda x: lax.dynamic_update_slice(x, x[:, :2], (0, 1, 0)), Row(0)),
    "dynamic slice": (lambda x: lax.dynamic_slice_in_dim(x, 1, 2, axis=1), Row(0)),
    "merged": (lambda x: x.transpose(1, 0, 2).reshape(-1, 8), Row(0, 4, 1)),
    "merged, inner": (lambda x: x.reshape(-1, 8), Row(0, 1, 4)),
    "merged and taken apart": (lambda x: x.transpose(1, 0, 2).reshape(4, -1).reshape(2, 2, -1, 8), Row(2)),
    "split": (lambda x: jnp.split(x, 2, axis=1)[1], Row(0)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))), Row(0)),
    "cumsum": (lambda x: jnp.cumsum(x, axis=1), Row(0)),
    "sort": (lambda x: jnp.sort(x, axis=2), Row(0)),
    "flip": (lambda x: jnp.flip(x, (1, 2)), Row(0)),
    "own products": (lambda x: jnp.einsum("bsd,btd->bst", x, x), Row(0)),
    "table": (lambda x: jnp.arange(40.0).reshape(8, 5)[jnp.argmax(x, axis=2)], Row(0)),
    "own places": (lambda x: x[jnp.arange(x.shape[0]), jnp.argmax(x[:, :, 0], axis=1)], Row(0)),
    "own places, second": (
        lambda x: x.transpose(1, 0, 2)[jnp.argmax(x[:, :, 0], axis=1), jnp.arange(x.shape[0])],
        Row(0),
    ),
    "along": (lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=1), axis=1), Row(0)),
    "one place for all": (lambda x: x[:, jnp.array([2, 0])], Row(0)),
    "scan": (lambda x: lax.scan(lambda c, y: (c + y, c), x[:, 0] * 0, x.transpose(1, 0, 2))[1], Row(1)),
    "window": (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2), (1, 1, 2), "SAME"), Row(0)),
    "vmapped": (jax.vmap(lambda x: jnp.linalg.norm(x @ x.T, axis=0)), Row(0)),
}
MIXED = {
    "tile": lambda x: jnp.tile(x, (2, 1, 1)),
    "tile, new axis": lambda x: jnp.tile(x, (2, 1, 1, 1))[0].sum(axis=0),
    "repeat": lambda x: jnp.repeat(x, x.shape[0], axis=0),
    "unstack": lambda x: sum(jnp.unstack(x, axis=0)),
    "top_k": lambda x: lax.top_k(x.T, 2)[0],
    "set": lambda x: x.at[0].set(1.0),
    "set where an example says": lambda x: x.at[:, jnp.argmax(x[0, :, 0])].set(1.0),
    "set of another's": lambda x: x.at[:, 0].set(jnp.flip(x[:, 1], 0)),
    "update": lambda x: lax.dynamic_update_slice(x, x[:1], (1, 0, 0)),
    "others' places": lambda x: x[x.shape[0] - 1 - jnp.arange(x.shape[0]), 0],
    "others' places, rolled": lambda x: x[(jnp.arange(x.shape[0]) + 1) % x.shape[0], 0],
    "every place": lambda x: x[jnp.arange(x.shape[0])[:, None], jnp.arange(4)[None]][:, 0] + x[0, 0, 0],
    "transposed sum": lambda x: x + x.sum(axis=0, keepdims=True),
    "reshape": lambda x: x.reshape(8, -1, 4).sum(axis=1),
    "convolution": lambda x: lax.conv_general_dilated(x.transpose(1, 2, 0), jnp.ones((1, 8, 2)), (1,), "SAME"),
    "window": lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"),
    "outer product": lambda x: jnp.einsum("bsd,csd->bcs", x, x),
}


@pytest.mark.parametrize("name", ROWS)
def test_examples_that_stay_apart(name):
    function, expected = ROWS[name]
    assert assert_sound(function, X) == [expected]


@pytest.mark.parametrize("name", MIXED)
def test_examples_that_do_not(name):
    assert not [state for state in assert_sound(MIXED[name], X) if isinstance(state, Row)]


def test_what_is_the_same_for_every_example_is_known_to_be():
    assert states(lambda x: jnp.ones((x.shape[0], 5)), X) == [Const(frozenset({0, 1}))]
    assert states(lambda x: jnp.zeros_like(x).sum(axis=2), X) == [Const(frozenset({0, 1}))]
    assert opaque(jnp.ones((1, 4))) == Const(frozenset({0}))


STEPS = {
    "transpose": lambda x, k: jnp.moveaxis(x, k % x.ndim, (k // 3) % x.ndim),
    "merge": lambda x, k: x.reshape(*x.shape[: k % (x.ndim - 1)], -1, *x.shape[k % (x.ndim - 1) + 2 :]),
    "take apart": lambda x, k: x.reshape(2, -1, *x.shape[1:]) if x.shape[0] % 2 == 0 else x,
    "take apart last": lambda x, k: x.reshape(*x.shape[:-1], -1, 2) if x.shape[-1] % 2 == 0 else x,
    "softmax": lambda x, k: jnp.exp(x) / (1 + jnp.sum(jnp.exp(x), axis=k % x.ndim, keepdims=True)),
    "flip": lambda x, k: jnp.flip(x, k % x.ndim),
    "roll": lambda x, k: jnp.roll(x, 1, k % x.ndim),
    "cumsum": lambda x, k: jnp.cumsum(x, axis=k % x.ndim),
    "take": lambda x, k: jnp.take(x, 0, axis=k % x.ndim, mode="clip")[..., None],
    "sort": lambda x, k: jnp.sort(x, axis=k % x.ndim),
    "expand": lambda x, k: jnp.broadcast_to(
        jnp.expand_dims(x, k % x.ndim), (*x.shape[: k % x.ndim], 2, *x.shape[k % x.ndim :])
    ),
    "product": lambda x, k: jnp.tensordot(x, jnp.ones((x.shape[k % x.ndim], 4)), axes=[[k % x.ndim], [0]]),
    "self": lambda x, k: jnp.einsum("...ij,...kj->...ik", x, x) if x.ndim > 2 else x,
    "places": lambda x, k: (
        x
        * jnp.cos(jnp.arange(1.0 * x.shape[k % x.ndim])).reshape([-1 if a == k % x.ndim else 1 for a in range(x.ndim)])
    ),
    "stack": lambda x, k: jnp.stack([x, 2 * x], axis=k % x.ndim),
    "set": lambda x, k: jnp.moveaxis(jnp.moveaxis(x, k % x.ndim, 0).at[0].set(0.5), 0, k % x.ndim),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 11)), min_size=1, max_size=6))
def test_no_chain_of_changes_is_taken_for_rows_that_are_none(chain):
    def function(x):
        for name, k in chain:
            x = STEPS[name](x, k) if 2 <= x.ndim < 6 and x.size < 20_000 else x
        return x

    assert_sound(function, X)


def test_chains_are_not_all_refused():
    merged = functools.partial(STEPS["merge"], k=0)
    assert isinstance(assert_sound(lambda x: STEPS["take apart last"](merged(jnp.exp(x)), 0), X)[0], Row)

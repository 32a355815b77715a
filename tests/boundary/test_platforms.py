"""Losses in which the platform decides how something is computed: `lax.platform_dependent`."""

import jax.numpy as jnp
import pytest
from jax import lax

import jtl
from jtl.errors import SplitError

from .cases import assert_exact, leaf, loss, ready, shapes, vectors

PARAMS = {"stem": leaf(1, 4, 5), "mid": leaf(2, 5, 5), "head": leaf(3, 5, 3)}


def product(h, w):
    return lax.platform_dependent(h, w, cpu=lambda h, w: h @ w, default=lambda h, w: jnp.einsum("bi,ij->bj", h, w))


def forward(params, batch, key):
    return jnp.tanh(product(jnp.tanh(product(batch["x"], params["stem"])), params["mid"])) @ params["head"]


@pytest.mark.parametrize(
    ("mask", "stored"), [(("head",), [(5,)]), (("mid", "head"), [(5,)]), (("stem",), []), (("**",), [])]
)
def test_it_is_cut_around_the_choice(mask, stored):
    assert shapes(assert_exact(loss(forward), {"params": PARAMS}, mask, vectors())) == stored


def test_a_way_that_mixes_examples_on_another_platform_is_refused():
    def centred(h, w):
        return lax.platform_dependent(
            h, w, cpu=lambda h, w: h @ w, default=lambda h, w: (h - jnp.mean(h, axis=0, keepdims=True)) @ w
        )

    def mixing(params, batch, key):
        return product(centred(batch["x"], params["stem"]), params["mid"]) @ params["head"]

    state, frozen = ready({"params": PARAMS}, ("head",))
    with pytest.raises(SplitError, match=r"examples are mixed \(reduce_sum over the batch axis\): cond"):
        jtl.split(loss(mixing), state, frozen, vectors())

"""What a mask saves is saved in the compiled step, whatever the optimizer chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl.models.bert import Bert, BertConfig

from .cases import QUICK

CONFIG = BertConfig(
    vocab_size=1000, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, pool="cls"
)
PLAIN = optax.adamw(1e-3)
GUARDED = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 3)


@functools.cache
def flops(pattern: str, guarded: bool) -> float:
    model = Bert(CONFIG, jtl.heads.classifier(2))
    ids = np.ones((8, 32), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.asarray(ids))
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    tx = GUARDED if guarded else PLAIN
    state, frozen = jtl.init(variables, tx, trainable=jtl.select(pattern), key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, tx, grad_norm=guarded), donate_argnums=0)
    batch = {"input_ids": ids, "attention_mask": ids, "label": np.zeros(8, np.int32)}
    # The passes that decide what is computed come before those that are left out.
    return step.lower(state, frozen, batch).compile(compiler_options=QUICK).cost_analysis()["flops"]


def test_clip_finite_guard_and_gradient_norm_do_not_bring_frozen_gradients_back():
    assert flops("head", True) == pytest.approx(flops("head", False), rel=0.01)


def test_a_head_alone_costs_little_more_than_a_third_of_full_fine_tuning():
    assert flops("head", True) <= 0.36 * flops("**", False)


def test_the_last_two_blocks_cost_a_forward_pass_and_their_own_backward_pass():
    # Of six blocks, with forward cost 1 each: 6 + 2 * 2 against 6 + 6 * 2.
    blocks = flops("encoder/layer_[45]", False) / flops("**", False)
    assert blocks == pytest.approx(10 / 18, rel=0.03)

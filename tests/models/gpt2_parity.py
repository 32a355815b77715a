"""What the tests of GPT-2 share beside `text_parity`: random configurations, rows, and small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jtl.models import gpt2
from jtl.models.gpt2_config import GPT2Config
from jtl.pretrained import shapes

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
"""To compile quickly, not to run quickly."""

ACTIVATIONS = ("gelu_new", "relu", "gelu", "silu")
SHAPE = (4, 7)
LENGTHS = np.array([7, 4, 1, 3])


def draw(seed):
    """A random configuration, as keyword arguments of `transformers.GPT2Config`."""
    rng = np.random.default_rng(seed)
    count = (3, 1, 2, 5, 7)[seed]
    return {
        "vocab_size": int(rng.integers(12, 40)),
        "n_positions": 9,
        "n_embd": count * int(rng.integers(2, 7)),
        "n_layer": (2, 1, 2, 1, 1)[seed],
        "n_head": count,
        "n_inner": [None, 5, 23][seed % 3],
        "activation_function": ACTIVATIONS[seed % 4],
        "layer_norm_epsilon": [1e-5, 1e-2][seed % 2],
        "scale_attn_weights": seed != 3,
        "scale_attn_by_inverse_layer_idx": seed == 2,
        "reorder_and_upcast_attn": seed == 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def rows(config, seed, *, left=False):
    """Rows of unequal lengths, padded with ids that real tokens have too."""
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], SHAPE)
    places = np.arange(SHAPE[1])[None]
    mask = places >= SHAPE[1] - LENGTHS[:, None] if left else places < LENGTHS[:, None]
    return {"input_ids": ids.astype(np.int32), "attention_mask": mask.astype(np.int32)}


def with_positions(inputs):
    """And the positions that transformers' own generation gives to padded rows."""
    positions = np.maximum(np.cumsum(inputs["attention_mask"], axis=1) - 1, 0)
    return {**inputs, "position_ids": positions}


def tiny(head=None, **settings):
    """A model with random variables."""
    few = {"vocab_size": 20, "n_positions": 12, "n_embd": 12, "n_layer": 2, "n_head": 3, "attn_pdrop": 0.0}
    model, rng = gpt2.GPT2(GPT2Config(**few | settings), head), np.random.default_rng(0)
    like = shapes(gpt2.FAMILY, model)
    return model, jax.tree.map(lambda leaf: jnp.array(rng.normal(scale=0.4, size=leaf.shape), leaf.dtype), like)

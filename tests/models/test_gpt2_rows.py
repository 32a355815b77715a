"""GPT-2's rows: padded, packed, and one word at a time."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtl import heads, peft
from jtl.data.packing import pack
from jtl.errors import ConfigError
from jtl.tree import leaves_with_paths

from .gpt2_parity import SHAPE, draw, jit, rows, tiny, with_positions
from .text_parity import loaded, randomised, to_jax, to_torch

# Rows


def test_packed_rows_give_what_their_texts_give_alone():
    """Rows from `jtl.data.packing`, with the positions that it tells and without."""
    model, variables = tiny()
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 20, length).tolist() for length in (3, 4, 2, 6, 2)]
    packed = {name: value for name, value in pack(texts, 10).columns.items() if name != "label"}
    model.check_batch(packed)
    apply = jit(model.apply)
    whole = apply(variables, **to_jax(packed))
    without = apply(variables, **to_jax({name: packed[name] for name in ("input_ids", "segment_ids")}))
    np.testing.assert_array_equal(
        whole.sequence[packed["segment_ids"] > 0], without.sequence[packed["segment_ids"] > 0]
    )
    alone = np.stack([np.pad(text, (0, 10 - len(text))) for text in texts]).astype(np.int32)
    mask = np.arange(10)[None] < np.array([len(text) for text in texts])[:, None]
    expected = apply(variables, jnp.array(alone), jnp.array(mask.astype(np.int32)))
    found = 0
    for row, segments in enumerate(packed["segment_ids"]):
        for number in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == number)
            (text,) = [k for k, ids in enumerate(texts) if np.array_equal(ids, packed["input_ids"][row, at])]
            np.testing.assert_allclose(without.sequence[row, at], expected.sequence[text, : len(at)], rtol=0, atol=1e-5)
            found += 1
        np.testing.assert_allclose(without.pooled[row], expected.pooled[text], rtol=0, atol=1e-5)
    assert found == len(texts)
    shifted = apply(variables, **to_jax({**packed, "position_ids": packed["position_ids"] + 1}))
    assert not np.allclose(shifted.sequence, whole.sequence)


def test_no_token_sees_a_later_one_and_the_last_sees_all():
    model, variables = tiny()
    ids = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)
    apply = jit(model.apply)
    first, other = (apply(variables, ids.at[0, place].set(9)).sequence for place in (4, 0))
    plain = apply(variables, ids).sequence
    np.testing.assert_array_equal(first[:, :4], plain[:, :4])
    assert np.all(np.any(other != plain, axis=-1))


def test_dropout_is_random_in_training_and_off_otherwise():
    model, variables = tiny(n_layer=1, attn_pdrop=0.5)
    ids = jnp.array([[3, 1, 4, 1, 5]], jnp.int32)
    train = jit(lambda key: model.apply(variables, ids, deterministic=False, rngs={"dropout": key}).sequence)
    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, jit(model.apply)(variables, ids).sequence)


def test_a_loop_of_blocks_that_are_computed_twice_gives_the_same():
    how = {"scan": True, "remat": True}
    model, variables = tiny(heads.Tied())
    ids = jnp.array([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]], jnp.int32)
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], jnp.int32)

    def gradient(model):
        return jit(jax.grad(lambda params: jnp.mean(model.apply({"params": params}, ids, mask)[:, 1] ** 2)))

    plain, other = (gradient(m)(variables["params"]) for m in (model, model.clone(**how)))
    for (path, a), b in zip(leaves_with_paths(other), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)
    unequal = model.clone(config=dataclasses.replace(model.config, scale_attn_by_inverse_layer_idx=True), **how)
    with pytest.raises(ConfigError, match="scan and remat are for equal blocks"):
        _shape_of(unequal.apply, variables, ids)


def _shape_of(call, *args, **settings):
    """What is refused while a call is traced; nothing is compiled."""
    return jax.eval_shape(lambda: call(*args, **settings))


# One word at a time


@pytest.mark.torch
def test_decoding_is_the_whole_row_s_forward_and_that_of_the_reference(tmp_path):
    """Left padded rows; five ids at first, then one at a time with a traced index, and one compilation for all."""
    torch = pytest.importorskip("torch")
    config = draw(0)
    inputs = rows(config, 1, left=True)
    reference = randomised("GPT2LMHeadModel", config, 0)
    model, variables = loaded(reference, tmp_path)
    given, told, real = to_jax(inputs), to_torch(with_positions(inputs)), inputs["attention_mask"].astype(bool)
    whole = jit(model.apply)(variables, **given)
    positions = jnp.array(told["position_ids"].numpy(), jnp.int32)
    mask = given["attention_mask"].astype(bool)
    traces = []

    @jit
    def decode(ids, cache, index, position_ids):
        traces.append(ids.shape)
        return model.apply(variables, ids, cache, index=index, mask=mask, position_ids=position_ids, method="decode")

    cache = model.apply(variables, given["input_ids"][:, :5], mask[:, :5], positions=SHAPE[1], method="start")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {SHAPE[0]}
    ours, theirs = [], []
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(reference.forward).parameters)
    past = {name: None}
    for begin, end in ((0, 5), (5, 6), (6, 7)):
        logits, cache = decode(given["input_ids"][:, begin:end], cache, jnp.array(begin), positions[:, begin:end])
        ours.append(logits)
        with torch.no_grad():
            out = reference(
                told["input_ids"][:, begin:end],
                attention_mask=told["attention_mask"][:, :end],
                position_ids=told["position_ids"][:, begin:end],
                **past,
                use_cache=True,
            )
        past = {name: out[name]}
        theirs.append(out.logits.numpy())
    got = np.concatenate(ours, axis=1)
    np.testing.assert_allclose(got[real], whole[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[real], np.concatenate(theirs, axis=1)[real], rtol=0, atol=1e-5)
    assert traces == [(4, 5), (4, 1)]


def test_the_logits_of_the_last_id_alone_are_the_last_of_all():
    model, variables = tiny(heads.Tokens(20, use_bias=False), n_layer=1)
    ids, positions = jnp.array([[3, 1, 4]], jnp.int32), jnp.arange(3)[None]
    cache = model.apply(variables, ids, jnp.ones_like(ids), positions=6, method="start")
    call = {"index": 0, "mask": jnp.ones((1, 6), bool), "position_ids": positions, "method": "decode"}
    decode = jit(lambda last: model.apply(variables, ids, cache, **call, last=last), static_argnums=0)
    (every, kept), (last, same) = decode(False), decode(True)
    assert (every.shape, last.shape) == ((1, 3, 20), (1, 1, 20))
    np.testing.assert_allclose(last, every[:, -1:], rtol=0, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, same)
    assert not np.any(kept[0].keys[:, 3:])
    assert np.all(np.any(kept[0].keys[:, :3] != 0, axis=(2, 3)))


@pytest.mark.parametrize("upcast", [False, True])
def test_half_precision_stays_near(upcast):
    model, variables = tiny(heads.Tied(), n_layer=1, reorder_and_upcast_attn=upcast)
    ids, positions = jnp.array([[3, 1, 4, 1, 5]], jnp.int32), jnp.arange(5)[None]
    half = model.clone(dtype=jnp.bfloat16)
    expected = jit(model.apply)(variables, ids)

    @jit
    def low(ids):
        cache = half.apply(variables, ids, None, positions=5, method="start")
        call = {"index": 0, "mask": jnp.ones((1, 5), bool), "position_ids": positions, "method": "decode"}
        return half.apply(variables, ids), *half.apply(variables, ids, cache, **call)

    with jax.numpy_dtype_promotion("standard"):  # linen's LayerNorm counts on it
        logits, decoded, cache = low(ids)
    assert {leaf.dtype.name for leaf in (logits, decoded, *jax.tree.leaves(cache))} == {"bfloat16"}
    size = float(jnp.max(jnp.abs(expected)))
    for got in (logits, decoded):
        np.testing.assert_allclose(got.astype("f4"), expected, rtol=0, atol=6 * size * float(jnp.finfo("bfloat16").eps))


# Adapters


def test_prompts_are_refused_where_they_would_mean_something_else():
    model, variables = tiny(heads.Tied(), n_layer=1)
    adapter = peft.prompt("decoder", length=2)
    adapted, whole = peft.adapted(model, adapter), peft.attach(adapter, variables, key=jax.random.key(0))
    ids = jnp.array([[3, 1, 4]], jnp.int32)
    assert not np.allclose(jit(adapted.apply)(whole, ids), jit(model.apply)(variables, ids))
    with pytest.raises(ConfigError, match="rows of several texts have no place for a prompt's vectors"):
        _shape_of(adapted.apply, whole, ids, segment_ids=jnp.array([[1, 1, 2]], jnp.int32))
    for length in (3, 5):
        cache = model.apply(variables, ids, None, positions=length, method="start")
        call = {"index": 0, "mask": jnp.ones((1, length), bool), "position_ids": ids, "method": "decode"}
        with pytest.raises(ConfigError, match="a prompt's vectors have no place among kept keys and values"):
            _shape_of(adapted.apply, whole, ids, cache, **call)

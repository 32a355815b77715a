"""T5, version 1.1 and mT5 against their reference implementations, and the laws of their own."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jtl
from jtl.errors import ConfigError, DataError, WeightsError
from jtl.models import t5, t5_blocks, t5_config
from jtl.models.attention import KeyValues
from jtl.models.t5_config import T5Config
from jtl.pretrained import shapes

from .text_parity import by_path, check_gradients, to_torch

# The width of all heads together is not that of the model, heads are odd, far positions share buckets.
TINY = {
    "vocab_size": 29,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 14,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "dropout_rate": 0.0,
    "initializer_factor": 0.5,
    "decoder_start_token_id": 0,
}
GATED = {**TINY, "num_heads": 1, "d_kv": 7, "feed_forward_proj": "gated-gelu", "num_layers": 1}
DEEPER = {**GATED, "num_decoder_layers": 2}
SILU = {**GATED, "feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-3, "relative_attention_num_buckets": 5}

# The reference's class, its configuration, and whether its head is a table of its own.
CASES = {
    "1.0": ("T5ForConditionalGeneration", TINY, False),
    "1.1": ("T5ForConditionalGeneration", {**DEEPER, "tie_word_embeddings": False}, True),
    "tied, not scaled": ("T5ForConditionalGeneration", {**SILU, "tie_word_embeddings": False}, False),
    "mt5": ("MT5ForConditionalGeneration", GATED, True),
    "model": ("T5Model", SILU, False),
    "encoder": ("T5EncoderModel", TINY, False),
    "mt5 encoder": ("MT5EncoderModel", GATED, False),
    "sequences": ("T5ForSequenceClassification", {**GATED, "num_labels": 3}, False),
    "tokens": ("T5ForTokenClassification", {**GATED, "num_labels": 4}, False),
    "spans": ("T5ForQuestionAnswering", GATED, False),
}
TRAINED, STEPPED = ("1.0", "1.1", "mt5", "encoder", "sequences"), ("1.0", "1.1")
LENGTHS, WORDS = (9, 6, 4), (7, 4, 2)
LABELS = np.where(np.arange(7)[None] < np.array(WORDS)[:, None], np.arange(3, 24).reshape(3, 7), jtl.labels.IGNORED)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile, not to run
jit = functools.partial(jax.jit, compiler_options=QUICK)


def _reference(case):
    """A torch model in float32 with every parameter random, norms too."""
    torch = pytest.importorskip("torch")
    import transformers

    kind, settings, untied = CASES[case]
    config = getattr(transformers, "MT5Config" if kind.startswith("M") else "T5Config")
    model = getattr(transformers, kind)(config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        if untied:
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.5)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _inputs(case):
    """Rows that are padded on the right, and one on the left where the reference lets no padding be seen."""
    kind, settings, _ = CASES[case]
    ids = np.random.default_rng(0).integers(2, settings["vocab_size"], (3, 9))
    mask = np.arange(9)[None] < np.array(LENGTHS)[:, None]
    if "Sequence" in kind or "Question" in kind:  # whose decoder reads the inputs once more, and sees what is before
        ids[np.arange(3), np.array(LENGTHS) - 1] = 1  # where the reference pools
    else:
        mask[1] = mask[1, ::-1]
    inputs = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}
    if "Conditional" in kind or kind == "T5Model":
        inputs["decoder_input_ids"] = t5.shift_right(LABELS, 0, 0)
    return {name: value.astype(np.int32) for name, value in inputs.items()}


def _expected(reference, inputs):
    """The reference's outputs, as the one array that jtl's model gives."""
    import torch

    out = reference(**to_torch(inputs))
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits], dim=1)
    return out.logits if "logits" in out else out.last_hidden_state


def _weights(case, inputs, shape):
    """Random, of each output, for the mean that is the loss; 0 for what is padding."""
    random = np.random.default_rng(1).normal(size=shape)
    if case in ("sequences", "spans"):
        return random / random.size
    real = LABELS != jtl.labels.IGNORED if "decoder_input_ids" in inputs else inputs["attention_mask"] != 0
    return random * real[..., None] / random.size


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_are_those_of_the_reference(case, tmp_path):
    """Outputs to 1e-5; of each leaf's gradient, the norm of the difference to 1e-4 of the norm of the reference.

    The loss is a random mean of logarithms of the softmax of all outputs that are no padding.
    """
    torch = pytest.importorskip("torch")
    reference, inputs = _reference(case), _inputs(case)
    reference.save_pretrained(tmp_path)
    model, variables = jtl.load(tmp_path)
    expected = _expected(reference, inputs).detach().numpy()
    weights = _weights(case, inputs, expected.shape)

    def loss(params, inputs):
        out = model.apply({"params": params}, **inputs)
        out = getattr(out, "sequence", out)
        return jnp.sum(jax.nn.log_softmax(out) * weights.astype("f4")), out

    call = jit(jax.value_and_grad(loss, has_aux=True) if case in TRAINED else lambda *args: (loss(*args), None))
    (total, out), gradients = call(variables["params"], jax.tree.map(jnp.array, inputs))
    np.testing.assert_allclose(np.where(weights, out, 0), np.where(weights, expected, 0), rtol=0, atol=1e-5)
    reference = reference.double()
    right = (torch.log_softmax(_expected(reference, inputs), -1) * torch.from_numpy(weights)).sum()
    np.testing.assert_allclose(total, right.item(), rtol=1e-5)
    if gradients is None:
        return
    right.backward()
    wanted = by_path(model, [(name, parameter.grad) for name, parameter in reference.named_parameters()])
    check_gradients(gradients, wanted)
    if case in STEPPED:
        _check_step(model, variables["params"], gradients, reference)


def _check_step(model, params, gradients, reference):
    """One of AdamW. An epsilon far above the rounding noise of a gradient keeps it noise."""
    import torch

    tx = optax.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)
    with jax.numpy_dtype_promotion("standard"):  # optax counts on it
        updates = jit(lambda gradients, params: tx.update(gradients, tx.init(params), params)[0])(gradients, params)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1).step()
    moved = by_path(model, [(name, p - before[name]) for name, p in reference.named_parameters()])
    for (path, a), b in zip(jtl.tree.leaves_with_paths(updates), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.torch
def test_the_loss_of_shifted_labels_is_that_of_the_reference(tmp_path):
    """`jtl.losses.per_token` of a batch, and `T5ForConditionalGeneration(labels=)`, which shifts them itself."""
    torch = pytest.importorskip("torch")
    reference, inputs = _reference("mt5"), _inputs("mt5")
    reference.save_pretrained(tmp_path)
    model, variables = jtl.load(tmp_path)
    texts = to_torch({name: inputs[name] for name in ("input_ids", "attention_mask")})
    expected = reference(**texts, labels=torch.from_numpy(LABELS)).loss
    batch = {**inputs, "label": LABELS.astype(np.int32)}
    loss_fn = jtl.supervised(model, jtl.losses.per_token())
    loss_fn.checker(variables["params"], {})(batch)
    got = jit(functools.partial(loss_fn, key=None))(variables["params"], {}, jax.tree.map(jnp.array, batch))[0]
    np.testing.assert_allclose(got, expected.item(), rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_the_reference_saves(case, tmp_path):
    """Bit for bit, and loaded by it with no tensor missing or left over, and the settings that decide its outputs."""
    pytest.importorskip("torch")
    import transformers

    kind, _, _ = CASES[case]
    reference = _reference(case)
    reference.save_pretrained(tmp_path / "theirs")
    model, variables = jtl.load(tmp_path / "theirs")
    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert sorted(ours) == sorted(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    loaded, found = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["architectures"] == [kind]
    assert ("id2label" in written) == kind.endswith("Classification")
    for name in ("is_encoder_decoder", "scale_decoder_outputs", "num_decoder_layers", "dense_act_fn", "is_gated_act"):
        assert getattr(loaded.config, name, None) == getattr(reference.config, name, None), name
    again = jtl.load(tmp_path / "ours")
    assert again[0] == model
    assert jtl.tree.digest(again[1]) == jtl.tree.digest(variables)


# Checkpoints of other versions

IDS = jnp.array(np.random.default_rng(0).integers(2, 29, (3, 7)), jnp.int32)
MASK = jnp.array(np.arange(7)[None] < np.array([7, 5, 2])[:, None], jnp.int32)
WRITTEN = jnp.array(np.random.default_rng(1).integers(2, 29, (3, 6)), jnp.int32)
TIED, UNTIED = jtl.heads.Tied(), jtl.heads.Tokens(29, scale=0.5, use_bias=False)


def _made(head=None, **changes):
    """A model of random leaves, norms and distances too."""
    model, rng = t5.T5(T5Config(**{**GATED, **changes}), head), np.random.default_rng(0)
    target = shapes(t5.FAMILY, model)
    return model, jax.tree.map(lambda leaf: jnp.array(rng.normal(0.2, 0.4, leaf.shape), jnp.float32), target)


def _written(folder, model, variables, *, settings=None, tensors=None):
    """A checkpoint as version 4 of transformers writes it, changed by settings and tensors."""
    jtl.save(folder / "first", model, variables, format="transformers")
    written = json.loads((folder / "first" / "config.json").read_text())
    del written["scale_decoder_outputs"]
    values = load_file(folder / "first" / "model.safetensors")
    (folder / "second").mkdir()
    (folder / "second" / "config.json").write_text(json.dumps(written | (settings or {})))
    save_file(values | (tensors or {}), folder / "second" / "model.safetensors")
    return folder / "second"


# What transformers derives from other settings, and obeys where it is written; and what it does not read.
BESIDE = {
    "T5Model": ({"dense_act_fn": "relu"}, {"dense_act_fn": "gelu"}, {"is_gated_act": False}),
    "T5Model, plain": ({"dense_act_fn": "gelu_new"}, {"is_gated_act": True}),
    "MT5ForConditionalGeneration": ({"scale_decoder_outputs": True},),
}


@pytest.mark.torch
@pytest.mark.parametrize(("case", "beside"), [(case, beside) for case, all in BESIDE.items() for beside in all])
def test_settings_beside_those_that_they_derive_from_are_those_of_transformers(case, beside, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    kind, _, plain = case.partition(",")
    base = {**DEEPER, "feed_forward_proj": "relu" if plain else "gated-gelu", "vocab_size": 29}
    torch.manual_seed(0)
    gated = beside.get("is_gated_act", not plain)
    config = getattr(transformers, kind.partition("5")[0] + "5Config")
    shaped = getattr(transformers, kind)(config(**base | {"feed_forward_proj": "gated-relu" if gated else "relu"}))
    with torch.no_grad():
        for parameter in shaped.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    shaped.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "config.json"
    written = json.loads(file.read_text())
    for name in ("dense_act_fn", "is_gated_act"):
        del written[name]
    file.write_text(json.dumps({**written, **base, **beside}))
    inputs = {"input_ids": IDS, "decoder_input_ids": WRITTEN}
    model, variables = jtl.load(tmp_path / "theirs")
    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    got = jit(model.apply)(variables, **inputs)
    for folder in ("theirs", "ours"):
        reference = getattr(transformers, kind).from_pretrained(tmp_path / folder).eval()
        out = reference(**to_torch({name: np.array(value) for name, value in inputs.items()}))[0].detach().numpy()
        np.testing.assert_allclose(getattr(got, "sequence", got), out, rtol=0, atol=2e-5, err_msg=folder)
    jtl.save(tmp_path / "own", model, variables)
    assert jtl.load(tmp_path / "own")[0] == jtl.load(tmp_path / "ours")[0] == model


def test_an_override_of_the_activation_goes_before_the_file():
    file = {**GATED, "dense_act_fn": "relu", "is_gated_act": True}
    config = t5_config.parse(file, None, {"feed_forward_proj": "silu"})
    assert (config.activation, config.gated, config.dense_act_fn) == ("silu", False, None)
    config = t5_config.parse(GATED, None, {"dense_act_fn": "gelu"})
    assert (config.activation, config.gated) == ("gelu", True)


@pytest.mark.parametrize("tied", [True, False])
def test_before_version_5_a_model_is_scaled_where_it_is_tied(tmp_path, tied):
    """As `T5ForConditionalGeneration` of version 4 has it: FLAN-T5's files say no more than that they are not tied."""
    made = _made(TIED if tied else UNTIED, tie_word_embeddings=tied, scale_decoder_outputs=tied)
    model, variables = jtl.load(_written(tmp_path, *made))
    assert model == made[0]
    assert jtl.tree.digest(variables) == jtl.tree.digest(made[1])


@pytest.mark.parametrize("same", [True, False])
def test_a_second_table_counts_where_it_differs(tmp_path, same):
    """Version 4 wrote a copy of the one table, version 5 says that all tables are one."""
    made = _made(TIED)
    table = np.array(made[1]["params"]["shared"]["embedding"])
    copies = {f"{stack}.embed_tokens.weight": table for stack in ("encoder", "decoder")}
    folder = _written(tmp_path, *made, tensors={**copies, "lm_head.weight": table + (not same)})
    model, variables = jtl.load(folder)
    assert model.head == (TIED if same else UNTIED)
    tables = [path for path, leaf in jtl.tree.leaves_with_paths(variables["params"]) if 29 in leaf.shape]
    assert tables == (["shared/embedding"] if same else ["head/kernel", "shared/embedding"])


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_table_of_one_stack_that_is_no_copy_is_refused(tmp_path, stack):
    made = _made(TIED)
    table = np.array(made[1]["params"]["shared"]["embedding"])
    folder = _written(tmp_path, *made, tensors={f"{stack}.embed_tokens.weight": table + 1})
    with pytest.raises(WeightsError, match=f"{stack}.embed_tokens.weight differs from shared.weight"):
        jtl.load(folder)


def test_an_encoder_is_read_from_the_checkpoint_of_a_whole_model(tmp_path):
    made = _made(UNTIED, tie_word_embeddings=False)
    folder = _written(tmp_path, *made)
    model, variables = jtl.load(folder, encoder_only=True)
    assert (model.head, sorted(variables["params"])) == (None, ["encoder", "shared"])
    whole = made[1]["params"]
    assert jtl.tree.digest(variables["params"]) == jtl.tree.digest({k: whole[k] for k in ("encoder", "shared")})
    classifier, leaves = jtl.load(folder, jtl.heads.classifier(3), key=jax.random.key(0), encoder_only=True)
    features = jit(model.apply)(variables, IDS, MASK)
    rows = zip(np.asarray(features.sequence), (7, 5, 2), strict=True)
    mean = np.stack([row[:length].mean(0) for row, length in rows])
    np.testing.assert_allclose(features.pooled, mean, rtol=1e-5, atol=1e-6)
    logits = mean @ np.asarray(leaves["params"]["head"]["kernel"])  # the bias begins at zero
    np.testing.assert_allclose(jit(classifier.apply)(leaves, IDS, MASK), logits, rtol=1e-5, atol=1e-6)


def test_what_jtl_saves_it_loads(tmp_path):
    made = _made(UNTIED, **{**t5_config.MT5, **GATED, "tie_word_embeddings": False, "eos_token_id": (1, 2)})
    jtl.save(tmp_path / "out", *made)
    model, variables = jtl.load(tmp_path / "out")
    assert model == made[0]
    assert jtl.tree.digest(variables) == jtl.tree.digest(made[1])


# Laws of the model


def test_cached_decoding_is_that_of_whole_rows():
    """Three words at once, then one at a time, at indices that are traced, with padding in front of both texts."""
    model, variables = _made(TIED, num_decoder_layers=2)
    source, words = MASK[:, ::-1], jnp.ones_like(WRITTEN).at[2, :2].set(0)
    expected = jit(model.apply)(variables, IDS, source, WRITTEN, words)
    mask = jnp.pad(words.astype(bool), ((0, 0), (0, 2)), constant_values=True)

    def begin(variables):
        cache = model.apply(variables, IDS, source, positions=8, method="start")
        return model.apply(variables, WRITTEN[:, :3], cache, index=0, mask=mask, method="decode")

    got, cache = jit(begin)(variables)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(cache)} == {3}
    step, logits = jit(functools.partial(model.apply, method="decode")), [got]
    for i in range(3, 6):
        got, cache = step(variables, WRITTEN[:, i : i + 1], cache, index=jnp.int32(i), mask=mask)
        logits.append(got)
    real = np.asarray(words, bool)
    np.testing.assert_allclose(np.concatenate(logits, axis=1)[real], expected[real], rtol=0, atol=1e-5)


def test_only_the_last_logits_are_computed_where_only_they_are_wanted():
    model, variables = _made(TIED)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)

    def last(variables):
        cache = model.apply(variables, IDS, positions=6, method="start")
        return model.apply(variables, WRITTEN, cache, index=0, mask=jnp.ones((3, 6), bool), last=True, method="decode")

    with jax.numpy_dtype_promotion("standard"):  # linen's norm counts on it
        logits, cache = jax.eval_shape(last, variables)
    assert (logits.shape, logits.dtype.name) == ((3, 1, 29), "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves((cache.source, cache.kept))} == {"bfloat16"}


@pytest.mark.parametrize("both", [True, False])
def test_buckets_of_distances_are_those_of_the_reference(both):
    """At boundaries too, where a power of two is a bucket's first distance."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-300, 301)
    for count, furthest in ((32, 128), (32, 256), (8, 6), (5, 9), (4, 3), (64, 100), (16, 17)):
        expected = modeling.T5Attention._relative_position_bucket(torch.from_numpy(distances), both, count, furthest)
        got = t5_blocks.buckets(distances, count, furthest, both=both)
        np.testing.assert_array_equal(got, expected.numpy(), err_msg=f"{count} of {furthest}")


def test_padding_on_either_side_changes_no_real_token():
    """Of the decoder that reads the inputs once more, too, whose last real token is pooled."""
    model, variables = _made()
    call = jit(model.apply)
    ids, mask = IDS.at[:, 5:].set(0), jnp.ones_like(IDS).at[:, 5:].set(0)
    alone = call(variables, IDS[:, :5], None, t5.shift_right(IDS[:, :5], 0, 0))
    for shift in (0, 2):
        padded = call(variables, jnp.roll(ids, shift, axis=1), jnp.roll(mask, shift, axis=1))
        np.testing.assert_allclose(padded.sequence[:, shift : shift + 5], alone.sequence, rtol=0, atol=1e-5)
        np.testing.assert_allclose(padded.pooled, alone.pooled, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(alone.pooled, alone.sequence[:, -1])


def test_blocks_as_a_loop_and_computed_twice_give_the_same():
    model, variables = _made(TIED, num_layers=2, num_decoder_layers=2)

    plain, other = (jit(m.apply)(variables, IDS, MASK, WRITTEN) for m in (model, model.clone(scan=True, remat=True)))
    np.testing.assert_allclose(plain, other, rtol=0, atol=1e-5)


def test_dropout_is_random_in_training_and_off_otherwise():
    model, variables = _made(encoder_only=True, dropout_rate=0.5)
    plain = _made(encoder_only=True)[0]

    @jit
    def outputs(variables):
        keys = [jax.random.key(seed) for seed in (0, 0, 1)]
        training = [model.apply(variables, IDS, deterministic=False, rngs={"dropout": key}) for key in keys]
        outs: list[Any] = [*training, model.apply(variables, IDS), plain.apply(variables, IDS)]
        return [out.sequence for out in outs]

    first, again, other, still, without = outputs(variables)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    np.testing.assert_array_equal(still, without)


def test_keys_in_front_of_a_text_have_no_distance():
    """Prefix tuning puts trained keys and values there: all may attend to them, and their scores have no bias."""
    layer, rng = t5_blocks.Attention(T5Config(**TINY)), np.random.default_rng(0)

    def random(*shape):
        return jnp.array(rng.normal(size=shape), jnp.float32)

    names = ("query", "key", "value", "output")
    kernels = {name: {"kernel": random(*((15, 12) if name == "output" else (12, 15)))} for name in names}
    x, known, bias = random(2, 4, 12), KeyValues(random(2, 6, 3, 5), random(2, 6, 3, 5)), random(1, 3, 4, 4)
    mask = jnp.array([[True, True, True, False]] * 2)
    call = jit(functools.partial(layer.apply, {"params": kernels}))
    wider = jnp.pad(mask, ((0, 0), (2, 0)), constant_values=True), jnp.pad(bias, [(0, 0)] * 3 + [(2, 0)])
    np.testing.assert_allclose(call(x, known, mask, bias), call(x, known, *wider), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("head", "changes"),
    [(TIED, {}), (UNTIED, {"num_layers": 2}), (None, {"encoder_only": True}), (jtl.heads.classifier(2), {})],
)
def test_depth_groups_cover_every_leaf_once(head, changes):
    model, variables = _made(head, num_decoder_layers=2, **changes)
    masks = [jtl.select(*group)(variables["params"]) for group in t5.depth_groups(model)]
    assert set(jax.tree.leaves(jax.tree.map(lambda *taken: sum(taken), *masks))) == {1}


@pytest.mark.parametrize(("name", "ours"), [("T5Config", {}), ("MT5Config", t5_config.MT5)])
def test_default_settings_are_those_of_transformers(name, ours):
    """But for T5's start, which is padding in every checkpoint and has no default there."""
    transformers = pytest.importorskip("transformers")
    reference, ours = getattr(transformers, name)(), T5Config(**ours)
    for field, value in dataclasses.asdict(ours).items():
        if field not in ("encoder_only", "dense_act_fn") and hasattr(reference, field):
            assert getattr(reference, field) == value, field
    assert (reference.dense_act_fn, reference.is_gated_act) == (ours.activation, ours.gated)
    assert t5_config.parse(json.loads(reference.to_json_string()), None, {}) == ours


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feed_forward_proj": "gated-swiglu"}, "'gated-swiglu': expected one of"),
        ({"feed_forward_proj": "half-gelu"}, "'half-gelu': expected one of"),
        ({"dense_act_fn": "swiglu"}, "dense_act_fn 'swiglu' is not among"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be an integer of at least 1, got 0"),
        (
            {"pad_token_id": None, "decoder_start_token_id": None},
            "start_token_id must be an integer of at least 0, got",
        ),
        ({"relative_attention_num_buckets": 3}, "num_buckets=3: expected an integer of at least 4"),
        ({"relative_attention_max_distance": 4}, "max_distance=4: expected an integer above 4"),
        ({"model_type": "umt5"}, r"'umt5' is not among \['mt5', 't5'\]"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        t5_config.parse({**TINY, **settings}, None, {})
    with pytest.raises(ConfigError, match=message):
        t5_config.parse(TINY, None, settings)


def test_outputs_of_mt5_are_not_scaled():
    with pytest.raises(ConfigError, match="scale_decoder_outputs=True: mT5's outputs are never scaled"):
        t5_config.parse({"model_type": "mt5"}, None, {"scale_decoder_outputs": True})


def test_an_unknown_override_is_refused_with_the_nearest_field():
    with pytest.raises(ConfigError, match=r"no field 'encoder'; nearest: encoder_only"):
        t5_config.parse(TINY, None, {"encoder": True})


def test_a_decoder_that_is_not_there_is_named(tmp_path):
    folder = _written(tmp_path, *_made(None, encoder_only=True))
    with pytest.raises(WeightsError, match=r"decoder/.* needs the tensor decoder\..*, which is missing"):
        jtl.load(folder, encoder_only=False)


def _called(head, method="__call__", given=(), changes=(), **inputs):
    model, variables = _made(head, **dict(changes))
    return jax.eval_shape(lambda: model.apply(variables, IDS, MASK, *given, **inputs, method=method))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (functools.partial(_called, TIED), r"needs decoder_input_ids: .*shift_right"),
        (functools.partial(_called, UNTIED), r"needs decoder_input_ids: .*shift_right"),
        (functools.partial(_called, None, given=[WRITTEN], changes=[("encoder_only", True)]), "leave them out"),
        (functools.partial(_called, TIED, "start", changes=[("encoder_only", True)], positions=2), "load it without"),
        (functools.partial(_called, None, "start", positions=2), "this model has NoneType: load it"),
        (functools.partial(_called, jtl.heads.token_classifier(29), "start", positions=2), "this model has Tokens"),
    ],
)
def test_calls_that_mean_nothing_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("head", "changes", "message"),
    [
        (jtl.heads.classifier(2), {}, "no T5 with the head Linear; it has T5ForConditionalGeneration"),
        (jtl.heads.Hidden(2), {"encoder_only": True}, "head Hidden; it has T5ForTokenClassification: use"),
        (
            jtl.heads.token_classifier(3),
            {"model_type": "mt5", "scale_decoder_outputs": False},
            "no MT5 with the head Tokens",
        ),
        (UNTIED, {}, "no T5 with the head Tokens"),
        (TIED, {"tie_word_embeddings": False}, "no T5 with the head Tied"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(tmp_path, head, changes, message):
    with pytest.raises(ConfigError, match=message):
        jtl.save(tmp_path / "out", *_made(head, **changes), format="transformers")


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids"])
def test_ids_that_the_table_does_not_have_are_refused(name):
    batch = {"input_ids": np.array([[3, 4]]), "decoder_input_ids": np.array([[0, 4]])}
    t5.T5(T5Config(**TINY)).check_batch(batch)
    batch[name][0, 1] = 29
    with pytest.raises(DataError, match=f"{name} of row 0 has 29 at position 1"):
        t5.T5(T5Config(**TINY)).check_batch(batch)

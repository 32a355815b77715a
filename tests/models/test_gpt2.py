"""GPT-2 against its reference implementation: outputs, gradients, and checkpoints of each class."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jtl
from jtl import heads
from jtl.errors import ConfigError, DataError
from jtl.models import gpt2, gpt2_config
from jtl.models.gpt2_config import GPT2Config
from jtl.pretrained import shapes

from ..covering import long_but  # noqa: TID252
from .gpt2_parity import SHAPE, draw, jit, rows, tiny, with_positions
from .text_parity import by_path, check_gradients, loaded, randomised, reference_gradients, to_jax, to_torch


@pytest.mark.torch
@pytest.mark.parametrize("seed", long_but(range(5), (1, 2, 3)))
def test_outputs_and_gradients_are_those_of_the_reference(seed, tmp_path):
    """Rows padded on the right, and of odd seeds on the left. What stands at padding is a convention: no weight."""
    torch = pytest.importorskip("torch")
    config = draw(seed)
    inputs = rows(config, seed, left=bool(seed % 2))
    reference = randomised("GPT2Model", config, seed)
    model, variables = loaded(reference, tmp_path)
    rng, real = np.random.default_rng(seed), inputs["attention_mask"].astype(bool)
    scale = rng.normal(size=(*SHAPE, config["n_embd"])).astype("f4") * real[..., None]
    pooled_scale = rng.normal(size=(SHAPE[0], config["n_embd"])).astype("f4")
    last = [int(np.flatnonzero(row)[-1]) for row in real]

    def loss(params):
        out = model.apply({"params": params}, **to_jax(inputs))
        return jnp.sum(out.sequence * scale) + jnp.sum(out.pooled * pooled_scale), out

    (_, got), gradients = jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    expected = reference(**to_torch(with_positions(inputs))).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(got.sequence[real], expected[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.pooled, expected[np.arange(4), last], rtol=0, atol=1e-5)
    for block in reference.h:
        block.attn.reorder_and_upcast_attn = False  # or float64 is narrowed

    def total(reference):
        out = reference(**to_torch(with_positions(inputs))).last_hidden_state
        pooled = out[np.arange(4), last] * torch.from_numpy(pooled_scale)
        return (out * torch.from_numpy(scale)).sum() + pooled.sum()

    check_gradients(gradients, reference_gradients(model, reference, total))


@pytest.mark.torch
@pytest.mark.parametrize("tied", [True, False])
def test_one_adamw_step_of_a_language_model_is_that_of_the_reference(tied, tmp_path):
    """The loss of next words with ignored labels, by hand, and every leaf's update; a tied table is trained as one.

    Adam divides each gradient by its own size, rounding noise too; an epsilon far above the noise keeps it noise.
    """
    torch = pytest.importorskip("torch")
    config = draw(0) | {"tie_word_embeddings": tied}
    inputs = rows(config, 0)
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[0, 2:4] = -100
    reference = randomised("GPT2LMHeadModel", config, 0)
    model, variables = loaded(reference, tmp_path)
    wide = [path for path, leaf in jtl.tree.leaves_with_paths(variables) if config["vocab_size"] in leaf.shape]
    assert wide == ["params/embeddings/word/embedding"] if tied else len(wide) == 2

    def loss_of(params):
        logits, targets = model.apply({"params": params}, **to_jax(inputs))[:, :-1], jnp.array(labels[:, 1:])
        counted = targets != -100
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets, 0))
        return jnp.sum(jnp.where(counted, each, 0)) / jnp.sum(counted).astype(each.dtype)

    tx = optax.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1)

    @jit
    def step(params):
        loss, gradients = jax.value_and_grad(loss_of)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            return loss, tx.update(gradients, tx.init(params), params)[0]

    got, moved = step(variables["params"])
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    loss = reference(**to_torch(with_positions(inputs)), labels=torch.from_numpy(labels).long()).loss
    loss.backward()
    optimizer.step()
    np.testing.assert_allclose(got, loss.item(), rtol=1e-5)
    expected = by_path(model, [(name, after - before[name]) for name, after in reference.named_parameters()])
    for (path, left), right in zip(jtl.tree.leaves_with_paths(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6, err_msg=path)


KINDS = {
    "GPT2Model": None,
    "GPT2LMHeadModel": heads.Tied(),
    "GPT2LMHeadModel, untied": heads.Tokens(draw(0)["vocab_size"], use_bias=False),
    "GPT2ForSequenceClassification": heads.Linear(3, use_bias=False),
    "GPT2ForTokenClassification": heads.Tokens(3, 0.1),
    "GPT2ForQuestionAnswering": heads.Span(),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_of_each_class_is_read_with_its_head_and_written_bit_for_bit(name, tmp_path):
    """Outputs at real tokens to 1e-5. transformers' classifier reads the last token that is not padding's."""
    torch = pytest.importorskip("torch")
    import transformers

    kind, _, untied = name.partition(",")
    labels = {"num_labels": KINDS[name].outputs} if "For" in kind else {}
    config = draw(0) | {"pad_token_id": 0, "eos_token_id": [1, 2], "tie_word_embeddings": not untied} | labels
    inputs = rows(config, 5)
    inputs["input_ids"] = np.where(inputs["attention_mask"] == 1, np.maximum(inputs["input_ids"], 1), 0)
    inputs = {key: value.astype(np.int32) for key, value in inputs.items()}
    reference = randomised(kind, config, 0)
    model, variables = loaded(reference, tmp_path / "theirs")
    assert model.head == KINDS[name]
    got = jit(model.apply)(variables, **to_jax(inputs))
    with torch.no_grad():
        out = reference(**to_torch(inputs))
    named = {key: value.numpy() for key, value in out.items() if hasattr(value, "numpy")}
    real = inputs["attention_mask"].astype(bool)
    if kind == "GPT2ForQuestionAnswering":
        got, expected = got.swapaxes(1, 2)[real], np.stack([named["start_logits"], named["end_logits"]], -1)[real]
    elif kind == "GPT2ForSequenceClassification":
        expected = named["logits"]
    else:
        got = (got.sequence if kind == "GPT2Model" else got)[real]
        expected = named["last_hidden_state" if kind == "GPT2Model" else "logits"][real]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)

    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    bits = [{key: (x.dtype, x.shape, x.tobytes()) for key, x in tensors.items()} for tensors in (theirs, ours)]
    assert bits[0] == bits[1]
    again, report = getattr(transformers, kind).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert _settings(again.config) == _settings(reference.config)


def _settings(config):
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}


@pytest.mark.torch
def test_tensors_without_a_place_are_left_out(tmp_path):
    """Those of old files: causal masks and a copy of the tied table; and the second head of `GPT2DoubleHeadsModel`."""
    reference = randomised("GPT2DoubleHeadsModel", draw(1) | {"num_labels": 1}, 0)
    model, variables = loaded(reference, tmp_path)
    assert model.head is None
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("multiple_choice_head") for name in tensors)
    buffers = {f"h.0.attn.{name}": np.ones((1, 1, 9, 9), bool) for name in ("bias", "masked_bias")}
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file({**bare, **buffers, "lm_head.weight": bare["wte.weight"]}, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again, same = jtl.load(tmp_path)
    assert again.head == heads.Tied()
    assert jtl.tree.digest(same) == jtl.tree.digest(variables)


@pytest.mark.torch
@pytest.mark.parametrize("said", [True, None])
def test_a_second_table_counts_where_it_differs(said, tmp_path):
    """Whether the settings say that it is tied, or nothing: transformers does not tie it, and jtl keeps it."""
    torch = pytest.importorskip("torch")
    import transformers

    reference, inputs = randomised("GPT2LMHeadModel", draw(0), 0), rows(draw(0), 0)
    reference.save_pretrained(tmp_path / "theirs")
    settings = json.loads((tmp_path / "theirs" / "config.json").read_text()) | {"tie_word_embeddings": said}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    file = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(file)
    words = tensors["transformer.wte.weight"]
    second = words + np.random.default_rng(0).normal(size=words.shape).astype("f4")
    save_file({**tensors, "lm_head.weight": second}, file, {"format": "pt"})
    model, variables = jtl.load(tmp_path / "theirs")
    assert model.head == heads.Tokens(len(words), use_bias=False)
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = reference(**to_torch(with_positions(inputs))).logits.numpy()
    got, real = jit(model.apply)(variables, **to_jax(inputs)), inputs["attention_mask"].astype(bool)
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=1e-5)
    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    np.testing.assert_array_equal(load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"], second)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.torch
@pytest.mark.parametrize(
    "rates",
    [
        {},
        {"classifier_dropout": 0.0},
        {"hidden_dropout": 0.3},
        {"classifier_dropout": 0.2, "hidden_dropout": 0.3},
        {"classifier_dropout": None, "hidden_dropout": 0},
    ],
    ids=str,
)
def test_the_dropout_of_a_classifier_of_tokens_is_that_of_transformers(rates, tmp_path):
    reference = randomised("GPT2ForTokenClassification", draw(1) | {"num_labels": 3} | rates, 0)
    model, variables = loaded(reference, tmp_path / "theirs")
    assert model.head.dropout == reference.dropout.p
    jtl.save(tmp_path / "ours", model, variables, format="transformers")
    again = type(reference).from_pretrained(tmp_path / "ours")
    assert again.dropout.p == reference.dropout.p
    assert jtl.load(tmp_path / "ours")[0] == model


def test_a_round_trip_of_jtl_s_own_changes_nothing(tmp_path):
    model, variables = tiny(heads.Tied(), n_layer=1, eos_token_id=(3, 4))
    jtl.save(tmp_path / "out", model, variables)
    again, same = jtl.load(tmp_path / "out")
    assert again == model
    assert jtl.tree.digest(same) == jtl.tree.digest(variables)


def test_default_settings_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    ours = dataclasses.asdict(GPT2Config())
    assert ours == {name: getattr(transformers.GPT2Config(), name, None) for name in ours}


@pytest.mark.parametrize(
    ("name", "scalars"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_the_sizes_have_as_many_scalars_as_their_checkpoints(name, scalars):
    assert jtl.tree.size(shapes(gpt2.FAMILY, gpt2.GPT2(gpt2_config.VARIANTS[name]))) == scalars


def test_kernels_that_add_to_the_stream_begin_smaller_by_the_root_of_their_number():
    """As in the paper, 2.3: one over the root of the number of residual layers, two to each block."""
    model = gpt2.GPT2(GPT2Config(vocab_size=9, n_positions=1, n_embd=64, n_layer=1, n_head=1))
    layer = jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["decoder"]["layer_0"]
    for kernel in (layer["attention"]["output"]["kernel"], layer["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02 / np.sqrt(2), rtol=0.05)
    for kernel in (layer["attention"]["qkv"]["kernel"], layer["mlp"]["up"]["kernel"]):
        np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)


# Groups, refusals


@pytest.mark.parametrize("head", [None, heads.Tied(), heads.Linear(2, use_bias=False)], ids=str)
def test_depth_groups_cover_every_leaf_once(head):
    model = gpt2.GPT2(GPT2Config(vocab_size=9, n_embd=4, n_layer=3, n_head=1), head)
    params = shapes(gpt2.FAMILY, model)["params"]
    masks = [jtl.select(*group)(params) for group in gpt2.depth_groups(model)]
    assert len(masks) == 5
    assert set(jax.tree.leaves(jax.tree.map(lambda *taken: sum(taken), *masks))) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"activation_function": "swiglu"}, "'swiglu' is not among"),
        ({"n_head": 0}, "n_head must be an integer above 0, got 0"),
        ({"n_inner": -1}, "n_inner must be an integer above 0, got -1"),
        ({"n_head": 5}, "n_embd 768 is not a multiple of n_head 5"),
    ],
)
def test_settings_that_the_family_does_not_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        gpt2_config.parse(settings, None, {})


def test_an_unknown_override_is_refused_with_the_nearest_field():
    with pytest.raises(ConfigError, match=r"no field 'n_heads'; nearest: n_head"):
        gpt2_config.parse({}, None, {"n_heads": 2})


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "needs a head that gives the next word, this model has NoneType"),
        (heads.Tokens(3), "this model has Tokens"),
    ],
    ids=str,
)
def test_generating_is_refused_without_a_head_of_words(head, message):
    model = gpt2.GPT2(GPT2Config(vocab_size=9, n_positions=12, n_embd=4, n_layer=1, n_head=1), head)
    with pytest.raises(ConfigError, match=message):
        model.apply({"params": {}}, jnp.zeros((1, 2), jnp.int32), None, positions=4, method="start")


def test_inputs_beyond_the_last_position_are_refused():
    model = gpt2.GPT2(GPT2Config(n_positions=4))
    with pytest.raises(ConfigError, match="inputs of length 5 are longer than the 4 positions"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize(
    ("settings", "deterministic", "message"),
    [({"reorder_and_upcast_attn": True}, True, "asks for float32"), ({"attn_pdrop": 0.1}, False, "without dropout")],
)
def test_the_fused_attention_of_a_gpu_is_refused_where_it_computes_something_else(settings, deterministic, message):
    few = {"vocab_size": 9, "n_embd": 4, "n_layer": 1, "n_head": 1}
    model = gpt2.GPT2(GPT2Config(**few, **settings), attention="cudnn")
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda: model.init(keys, jnp.zeros((1, 5), jnp.int32), deterministic=deterministic))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[1, 9]]}, "input_ids of row 0 has 9 at position 1"),
        ({"input_ids": [[1, 2]], "segment_ids": [[1]]}, r"segment_ids have shape \[1, 1\], input_ids \[1, 2\]"),
        (
            {"input_ids": [[1, 2]], "position_ids": [[0, 4]]},
            r"position_ids lie in \[0, 4\]: expected .* 0 to 3",
        ),
        ({"input_ids": [[1, 2, 3]] * 2, "segment_ids": [[1, 1, 2], [1, 2, 1]]}, "of row 1 come back to 1"),
    ],
)
def test_batches_that_cannot_be_meant_are_refused(batch, message):
    model = gpt2.GPT2(GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(DataError, match=message):
        model.check_batch({name: np.array(value) for name, value in batch.items()})
    positions, segments = np.array([[0, 1, 0, 3]]), np.array([[2, 2, 1, 0]])
    model.check_batch({"input_ids": np.zeros((1, 4), int), "segment_ids": segments, "position_ids": positions})

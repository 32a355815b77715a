"""Generation against transformers, against brute force, and against probabilities worked out by numpy."""

import copy
import dataclasses
import itertools
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jtl
from jtl.errors import ConfigError, DataError, WeightsError
from jtl.generation import choosing, defaults, generate
from jtl.generation.settings import Settings
from jtl.models import bert

NEW = 10
VOCABULARY, PAD, END = 23, 0, 1

# A model of pairs: each next token depends on the last one alone


TIED = jtl.heads.Tied()


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Logits of the next token are a row of a table; what is kept is a count of the tokens that were read.

    Equal models share what is compiled, so a test that looks into `traced` or `read` gives its own a name.
    """

    vocabulary: int = 4
    longest: int = 70
    prompted: bool = True
    head: Any = TIED
    name: str = ""
    traced: list = dataclasses.field(default_factory=list, compare=False)
    read: list = dataclasses.field(default_factory=list, compare=False)
    start = decode = None

    @property
    def config(self):
        return types.SimpleNamespace(
            vocab_size=self.vocabulary, max_length=self.longest, decoder_start_token_id=0, eos_token_id=None
        )

    def apply(self, variables, ids, cache, *, method, **settings):
        if method == "start":
            self.traced.append(ids.shape)
            return jnp.zeros(len(ids), jnp.int32)
        if self.name:
            jax.debug.callback(lambda index: self.read.append(int(index)), settings["index"])
        logits = variables["table"][ids]
        return logits[:, -1:] if settings.get("last") else logits, cache + ids.shape[1]


def _table(vocabulary=4, seed=0, scale=1.5):
    values = scale * np.random.default_rng(seed).normal(size=(vocabulary, vocabulary))
    return {"table": jnp.array(values, jnp.float32)}


def _log_probabilities(variables):
    table = np.asarray(variables["table"], np.float64)
    return table - np.log(np.exp(table).sum(axis=1, keepdims=True))


def _all_texts(table, first, new, end):
    """Every text that may follow a token, with the logarithm of its probability."""
    for length in range(1, new + 1):
        for text in itertools.product(range(len(table)), repeat=length):
            if end in text[:-1] or (length < new and text[-1] != end):
                continue
            yield text, sum(table[pair] for pair in itertools.pairwise((first, *text)))


@pytest.mark.parametrize("penalty", [0.0, 2.5, -1.0])
def test_with_beams_for_all_texts_the_best_of_all_is_found(penalty):
    ids, new, end = np.arange(4)[:, None], 4, 3
    for seed in range(3):
        variables = _table(seed=seed)
        settings = {"beams": 32, "length_penalty": penalty, "early_stopping": "never", "eos_token_id": end}
        got = generate(Pairs(), variables, {"input_ids": ids}, max_new_tokens=new, **settings)
        table = _log_probabilities(variables)
        for row in range(4):
            scored = [(score / len(text) ** penalty, text) for text, score in _all_texts(table, row, new, end)]
            score, text = max(scored)
            assert tuple(np.asarray(got.tokens[row])[: len(text)]) == text
            assert int(got.lengths[row]) == len(text)
            np.testing.assert_allclose(got.scores[row], score, rtol=1e-5)


def test_greedy_takes_the_likeliest_and_stops_when_all_rows_have_ended():
    # 0 -> 1 -> 2 -> 3, 4 -> 3, and 3 goes on with itself.
    following = [1, 2, 3, 3, 3]
    variables = {"table": jnp.array(5 * np.eye(5)[following], jnp.float32)}
    model = Pairs(vocabulary=5, name="greedy")
    inputs = {"input_ids": np.array([[0], [1], [4]])}
    got = generate(model, variables, inputs, max_new_tokens=8, eos_token_id=3, pad_token_id=4)
    jax.effects_barrier()
    assert got.tokens.tolist() == [[1, 2, 3, 4, 4, 4, 4, 4], [2, 3, 4, 4, 4, 4, 4, 4], [3, 4, 4, 4, 4, 4, 4, 4]]
    assert got.lengths.tolist() == [3, 2, 1]
    per_token = 5 - np.log(np.exp(5) + 4)
    np.testing.assert_allclose(got.scores, per_token * np.array([3, 2, 1]), rtol=1e-5)
    # The prompt of one padded length at once, and then the first and the second of three new tokens.
    assert sorted(model.read) == [0, 32, 33]

    endless = generate(model, variables, inputs, max_new_tokens=8)
    assert endless.lengths.tolist() == [8, 8, 8]
    assert endless.tokens[0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    later = generate(model, variables, inputs, max_new_tokens=8, min_new_tokens=4, eos_token_id=(3, 3))
    assert later.lengths.min() >= 5
    assert not np.any(np.asarray(later.tokens)[:, :4] == 3)


def test_beams_stop_when_no_text_can_become_better():
    sure = np.full((3, 3), -20.0)
    sure[:, 2] = 0  # each text ends at once, all others are hopeless
    model = Pairs(vocabulary=3, name="beams")
    inputs = {"input_ids": np.array([[0]])}
    got = generate(model, {"table": jnp.array(sure, jnp.float32)}, inputs, max_new_tokens=20, beams=2, eos_token_id=2)
    jax.effects_barrier()
    assert got.lengths.tolist() == [1]
    assert len(model.read) < 5


# One compilation


def test_inputs_of_one_padded_length_are_compiled_once():
    model = Pairs(name="compiled")
    for length in (3, 17, 32, 32):
        for seed in range(2):
            ids = np.random.default_rng(seed).integers(0, 4, (2, length))
            got = generate(model, _table(seed=seed), {"input_ids": ids}, max_new_tokens=5)
            again = generate(dataclasses.replace(model), _table(seed=seed), {"input_ids": ids}, max_new_tokens=5)
            np.testing.assert_array_equal(got.tokens, again.tokens)
    assert model.traced == [(2, 32)]
    generate(model, _table(), {"input_ids": np.zeros((2, 33), int)}, max_new_tokens=5)
    generate(model, _table(), {"input_ids": np.zeros((2, 64), int)}, max_new_tokens=5)
    assert model.traced == [(2, 32), (2, 64)]
    # No padding beyond the longest text that the model has.
    generate(model, _table(), {"input_ids": np.zeros((2, 65), int)}, max_new_tokens=5)
    assert model.traced[2:] == [(2, 65)]


# Drawn tokens


def _probabilities(logits, temperature, k, p):
    """What may be drawn, by sorting and adding."""
    logits = logits / temperature
    order = np.argsort(-logits)
    order = order[:k] if k else order
    kept = np.exp(logits[order] - logits.max())
    kept /= kept.sum()
    count = 1
    while count < len(kept) and kept[:count].sum() < p:
        count += 1
    found = np.zeros_like(logits)
    found[order[:count]] = kept[:count] / kept[:count].sum()
    return found


def _check_counts(tokens, expected):
    """Pearson's test: such counts come by chance less often than once in ten thousand."""
    counts, mean = np.bincount(tokens, minlength=len(expected)), len(tokens) * expected
    assert not counts[expected == 0].any()
    rare = mean < 5  # together: the test is of counts that are nearly normal
    counts, mean = (np.append(x[~rare], x[rare].sum() + 1e-9) for x in (counts, mean))
    statistic = np.sum((counts - mean) ** 2 / mean)
    assert statistic < stats.chi2.ppf(1 - 1e-4, len(mean) - 1)


@pytest.mark.parametrize(
    ("temperature", "k", "p"),
    [(1.0, 0, 1.0), (0.5, 3, 1.0), (1.5, 4, 0.8)],
)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(temperature, k, p):
    """The first token, and the second one given the first: a key that is used twice would couple them."""
    rows, variables = 8192, _table(6, scale=1.0)
    table = np.asarray(variables["table"], np.float64)
    got = generate(
        Pairs(vocabulary=6),
        variables,
        {"input_ids": np.full((rows, 1), 2)},
        max_new_tokens=2,
        key=jax.random.key(0),
        **{"temperature": temperature, "top_k": k, "top_p": p},
    )
    tokens = np.asarray(got.tokens)
    first = _probabilities(table[2], temperature, k, p)
    _check_counts(tokens[:, 0], first)
    pairs = np.stack([first[i] * _probabilities(table[i], temperature, k, p) for i in range(6)])
    _check_counts(tokens[:, 0] * 6 + tokens[:, 1], pairs.ravel())
    # Scores are those of the model, whatever the tokens were drawn at.
    logs = _log_probabilities(variables)
    np.testing.assert_allclose(got.scores, logs[2, tokens[:, 0]] + logs[tokens[:, 0], tokens[:, 1]], rtol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(4))
def test_what_is_drawn_from_is_what_transformers_draws_from(seed):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=(5, 30))).astype(np.float32)
    logits[0, :10] = logits[0, 10]  # equal ones are kept together by top-k
    temperature, k, p = float(rng.uniform(0.3, 2)), int(rng.integers(2, 40)), float(rng.uniform(0.2, 0.99))
    expected = logits_process.TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    expected = logits_process.TopKLogitsWarper(k)(None, expected)
    kept = np.isfinite(logits_process.TopPLogitsWarper(p)(None, expected).numpy())
    settings = Settings(1, 0, temperature, k, p, 1, 1.0, False, (), 0)
    got = np.asarray(choosing.shaped(jnp.array(logits), settings))
    np.testing.assert_array_equal(np.isfinite(got)[1:], kept[1:])
    assert set(np.flatnonzero(kept[0])) <= set(np.flatnonzero(np.isfinite(got[0])))
    np.testing.assert_allclose(got[1:][kept[1:]], expected.numpy()[1:][kept[1:]], rtol=1e-6)


def test_the_same_key_draws_the_same_and_each_row_has_its_own():
    model, variables = Pairs(vocabulary=6), _table(6, scale=0.3)
    inputs = {"input_ids": np.tile(np.arange(4)[:, None], (1, 3))}
    settings = {"max_new_tokens": 12, "eos_token_id": 5}
    key = jax.random.key(3)
    got = generate(model, variables, inputs, key=key, **settings)
    np.testing.assert_array_equal(generate(model, variables, inputs, key=key, **settings).tokens, got.tokens)
    other = generate(model, variables, inputs, key=jax.random.key(4), **settings)
    assert np.any(np.asarray(other.tokens) != np.asarray(got.tokens))
    keys = jax.random.split(key, 4)
    for row in range(4):
        alone = {"input_ids": inputs["input_ids"][row : row + 1]}
        again = generate(model, variables, alone, key=keys[row : row + 1], **settings)
        np.testing.assert_array_equal(again.tokens[0], got.tokens[row])
    equal = generate(model, variables, {"input_ids": np.zeros((4, 1), int)}, key=key, **settings)
    assert len(np.unique(np.asarray(equal.tokens), axis=0)) == 4


# The models of transformers


def _reference(family, seed):
    """A torch model whose every parameter is random, so large that no token is always the likeliest."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None}
    if family == "gpt2":
        sizes = {"n_positions": 2 * NEW, "n_embd": 16, "n_layer": 1, "n_head": 2}
        config = transformers.GPT2Config(**tokens, **sizes)
        model, spread = transformers.GPT2LMHeadModel(config), 0.5
    else:
        tokens.pop("bos_token_id")
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        rest = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
        config = transformers.T5Config(**tokens, **sizes, **rest, decoder_start_token_id=PAD)
        model, spread = transformers.T5ForConditionalGeneration(config), 0.7
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


_LOADED = {}


@pytest.fixture
def pair(tmp_path_factory):
    """Of a family and a seed: the reference, and the same model in jtl; made once."""

    def make(family, seed=0):
        if (family, seed) not in _LOADED:
            reference = _reference(family, seed)
            folder = tmp_path_factory.mktemp(family)
            reference.save_pretrained(folder)
            _LOADED[family, seed] = (reference, *jtl.load(folder))
        return _LOADED[family, seed]

    return make


def _inputs(family, seed):
    """Four rows of different lengths, padded on the left for GPT-2 and on the right for T5.

    Of even seeds the longest is as long as the model allows beside the new tokens, of odd ones shorter; both are padded
    to the same length within, and so compiled once.
    """
    rng, longest = np.random.default_rng(seed), (NEW, 6)[seed % 2]
    lengths = np.array([longest, *rng.integers(1, longest, 3)])[:, None]
    places = np.arange(longest)[None]
    mask = places >= longest - lengths if family == "gpt2" else places < lengths
    ids = np.where(mask, rng.integers(2, VOCABULARY, (4, longest)), PAD)
    return {"input_ids": ids, "attention_mask": mask.astype(np.int64)}


def _theirs(reference, inputs, **settings):
    """The texts of transformers, each until its end, and what they are worth."""
    import torch

    tensors = {name: torch.from_numpy(np.asarray(value)).long() for name, value in inputs.items()}
    out = reference.generate(**tensors, do_sample=False, return_dict_in_generate=True, output_scores=True, **settings)
    begin = 1 if reference.config.is_encoder_decoder else tensors["input_ids"].shape[1]
    if "sequences_scores" in out:
        return out.sequences[:, begin:].tolist(), out.sequences_scores.numpy()
    return out.sequences[:, begin:].tolist(), torch.stack([x.log_softmax(-1) for x in out.scores], 1).numpy()


def _check_texts(got, expected, ends=(END,), padding=PAD):
    """Token for token until the end, and padding after it."""
    lengths = []
    for row, text in enumerate(expected):
        last = next((i for i, token in enumerate(text) if token in ends), len(text) - 1)
        lengths.append(last + 1)
        assert got.tokens[row, : last + 1].tolist() == text[: last + 1], row
        assert set(got.tokens[row, last + 1 :].tolist()) <= {padding}
    assert got.lengths.tolist() == lengths
    return lengths


FAMILIES = ("gpt2", "t5")
PLAIN_BEAMS = {"num_beams": 2}
CHECKPOINT_BEAMS = {
    "num_beams": 4,
    "length_penalty": 0.0,
    "early_stopping": True,
    "eos_token_id": [END, 7],
    "min_new_tokens": 3,
}


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_are_those_of_transformers(family, pair):
    ends, firsts = set(), set()
    for seed in range(4):
        reference, model, variables = pair(family, seed)
        inputs = _inputs(family, seed)
        expected, logs = _theirs(reference, inputs, max_new_tokens=NEW)
        got = generate(model, variables, inputs, max_new_tokens=NEW)
        lengths = _check_texts(got, expected)
        worth = [
            sum(logs[row, i, text[i]] for i in range(length))
            for row, (text, length) in enumerate(zip(expected, lengths, strict=True))
        ]
        np.testing.assert_allclose(got.scores, worth, rtol=1e-4)
        ends, firsts = ends | set(lengths), firsts | {text[0] for text in expected}
    assert len(ends) > 2, "rows have to end at different times for this to test anything"
    assert len(firsts) > 5


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", PLAIN_BEAMS),
        ("gpt2", {"num_beams": 4, "length_penalty": 0.6, "early_stopping": "never"}),
        ("t5", {"num_beams": 3, "length_penalty": -1.0}),
        ("t5", CHECKPOINT_BEAMS),
    ],
    ids=["two", "never", "negative", "early"],
)
def test_texts_of_beams_are_those_of_transformers(family, settings, pair):
    ends = set()
    for seed in range(4):
        reference, model, variables = pair(family, seed)
        inputs = _inputs(family, seed)
        expected, worth = _theirs(reference, inputs, max_new_tokens=NEW, **settings)
        got = generate(model, variables, inputs, max_new_tokens=NEW, **_renamed(settings))
        ends |= set(_check_texts(got, expected, ends=settings.get("eos_token_id", [END])))
        np.testing.assert_allclose(got.scores, worth, rtol=1e-4)
    assert len(ends) > 1, "rows have to end at different times for this to test anything"


def _renamed(settings):
    return {"beams" if name == "num_beams" else name: value for name, value in settings.items()}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "settings"), [("gpt2", {}), ("gpt2", PLAIN_BEAMS), ("t5", {})], ids=["gpt2", "gpt2-beams", "t5"]
)
def test_a_row_depends_neither_on_the_others_nor_on_where_its_padding_stands(family, settings, pair):
    """For GPT-2 amid the tokens too. Padding is an id that the model does not have."""
    _, model, variables = pair(family, 2)
    inputs = _inputs(family, 2)
    whole = generate(model, variables, inputs, max_new_tokens=NEW, **_renamed(settings))
    rng, length = np.random.default_rng(0), NEW + 4
    texts = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    for row, text in enumerate(texts):
        beside = [rng.integers(2, VOCABULARY, int(rng.integers(1, NEW))) for _ in range(3)]
        moved = {"input_ids": np.full((4, length), 99), "attention_mask": np.zeros((4, length), int)}
        for i, tokens in enumerate((*beside[:row], text, *beside[row:])):
            places = rng.choice(length, len(tokens), replace=False) if family == "gpt2" else np.arange(len(tokens))
            moved["input_ids"][i, np.sort(places)], moved["attention_mask"][i, places] = tokens, 1
        got = generate(model, variables, moved, max_new_tokens=NEW, **_renamed(settings))
        np.testing.assert_array_equal(got.tokens[row], whole.tokens[row])
        np.testing.assert_allclose(got.scores[row], whole.scores[row], rtol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_half_precision_can_write(family, pair):
    """A loop's values keep their dtypes: what is kept in half precision, scores in float32. Traced, not run."""
    _, model, variables = pair(family, 0)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    for beams in (1, 2):
        with jax.numpy_dtype_promotion("standard"):  # linen's LayerNorm counts on it
            got = jax.eval_shape(
                lambda v, beams=beams: generate(model, v, _inputs(family, 0), max_new_tokens=NEW, beams=beams), halves
            )
        assert [(x.shape, x.dtype) for x in got] == [((4, NEW), jnp.int32), ((4,), jnp.int32), ((4,), jnp.float32)]


def test_logits_in_half_precision_are_added_in_float32():
    halves = {"table": _table()["table"].astype(jnp.bfloat16)}
    got = generate(Pairs(), halves, {"input_ids": [[0], [1]]}, max_new_tokens=40)
    logs = _log_probabilities(halves)
    for row in range(2):
        text = (row, *got.tokens[row].tolist())
        assert all(logs[pair] == logs[pair[0]].max() for pair in itertools.pairwise(text))
        np.testing.assert_allclose(got.scores[row], sum(logs[pair] for pair in itertools.pairwise(text)), rtol=1e-5)


@pytest.mark.torch
def test_an_adapted_model_writes_what_the_merged_one_writes(pair):
    _, model, variables = pair("gpt2", 3)
    adapter = jtl.peft.lora(["**/qkv", "**/up"], rank=2)
    attached = jtl.peft.attach(adapter, variables, key=jax.random.key(0))
    thin = jtl.select("**/lora")(attached["params"])
    params = jax.tree.map(lambda leaf, chosen: leaf + 0.3 if chosen else leaf, attached["params"], thin)
    attached = {**attached, "params": params}
    inputs = _inputs("gpt2", 3)
    got = generate(jtl.peft.adapted(model, adapter), attached, inputs, max_new_tokens=NEW)
    merged = generate(model, jtl.peft.merge(adapter, attached), inputs, max_new_tokens=NEW)
    np.testing.assert_array_equal(got.tokens, merged.tokens)
    assert np.any(np.asarray(got.tokens) != np.asarray(generate(model, variables, inputs, max_new_tokens=NEW).tokens))


@pytest.mark.torch
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_with_an_adapter_that_is_never_merged_each_word_is_the_likeliest(pair, family):
    """Against the whole text read anew for each word, through layers that decoding alone does not come by."""
    _, model, variables = pair(family, 3)
    adapter = jtl.peft.bottleneck(["**/up"], width=2, input_axes=())
    attached = jtl.peft.attach(adapter, variables, key=jax.random.key(0))
    thin = jtl.select("**/bottleneck")(attached["params"])
    params = jax.tree.map(lambda leaf, chosen: leaf + 0.5 if chosen else leaf, attached["params"], thin)
    attached, adapted = {**attached, "params": params}, jtl.peft.adapted(model, adapter)
    ids = np.array([[3, 5, 4]], np.int32)
    got = generate(adapted, attached, {"input_ids": ids}, max_new_tokens=3, eos_token_id=())
    text = ids if family == "gpt2" else np.array([[model.config.decoder_start_token_id]], np.int32)
    for word in np.asarray(got.tokens)[0]:
        given = {"input_ids": text} if family == "gpt2" else {"input_ids": ids, "decoder_input_ids": text}
        logits = adapted.apply(attached, **jax.tree.map(jnp.asarray, given))[0, -1]
        assert word == np.argmax(logits)
        text = np.append(text, [[word]], axis=1)


# What a checkpoint comes with


def _written(folder, settings, name="generation_config.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.mark.torch
def test_with_the_settings_of_a_checkpoint_it_writes_what_transformers_writes(pair, tmp_path):
    reference, model, variables = pair("t5", 4)
    import transformers

    beams = {name: value for name, value in CHECKPOINT_BEAMS.items() if name != "min_new_tokens"}
    reference = copy.deepcopy(reference)
    reference.generation_config = transformers.GenerationConfig(
        max_length=NEW + 1, min_length=4, decoder_start_token_id=PAD, pad_token_id=PAD, **beams
    )
    reference.save_pretrained(tmp_path)
    settings = defaults(tmp_path)
    expected = {"max_new_tokens": NEW, **_renamed(CHECKPOINT_BEAMS), "eos_token_id": (END, 7), "pad_token_id": PAD}
    assert settings == {**expected, "decoder_start_token_id": PAD}
    inputs = _inputs("t5", 4)
    _check_texts(generate(model, variables, inputs, **settings), _theirs(reference, inputs)[0], ends=(END, 7))


def test_arguments_go_before_the_settings_of_a_checkpoint(tmp_path):
    file = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 3, "max_length": 50, "num_beams": None}
    folder = _written(tmp_path, file)
    with pytest.raises(ConfigError, match=r"draws tokens \(do_sample\): give key="):
        defaults(folder, max_new_tokens=5)
    with pytest.raises(ConfigError, match=r"max_length=50, which counts the prompt too: give max_new_tokens="):
        defaults(folder, key=None)
    greedy = {"key": None, "max_new_tokens": 5}
    assert defaults(folder, **greedy) == {"eos_token_id": 3, **greedy}
    key = jax.random.key(0)
    drawn = defaults(folder, key=key, max_new_tokens=5, top_p=0.8)
    chosen = {"temperature": 0.6, "top_k": 50, "top_p": 0.8}  # transformers fills in a top_k of 50
    assert drawn == {"eos_token_id": 3, "key": key, "max_new_tokens": 5, **chosen}


def test_an_old_checkpoint_has_them_among_the_settings_of_the_model(tmp_path):
    folder = _written(tmp_path, {"model_type": "gpt2", "n_embd": 8, "eos_token_id": 7, "num_beams": 2}, "config.json")
    expected = {"eos_token_id": 7, "beams": 2, "length_penalty": 1.0, "early_stopping": False, "max_new_tokens": 20}
    assert defaults(folder) == expected
    with pytest.raises(ConfigError, match=r"no generation_config\.json and no config\.json"):
        defaults(tmp_path / "nowhere")
    _written(tmp_path, [1])
    with pytest.raises(WeightsError, match=r"generation_config\.json holds a list"):
        defaults(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"no_repeat_ngram_size": 3},
        {"repetition_penalty": 1.2},
        {"forced_eos_token_id": 2},
        {"suppress_tokens": [4]},
        {"some_setting_to_come": 1},
    ],
    ids=str,
)
def test_settings_that_would_change_the_text_are_refused_by_name(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"sets {name}=.*ignore=\['{name}'\]"):
        defaults(_written(tmp_path, setting))
    assert defaults(tmp_path, ignore=[name]) == {"eos_token_id": (), "max_new_tokens": 20}
    idle = {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "use_cache": True, "transformers_version": "5.0"}
    assert defaults(_written(tmp_path, idle), ignore=["eos_token_id", "max_length"]) == {}


def _with_files(reference, folder, file, **config):
    """A checkpoint with these settings of generation, and its settings changed; None takes one out."""
    reference.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    _written(folder, {name: value for name, value in settings.items() if value is not None}, "config.json")
    _written(folder, file)
    return type(reference).from_pretrained(folder).eval(), *jtl.load(folder)


@pytest.mark.torch
@pytest.mark.parametrize("start", [None, PAD], ids=["nowhere else", "another in config.json"])
@pytest.mark.parametrize("name", ["decoder_start_token_id", "bos_token_id"])
def test_a_decoder_starts_as_that_of_transformers(name, start, pair, tmp_path):
    """With the token of the settings of generation, whatever `config.json` says, or with that of a beginning."""
    file = {name: 5, "eos_token_id": END, "pad_token_id": PAD, "max_new_tokens": NEW}
    reference, model, variables = _with_files(pair("t5")[0], tmp_path, file, decoder_start_token_id=start)
    inputs, settings = _inputs("t5", 0), defaults(tmp_path)
    assert settings["decoder_start_token_id"] == 5
    got = generate(model, variables, inputs, **settings)
    _check_texts(got, _theirs(reference, inputs)[0])
    other = generate(model, variables, inputs, **defaults(tmp_path, ignore=["decoder_start_token_id"]))
    assert np.any(np.asarray(other.tokens) != np.asarray(got.tokens))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_without_an_end_or_a_length_it_writes_what_transformers_writes(pair, tmp_path):
    """Twenty tokens, though `config.json` has an end."""
    reference, model, variables = _with_files(pair("t5")[0], tmp_path, {"decoder_start_token_id": PAD})
    inputs = _inputs("t5", 0)
    got = generate(model, variables, inputs, **defaults(tmp_path))
    assert _check_texts(got, _theirs(reference, inputs)[0], ends=()) == [20] * 4
    assert min(generate(model, variables, inputs, max_new_tokens=20).lengths.tolist()) < 20


@pytest.mark.parametrize("value", [0, 1, "20", 20.5])
def test_a_length_that_cannot_be_is_refused_by_its_name(value, tmp_path):
    _written(tmp_path, {"is_encoder_decoder": True}, "config.json")
    with pytest.raises(ConfigError, match=rf"sets max_length={value!r}: expected an integer of at least 2"):
        defaults(_written(tmp_path, {"max_length": value}))


@pytest.mark.parametrize(
    ("model", "start", "message"),
    [
        (Pairs(), 0, "decoder_start_token_id=0: Pairs goes on from its inputs"),
        (Pairs(prompted=False), 4, "decoder_start_token_id must be one of the model's tokens, 0 to 3, got 4"),
    ],
    ids=["prompted", "beyond"],
)
def test_a_first_token_that_the_model_does_not_have_is_refused(model, start, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, _table(), {"input_ids": [[1, 2]]}, max_new_tokens=2, decoder_start_token_id=start)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"min_new_tokens": 6}, "min_new_tokens=6 is above max_new_tokens=5"),
        ({"key": True, "temperature": 0.0}, r"temperature=0.0: expected above 0; without key="),
        ({"key": True, "temperature": float("nan")}, r"temperature=nan"),
        ({"key": True, "top_p": 0.0}, r"top_p=0.0: expected in \(0, 1\]"),
        ({"key": True, "top_p": 1.1}, r"top_p=1.1: expected in \(0, 1\]"),
        ({"key": True, "top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"top_k": 5}, "top_k=5 draws tokens, which needs key="),
        ({"temperature": 0.5}, "temperature=0.5 draws tokens, which needs key="),
        ({"beams": 0}, "beams must be an integer of at least 1, got 0"),
        ({"beams": 2, "key": True}, "beams=2 with a key"),
        ({"beams": 2, "early_stopping": "always"}, "early_stopping='always': expected True, False or 'never'"),
        ({"length_penalty": 2.0}, r"length_penalty=2.0 is of beams: set beams="),
        ({"early_stopping": True}, r"early_stopping=True is of beams: set beams="),
        ({"beams": 2, "length_penalty": float("inf")}, "length_penalty=inf"),
        ({"eos_token_id": 4}, "eos_token_id: got 4, which is not among the model's tokens, 0 to 3"),
        ({"eos_token_id": (0, 1, 2, 3)}, "all 4 tokens of the model"),
        ({"max_new_tokens": 70}, "max_new_tokens=70: the model's texts have at most 70 tokens"),
        ({"max_new_tokens": 69}, r"row 1 is 2 tokens long: .* so a row at most 1 beside max_new_tokens=69; truncate"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(settings, message):
    model = Pairs()
    inputs = {"input_ids": np.array([[1, 2], [1, 2]]), "attention_mask": np.array([[0, 1], [1, 1]])}
    if "key" in settings:
        settings = {**settings, "key": jax.random.key(0)}
    with pytest.raises(ConfigError, match=message):
        generate(model, _table(), inputs, **{"max_new_tokens": 5, **settings})
    assert not model.traced


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [[0, 1], [2, 4]]}, "input_ids of row 1 has 4 at position 1: expected 0 to 3"),
        ({"input_ids": [[0, -1]]}, "input_ids of row 0 has -1 at position 1"),
        ({"input_ids": [[0, 1], [1, 2]], "attention_mask": [[1, 1], [0, 0]]}, "row 1 has no token, only padding"),
        ({"input_ids": [[0, 1]], "attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \[1, 3\]"),
        ({"input_ids": [0, 1]}, r"expected integers \[batch, length\]"),
        ({"input_ids": [[0.5]]}, r"expected integers \[batch, length\]"),
        ({"input_ids": np.zeros((0, 3), int)}, "inputs have no row"),
        ({"attention_mask": [[1]]}, r"inputs have \['attention_mask'\]: expected input_ids"),
        ({"input_ids": [[1]], "token_type_ids": [[0]]}, r"inputs have \['input_ids', 'token_type_ids'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_the_model_cannot_mean_are_refused(inputs, message):
    model = Pairs()
    with pytest.raises(DataError, match=message):
        generate(model, _table(), inputs, max_new_tokens=5)
    assert not model.traced


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.split(jax.random.key(0), 3)], ids=["raw", "three"])
def test_keys_of_other_kinds_are_refused(key):
    with pytest.raises(ConfigError, match=r"expected one of jax\.random\.key|one for each of 2 rows"):
        generate(Pairs(), _table(), {"input_ids": [[1], [2]]}, max_new_tokens=5, key=key)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Pairs(head=None), r"Pairs with no head has no logits of words: load it with head=jtl\.heads\.language_model"),
        (Pairs(head=jtl.heads.classifier(2)), "Pairs with the head Linear has no logits of words"),
        (bert.Bert(bert.BertConfig()), "Bert generates no text"),
    ],
    ids=["none", "classifier", "bert"],
)
def test_models_that_give_no_words_are_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, _table(), {"input_ids": [[1]]}, max_new_tokens=5)

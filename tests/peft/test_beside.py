"""What is not written into kernels: bottlenecks, prompts and prefixes; and many adapters over one base."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, peft, tree
from jtl.models.bert import Bert, BertConfig, Embeddings, Encoder
from jtl.models.gpt2 import GPT2
from jtl.models.gpt2_config import GPT2Config
from jtl.models.vit import ViT, ViTConfig

RNG = np.random.default_rng(0)
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = BertConfig(vocab_size=13, initializer_range=0.5, **SIZES)
IDS = jnp.asarray(RNG.integers(1, 13, (4, 6)), jnp.int32)
MASK = jnp.asarray(np.arange(6) < np.array([[6], [4], [1], [5]]), jnp.int32)
BATCH = {"input_ids": IDS, "attention_mask": MASK, "label": jnp.asarray([0, 1, 2, 1], jnp.int32)}
MAKERS = {
    "bottleneck": functools.partial(peft.bottleneck, ["**/attention/output", "**/mlp/down"], width=3),
    "prompt": functools.partial(peft.prompt, length=2, scale=1.0),
    "prefix": functools.partial(peft.prefix, ["**/attention"], length=3, scale=1.0),
}
each = pytest.mark.parametrize("maker", MAKERS)


@functools.cache
def initial():
    model = Bert(CONFIG, jtl.heads.classifier(3))
    return model, jax.jit(model.init)(jax.random.key(0), IDS, MASK)


def made(maker, **settings):
    """A model and an adapter that has learnt something."""
    model, variables = initial()
    adapter = MAKERS[maker](**settings)
    attached = peft.attach(adapter, variables, key=jax.random.key(1))

    def shift(path, leaf):
        noise = 0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
        return leaf + noise if f"/{adapter.name}/" in path else leaf

    return model, variables, adapter, {"params": tree.map_with_paths(shift, attached["params"])}


def run(model, adapter):
    return jax.jit(peft.adapted(model, adapter).apply)


def close(one, other, atol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), one, other)


def test_a_new_bottleneck_changes_nothing_and_a_trained_one_is_its_formula():
    model, variables = initial()
    adapter = MAKERS["bottleneck"]()
    new = peft.attach(adapter, variables, key=jax.random.key(1))
    close(run(model, adapter)(new, IDS, MASK), jax.jit(model.apply)(variables, IDS, MASK), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, peft.merge(adapter, new), variables)

    layer = nn.Dense(5)
    x = RNG.normal(size=(7, 4)).astype(np.float32)
    plain = {"params": {"layer": layer.init(jax.random.key(0), x)["params"]}}
    net = _Wrapped()
    adapter = peft.bottleneck(["layer"], width=2, activation=jnp.tanh)
    part = {"down": (5, 2), "down_bias": (2,), "up": (2, 5), "up_bias": (5,)}
    part = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in part.items()}
    attached = {"params": {"layer": {**plain["params"]["layer"], "bottleneck": {"kernel": part}}}}
    h = x @ np.asarray(plain["params"]["layer"]["kernel"]) + np.asarray(plain["params"]["layer"]["bias"])
    part = jax.tree.map(np.asarray, part)
    expected = h + np.tanh(h @ part["down"] + part["down_bias"]) @ part["up"] + part["up_bias"]
    np.testing.assert_allclose(peft.adapted(net, adapter).apply(attached, x), expected, rtol=1e-5, atol=1e-5)


class _Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="layer")(x)


def test_a_prompt_is_vectors_before_the_sequence_of_the_encoder():
    _, variables, adapter, attached = made("prompt")
    vectors = attached["params"]["encoder"]["prompt"]["vectors"]
    params = variables["params"]
    x, _ = Embeddings(CONFIG).apply({"params": params["embeddings"]}, IDS, jnp.zeros_like(IDS))
    x = jnp.concatenate([jnp.broadcast_to(vectors, (4, 2, 8)), x], axis=1)
    mask = jnp.concatenate([jnp.ones((4, 2), bool), MASK.astype(bool)], axis=1)
    expected = Encoder(CONFIG).apply({"params": params["encoder"]}, x, mask)[:, 2:]
    bare = Bert(CONFIG)
    found = run(bare, adapter)(attached, IDS, MASK)
    np.testing.assert_allclose(found.sequence, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(found.sequence - bare.apply(variables, IDS, MASK).sequence).max() > 0.1


@pytest.mark.parametrize("kind", ["linen", "linen masked", "jtl"])
def test_a_prefix_is_keys_and_values_before_those_of_attention(kind):
    """Against attention written out in NumPy, one head."""
    model = _Attending(kind != "jtl", kind == "linen masked")
    x = RNG.normal(size=(2, 5, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), x)
    adapter = peft.prefix(["attention"], length=3, scale=1.0)
    attached = peft.attach(adapter, variables, key=jax.random.key(1))
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf).squeeze(), attached["params"]["attention"])
    last = leaves["out" if kind != "jtl" else "output"]
    q, k, v = (x @ leaves[name]["kernel"] + leaves[name]["bias"] for name in ("query", "key", "value"))
    k, v = (
        np.concatenate([np.tile(leaves["prefix"][name], (2, 1, 1)), values], 1)
        for name, values in (("key", k), ("value", v))
    )
    scores = q @ k.swapaxes(1, 2) / 2
    if kind == "linen masked":
        scores = np.where(np.concatenate([np.ones((5, 3), bool), np.tri(5, dtype=bool)], 1), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = weights @ v @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(peft.adapted(model, adapter).apply(attached, x), expected, rtol=1e-4, atol=1e-5)


def test_a_prefix_of_gpt2_is_what_words_in_front_are_to_its_attention():
    """One block: with the keys and values of some words as its prefix, the words after them are read alike."""
    model = GPT2(GPT2Config(vocab_size=13, n_positions=9, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5))
    ids, positions = IDS[:1], jnp.arange(6)[None]
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    whole, seen = model.apply(variables, ids, capture_intermediates=lambda module, _: module.name == "qkv")
    (fused,) = jax.tree.leaves(seen["intermediates"])
    adapter = peft.prefix(["**/attention"], length=2, names=["qkv"])
    attached = peft.attach(adapter, variables, key=jax.random.key(1))

    def of_words(path, leaf):
        return fused[0, :2].at[:, :8].set(7.0) if "/prefix/" in path else leaf  # the part of queries is not used

    attached = {"params": tree.map_with_paths(of_words, attached["params"])}
    rest = run(model, adapter)(attached, ids[:, 2:], position_ids=positions[:, 2:])
    close(rest.sequence, whole.sequence[:, 2:])
    writer = GPT2(model.config, jtl.heads.language_model())
    with pytest.raises(errors.ConfigError, match=r"prefix\(\) puts in front of a sequence has no place among the keys"):
        jtl.generate(peft.adapted(writer, adapter), attached, {"input_ids": ids}, max_new_tokens=2)


class _Attending(nn.Module):
    linen: bool
    masked: bool

    @nn.compact
    def __call__(self, x):
        if self.linen:
            mask = nn.make_causal_mask(x[..., 0]) if self.masked else None
            return nn.MultiHeadDotProductAttention(1, name="attention")(x, mask=mask)
        return jtl.models.attention.SelfAttention(1, init_scale=0.5, name="attention")(jnp.asarray(x))


@each
def test_what_is_padding_stays_padding(maker):
    """A row's outputs do not depend on how far it was padded."""
    model, _, adapter, attached = made(maker)
    whole = run(model, adapter)(attached, IDS, MASK)
    alone = run(model, adapter)(attached, IDS[1:2, :4], MASK[1:2, :4])
    np.testing.assert_allclose(whole[1:2], alone, rtol=1e-5, atol=1e-5)


def test_the_audit_passes_a_new_adapter_whose_first_gradients_are_zero():
    model, variables = initial()
    adapter = peft.lora(["**/query", "**/value"], rank=2)
    attached = peft.attach(adapter, variables, key=jax.random.key(1))
    mask = jtl.select("**/lora", "head")
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.adamw(1e-2)
    state, frozen = jtl.init(attached, tx, trainable=mask, key=jax.random.key(0))
    jtl.audit(jax.jit(jtl.train_step(loss, tx)), state, frozen, BATCH, loss_fn=loss, trainable=mask).require()


@each
def test_the_audit_passes_and_only_the_adapter_is_trained(maker):
    model, _, adapter, attached = made(maker)
    mask = jtl.select(f"**/{adapter.name}", "head")
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.adamw(1e-2)
    state, frozen = jtl.init(attached, tx, trainable=mask, key=jax.random.key(0))
    jtl.audit(jax.jit(jtl.train_step(loss, tx)), state, frozen, BATCH, trainable=mask).require()
    delta = peft.detach(adapter, attached)[1]
    assert tree.size(state.params) == tree.size(delta) + 27


@each
def test_the_cut_lies_below_the_adapter(maker):
    """An adapter of the last block alone trains from what is cached below it."""
    model, variables = initial()
    adapter = {
        "bottleneck": lambda: peft.bottleneck(["encoder/layer_1/mlp/down"], width=3),
        "prompt": lambda: peft.prompt("encoder/layer_1", length=2),
        "prefix": lambda: peft.prefix(["encoder/layer_1/attention"], length=3),
    }[maker]()
    attached = peft.attach(adapter, variables, key=jax.random.key(1))
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.sgd(0.1)
    state, frozen = jtl.init(attached, tx, trainable=jtl.select(f"**/{maker}", "head"), key=jax.random.key(0))
    cut = jtl.split(loss, state, frozen, BATCH)
    assert cut.report.prefix_flops > 0.7 * cut.report.suffix_flops / 3
    cached = jax.jit(cut.prefix)(frozen, frozen.collections, BATCH)
    whole, parts = (
        jax.jit(jtl.train_step(one, tx))(state, frozen, batch) for one, batch in ((loss, BATCH), (cut.suffix, cached))
    )
    close(whole[0].params, parts[0].params)
    np.testing.assert_allclose(whole[1]["loss"], parts[1]["loss"], rtol=1e-5)


@each
def test_a_trained_one_is_no_change_of_the_params(maker):
    _, _, adapter, attached = made(maker)
    with pytest.raises(errors.ConfigError, match=rf"{maker} is no change of the params"):
        peft.merge(adapter, attached)
    with pytest.raises(errors.ConfigError, match="no change of the params"):
        jax.jit(lambda tree: peft.merge(adapter, tree))(attached)


def test_a_prompt_of_pictures_is_vpt():
    model = ViT(
        ViTConfig(image_size=(8, 8), patch_size=4, initializer_range=0.5, **SIZES),
        jtl.heads.classifier(3),
    )
    images = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    for adapter in (peft.prompt(length=2, scale=1.0), peft.prefix(["**/attention"], length=2, scale=1.0)):
        attached = peft.attach(adapter, variables, key=jax.random.key(1))
        found = run(model, adapter)(attached, images)
        assert found.shape == (2, 3)
        assert np.abs(found - model.apply(variables, images)).max() > 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.bottleneck(["head"], width=0), "width=0"),
        (lambda: peft.bottleneck("head"), "list of patterns"),
        (lambda: peft.prompt(length=0), "length=0"),
        (lambda: peft.prefix(["**/attention"], length=0), "length=0"),
        (lambda: _attach(peft.prompt("encodr")), "nearest paths"),
        (lambda: _attach(peft.prompt("embeddings")), "pass width="),
        (lambda: _attach(peft.prompt("head/kernel")), "not the path of a module"),
        (lambda: _attach(peft.prefix(["**/mlp"])), "no module with the dense layers key and value"),
        (lambda: _attach(peft.prefix(["**/attenton"])), "nearest paths"),
        (lambda: _attach(peft.bottleneck(["embeddings/word"])), "dense"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(errors.JtlError, match=message):
        make()


def _attach(adapter):
    model, variables = initial()
    attached = peft.attach(adapter, variables, key=jax.random.key(0))
    peft.adapted(model, adapter).apply(attached, IDS, MASK)


def family(count, maker=lambda: peft.lora(["**/query", "**/value"], rank=2)):
    """Members of one base: an adapter and a head each."""
    model, variables = initial()
    adapter, members = maker(), []
    for number in range(count):
        attached = peft.attach(adapter, variables, key=jax.random.key(number))
        members.append(tree.map_with_paths(lambda path, leaf, n=number: leaf + 0.1 * n * ("lora" in path), attached))
    return model, variables, adapter, members


@pytest.mark.parametrize("maker", ["lora", *MAKERS])
def test_each_row_through_an_adapter_of_its_own(maker):
    makers = {name: (MAKERS[name],) for name in MAKERS}
    model, variables, adapter, members = family(3, *makers.get(maker, ()))
    running = run(model, adapter)
    stacked = peft.stack([peft.detach(adapter, member)[1] for member in members])
    which = jnp.asarray([2, 0, 2, 1])
    routed = jax.jit(lambda *given: peft.route(model, adapter, *given))
    found = routed(variables, stacked, which, IDS, MASK)
    expected = [running(members[m], IDS[b : b + 1], MASK[b : b + 1])[0] for b, m in enumerate(which)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_the_head_of_each_adapter_goes_with_it():
    model, variables, adapter, members = family(2)
    heads = [jax.tree.map(lambda leaf, n=n: leaf + n, variables["params"]["head"]) for n in range(2)]
    whole = [{"params": {**member["params"], "head": head}} for member, head in zip(members, heads, strict=True)]
    stacked = peft.stack(
        [{**peft.detach(adapter, one)[1], "head": head} for one, head in zip(whole, heads, strict=True)]
    )
    routed = jax.jit(lambda *given, **kwargs: peft.route(model, adapter, *given, **kwargs))
    found = routed(variables, stacked, jnp.asarray([1, 0, 0, 1]), IDS, attention_mask=MASK)
    running = run(model, adapter)
    expected = [running(whole[m], IDS[b : b + 1], MASK[b : b + 1])[0] for b, m in enumerate((1, 0, 0, 1))]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_members_trained_in_one_step_are_those_trained_alone_and_the_base_is_there_once():
    model, variables, adapter, members = family(3)
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.adam(1e-2)
    mask = jtl.select("**/lora", "head")
    pairs = [jtl.init(member, tx, trainable=mask, key=jax.random.key(n)) for n, member in enumerate(members)]
    batches = [{**BATCH, "label": (BATCH["label"] + n) % 3} for n in range(3)]
    step = jtl.train_step(loss, tx)
    states, batch = peft.stack([state for state, _ in pairs]), peft.stack(batches)
    together = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))
    compiled = together.lower(states, pairs[0][1], batch).compile()
    after, _ = compiled(states, pairs[0][1], batch)
    alone = jax.jit(step)
    for number, one in enumerate(peft.unstack(after)):
        close(one.params, alone(*pairs[number], batches[number])[0].params, 1e-6)
    size = tree.nbytes(variables["params"]) - tree.nbytes(variables["params"]["head"])
    expected = tree.nbytes(states) + size + tree.nbytes(batch)
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(expected, abs=256)


def test_what_cannot_be_stacked_is_refused():
    _, _, adapter, members = family(2)
    one, other = (peft.detach(adapter, member)[1] for member in members)
    with pytest.raises(errors.ConfigError, match="no adapter"):
        peft.stack([])
    with pytest.raises(errors.ConfigError, match="adapters 0 and 1 differ"):
        peft.stack([one, jax.tree.map(lambda leaf: leaf[..., :1], other)])

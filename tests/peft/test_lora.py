"""LoRA and DoRA: against their formulas, merged against running, and what one mask makes of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, peft, tree
from jtl.models.bert import Bert, BertConfig

from ..covering import covering  # noqa: TID252

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 6)).astype(np.float32), RNG.integers(0, 3, 8).astype(np.int32)
BATCH = {"x": jnp.asarray(X), "label": jnp.asarray(Y)}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(6, name="dense")(x)
        heads = nn.DenseGeneral((2, 3), name="heads")(x)
        x = nn.DenseGeneral(6, axis=(-2, -1), name="out")(nn.tanh(heads))
        return nn.Dropout(0.1, deterministic=not train)(nn.tanh(x))


class Body(Block):
    def __call__(self, x, _):
        return Block.__call__(self, x), None


class Net(nn.Module):
    """Dense layers of every kind, an embedding that is also read by `attend`, and a convolution."""

    kind: str = "plain"

    @nn.compact
    def __call__(self, x, train: bool = False):
        if self.kind == "scan":
            stack = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
            x, _ = stack(name="blocks")(x, None)
        else:
            wrap = nn.remat if self.kind == "remat" else lambda block: block
            for i in range(2):
                x = (
                    wrap(Block, static_argnums=2)(name=f"block_{i}")(x, train)
                    if self.kind == "remat"
                    else Block(name=f"block_{i}")(x, train)
                )
        if self.kind == "mixed":
            table = nn.Embed(5, 6, name="table")
            x = x + table(jnp.argmax(x, -1) % 5)
            image = nn.Conv(6, (2, 2), name="conv")(x.reshape(-1, 2, 3, 1))
            x = jnp.concatenate([image.mean((1, 2)), table.attend(x)], -1)
        return nn.Dense(3, name="head")(x)


TARGETS = {
    "plain": ["**/dense", "**/heads", "**/out"],
    "remat": ["**/dense", "**/heads", "**/out"],
    "mixed": ["**/dense", "table", "conv", "**/out"],
    "scan": ["**/dense", "**/heads", "**/out"],
}
MAKERS = {
    "lora": (peft.lora, {"rank": 2, "alpha": 3.0}),
    "dora": (peft.dora, {"rank": 2, "alpha": 3.0}),
    "ia3": (peft.ia3, {"inputs": ["**/out"]}),
}
everywhere = pytest.mark.parametrize(("kind", "maker"), covering([(k, m) for k in TARGETS for m in MAKERS], times=2))


def made(kind, maker, **settings):
    model, variables = initial(kind)
    settings |= {"stacked": ["blocks"]} if kind == "scan" else {}
    make, usual = MAKERS[maker]
    adapter = make(TARGETS[kind], **{**usual, **settings})
    return model, variables, adapter, peft.attach(adapter, variables, key=jax.random.key(1))


def moved(variables, name):
    """The same with an adapter that has learnt something."""

    def shift(path, leaf):
        if f"/{name}/" not in path:
            return leaf
        return leaf + 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)

    return {"params": tree.map_with_paths(shift, variables["params"])}


def same(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


@functools.cache
def initial(kind):
    model = Net(kind)
    return model, jax.jit(model.init)(jax.random.key(0), X)


@everywhere
def test_a_new_adapter_changes_nothing(kind, maker):
    model, variables, adapter, attached = made(kind, maker)
    merged = peft.merge(adapter, attached)
    if maker != "dora":
        jax.tree.map(np.testing.assert_array_equal, merged, variables)
    same(merged, variables, 1e-6)
    same(jax.jit(peft.adapted(model, adapter).apply)(attached, X), jax.jit(model.apply)(variables, X))


@everywhere
def test_running_equals_merged_in_values_and_gradients(kind, maker):
    model, _, adapter, attached = made(kind, maker)
    attached = moved(attached, maker)
    running = peft.adapted(model, adapter)
    merged = peft.merge(adapter, attached)
    plain = jax.jit(model.apply)
    assert np.abs(plain(merged, X) - plain(made(kind, maker)[1], X)).max() > 1e-2
    same(jax.jit(running.apply)(attached, X), plain(merged, X))
    loss = jtl.supervised(model, jtl.losses.cross_entropy)
    other = jtl.supervised(running, jtl.losses.cross_entropy)
    expected = jax.jit(jax.grad(lambda v: loss(peft.merge(adapter, v)["params"], {}, BATCH, key=None)[0]))(attached)
    found = jax.jit(jax.grad(lambda v: other(v["params"], {}, BATCH, key=None)[0]))(attached)
    same(found, expected)


def test_the_formula_of_lora():
    _, variables, adapter, attached = made("plain", "lora")
    attached = moved(attached, "lora")
    dense = attached["params"]["block_0"]["dense"]
    part, merged = dense["lora"]["kernel"], peft.merge(adapter, attached)["params"]["block_0"]["dense"]
    np.testing.assert_allclose(merged["kernel"], dense["kernel"] + 3 / 2 * part["a"] @ part["b"], rtol=1e-6, atol=1e-7)
    assert merged["bias"] is variables["params"]["block_0"]["dense"]["bias"]
    assert part["a"].shape == (6, 2)
    assert attached["params"]["block_0"]["out"]["lora"]["kernel"]["a"].shape == (2, 3, 2)


def test_the_formula_of_dora():
    _, variables, adapter, attached = made("plain", "dora")
    start = attached["params"]["block_0"]["dense"]["dora"]["kernel"]["magnitude"]
    norm = np.linalg.norm(variables["params"]["block_0"]["dense"]["kernel"], axis=0)
    np.testing.assert_allclose(start, norm, rtol=1e-6)
    attached = moved(attached, "dora")
    dense = attached["params"]["block_0"]["dense"]
    part, merged = dense["dora"]["kernel"], peft.merge(adapter, attached)["params"]["block_0"]["dense"]
    whole = np.asarray(dense["kernel"] + 3 / 2 * part["a"] @ part["b"])
    expected = np.asarray(part["magnitude"])[None] * whole / np.linalg.norm(whole, axis=0, keepdims=True)
    np.testing.assert_allclose(merged["kernel"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "scan"])
def test_only_the_adapter_and_the_head_are_trained(kind):
    model, _, adapter, attached = made(kind, "lora")
    loss = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    state, frozen = jtl.init(attached, tx, trainable=jtl.select("**/lora", "head"), key=jax.random.key(0))
    before = tree.digest(frozen)
    *_, report = jtl.fit(loss, tx, state, frozen, [BATCH] * 10)
    assert tree.digest(report.frozen) == before
    assert all("lora" in path or path.startswith("head") for path in tree.paths(report.state.params))
    assert float(report.metrics["loss"]) < 0.9 * float(loss(attached["params"], {}, BATCH, key=None)[0])
    merged = peft.merge(adapter, jtl.variables(report.state, report.frozen))
    same(model.apply(merged, X), peft.adapted(model, adapter).apply(jtl.variables(report.state, report.frozen), X))


class Row(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(256, use_bias=False, name="dense")(x)), None


class Wide(nn.Module):
    count: int
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            body = nn.scan(Row, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.count)
            return body(name="rows")(x, None)[0]
        for i in range(self.count):
            x, _ = Row(name=f"row_{i}")(x, None)
        return x


def wide_step(count, scanned, rank=2):
    model, batch = Wide(count, scanned), {"x": jnp.ones((64, 256)), "label": jnp.zeros(64, jnp.int32)}
    variables = model.init(jax.random.key(0), batch["x"])
    adapter = peft.lora(["**/dense"], rank=rank, stacked=["rows"] if scanned else [])
    attached = peft.attach(adapter, variables, key=jax.random.key(1))
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.sgd(1e-2)
    state, frozen = jtl.init(attached, tx, trainable=jtl.select("**/lora"), key=jax.random.key(0))
    return jax.jit(jtl.train_step(loss, tx), donate_argnums=0).lower(state, frozen, batch).compile()


def test_no_gradient_of_a_frozen_kernel_is_computed():
    """Frozen above a trained leaf costs twice a forward pass; thin products are extra, three times theirs."""
    layer, thin = 2 * 64 * 256 * 256, 2 * 64 * 2 * 512
    flops = wide_step(4, False).cost_analysis()["flops"]
    assert flops < 1.03 * (4 * (2 * layer + 3 * thin) - layer)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_layer_more_takes_the_memory_of_its_activations_not_of_a_kernel(scanned):
    few, many = (wide_step(count, scanned).memory_analysis().temp_size_in_bytes for count in (4, 12))
    kernel, activations = 256 * 256 * 4, 64 * 256 * 4
    assert (many - few) / 8 < 3.5 * activations < kernel


def test_dropout_is_on_the_thin_path_alone_and_off_in_inference():
    model, _, adapter, attached = made("plain", "lora", dropout=0.5)
    attached = moved(attached, "lora")
    running = peft.adapted(model, adapter)
    same(running.apply(attached, X), model.apply(peft.merge(adapter, attached), X))
    with_keys = [running.apply(attached, X, rngs={"dropout": jax.random.key(i)}) for i in range(2)]
    assert np.abs(with_keys[0] - with_keys[1]).max() > 1e-3
    fresh = made("plain", "lora", dropout=0.5)[3]  # B is zero, so nothing is there to drop
    same(running.apply(fresh, X, rngs={"dropout": jax.random.key(0)}), model.apply(made("plain", "lora")[1], X))
    mixed, _, adapter, attached = made("mixed", "lora", dropout=0.5)
    with pytest.raises(errors.ConfigError, match=r"called with one array.*\['conv', 'table'\]"):
        peft.adapted(mixed, adapter).apply(attached, X)


def test_ranks_alphas_and_stabilisation_follow_rules():
    _, _, adapter, attached = made(
        "plain", "lora", rank=[("block_0", 4), ("**", 1)], alpha=[("block_0", 8.0), ("**", 3.0)], rank_stabilized=True
    )
    attached = moved(attached, "lora")
    for block, rank, scale in (("block_0", 4, 4.0), ("block_1", 1, 3.0)):
        dense = attached["params"][block]["dense"]
        part, merged = dense["lora"]["kernel"], peft.merge(adapter, attached)["params"][block]["dense"]["kernel"]
        assert part["a"].shape == (6, rank)
        np.testing.assert_allclose(merged, dense["kernel"] + scale * part["a"] @ part["b"], rtol=1e-5, atol=1e-6)


def test_an_adapter_trains_from_the_cache_of_what_lies_below_it():
    config = BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    model = Bert(config, jtl.heads.classifier(3))
    ids = jnp.asarray(RNG.integers(1, 11, (12, 5)), jnp.int32)
    columns = {"input_ids": np.asarray(ids), "attention_mask": np.ones((12, 5), np.int32)}
    variables = jax.jit(model.init)(jax.random.key(0), ids, jnp.ones_like(ids))
    adapter = peft.lora(["encoder/layer_2/**/query", "encoder/layer_2/**/value"], rank=2)
    variables = peft.attach(adapter, variables, key=jax.random.key(1))
    loss, tx = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy), optax.adam(1e-2)
    runs, labels = {}, np.arange(12, dtype=np.int32) % 3
    for cache in ("off", "require"):
        state, frozen = jtl.init(variables, tx, trainable=jtl.select("**/lora", "head"), key=jax.random.key(0))
        batches = jtl.data.batches(_ragged(columns), labels, batch_size=4, seed=0, epochs=3)
        *_, report = jtl.fit(loss, tx, state, frozen, batches, cache=cache, say=lambda line: None)
        runs[cache] = report.state.params
    same(runs["off"], runs["require"], 1e-5)


def _ragged(columns):
    ids = columns["input_ids"]
    from jtl.data.text import Ragged

    return {"input_ids": Ragged(ids.ravel(), np.arange(len(ids) + 1) * ids.shape[1], 0)}


def test_a_function_of_params_is_merged():
    def forward(params, x):
        return x @ params["stem"]["kernel"] @ params["head"]["kernel"]

    model = jtl.from_function(forward)
    variables = {"params": {"stem": {"kernel": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((4, 3))}}}
    adapter = peft.lora(["stem"], rank=2)
    attached = moved(peft.attach(adapter, variables, key=jax.random.key(0)), "lora")
    same(peft.adapted(model, adapter).apply(attached, X), model.apply(peft.merge(adapter, attached), X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.lora("**/query"), "list of patterns"),
        (lambda: peft.lora([]), "list of patterns"),
        (lambda: peft.lora(["head"], rank=0), "a rank is 0"),
        (lambda: peft.lora(["head"], rank=[("head", 1.5)]), r"a rank is 1\.5"),
        (lambda: peft.lora(["head"], dropout=1.0), r"dropout=1\.0"),
        (lambda: made("plain", "lora", rank=[("block_0", 2)]), "no rule of ranks covers block_1"),
        (lambda: made("plain", "lora", input_axes=[("**/dense", 2)]), "cannot be its inputs"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(errors.JtlError, match=message):
        make()


def test_patterns_that_adapt_nothing_are_refused():
    _, variables, adapter, attached = made("plain", "lora")
    for targets, message in ((["**/qurey"], "nearest paths"), (["**/bias"], "no leaf of two or more axes")):
        with pytest.raises(errors.JtlError, match=message):
            peft.attach(peft.lora(targets), variables, key=jax.random.key(0))
    with pytest.raises(errors.ConfigError, match="already"):
        peft.attach(adapter, attached, key=jax.random.key(0))
    strange = {"params": {"block_9": {"dense": {"lora": {"kernel": {"a": jnp.ones((6, 2)), "b": jnp.ones((2, 6))}}}}}}
    with pytest.raises(errors.ConfigError, match="block_9"):
        peft.merge(adapter, {"params": {**variables["params"], **strange["params"]}})

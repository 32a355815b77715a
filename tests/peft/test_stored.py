"""A base in few bits: what is kept of its values, of its bytes, of the memory of a step, and what trains over it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import jtl
from jtl import errors, peft, quantized, tree
from jtl.models.bert import Bert, BertConfig
from jtl.models.convolution import Conv

from ..covering import covering, product  # noqa: TID252

RNG = np.random.default_rng(0)
FORMATS = ("bfloat16", "int8", "int4", "nf4")
IDS = jnp.asarray(RNG.integers(1, 40, (12, 6)), jnp.int32)
BATCH = {
    "input_ids": IDS,
    "attention_mask": jnp.ones_like(IDS),
    "label": jnp.asarray(RNG.integers(0, 3, 12), jnp.int32),
}
CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=36,
    max_position_embeddings=8,
    initializer_range=0.2,
)
BERT = Bert(CONFIG, jtl.heads.classifier(3))
LORA = peft.lora(["**/query", "**/value"], rank=2)
TRAINED = jtl.select("**/lora", "head")
in_each_format = pytest.mark.parametrize("format", FORMATS)


@functools.cache
def bert():
    return jax.jit(BERT.init)(jax.random.key(0), IDS, jnp.ones_like(IDS))


def over(format, adapter=LORA):
    """BERT's variables, stored and adapted; float ones for None."""
    base = bert() if format is None else peft.quantize(bert(), format, trainable=jtl.select("head"))
    return peft.attach(adapter, base, key=jax.random.key(1))


def one(kernel, format, **settings):
    """A lone kernel, stored and opened again."""
    box = peft.quantize({"params": {"kernel": jnp.asarray(kernel)}}, format, **settings)["params"]["kernel"]
    return box, np.asarray(box.unbox())


def kernel_of(*shape):
    return RNG.normal(size=shape).astype(np.float32) * np.exp(RNG.normal(size=shape)).astype(np.float32)


def same(a, b, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


# What is kept of the values.


def test_the_points_of_nf4_are_quantiles_of_a_normal_distribution():
    """The construction in bitsandbytes' `create_normal_map`, which QLoRA's appendix tabulates."""
    offset = 0.9677083
    above = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    points = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(quantized.CODES["nf4"], points / points.max(), atol=1e-6)
    assert len(quantized.CODES["nf4"]) == 16


def test_bfloat16_keeps_eight_bits_of_a_mantissa():
    kernel = kernel_of(33, 7)
    _, opened = one(kernel, "bfloat16")
    assert np.all(np.abs(opened - kernel) <= np.abs(kernel) * 2.0**-8)
    assert np.abs(opened - kernel).max() > 0


@pytest.mark.parametrize(
    ("shape", "axes", "settings"),
    [
        ((33, 7), (0,), {}),
        ((5, 2, 3), (0,), {}),
        ((5, 2, 3), (0, 1), {"input_axes": [("kernel", 2)]}),
        ((3, 3, 4, 5), (0, 1, 2), {}),
        ((4, 6, 5), (1,), {"stacked": ["kernel"]}),
    ],
)
def test_int8_is_within_half_a_step_of_each_output(shape, axes, settings):
    kernel = kernel_of(*shape)
    box, opened = one(kernel, "int8", **settings)
    step = np.abs(kernel).max(axes, keepdims=True) / 127
    assert np.all(np.abs(opened - kernel) <= step / 2 * (1 + 1e-5))
    assert box.absmax.shape == step.shape
    assert np.all(np.abs(np.asarray(box.values, np.int32)).max(axes) == 127)


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.parametrize(("shape", "block"), [((16, 8), 64), ((16, 8), 32), ((7, 11), 64), ((3, 3, 2, 5), 32)])
def test_four_bits_take_the_nearest_point_of_the_block(format, shape, block):
    kernel = kernel_of(*shape)
    _, opened = one(kernel, format, block=block)
    flat = np.pad(kernel.ravel(), (0, -kernel.size % block)).reshape(-1, block)
    points = np.asarray(quantized.CODES[format], np.float32) * np.abs(flat).max(1)[:, None]
    nearest = np.abs(flat[..., None] - points[:, None]).min(-1)
    found = np.abs(np.pad(opened.ravel(), (0, -kernel.size % block)).reshape(-1, block) - flat)
    assert opened.shape == shape
    np.testing.assert_allclose(found, nearest, atol=1e-6 * np.abs(kernel).max())


def test_a_stack_has_blocks_of_its_own_for_each_layer():
    kernel = kernel_of(3, 5, 7)
    _, together = one(kernel, "nf4", stacked=["kernel"])
    alone = [one(layer, "nf4")[1] for layer in kernel]
    np.testing.assert_array_equal(together, np.stack(alone))


@in_each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_zeros_stay_zeros_and_an_array_keeps_its_dtype(format, dtype):
    kernel = np.zeros((70, 3), np.float32)
    kernel[:, 1] = np.linspace(-1, 1, 70)
    _, opened = one(jnp.asarray(kernel, dtype), format, block=2)
    assert opened.dtype == dtype
    np.testing.assert_array_equal(opened[:, [0, 2]], 0)
    np.testing.assert_array_equal(one(np.zeros((70, 3), np.float32), format)[1], 0)


def test_what_has_sixteen_bits_is_bfloat16_at_once():
    kernel = jnp.asarray(kernel_of(4, 4), jnp.bfloat16)
    np.testing.assert_array_equal(one(kernel, "bfloat16")[1], kernel)


# What is kept of the bytes.


@in_each_format
def test_bytes_are_those_of_the_formula_and_of_the_buffers(format):
    variables, tx = over(format), optax.adam(1e-2)
    state, frozen = jtl.init(variables, tx, trainable=TRAINED, key=jax.random.key(0))
    floats, layers = bert()["params"], CONFIG.num_hidden_layers
    block, width, wide = 64, CONFIG.hidden_size, CONFIG.intermediate_size
    shapes = [(width, width)] * (4 * layers + 1) + [(width, wide), (wide, width)] * layers
    shapes += [(CONFIG.vocab_size, width), (CONFIG.max_position_embeddings, width), (CONFIG.type_vocab_size, width)]
    sizes = {
        "bfloat16": lambda i, o: 2 * i * o,
        "int8": lambda i, o: i * o + 4 * o,
        "int4": lambda i, o: -(-i * o // block) * (block // 2 + 4),
        "nf4": lambda i, o: -(-i * o // block) * (block // 2 + 4),
    }
    head = tree.nbytes(floats["head"])
    kept = tree.nbytes(floats) - head - 4 * sum(i * o for i, o in shapes)
    adapter = 4 * layers * 2 * (2 * 2 * width)
    base = kept + sum(sizes[format](*shape) for shape in shapes)
    assert tree.nbytes(frozen) == base
    assert tree.nbytes(state.params) == adapter + head
    assert tree.nbytes(state.opt_state) == 2 * (adapter + head) + 4
    for part in (frozen, state.params):
        buffers = {leaf.unsafe_buffer_pointer(): leaf.on_device_size_in_bytes() for leaf in jax.tree.leaves(part)}
        assert sum(buffers.values()) == tree.nbytes(part)


@in_each_format
def test_nothing_is_copied(format):
    start = bert()
    stored = peft.quantize(start, format, trainable=jtl.select("head"))
    for path, leaf in quantized.leaves(stored["params"]):
        if not quantized.is_box(leaf):
            assert leaf is dict(tree.leaves_with_paths(start["params"]))[path]
    variables = peft.attach(LORA, stored, key=jax.random.key(0))
    _, frozen = jtl.init(variables, optax.adam(1e-2), trainable=TRAINED, key=jax.random.key(0))
    before = {path: leaf.unsafe_buffer_pointer() for path, leaf in tree.leaves_with_paths(stored["params"])}
    after = {path: leaf.unsafe_buffer_pointer() for path, leaf in tree.leaves_with_paths(frozen.params)}
    assert after == {path: place for path, place in before.items() if not path.startswith("head")}


def test_small_leaves_the_trained_and_adapters_stay_as_they_are():
    stored = peft.quantize(over(None), "int8", trainable=TRAINED)
    boxes = set(quantized.boxes(stored["params"]))
    assert boxes == {
        path
        for path in tree.paths(bert()["params"])
        if path.endswith(("kernel", "embedding")) and not path.startswith("head")
    }
    assert all(not path.endswith(("bias", "scale")) for path in boxes)
    chosen = peft.quantize(bert(), "int8", targets=["**/query"])
    assert set(quantized.boxes(chosen["params"])) == {"encoder/layer_0/attention/query/kernel"}


# What a step takes of memory.


class Row(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(128, name="dense")(x)), None


class Deep(nn.Module):
    count: int
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            body = nn.scan(Row, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.count)
            return body(name="rows")(x, None)[0]
        for i in range(self.count):
            x, _ = Row(name=f"row_{i}")(x, None)
        return x


def temporary(format, count, scanned, adapt=True):
    model, batch = Deep(count, scanned), {"x": jnp.ones((16, 128)), "label": jnp.zeros(16, jnp.int32)}
    variables = jax.jit(model.init)(jax.random.key(0), batch["x"])
    stacked = ["rows"] if scanned else []
    if format:
        variables = peft.quantize(variables, format, stacked=stacked)
    mask = jtl.select("**/bias")
    if adapt:
        adapter, mask = peft.lora(["**/dense"], rank=2, stacked=stacked), jtl.select("**/lora")
        variables = peft.attach(adapter, variables, key=jax.random.key(1))
    wrapped = peft.adapted(model, adapter) if adapt else peft.quantized(model)
    loss, tx = jtl.supervised(wrapped, jtl.losses.cross_entropy), optax.sgd(1e-2)
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(0))
    step = jax.jit(jtl.train_step(loss, tx), donate_argnums=0).lower(state, frozen, batch).compile()
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("format", "adapt"), covering(product(["bfloat16", "int8", "nf4"], [True, False])))
def test_a_step_holds_one_opened_kernel_more_than_a_float_base(format, adapt):
    kernel, activations = 128 * 128 * 4, 16 * 128 * 4
    stored, floats = (temporary(which, 8, False, adapt) for which in (format, None))
    assert stored <= floats + kernel + 2 * activations < floats + 2 * kernel


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_scan_over_layers_does_as_well(format):
    kernel, activations = 128 * 128 * 4, 16 * 128 * 4
    assert temporary(format, 8, True) <= temporary(None, 8, True) + kernel + 2 * activations


# What trains over it.


def deep(format, layers=2):
    batch = {"x": jnp.asarray(RNG.normal(size=(4, 128)), jnp.float32), "label": jnp.arange(4, dtype=jnp.int32)}
    variables = jax.jit(Deep(layers).init)(jax.random.key(0), batch["x"])
    return Deep(layers), batch, variables if format is None else peft.quantize(variables, format)


@pytest.mark.parametrize(
    ("make", "format", "adapter"),
    [
        (lambda format: (BERT, BATCH, peft.quantize(bert(), format, trainable=jtl.select("head"))), "int8", LORA),
        (deep, "nf4", peft.lora(["row_0"], rank=2)),
        (deep, "bfloat16", peft.dora(["row_0"], rank=2)),
        (deep, "int8", peft.ia3(["row_0"])),
    ],
)
def test_losses_and_gradients_are_those_of_the_opened_model(make, format, adapter):
    model, batch, base = make(format)
    stored = peft.attach(adapter, base, key=jax.random.key(1))
    loss = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy)

    def moved(path, leaf):
        return leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)

    def value_and_grad(variables):
        mask = jtl.select(f"**/{adapter.name}")
        trained, rest = tree.partition(variables["params"], mask)
        trained = tree.map_with_paths(moved, trained)
        of = jax.jit(
            jax.value_and_grad(lambda part, rest: loss(tree.combine(part, rest), {}, batch, key=jax.random.key(0))[0])
        )
        value, grads = of(trained, rest)
        return value, {path: leaf for path, leaf in tree.leaves_with_paths(grads)}

    (found, grads), (expected, others) = map(value_and_grad, (stored, peft.dequantize(stored)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    same(grads, others)
    assert min(float(jnp.abs(leaf).max()) for leaf in grads.values()) > 1e-4


def test_lora_learns_over_int8_and_the_base_does_not_move():
    loss, tx = jtl.supervised(peft.adapted(BERT, LORA), jtl.losses.cross_entropy), optax.adam(5e-2)
    state, frozen = jtl.init(over("int8"), tx, trainable=jtl.select("**/lora"), key=jax.random.key(0))
    before = tree.digest(frozen)
    evaluated = jax.jit(lambda variables: loss(variables["params"], {}, BATCH, key=None)[0])
    start = evaluated(jtl.variables(state, frozen))
    *_, report = jtl.fit(loss, tx, state, frozen, [BATCH] * 30)
    assert tree.digest(report.frozen) == before
    after = jtl.variables(report.state, report.frozen)
    assert evaluated(after) < 0.95 * start
    merged = peft.merge(LORA, peft.dequantize(after))
    assert tree.paths(merged) == tree.paths(bert())
    inputs = (BATCH["input_ids"], BATCH["attention_mask"])
    same(jax.jit(BERT.apply)(merged, *inputs), jax.jit(peft.adapted(BERT, LORA).apply)(after, *inputs))


class Mixed(nn.Module):
    """Layers that are opened in every way: lifted ones, a convolution, an embedding, and a parameter of its own."""

    lifted: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        if self.lifted == "scan":
            body = nn.scan(Row, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = body(name="rows")(x, None)
        else:
            row = nn.remat(Row) if self.lifted == "remat" else Row
            x, _ = row(name="row")(x, None)
        x = x + nn.Embed(5, 128, name="table")(jnp.argmax(x, -1) % 5)
        picture = Conv(4, (3, 3), name="ours")(nn.Conv(4, (3, 3), name="theirs")(x.reshape(-1, 8, 16, 1)))
        heads = nn.DenseGeneral((2, 3), name="heads")(picture.mean((1, 2)))
        x = nn.DenseGeneral(6, axis=(-2, -1), name="out")(nn.Dropout(0.1, deterministic=not train)(heads))
        return nn.tanh(x) @ self.param("kernel", nn.initializers.lecun_normal(), (6, 3))


@pytest.mark.parametrize(
    ("lifted", "wrap"),
    [("scan", peft.quantized), ("remat", peft.quantized), ("scan", lambda model: model)],
)
def test_any_linen_model_takes_stored_kernels(lifted, wrap):
    model, x = Mixed(lifted), jnp.asarray(RNG.normal(size=(4, 128)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    stored = peft.quantize(variables, "int8", stacked=["rows"] if lifted == "scan" else [])
    assert len(quantized.boxes(stored["params"])) == 7
    opened, batch = peft.dequantize(stored), {"x": x, "label": jnp.zeros(4, jnp.int32)}
    loss = jtl.supervised(wrap(model), jtl.losses.cross_entropy)
    plain = jtl.supervised(model, jtl.losses.cross_entropy)
    biases, key = jtl.masks.biases(), jax.random.key(2)

    def gradient(loss, variables):
        trained, rest = tree.partition(variables["params"], biases)
        grads = jax.jit(jax.grad(lambda part: loss(tree.combine(part, rest), {}, batch, key=key)[0]))(trained)
        return dict(tree.leaves_with_paths(grads))

    same(jax.jit(wrap(model).apply)(stored, x), jax.jit(model.apply)(opened, x))
    same(gradient(loss, stored), gradient(plain, opened))


def test_adapters_of_convolutions_and_embeddings_are_merged_as_they_run():
    model, x = Mixed("plain"), jnp.asarray(RNG.normal(size=(4, 128)), jnp.float32)
    stored = peft.quantize(jax.jit(model.init)(jax.random.key(0), x), "nf4")
    adapter = peft.lora(["table", "theirs", "**/dense"], rank=2)
    attached = peft.attach(adapter, stored, key=jax.random.key(1))
    attached["params"] = tree.map_with_paths(lambda p, v: v + 0.1 if "/lora/" in p else v, attached["params"])
    expected = jax.jit(model.apply)(peft.merge(adapter, peft.dequantize(attached)), x)
    same(jax.jit(peft.adapted(model, adapter).apply)(attached, x), expected)
    assert peft.adapted(peft.quantized(model), adapter) == peft.adapted(model, adapter)


def test_models_from_outside_linen_get_arrays_at_the_call():
    def forward(params, x):
        return x @ params["stem"]["kernel"] @ params["head"]["kernel"]

    model, x = jtl.from_function(forward), jnp.asarray(kernel_of(5, 6))
    params = {"stem": {"kernel": jnp.asarray(kernel_of(6, 4))}, "head": {"kernel": jnp.asarray(kernel_of(4, 3))}}
    stored = peft.quantize({"params": params}, "int8", trainable=jtl.select("head"))
    same(peft.quantized(model).apply(stored, x), model.apply(peft.dequantize(stored), x))
    adapter = peft.lora(["stem"], rank=2)
    attached = peft.attach(adapter, stored, key=jax.random.key(0))
    same(peft.adapted(model, adapter).apply(attached, x), model.apply(peft.dequantize(stored), x))


def trained_deep(format, layers, target):
    """A loss, and state and frozen half, of LoRA in one layer."""
    model, batch, base = deep(format, layers)
    adapter = peft.lora([target], rank=2)
    loss = jtl.supervised(peft.adapted(model, adapter), jtl.losses.cross_entropy)
    attached = peft.attach(adapter, base, key=jax.random.key(1))
    return loss, batch, *jtl.init(attached, optax.sgd(0.1), trainable=jtl.select("**/lora"), key=jax.random.key(0))


def test_the_prefix_of_a_stored_base_is_cached():
    loss, batch, state, frozen = trained_deep("nf4", 3, "row_2")
    cut = jtl.split(loss, state, frozen, batch)
    cached = jax.jit(cut.prefix)(frozen, frozen.collections, batch)
    assert cut.report.prefix_flops > 3 * 2 * 128 * 128  # also the stored kernel beside the adapter
    assert {one.source.split("/")[1].split()[0].strip(",") for one in cut.report.stored} == {"row_1", "row_2"}
    same(*(step_of(which, state, frozen, given) for which, given in ((cut.suffix, cached), (loss, batch))), 1e-6)


def step_of(loss, state, frozen, batch):
    return jax.jit(jtl.train_step(loss, optax.sgd(0.1)))(state, frozen, batch)[0].params["row_2"]["dense"]["lora"]


def test_an_audit_finds_of_a_stored_base_what_it_finds_of_a_float_one():
    found = {}
    for format in (None, "int8"):
        loss, batch, state, frozen = trained_deep(format, 2, "row_0")
        report = jtl.audit(jax.jit(jtl.train_step(loss, optax.sgd(0.1))), state, frozen, batch, loss_fn=loss)
        assert report.frozen_bytes == tree.nbytes(frozen)
        found[format] = [(finding.check, finding.ok) for finding in report.findings]
    assert found[None] == found["int8"]


def test_a_sweep_over_seeds_shares_a_stored_base():
    loss, batch, state, frozen = trained_deep("int8", 2, "row_0")
    step = jtl.train_step(loss, optax.sgd(0.1))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    members, _ = jax.jit(jax.vmap(step, (0, None, None)))(states, frozen, batch)
    alone, _ = jax.jit(step)(state, frozen, batch)
    same(jax.tree.map(lambda leaf: leaf[1], members.params), alone.params)


# What is refused.


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_stored_leaf_is_not_trained(format):
    variables, tx = over(format), optax.sgd(0.1)
    for mask in (jtl.select("**/query"), jtl.everything(), jtl.masks.where(lambda path, _: path.endswith("values"))):
        with pytest.raises(errors.MaskError, match=f"is stored as {format}: only floats"):
            jtl.init(variables, tx, trainable=mask, key=jax.random.key(0))
    jtl.init(variables, tx, trainable=jtl.masks.norms() | jtl.masks.biases(), key=jax.random.key(0))


def test_scales_alone_are_not_trained_either():
    mask = jtl.masks.where(lambda path, leaf: leaf.dtype == jnp.float32)
    with pytest.raises(errors.MaskError, match="is stored as int8"):
        jtl.init(over("int8"), optax.sgd(0.1), trainable=mask, key=jax.random.key(0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@in_each_format
def test_values_that_are_not_finite_are_refused_by_path(format, value):
    kernel = kernel_of(6, 5)
    kernel[3, 2] = value
    with pytest.raises(errors.WeightsError, match="stem/kernel has values that are not finite"):
        peft.quantize({"params": {"stem": {"kernel": jnp.asarray(kernel)}, "kernel": jnp.ones((2, 2))}}, format)


def refusals():
    integers = {"params": {"kernel": jnp.ones((3, 3), jnp.int32)}}
    vectors = {"params": {"kernel": jnp.ones(3)}}
    kernel = {"params": {"kernel": jnp.ones((3, 3))}}
    return [
        (lambda: peft.quantize(kernel, "int3"), "expected one of bfloat16, int8"),
        (lambda: peft.quantize(kernel, "nf4", block=7), "block=7"),
        (lambda: peft.quantize(kernel, "nf4", block=0), "block=0"),
        (lambda: peft.quantize(kernel, "nf4", targets=["kernle"]), "nearest paths"),
        (lambda: peft.quantize({"params": {"w": jnp.ones((3, 3))}}, "nf4"), "matches none"),
        (lambda: peft.quantize(integers, "int8"), "of dtype int32"),
        (lambda: peft.quantize(vectors, "int8"), "no leaf of two or more axes"),
        (lambda: peft.quantize(kernel, "int8", trainable=jtl.everything()), "trains all that could be stored"),
        (lambda: peft.quantize(peft.quantize(kernel, "int8"), "int8"), "stored as int8 already"),
        (lambda: peft.quantize(peft.quantize(kernel, "bfloat16"), "nf4"), "stored as bfloat16 already"),
        (lambda: peft.merge(LORA, over("int8")), r"merging needs floats, and encoder/.*/kernel is stored as int8"),
    ]


@pytest.mark.parametrize("case", range(11))
def test_what_cannot_work_is_refused(case):
    make, message = refusals()[case]
    with pytest.raises(errors.JtlError, match=message):
        make()


def test_saving_needs_floats(tmp_path):
    stored = peft.quantize(bert(), "int8")
    with pytest.raises(errors.ConfigError, match=r"saving needs floats, and params/.* call peft\.dequantize"):
        jtl.save(tmp_path / "a", BERT, stored)
    jtl.save(tmp_path / "b", BERT, peft.dequantize(stored))

"""Frozen modules infer, trained ones train, in models that have never heard of masks."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import modes, tree

from .conformance.cases import QUICK
from .covering import covering, product

KEY = jax.random.key(3)
X = 2 * jax.random.normal(jax.random.key(5), (16, 4)) + 1
BATCH = {"x": X}
TX = optax.sgd(0.0)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def loss_of(model, **call):
    def loss_fn(params, collections, batch, *, key):
        rngs = None if key is None else {"dropout": key}
        mutable = False if key is None else list(collections)
        result = model.apply({"params": params, **collections}, batch["x"], rngs=rngs, mutable=mutable, **call)
        outputs, updated = (result, collections) if key is None else result
        return jnp.mean(outputs**2), jtl.Aux({"outputs": outputs}, {**collections, **updated})

    return loss_fn


@functools.cache
def variables_of(model):
    """Variables in which no statistic, scale or bias has its initial value."""
    keys = dict(zip(("params", "dropout"), jax.random.split(KEY), strict=True))
    variables = jax.jit(model.init, compiler_options=QUICK)(keys, X)
    keys = iter(jax.random.split(KEY, len(jax.tree.leaves(variables))))

    def fresh(path, leaf):
        return leaf if path.endswith("kernel") else jax.random.uniform(next(keys), leaf.shape, minval=0.5, maxval=1.5)

    return tree.map_with_paths(fresh, variables)


def train(loss_fn, variables, trainable, *, jit=True, key=KEY, **options):
    """The outputs that a training step sees, and the variables after it."""
    state, frozen = jtl.init(variables, TX, trainable=trainable, key=key)
    step = jtl.train_step(loss_fn, TX, **options)
    state, metrics = (jax.jit(step, compiler_options=QUICK) if jit else step)(state, frozen, BATCH)
    return metrics["outputs"], jtl.variables(state, frozen)


def plain(loss_fn, variables, key=KEY):
    """What the same loss computes by itself, with the key that a step would give it; `key=None` infers."""
    params, collections = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    key = None if key is None else jax.random.split(key)[1]
    aux = jax.jit(loss_fn, compiler_options=QUICK)(params, collections, BATCH, key=key)[1]
    return aux.metrics["outputs"], {"params": params, **aux.collections}


# BatchNorm by hand


class Normed(nn.Module):
    """A BatchNorm that is told its mode in one of three ways, and a head."""

    way: str
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        attribute = {"use_running_average": False} if self.way == "attribute" else {}
        norm = nn.BatchNorm(
            momentum=0.7, epsilon=1e-3, use_scale=self.affine, use_bias=self.affine, name="norm", **attribute
        )
        if self.way == "position":
            x = norm(x, False)
        elif self.way == "keyword":
            x = norm(x, use_running_average=False)
        else:
            x = norm(x)
        self.sow("intermediates", "normed", x)
        return x + nn.Dense(4, name="head")(x)


def normalised(x, mean, var, params):
    return (x - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]


def with_head(x, params):
    return x + x @ params["head"]["kernel"] + params["head"]["bias"][None]


WAYS = ["attribute", "position", "keyword"]
ways = pytest.mark.parametrize("way", WAYS)
jitted = pytest.mark.parametrize("jit", [False, True])


@ways
@jitted
def test_frozen_batch_norm_uses_its_running_statistics_and_leaves_them(way, jit):
    model = Normed(way)
    before = variables_of(model)
    outputs, after = train(loss_of(model), before, jtl.select("head"), jit=jit)
    params, stats = before["params"], before["batch_stats"]["norm"]
    close(outputs, with_head(normalised(X, stats["mean"][None], stats["var"][None], params_2d(params["norm"])), params))
    assert tree.digest(after["batch_stats"]) == tree.digest(before["batch_stats"])


def params_2d(params):
    return {name: leaf[None] for name, leaf in params.items()}


@pytest.mark.parametrize(
    ("way", "jit", "pattern"),
    covering(product(WAYS, [False, True], ["norm", "norm/scale", "norm/bias"]), times=2),
)
def test_batch_norm_with_a_trained_leaf_uses_the_batch_and_moves_its_statistics(way, jit, pattern):
    model = Normed(way)
    before = variables_of(model)
    outputs, after = train(loss_of(model), before, jtl.select(pattern), jit=jit)
    mean, var = np.mean(X, axis=0), np.var(X, axis=0)
    params, old, new = before["params"], before["batch_stats"]["norm"], after["batch_stats"]["norm"]
    close(outputs, with_head(normalised(X, mean[None], var[None], params_2d(params["norm"])), params))
    close(new["mean"], 0.7 * old["mean"] + 0.3 * mean)
    close(new["var"], 0.7 * old["var"] + 0.3 * var)


@ways
def test_batch_norm_without_leaves_goes_with_the_module_around_it(way):
    class Inner(nn.Module):
        """A dense layer and a BatchNorm that has no leaf of its own."""

        @nn.compact
        def __call__(self, x):
            return Normed(way, affine=False, name="normed")(nn.Dense(4, name="dense")(x))

    class Outer(nn.Module):
        """Two of them."""

        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="last")(Inner(name="b")(Inner(name="a")(x)))

    before = variables_of(Outer())
    _, after = train(loss_of(Outer()), before, jtl.select("b/normed/head", "last"))
    moved = {
        path
        for path, leaf in tree.leaves_with_paths(after["batch_stats"])
        if (leaf != dict(tree.leaves_with_paths(before["batch_stats"]))[path]).any()
    }
    assert moved == {"b/normed/norm/mean", "b/normed/norm/var"}


# Every way to build a model


class Block(nn.Module):
    """BatchNorm and dropout, compact."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.7)(nn.Dense(4)(x))
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class Arguments(Block):
    """The same, told its mode in the call."""

    @nn.compact
    def __call__(self, x):
        return self.inner(x, self.train, deterministic=not self.train)

    @nn.compact
    def inner(self, x, train, *, deterministic):
        x = nn.BatchNorm(momentum=0.7)(nn.Dense(4)(x), not train)
        return nn.Dropout(0.5)(x, deterministic=deterministic)


class Setup(Block):
    """The same, with its parts made in `setup`."""

    def setup(self):
        self.dense = nn.Dense(4)
        self.norm = nn.BatchNorm(use_running_average=not self.train, momentum=0.7)
        self.drop = nn.Dropout(0.5, deterministic=not self.train)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


class Nested(Block):
    """A block in a block, both with leaves."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(Setup(self.train)(Block(self.train)(x)))


class Shared(Block):
    """One block called twice."""

    @nn.compact
    def __call__(self, x):
        block = Block(self.train)
        return block(nn.tanh(block(x)))


class Attention(Block):
    """Attention with dropout of its own, set as an attribute."""

    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=not self.train)
        return attend(x[None])[0]


class AttentionArgument(Block):
    """The same, told in the call."""

    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5)
        return attend(x[None], deterministic=not self.train)[0]


class Body(Block):
    """A block as the body of a scan."""

    def __call__(self, x, _):
        return Block.__call__(self, x), None


class Scan(Block):
    """Three blocks in a scan."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(Body, variable_axes=axes, split_rngs={"params": True, "dropout": True}, length=3)
        return stack(self.train)(x, None)[0]


class RematScan(Block):
    """Rematerialised blocks in a scan."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(nn.remat(Body), variable_axes=axes, split_rngs={"params": True, "dropout": True}, length=3)
        return stack(self.train)(x, None)[0]


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "compact": Block,
    "arguments": Arguments,
    "setup": Setup,
    "nested": Nested,
    "shared": Shared,
    "attention": Attention,
    "attention argument": AttentionArgument,
    "remat": nn.remat(Block),
    "jit": nn.jit(Block),
    "jit of setup": nn.jit(Setup),
    "scan": Scan,
    "remat in scan": RematScan,
}


class Model(nn.Module):
    """A stem and a body of one kind of block, then a head."""

    block: str
    train: bool = True

    @nn.compact
    def __call__(self, x):
        for name in ("stem", "body"):
            x = nn.tanh(BLOCKS[self.block](self.train, name=name)(x))
        return x + nn.Dense(4, name="head")(x)


@functools.cache
def expected(block, trained):
    """What the model gives with the modes set by hand: `trained` names the blocks that train."""

    class ByHand(nn.Module):
        """The model, each block in the mode that the law demands."""

        @nn.compact
        def __call__(self, x):
            for name in ("stem", "body"):
                x = nn.tanh(BLOCKS[block](name in trained, name=name)(x))
            return x + nn.Dense(4, name="head")(x)

    return plain(loss_of(ByHand()), variables_of(Model(block)))


@pytest.mark.parametrize(
    ("block", "trained"), covering(product(BLOCKS, [("stem",), ("body",), (), ("stem", "body")]), times=2)
)
def test_each_module_runs_in_the_mode_that_its_leaves_demand(block, trained):
    """Dropout, statistics and outputs are those of a model with every mode written out."""
    model = Model(block)
    variables = variables_of(model)
    outputs, after = train(loss_of(model), variables, jtl.select("head", *trained))
    by_hand, then = expected(block, trained)
    close(outputs, by_hand)
    jax.tree.map(close, after, then)


@pytest.mark.parametrize("block", BLOCKS)
def test_evaluation_puts_everything_in_inference_mode(block):
    model = Model(block)
    variables = variables_of(model)
    state, frozen = jtl.init(variables, TX, trainable=jtl.everything(), key=KEY)
    outputs = jax.jit(jtl.eval_step(loss_of(model)))(state, frozen, BATCH)["outputs"]
    close(outputs.compute(), plain(loss_of(Model(block, train=False)), variables, key=None)[0])


@pytest.mark.parametrize(
    ("block", "jit"),
    [("jit", False), ("jit of setup", False), *((block, True) for block in ("jit", "jit of setup", "remat", "scan"))],
)
def test_the_modes_of_one_mask_never_leak_into_a_run_with_another(block, jit):
    model, masks = Model(block), [("body",), ("stem",), ("body",), (), ("stem", "body"), ()]
    variables, loss_fn = variables_of(model), loss_of(model)
    for trained in masks:
        outputs, _ = train(loss_fn, variables, jtl.select("head", *trained), jit=jit)
        close(outputs, expected(block, trained)[0])


def checkpointed(apply):
    return jax.checkpoint(apply)


def scanned(apply):
    def body(carry, _):
        variables, x, key = carry
        return carry, apply(variables, x, key)

    def call(variables, x, key):
        _, stacked = jax.lax.scan(body, (variables, x, key), None, length=1)
        return jax.tree.map(lambda leaf: leaf[0], stacked)

    return call


@pytest.mark.parametrize("transform", [jax.jit, checkpointed, scanned], ids=["jit", "checkpoint", "scan"])
@jitted
def test_the_cache_of_a_transform_inside_the_loss_keeps_masks_apart(transform, jit):
    model = Model("compact")
    apply = transform(lambda variables, x, key: model.apply(variables, x, rngs={"dropout": key}, mutable="batch_stats"))

    def loss_fn(params, collections, batch, *, key):
        outputs, updated = apply({"params": params, **collections}, batch["x"], key)
        return jnp.mean(outputs**2), jtl.Aux({"outputs": outputs}, {**collections, **updated})

    variables = variables_of(model)
    for trained in [("body",), ("stem",), ("body",), ()]:
        outputs, after = train(loss_fn, variables, jtl.select("head", *trained), jit=jit)
        by_hand, then = expected("compact", trained)
        close(outputs, by_hand)
        jax.tree.map(close, after, then)


def test_a_jit_around_the_loss_changes_nothing():
    model = Model("compact")
    variables, loss_fn = variables_of(model), jax.jit(loss_of(model))
    for trained in [("body",), (), ("body",)]:
        outputs, _ = train(loss_fn, variables, jtl.select("head", *trained))
        close(outputs, expected("compact", trained)[0])


# Dropout


class Leafless(nn.Module):
    """Dropout beside two dense layers: it has no leaf of its own."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a")(x)
        x = nn.Dropout(0.5, deterministic=not self.train)(x)
        return nn.Dense(4, name="b")(x)


class Around(nn.Module):
    """The module above, and a head."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(Leafless(self.train, name="inner")(x))


@pytest.mark.parametrize(
    ("patterns", "active"), [(["head"], False), (["inner"], True), (["inner/a"], True), (["inner/b", "head"], True)]
)
def test_dropout_is_off_in_a_wholly_frozen_parent_alone(patterns, active):
    variables = variables_of(Around())
    outputs, _ = train(loss_of(Around()), variables, jtl.select(*patterns))
    close(outputs, plain(loss_of(Around(train=active)), variables)[0])


@pytest.mark.parametrize("block", ["compact", "attention", "jit", "scan"])
def test_frozen_dropout_keeps_dropout_alone_active(block):
    model = Model(block)
    variables, loss_fn = variables_of(model), loss_of(model)
    run = functools.partial(train, loss_fn, variables, jtl.select("head"), frozen_dropout=True)
    one, after = run(key=jax.random.key(1))
    other, _ = run(key=jax.random.key(2))
    assert (one != other).any(axis=-1).sum() > len(X) // 2
    assert tree.digest(after.get("batch_stats")) == tree.digest(variables.get("batch_stats"))
    off, _ = train(loss_fn, variables, jtl.select("head"), key=jax.random.key(1))
    assert (one != off).any()


# Modules that somebody else holds


class Holder(nn.Module):
    """A model made of modules that its user keeps."""

    norm: nn.Module
    drop: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(self.drop(self.norm(x)))


def held():
    return nn.BatchNorm(use_running_average=False), nn.Dropout(0.5, deterministic=False)


def test_a_module_that_its_user_holds_is_left_as_it_was():
    norm, drop = held()
    model = Holder(norm, drop)
    copies = (*held(), Holder(*held()))
    train(loss_of(model), variables_of(model), jtl.select("head"))
    assert (norm, drop, model) == copies
    assert (norm.use_running_average, drop.deterministic) == (False, False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_bound_module_gets_its_attributes_back_also_when_the_call_raises(fails):
    model = Holder(*held())
    seen: list[Any] = []

    def loss_fn(params, collections, batch, *, key):
        bound = model.bind({"params": params, **collections}, rngs={"dropout": key}, mutable=list(collections))
        seen.append(bound)
        outputs = bound(batch["x"][:, :3] if fails else batch["x"])
        return jnp.mean(outputs), jtl.Aux({"outputs": outputs}, collections)

    variables = variables_of(model)
    if fails:
        with pytest.raises(Exception, match=r"(?i)shape"):
            train(loss_fn, variables, jtl.select("head"))
    else:
        train(loss_fn, variables, jtl.select("head"))
    assert (seen[0].norm.use_running_average, seen[0].drop.deterministic) == (False, False)


def test_no_modes_are_in_force_outside_of_a_step():
    model = Model("jit")
    variables, loss_fn = variables_of(model), loss_of(model)
    train(loss_fn, variables, jtl.select("head"))
    assert modes.current() is None
    close(plain(loss_fn, variables)[0], expected("jit", ("stem", "body"))[0])


# Losses that apply models to subtrees


class Encoder(nn.Module):
    """A block whose name is also the name of a part of the whole, where the leaves are others."""

    block: str
    train: bool = True

    @nn.compact
    def __call__(self, x):
        return BLOCKS[self.block](self.train, name="head")(x)


@pytest.mark.parametrize(
    ("block", "trained"),
    covering(product(["compact", "setup", "shared", "attention", "remat", "jit", "scan"], ["head", "encoder"])),
)
def test_a_loss_may_apply_submodels_to_subtrees(block, trained):
    head = nn.Dense(4)

    def loss_of_parts(active):
        encoder = Encoder(block, active)

        def loss_fn(params, collections, batch, *, key):
            stats = {name: value["encoder"] for name, value in collections.items()}
            features, updated = encoder.apply(
                {"params": params["encoder"], **stats}, batch["x"], rngs={"dropout": key}, mutable=list(stats)
            )
            outputs = head.apply({"params": params["head"]}, features)
            return jnp.mean(outputs**2), jtl.Aux({"outputs": outputs}, {n: {"encoder": v} for n, v in updated.items()})

        return loss_fn

    parts = variables_of(Encoder(block))
    variables = {name: {"encoder": value} for name, value in parts.items()}
    variables["params"]["head"] = variables_of(head)["params"]
    outputs, after = train(loss_of_parts(True), variables, jtl.select(trained))
    by_hand, then = plain(loss_of_parts(trained == "encoder"), variables)
    close(outputs, by_hand)
    jax.tree.map(close, after, then)

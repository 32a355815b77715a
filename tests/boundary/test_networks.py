"""Random networks under random masks: both halves are the whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jtl

from .cases import assert_exact, leaf

few = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, deterministic=not train, name="inner")(x)


class Layers(nn.Module):
    """Layers by name over sequences of tokens, and a head with dropout."""

    kinds: tuple[str, ...]

    @nn.compact
    def __call__(self, ids, extra, train=True):
        x = nn.Embed(11, 4, name="embed")(ids)
        for i, kind in enumerate(self.kinds):
            x = self.layer(kind, f"layer_{i}", x, train)
        x = jnp.concatenate([jnp.mean(x, axis=1), extra], axis=-1)
        return nn.Dense(3, name="head")(nn.Dropout(0.3, deterministic=not train)(x))

    def layer(self, kind, name, x, train):
        if kind == "dense":
            return nn.gelu(nn.Dense(4, name=name)(x))
        if kind == "residual":
            return x + jnp.tanh(nn.Dense(4, use_bias=False, name=name)(x))
        if kind == "conv":
            return nn.relu(nn.Conv(4, (3,), name=name)(x))
        if kind == "layer norm":
            return nn.LayerNorm(name=name)(x)
        if kind == "batch norm":
            return nn.BatchNorm(use_running_average=not train, momentum=0.7, name=name)(x)
        return Attention(name=name)(x, train)


KINDS = ["dense", "residual", "conv", "layer norm", "batch norm", "attention"]


def tokens(size, length):
    ids = jax.random.randint(jax.random.key(size), (size, length), 0, 11)
    return {"ids": ids, "extra": leaf(size, size, 2), "label": jnp.arange(size) % 3}


@few
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    first=st.integers(0, 4),
    bits=st.none() | st.integers(0, 2**20 - 1),
    length=st.integers(2, 5),
)
def test_networks_of_linen_layers(kinds, first, bits, length):
    model = Layers(kinds)
    variables = model.init(jax.random.key(0), tokens(2, 5)["ids"], tokens(2, 5)["extra"], train=False)
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy, inputs=("ids", "extra"))
    above = {"head", *(f"layer_{i}" for i in range(first, len(kinds)))}
    paths = jtl.tree.paths(variables["params"])
    chosen = {p for p in paths if p.partition("/")[0] in above}
    if bits is not None:  # any leaves at all, and one at least
        chosen = {p for k, p in enumerate(paths) if bits >> k & 1} | {paths[bits % len(paths)]}
    mask = jtl.tree.map_with_paths(lambda path, _: path in chosen, variables["params"])
    assert_exact(loss_fn, variables, mask, tokens(4, length))


def step(h, kind, w, v):
    if kind == "attend":
        return jax.nn.softmax(h @ h.swapaxes(1, 2), axis=-1) @ (h @ w)
    if kind == "gate":
        return h * jax.nn.sigmoid(h @ w) + jnp.expand_dims(v, (0, 1))
    if kind == "shift":
        return jnp.tanh(jnp.roll(h, 1, axis=1) @ w) - jnp.cumsum(h, axis=1) * 0.1
    if kind == "pick":
        best = jnp.argmax(h[..., 0], axis=1)
        return h + (h[jnp.arange(h.shape[0]), best] @ w)[:, None]
    if kind == "loop":
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(x @ w) + v[i], h)
    norm = h - jnp.mean(h, axis=-1, keepdims=True)
    return norm * jax.lax.rsqrt(jnp.mean(jnp.square(norm), axis=-1, keepdims=True) + 1) * jnp.expand_dims(v, (0, 1))


@few
@given(
    kinds=st.lists(st.sampled_from(["attend", "gate", "shift", "pick", "loop", "norm"]), min_size=1, max_size=4),
    shared=st.booleans(),
    bits=st.integers(0, 2**9 - 1),
    size=st.integers(2, 5),
)
def test_networks_of_plain_functions(kinds, shared, bits, size):
    params = {f"w{i}": leaf(i, 4, 4) for i in range(4)} | {f"v{i}": leaf(9 + i, 4) for i in range(4)}
    params["head"] = leaf(20, 4, 3)

    def loss_fn(params, collections, batch, *, key):
        h, places = batch["x"], []
        for i, kind in enumerate(kinds):
            i = 0 if shared else i
            h = step(h, kind, params[f"w{i}"], params[f"v{i}"])
            places.append(jnp.max(h, axis=(1, 2)))
        value = jnp.mean(jtl.losses.cross_entropy(h.mean(axis=1) @ params["head"], batch["label"]))
        regular = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
        return value + 0.01 * regular, jtl.Aux({"places": jnp.stack(places), "value": value}, {})

    paths = jtl.tree.paths(params)
    chosen = {p for k, p in enumerate(paths) if bits >> k & 1} or {"head"}
    mask = jtl.tree.map_with_paths(lambda path, _: path in chosen, params)
    batch = {"x": leaf(size, size, 3, 4, scale=1.0), "label": jnp.arange(size) % 3}
    assert_exact(loss_fn, {"params": params}, mask, batch)

"""Where a split cuts, by minimum cut and by simpler rules: bytes to store for each example.

Command: python benchmarks/cut_bytes.py --out benchmarks/results
Models: a 6-layer BERT of MiniLM's size with random weights and a new head, 128 tokens; the same with
normalisation before each block, which is where the rules differ most.

"crossing" stores every value that something trained reads. "greedy" first goes back from each through light
equations of one operand to whatever is smallest.
"minimum cut" is `jtl.split`. Labels and masks, which the batch has anyway, are not counted.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from reporting import write

import jtl
from jtl.boundary.cut import example_bytes, rows, wanted
from jtl.boundary.flops import is_light
from jtl.models.bert import Bert, BertConfig

CONFIG = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, pool="mean")
IDS = np.ones((2, 128), np.int32)
MASKS = {
    "head": jtl.select("head"),
    "last block": jtl.select("head", "encoder/layer_5"),
    "last two blocks": jtl.select("head", "encoder/layer_[45]"),
    "biases": jtl.select("head", "**/bias"),
    "norms": jtl.select("head") | jtl.masks.norms(),
    "attention of the last block": jtl.select("head", "encoder/layer_5/attention"),
}


class Block(nn.Module):
    """Attention and a perceptron, each on its normalised input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, width]` to the same."""
        x = x + nn.MultiHeadDotProductAttention(12, name="attention")(nn.LayerNorm(name="attention_norm")(x))
        y = nn.gelu(nn.Dense(1536, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(384, name="down")(y)


class Encoder(nn.Module):
    """Six blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[batch, length, width]` to the same."""
        for i in range(6):
            x = Block(name=f"layer_{i}")(x)
        return nn.LayerNorm(name="norm")(x)


class PreNorm(nn.Module):
    """A transformer with normalisation first."""

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Ids `[batch, length]` to logits `[batch, classes]`."""
        x = nn.Embed(CONFIG.vocab_size, 384, name="embeddings")(input_ids)
        return nn.Dense(2, name="head")(Encoder(name="encoder")(x).mean(axis=1))


def bytes_of(loss_fn: Any, variables: Any, mask: Any, batch: Any) -> dict[str, int]:
    """What each rule stores of an example."""
    start = functools.partial(jtl.init, tx=optax.sgd(0.1), trainable=mask, key=jax.random.key(1))
    state, frozen = jax.eval_shape(start, variables)
    cut = jtl.split(loss_fn, state, frozen, batch)
    program, doubled = cut.prefix.boundary.traced(jax.tree.map(shape_of, batch), training=True)
    found = rows(program, doubled)
    behind = {var: eqn for eqn in program.eqns for var in eqn.outvars}

    def size(values: set[Any]) -> int:
        return sum(example_bytes(var.aval, found.axis[var]) for var in values if var in behind)

    crossing = set(wanted(program, found))
    greedy = {smallest(var, found, behind) for var in crossing}
    return {"crossing": size(crossing), "greedy": size(greedy), "minimum cut": cut.report.nbytes}


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def smallest(var: Any, found: Any, behind: Any) -> Any:
    """The smallest value that this one can be rebuilt from alone by light equations; the first of equals."""
    best = var
    while var in behind and is_light(behind[var]):
        operands = {atom for atom in behind[var].invars if not hasattr(atom, "val") and atom in found.axis}
        if len(operands) != 1:
            break
        var = operands.pop()
        sizes = [example_bytes(one.aval, found.axis[one]) if one in behind else 0 for one in (var, best)]
        best = var if sizes[0] <= sizes[1] else best
    return best


def measured() -> list[dict[str, Any]]:
    """Every model with every mask."""
    batch = {"input_ids": IDS, "attention_mask": IDS, "label": np.zeros(2, np.int32)}
    models = {"BERT": (Bert(CONFIG, jtl.heads.classifier(2)), batch)}
    models["pre-norm"] = (PreNorm(), {name: batch[name] for name in ("input_ids", "label")})
    found = []
    for name, (model, given) in models.items():
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(IDS))
        loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
        for mask, trainable in MASKS.items():
            found.append({"model": name, "trained": mask, **bytes_of(loss_fn, variables, trainable, given)})
    return found


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    found = measured()
    print(f"{'':40s} {'crossing':>12s} {'greedy':>14s} {'minimum cut':>12s}")
    for row in found:
        values = f"{row['crossing']:12,} {row['greedy']:14,} {row['minimum cut']:12,}"
        print(f"{row['model']:10s} {row['trained']:29s} {values}")
    write(out, "cut_bytes", found, "jax", "flax")


if __name__ == "__main__":
    main()

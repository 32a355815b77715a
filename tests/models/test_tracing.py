"""The shapes of equal blocks, traced once, are those of a whole trace."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jtl
from jtl.models import registry
from jtl.models.tracing import variable_shapes

NAMES = ["vit_tiny_patch16_224", "resnet18", "efficientnet_b0", "mobilenetv2_050", "vgg11_bn"]


def whole(model, inputs):
    return jax.eval_shape(
        lambda: model.init(jax.random.key(0), **{k: jnp.zeros(x.shape, x.dtype) for k, x in inputs.items()})
    )


def same(model, inputs):
    found, expected = variable_shapes(model, inputs), whole(model, inputs)
    assert found == expected
    assert jax.tree.structure(found) == jax.tree.structure(expected)


@pytest.mark.parametrize("name", NAMES)
def test_families(name):
    family, config = registry.variant(name)
    same(family.build(config, jtl.heads.classifier(3)), family.example(config))


def test_texts():
    family = registry.get("bert")
    config = family.parse({"model_type": "bert", "hidden_size": 12, "num_attention_heads": 3}, None, {})
    same(family.build(config, None), family.example(config))


class Block(nn.Module):
    width: int
    inner: nn.Module | None = None

    @nn.compact
    def __call__(self, x, scale=1.0):
        self.sow("intermediates", "norm", jnp.sum(x))
        count = self.variable("counts", "n", lambda: jnp.zeros((), jnp.int32))
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(self.width)(x)) * scale
        return (x if self.inner is None else self.inner(x)), count.value


class Model(nn.Module):
    kind: str

    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(4)

    @nn.compact
    def __call__(self, x):
        if self.kind == "owned by another":
            blocks = [Block(4, self.first), Block(4, self.second)]
        elif self.kind == "remat":
            blocks = [nn.remat(Block)(4) for _ in range(3)]
        elif self.kind == "shared":
            blocks = [Block(4)] * 3
        elif self.kind == "widths":
            blocks = [Block(width) for width in (4, 4, 6, 6)]
        else:
            blocks = [Block(4), nn.remat(Block)(4), nn.jit(Block)(4), Block(4)]
        for block in blocks:
            x, _ = block(x)
        return x


@pytest.mark.parametrize("kind", ["owned by another", "remat", "shared", "widths", "mixed"])
def test_modules_of_one_s_own(kind):
    same(Model(kind), {"x": jax.ShapeDtypeStruct((2, 4), jnp.float32)})

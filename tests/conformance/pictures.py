"""The vision families as cases of the laws: small models of each, and pictures to train them on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jtl
from jtl.models import registry
from jtl.models.efficientnet_config import EfficientNetConfig
from jtl.models.mobilenet_v2 import MobileNetV2Config
from jtl.models.resnet_config import ResNetConfig
from jtl.models.vgg_config import VggConfig
from jtl.models.vit_config import ViTConfig

SIZE = 16

CONFIGS: dict[str, tuple[Any, str]] = {
    "resnet": (
        ResNetConfig(embedding_size=4, hidden_sizes=(4, 8), depths=(1, 1), layer_type="basic"),
        "stages_1/blocks_0/layer_*/conv",
    ),
    "vgg": (VggConfig(widths=(4, 6), depths=(1, 1), hidden=8, pool_size=2), "fc_1"),
    "efficientnet": (
        EfficientNetConfig(
            width_coefficient=1.0,
            depth_coefficient=1.0,
            depth_divisor=4,
            kernel_sizes=(3, 5),
            out_channels=(8, 12),
            strides=(2, 2),
            num_block_repeats=(1, 2),
            expand_ratios=(1, 2),
            stem_channels=8,
            head_channels=16,
        ),
        "top/conv",
    ),
    "mobilenet_v2": (
        MobileNetV2Config(
            depth_divisible_by=4,
            min_depth=4,
            expand_ratio=2.0,
            out_channels=(4, 4, 4, 6, 6, 8, 8),
            num_block_repeats=(1, 1, 1, 1, 1, 1, 1),
            stem_channels=4,
            head_channels=16,
            output_stride=8,
        ),
        "top/conv",
    ),
    "vit": (
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=(SIZE, SIZE),
            patch_size=8,
            initializer_range=0.5,
            hidden_dropout_prob=0.1,
        ),
        "encoder/layer_1",
    ),
}
"""A configuration of each family, and its last block: the convolutions alone, for what a batch normalisation in
training subtracts leaves rounding."""


def pictures(seed: int) -> dict[str, jax.Array]:
    """A batch of eight pictures."""
    a, b = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(a, (8, SIZE, SIZE, 3))
    return {"image": images, "label": jax.random.randint(b, (8,), 0, 3)}


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model, and random variables: quicker than compiling its own initialisation."""
    family = registry.get(name)
    model = family.build(CONFIGS[name][0], jtl.heads.classifier(3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), pictures(0)["image"])
    rng = np.random.default_rng(3)

    def value(path: str, leaf: Any) -> jax.Array:
        positive = path.endswith(("/var", "/scale"))
        return jnp.asarray(
            rng.uniform(0.5, 1.5, leaf.shape) if positive else rng.normal(0, 0.3, leaf.shape), leaf.dtype
        )

    return model, jtl.tree.map_with_paths(value, shapes)


def masks(name: str) -> dict[str, jtl.Mask]:
    """The head, the last block, and the norms of the family that can.

    What lies before a batch normalisation in training has gradients that are zero but for rounding, and no law
    holds for rounding; the parity tests of each family compare all leaves.
    """
    head = jtl.select("head")
    found = {"head": head, "last block": head | jtl.select(CONFIGS[name][1])}
    return {**found, "norms": head | jtl.masks.norms()} if name == "vit" else found

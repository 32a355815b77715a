"""ViT and DeiT: the pre-norm Transformer encoder over patches of a picture.

    embeddings   patches (a dense layer on each), class_token, distillation_token (DeiT), position
    encoder      layer_0 ... layer_{n-1}:  attention_norm, attention (query, key, value, output),
                                           mlp_norm, mlp (up, down)
    norm         the last one
    pooler       only where the pooled features come from it
    head         only where there is one

References:
  Dosovitskiy et al, An image is worth 16x16 words, 2021 (arXiv 2010.11929).
  Touvron et al, Training data-efficient image transformers, 2021 (arXiv 2012.12877).
  The code of the papers, of transformers and of timm and their usual weights are under Apache-2.0.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jtl import heads
from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.attention import IMPLEMENTATIONS, SelfAttention
from jtl.models.family import Family, PictureFeatures
from jtl.models.inputs import check_pictures
from jtl.models.layers import Dense, Dropout, Mlp, call_head, layer_norm
from jtl.models.stack import stack
from jtl.models.tracing import random_init
from jtl.models.vit_config import VARIANTS, ViTConfig, parse, settings
from jtl.models.vit_layouts import LAYOUTS, adapt_positions, infer


class Patches(nn.Module):
    """A dense layer on the pixels of each patch: a convolution whose stride is its kernel's size."""

    config: ViTConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, patches, width]`."""
        c = self.config
        size, channels = c.patch_size, images.shape[-1]
        init = random_init(nn.initializers.normal(c.initializer_range))
        kernel = self.param("kernel", init, (size, size, channels, c.hidden_size))
        bias = self.param("bias", nn.initializers.zeros_init(), (c.hidden_size,))
        x, kernel, bias = promote_dtype(images, kernel, bias, dtype=self.dtype)
        # One product of matrices: on CPU, the kernel's gradient of such a convolution is far slower.
        x = x.reshape(-1, c.grid[0], size, c.grid[1], size, channels).transpose(0, 1, 3, 2, 4, 5)
        flat = x.reshape(-1, size * size * channels) @ kernel.reshape(-1, c.hidden_size) + jnp.expand_dims(bias, 0)
        return flat.reshape(len(images), -1, c.hidden_size)


class Embeddings(nn.Module):
    """Patches behind the class token and the distillation token, with position embeddings."""

    config: ViTConfig
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, height, width, channels]` to `[batch, tokens, width]`."""
        c, init = self.config, random_init(nn.initializers.truncated_normal(self.config.initializer_range))
        x = Patches(c, self.dtype, name="patches")(images)
        tokens = [
            self.param(name, init, (1, 1, c.hidden_size))
            for name, present in (("class_token", c.class_token), ("distillation_token", c.distillation_token))
            if present
        ]
        position = self.param("position", init, (1, c.prefix + x.shape[1], c.hidden_size))
        x, position, *tokens = promote_dtype(x, position, *tokens, dtype=self.dtype)
        before = [jnp.broadcast_to(token, (len(x), 1, c.hidden_size)) for token in tokens]
        x = jnp.concatenate([*before, x], axis=1) + position
        return Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class Layer(nn.Module):
    """One pre-norm Transformer block."""

    config: ViTConfig
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, tokens, width]` to the same."""
        c = self.config
        drop = functools.partial(Dropout(c.hidden_dropout_prob), deterministic=deterministic)
        attend = SelfAttention(
            c.num_attention_heads,
            c.attention_probs_dropout_prob,
            c.initializer_range,
            self.dtype,
            c.qkv_bias,
            self.attention,
            name="attention",
        )
        mlp = Mlp(c.intermediate_size, c.hidden_act, c.initializer_range, self.dtype, name="mlp")
        norm = functools.partial(layer_norm, c.layer_norm_eps, self.dtype)
        x = x + drop(attend(norm("attention_norm")(x), deterministic=deterministic))
        return x + drop(mlp(norm("mlp_norm")(x)))


class Encoder(nn.Module):
    """The stack of blocks."""

    config: ViTConfig
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """`[batch, tokens, width]` to the same."""
        make = functools.partial(Layer, self.config, self.dtype, self.attention)
        count, how = self.config.num_hidden_layers, {"scan": self.scan, "remat": self.remat}
        return stack(self, make, count, x, **how, deterministic=deterministic)


class ViT(nn.Module):
    """A ViT or DeiT, with or without a head.

    Attributes:
      config: its settings.
      head: a module from pooled features `[batch, width]` to outputs.
      dtype: of the computation; by default that of the parameters.
      attention: "xla", or "cudnn" for the fused attention of a GPU: half precision, no dropout of attention.
        `model.clone(attention="cudnn", dtype=jnp.bfloat16)` switches a loaded model.
      scan: run the blocks as a loop, which is traced and compiled sooner; see `jtl.models.stack`.
      remat: compute the blocks' activations again in the backward pass: less memory, more time.
    """

    config: ViTConfig
    head: nn.Module | None = None
    dtype: jax.typing.DTypeLike | None = None
    attention: str = "xla"
    scan: bool = False
    remat: bool = False

    def __call__(self, images: jax.Array, *, deterministic: bool = True) -> Any:
        """Pictures to what the head makes of them.

        Args:
          images: `[batch, height, width, channels]`, normalised as `config.input` says.
          deterministic: no dropout.

        Returns:
          `PictureFeatures`, or what the head makes of the pooled ones.
        """
        features = self.features(images, deterministic=deterministic)
        return features if self.head is None else call_head(self.head, features, deterministic=deterministic)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse a batch that the model cannot mean; see `jtl.models.inputs`."""
        check_pictures(batch)

    @nn.compact
    def features(self, images: jax.Array, *, deterministic: bool = True) -> PictureFeatures:
        """The patches' features as a map, after the last norm (with `norm_after_pool` before it), and pooled ones."""
        c = self.config
        self._check(images)
        x = Embeddings(c, self.dtype, name="embeddings")(images, deterministic=deterministic)
        encoder = Encoder(c, self.dtype, self.attention, self.scan, self.remat, name="encoder")
        x = encoder(x, deterministic=deterministic)
        norm = layer_norm(c.layer_norm_eps, self.dtype, "norm")
        x = x if c.norm_after_pool else norm(x)
        spatial = x[:, c.prefix :].reshape(len(x), *c.grid, c.hidden_size)
        if c.pool == "mean":
            mean = jnp.mean(spatial, axis=(1, 2))
            return PictureFeatures(spatial, norm(mean) if c.norm_after_pool else mean)
        if c.pool == "distilled":
            return PictureFeatures(spatial, x[:, :2].reshape(len(x), -1))
        if c.pool == "cls":
            return PictureFeatures(spatial, x[:, 0])
        pooler = Dense(c.hidden_size, c.initializer_range, self.dtype, name="pooler")
        return PictureFeatures(spatial, ACTIVATIONS[c.pooler_act](pooler(x[:, 0])))

    def _check(self, images: jax.Array) -> None:
        expected = (*self.config.image_size, self.config.num_channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            height, width, channels = expected
            raise ConfigError(
                f"images must be [batch, {height}, {width}, {channels}], got {list(images.shape)}; load the model with "
                "image_size=(height, width) for pictures of another size"
            )
        if self.attention not in IMPLEMENTATIONS:
            raise ConfigError(f"attention {self.attention!r} is not among {IMPLEMENTATIONS}")


class DistilledHead(nn.Module):
    """The mean of two linear classifiers, one on the class token and one on the distillation token.

    Attributes:
      outputs: the width of the output.
      dropout: rate, active in training.
      scale: standard deviation of the initial kernels.

    References:
      Touvron et al, Training data-efficient image transformers, 2021 (arXiv 2012.12877), "classification with our
      approach: joint classifiers".
    """

    outputs: int
    dropout: float = 0.0
    scale: float = 0.02

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Outputs `[batch, outputs]` of the two tokens' features side by side, `[batch, 2 * width]`."""
        features = Dropout(self.dropout)(features, deterministic=deterministic)
        first, second = jnp.split(features, 2, axis=-1)
        return (self._classify(first, "") + self._classify(second, "distillation_")) / 2

    def _classify(self, token: jax.Array, prefix: str) -> jax.Array:
        init = random_init(nn.initializers.normal(self.scale))
        kernel = self.param(f"{prefix}kernel", init, (token.shape[-1], self.outputs))
        bias = self.param(f"{prefix}bias", nn.initializers.zeros_init(), (self.outputs,))
        return token @ kernel.astype(token.dtype) + jnp.expand_dims(bias.astype(token.dtype), 0)


def example(config: ViTConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs to initialise with."""
    return {"images": jax.ShapeDtypeStruct((1, *config.image_size, config.num_channels), jnp.float32)}


def head(config: ViTConfig, outputs: int) -> nn.Module:
    """The head of the checkpoints: one classifier, or the mean of two where `pool` is "distilled"."""
    return DistilledHead(outputs) if config.pool == "distilled" else heads.Linear(outputs)


def depth_groups(model: ViT) -> list[tuple[str, ...]]:
    """Embeddings, then each block, then all above."""
    blocks = [(f"encoder/layer_{i}",) for i in range(model.config.num_hidden_layers)]
    pooler = ("pooler",) if model.config.pool == "pooler" else ()
    return [("embeddings",), *blocks, ("norm", *pooler, *(() if model.head is None else ("head",)))]


FAMILY = Family(
    name="vit",
    modality="image",
    parse=parse,
    build=lambda config, head: ViT(config, head),
    example=example,
    layouts=LAYOUTS,
    depth_groups=depth_groups,
    paper="arXiv 2010.11929, arXiv 2012.12877",
    infer=infer,
    head=head,
    adapt=adapt_positions,
    settings=settings,
    variants=VARIANTS,
    licence="Apache-2.0",
)

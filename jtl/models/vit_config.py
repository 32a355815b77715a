"""The configuration of a ViT or DeiT, and the settings of transformers and timm that it comes from.

References:
  Dosovitskiy et al, An image is worth 16x16 words, 2021 (arXiv 2010.11929).
  Touvron et al, Training data-efficient image transformers, 2021 (arXiv 2012.12877).
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jtl.activations import ACTIVATIONS
from jtl.errors import ConfigError
from jtl.models.family import ImageInput, check_overrides, fields_from_json
from jtl.models.pictures import image_input, pair
from jtl.weights.json_file import read_json

POOLS = ("cls", "mean", "pooler", "distilled")
"""Where pooled features come from; see `ViTConfig`."""

HALF = (0.5, 0.5, 0.5)
"""Mean and std of each channel for the original ViT's checkpoints; DeiT's are ImageNet's own."""

INPUT = ImageInput(resize="exact", resize_to=None, interpolation="bilinear", mean=HALF, std=HALF)
"""What `ViTImageProcessor` of transformers does."""


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The settings of a ViT or DeiT, named as in transformers' `config.json`, with the same defaults.

    `pool` says where pooled features come from: `cls`, the class token after the last norm; `mean` of the patches;
    `pooler`, a dense layer and `pooler_act` on the class token, as `ViTModel` has; `distilled`, the class token and
    the distillation token side by side, `[batch, 2 * width]`, for the mean of two classifiers (`DistilledHead`).
    With `norm_after_pool` the last norm follows the mean of the patches, as timm's `global_pool="avg"` has it.

    Position embeddings are of `image_size`. Those of a checkpoint for another size, `checkpoint_size` (by default a
    square), are interpolated when they are read: bicubic, as transformers does, or with `antialias`, as timm does.
    `input` says how pictures become what the model was trained on; its size is always `image_size`.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    class_token: bool = True
    distillation_token: bool = False
    pool: str = "cls"
    pooler_act: str = "tanh"
    norm_after_pool: bool = False
    checkpoint_size: tuple[int, int] | None = None
    antialias: bool = False
    input: ImageInput = INPUT

    def __post_init__(self):
        self._check_sizes()
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ConfigError(f"{name} {getattr(self, name)!r} is not among {sorted(ACTIVATIONS)}")
        self._check_pool()
        object.__setattr__(self, "input", _fitted(self.input, self.image_size))

    def _check_sizes(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size")
        for name in (*sizes, "num_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer above 0, got {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        for name in ("image_size", "checkpoint_size"):
            size = getattr(self, name)
            if size is not None and any(edge < 1 or edge % self.patch_size for edge in size):
                raise ConfigError(f"{name} {size} does not divide into patches of {self.patch_size} pixels")

    def _check_pool(self) -> None:
        if self.pool not in POOLS:
            raise ConfigError(f"pool {self.pool!r} is not among {POOLS}")
        if not self.class_token and (self.distillation_token or self.pool != "mean"):
            raise ConfigError(f"without class_token, pool must be 'mean' and there is no distillation_token: {self}")
        if self.pool == "distilled" and not self.distillation_token:
            raise ConfigError("pool 'distilled' needs a model with distillation_token")
        if self.norm_after_pool and self.pool != "mean":
            raise ConfigError(f"norm_after_pool goes with pool 'mean', got {self.pool!r}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in each direction."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def prefix(self) -> int:
        """Tokens before those of the patches."""
        return self.class_token + self.distillation_token


def _fitted(given: ImageInput, size: tuple[int, int]) -> ImageInput:
    """The same preparation for another size, with the same share cropped away."""
    if given.size == size:
        return given
    resize_to = given.resize_to and round(given.resize_to * min(size) / min(given.size))
    return dataclasses.replace(given, size=size, resize_to=resize_to)


# Configurations by timm's names

_WIDTHS = {
    # Layers, width, heads. Ti and S: DeiT, table 1. B, L and H: ViT, table 1.
    "tiny": (12, 192, 3),
    "small": (12, 384, 6),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
    "huge": (32, 1280, 16),
}

_SIZES = {
    # Patches and pictures of each, as timm has them.
    "vit_tiny": ("16_224", "16_384"),
    "vit_small": ("32_224", "32_384", "16_224", "16_384", "8_224"),
    "vit_base": ("32_224", "32_384", "16_224", "16_384", "8_224"),
    "vit_large": ("32_224", "32_384", "16_224", "16_384", "14_224"),
    "vit_huge": ("14_224",),
    "deit_tiny": ("16_224",),
    "deit_small": ("16_224",),
    "deit_base": ("16_224", "16_384"),
    "deit_tiny_distilled": ("16_224",),
    "deit_small_distilled": ("16_224",),
    "deit_base_distilled": ("16_224", "16_384"),
}


def _variant(name: str, patch: int, edge: int) -> ViTConfig:
    layers, width, heads = _WIDTHS[name.split("_")[1]]
    distilled = name.endswith("_distilled")
    # timm's weights of S/8 are those of DINO.
    imagenet = name.startswith("deit") or (name, patch) == ("vit_small", 8)
    statistics = {} if imagenet else {"mean": HALF, "std": HALF}
    return ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        image_size=(edge, edge),
        patch_size=patch,
        distillation_token=distilled,
        pool="distilled" if distilled else "cls",
        antialias=True,
        input=image_input({"input_size": (3, edge, edge), "crop_pct": 0.9 if edge == 224 else 1.0, **statistics}),
    )


VARIANTS: Mapping[str, ViTConfig] = MappingProxyType(
    {
        f"{name}_patch{size}": _variant(name, *map(int, size.split("_")))
        for name, sizes in _SIZES.items()
        for size in sizes
    }
)


# Settings of files


def parse(settings: Mapping[str, Any], folder: Path | None, overrides: Mapping[str, Any]) -> ViTConfig:
    """The configuration of a checkpoint.

    Another `image_size` than the checkpoint's may be among the overrides: its position embeddings are interpolated.

    Args:
      settings: the parsed `config.json` of transformers or timm, or the fields of a `ViTConfig`.
      folder: where it lies; a `preprocessor_config.json` beside it gives `input`.
      overrides: fields that the caller sets.

    Raises:
      ConfigError: settings that this family does not have.
    """
    check_overrides(ViTConfig, overrides)
    if "model_type" in settings:
        fields = _from_transformers(settings, folder)
    elif "architecture" in settings:
        fields = _from_timm(settings)
    else:
        check_overrides(ViTConfig, settings)
        fields = {**dataclasses.asdict(ViTConfig()), **settings}
    chosen = _typed({**fields, **overrides})
    if "checkpoint_size" not in overrides:
        stored = pair(fields["image_size"], "image_size")
        chosen["checkpoint_size"] = None if stored == chosen["image_size"] else stored
    return ViTConfig(**chosen)


def _typed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as JSON gives them, in the types of `ViTConfig`."""
    fields = {**fields, "image_size": pair(fields["image_size"], "image_size")}
    if fields.get("checkpoint_size") is not None:
        fields["checkpoint_size"] = pair(fields["checkpoint_size"], "checkpoint_size")
    patch = pair(fields.get("patch_size", ViTConfig.patch_size), "patch_size")
    if patch[0] != patch[1]:
        raise ConfigError(f"patch_size {patch}: jtl's ViT has square patches alone")
    return fields_from_json(ViTConfig, {**fields, "patch_size": patch[0]})


def _from_transformers(settings: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    kind = settings["model_type"]
    if kind not in ("vit", "deit"):
        raise ConfigError(f"the model type {kind!r} is not among those of jtl's ViT: 'vit', 'deit'")
    fields = {**dataclasses.asdict(ViTConfig()), "distillation_token": kind == "deit"}
    fields |= {name: value for name, value in settings.items() if name in fields}
    width = fields["hidden_size"]
    for name, value in {"pooler_output_size": width, "head_dim": width / (fields["num_attention_heads"] or 1)}.items():
        if settings.get(name) not in (None, value):
            raise ConfigError(f"config.json sets {name}={settings[name]!r}; jtl's ViT has only {name}={value:g}")
    fields["pool"] = _pool_of(settings.get("architectures") or ())
    path, processor = folder / "preprocessor_config.json" if folder else None, "DeiT" if kind == "deit" else "ViT"
    if path is not None and path.is_file():
        fields["input"] = image_input(read_json(path), processor=processor)
    elif "input" not in settings:
        fields["input"] = image_input({"image_processor_type": processor})
    return fields


def _pool_of(architectures: Any) -> str:
    if any(name.endswith("WithTeacher") for name in architectures):
        return "distilled"
    return "pooler" if any(name in ("ViTModel", "DeiTModel") for name in architectures) else "cls"


_TIMM_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "qkv_bias": "qkv_bias",
    "class_token": "class_token",
    "attn_drop_rate": "attention_probs_dropout_prob",
}
"""Arguments of timm's model, and the fields that they are."""


def _from_timm(settings: Mapping[str, Any]) -> dict[str, Any]:
    name = str(settings["architecture"]).partition(".")[0]
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=3, cutoff=0.0)
        raise ConfigError(f"timm's architecture {name!r} is not one of jtl's ViT; nearest: {', '.join(near)}")
    variant, pretrained = VARIANTS[name], settings.get("pretrained_cfg") or {}
    fields = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    fields["input"] = image_input(pretrained, variant.input)
    fields["image_size"] = fields["input"].size
    arguments = dict(settings.get("model_args") or {})
    pool = arguments.pop("global_pool", settings.get("global_pool") or "token")
    if pool not in ("token", "avg") or (pool == "avg" and fields["distillation_token"]):
        raise ConfigError(
            f"config.json sets global_pool={pool!r}; jtl's ViT has 'token', or 'avg' without distillation"
        )
    norm_after_pool = arguments.pop("fc_norm", None)
    if pool == "avg":
        fields |= {"pool": "mean", "norm_after_pool": norm_after_pool is not False}
    elif norm_after_pool:
        raise ConfigError("config.json sets fc_norm with global_pool='token'; jtl's ViT has it with 'avg' alone")
    ratio = arguments.pop("mlp_ratio", 4)
    for argument, value in arguments.items():
        if argument not in _TIMM_ARGUMENTS:
            raise ConfigError(f"config.json sets model_args {argument}={value!r}, which jtl's ViT does not have")
        fields[_TIMM_ARGUMENTS[argument]] = value
    return {**fields, "intermediate_size": int(fields["hidden_size"] * ratio)}


_OWN_FIELDS = ("class_token", "distillation_token", "pool", "norm_after_pool", "checkpoint_size", "antialias", "input")


def settings(config: ViTConfig, outputs: int | None) -> dict[str, Any]:
    """The `config.json` of transformers.

    Args:
      config: of the model.
      outputs: the width of its head, or None without one.

    Raises:
      ConfigError: transformers has no such model.
    """
    if not config.class_token or config.pool == "mean" or (config.pool == "pooler" and outputs is not None):
        raise ConfigError(
            f"transformers has no ViT with class_token={config.class_token}, pool={config.pool!r} and "
            f"{'no head' if outputs is None else 'a head'}"
        )
    kind = "DeiT" if config.distillation_token else "ViT"
    task = "Model" if config.pool == "pooler" else "ForImageClassification"
    written = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OWN_FIELDS}
    names = [f"LABEL_{i}" for i in range(outputs or 0)]
    edges = config.image_size
    return {
        "architectures": [f"{kind}{task}{'WithTeacher' if config.pool == 'distilled' else ''}"],
        "model_type": kind.lower(),
        **written,
        "image_size": edges[0] if edges[0] == edges[1] else list(edges),
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }

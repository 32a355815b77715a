"""Where the tensors of a ViT or DeiT are in the checkpoints of transformers, timm and torchvision.

Position embeddings for pictures of another size are interpolated by `adapt_positions`; `infer` tells the
configuration of a checkpoint that comes without one.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jtl.errors import ConfigError, WeightsError
from jtl.models.family import ImageInput, KeyLayout
from jtl.models.pictures import image_input
from jtl.models.vit_config import HALF, ViTConfig
from jtl.rules import matches
from jtl.weights.convert import HWIO, KEEP, TRANSPOSE, KeyRule, Layout

POSITIONS = "embeddings/position"
"""The path of the position embeddings, `[1, positions, width]`: the tokens before the patches, then rows of patches."""


def _third(part: int) -> Layout:
    """Query, key or value, which one tensor holds below each other; for weights and for biases.

    That tensor is never written: the inverse gives its shape, with NaN in the other two thirds.
    """

    def write(x: np.ndarray) -> np.ndarray:
        whole = np.full((3, *x.T.shape), np.nan, x.dtype)
        whole[part] = x.T
        return whole.reshape(-1, *x.T.shape[1:])

    return Layout(lambda x: x[part * (len(x) // 3) : (part + 1) * (len(x) // 3)].T, write, np.transpose, (part, 3))


_PARTS = {"query": _third(0), "key": _third(1), "value": _third(2)}


def _dense(path: str, source: str) -> list[KeyRule]:
    return [KeyRule(f"{path}/kernel", f"{source}.weight", TRANSPOSE), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def _norm(path: str, source: str) -> list[KeyRule]:
    return [KeyRule(f"{path}/scale", f"{source}.weight", KEEP), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def _patches(source: str) -> list[KeyRule]:
    path = "embeddings/patches"
    return [KeyRule(f"{path}/kernel", f"{source}.weight", HWIO), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def _tokens(class_token: str, distillation_token: str, position: str) -> list[KeyRule]:
    named = {"class_token": class_token, "distillation_token": distillation_token, "position": position}
    return [KeyRule(f"embeddings/{path}", source, KEEP) for path, source in named.items() if source]


def _fused(path: str, weight: str, bias: str) -> list[KeyRule]:
    rules = []
    for part, layout in _PARTS.items():
        rules += [KeyRule(f"{path}/{part}/kernel", weight, layout), KeyRule(f"{path}/{part}/bias", bias, layout)]
    return rules


# Of transformers. The names are those of its files; `ViTModel` of release 5 has others once loaded.


def transformers_rules(config: ViTConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in `ViTForImageClassification` and the models like it, DeiT's too."""
    model = "deit" if config.distillation_token else "vit"
    if config.pool != "distilled":
        return [*_backbone(f"{model}."), *_dense("head", "classifier")]
    return [*_backbone(f"{model}."), *_distilled_head("cls_classifier", "distillation_classifier")]


def _backbone(prefix: str) -> list[KeyRule]:
    embeddings, layer, path = f"{prefix}embeddings", f"{prefix}encoder.layer.{{}}", "encoder/layer_*"
    rules = _patches(f"{embeddings}.patch_embeddings.projection")
    rules += _tokens(*(f"{embeddings}.{name}" for name in ("cls_token", "distillation_token", "position_embeddings")))
    for part in _PARTS:
        rules += _dense(f"{path}/attention/{part}", f"{layer}.attention.attention.{part}")
    rules += _dense(f"{path}/attention/output", f"{layer}.attention.output.dense")
    rules += [
        *_dense(f"{path}/mlp/up", f"{layer}.intermediate.dense"),
        *_dense(f"{path}/mlp/down", f"{layer}.output.dense"),
    ]
    rules += _norm(f"{path}/attention_norm", f"{layer}.layernorm_before")
    rules += _norm(f"{path}/mlp_norm", f"{layer}.layernorm_after")
    return [*rules, *_norm("norm", f"{prefix}layernorm"), *_dense("pooler", f"{prefix}pooler.dense")]


def _distilled_head(first: str, second: str) -> list[KeyRule]:
    kernel = KeyRule("head/distillation_kernel", f"{second}.weight", TRANSPOSE)
    return [*_dense("head", first), kernel, KeyRule("head/distillation_bias", f"{second}.bias", KEEP)]


def _transformers_ignored(config: ViTConfig) -> Sequence[str]:
    # Those of `ViTForMaskedImageModeling`.
    unused = ("decoder/0", "embeddings/mask_token", "vit/embeddings/mask_token", "deit/embeddings/mask_token")
    return (*unused, *(() if config.pool == "pooler" else ("pooler", "vit/pooler", "deit/pooler")))


_RELEASE_5 = {
    r"\blayers\.(\d+)\.": r"encoder.layer.\1.",
    r"\.attention\.q_proj\.": ".attention.attention.query.",
    r"\.attention\.k_proj\.": ".attention.attention.key.",
    r"\.attention\.v_proj\.": ".attention.attention.value.",
    r"\.attention\.o_proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


def transformers_name(name: str) -> str:
    """A tensor's name in the files of transformers, from one there or in its modules of release 5.

    >>> transformers_name("vit.layers.3.attention.q_proj.weight")
    'vit.encoder.layer.3.attention.attention.query.weight'
    """
    name = name.removeprefix("module.")
    for pattern, replacement in _RELEASE_5.items():
        name = re.sub(pattern, replacement, name)
    return name


_IN_MEMORY = {
    r"\bencoder\.layer\.(\d+)\.": r"layers.\1.",
    r"\.attention\.attention\.(query|key|value)\.": lambda found: f".attention.{found[1][0]}_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
}


def transformers_module(name: str) -> str:
    """A tensor's name in the modules of transformers' release 5, from that in its files.

    >>> transformers_module("vit.encoder.layer.3.output.dense.bias")
    'vit.layers.3.mlp.fc2.bias'
    """
    for pattern, replacement in _IN_MEMORY.items():
        name = re.sub(pattern, replacement, name)
    return name


# Of timm and torchvision


def timm_rules(config: ViTConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of timm."""
    path, block = "encoder/layer_*", "blocks.{}"
    rules = [*_patches("patch_embed.proj"), *_tokens("cls_token", "dist_token", "pos_embed")]
    rules += _fused(f"{path}/attention", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias")
    rules += [*_dense(f"{path}/attention/output", f"{block}.attn.proj"), *_dense(f"{path}/mlp/up", f"{block}.mlp.fc1")]
    rules += [*_dense(f"{path}/mlp/down", f"{block}.mlp.fc2"), *_norm(f"{path}/attention_norm", f"{block}.norm1")]
    rules += [
        *_norm(f"{path}/mlp_norm", f"{block}.norm2"),
        *_norm("norm", "fc_norm" if config.norm_after_pool else "norm"),
    ]
    return [*rules, *(_distilled_head("head", "head_dist") if config.pool == "distilled" else _dense("head", "head"))]


def torchvision_rules(config: ViTConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of torchvision."""
    del config  # the same names for every size
    path, block = "encoder/layer_*", "encoder.layers.encoder_layer_{}"
    rules = [*_patches("conv_proj"), *_tokens("class_token", "", "encoder.pos_embedding")]
    attention = f"{block}.self_attention"
    rules += _fused(f"{path}/attention", f"{attention}.in_proj_weight", f"{attention}.in_proj_bias")
    rules += [*_dense(f"{path}/attention/output", f"{attention}.out_proj"), *_dense(f"{path}/mlp/up", f"{block}.mlp.0")]
    rules += [*_dense(f"{path}/mlp/down", f"{block}.mlp.3"), *_norm(f"{path}/attention_norm", f"{block}.ln_1")]
    rules += [*_norm(f"{path}/mlp_norm", f"{block}.ln_2"), *_norm("norm", "encoder.ln")]
    return [*rules, *_dense("head", "heads.head")]


def torchvision_name(name: str) -> str:
    """A tensor's name in today's torchvision; its first files have `linear_1` and `linear_2`.

    >>> torchvision_name("encoder.layers.encoder_layer_0.mlp.linear_2.bias")
    'encoder.layers.encoder_layer_0.mlp.3.bias'
    """
    return name.removeprefix("module.").replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")


def _plain(name: str) -> str:
    return name.removeprefix("module.")


LAYOUTS = (
    KeyLayout("transformers", transformers_rules, _transformers_ignored, transformers_name, transformers_module),
    KeyLayout("transformers, no head", lambda config: _backbone(""), _transformers_ignored, transformers_name),
    KeyLayout(
        # DeiT's two classifiers, where a model with the class token alone takes the first.
        "transformers, two heads",
        lambda config: [*_backbone("deit."), *_dense("head", "cls_classifier")],
        lambda config: (*_transformers_ignored(config), "distillation_classifier"),
        transformers_name,
    ),
    KeyLayout(
        "timm", timm_rules, lambda config: () if config.pool == "distilled" else ("head_dist", "pre_logits"), _plain
    ),
    KeyLayout("torchvision", torchvision_rules, rename=torchvision_name),
)


# Pictures of another size


def adapt_positions(config: ViTConfig, path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Interpolate the position embeddings of a checkpoint for pictures of another size.

    Bicubic, as transformers' `interpolate_pos_encoding`; with `config.antialias` as timm's `resample_abs_pos_embed`.
    The two differ when they enlarge as well: Keys' parameter is -0.75 in the one and -0.5 in the other. Tokens
    before those of the patches keep theirs.

    Args:
      config: of the model; its `checkpoint_size` says which grid the array is for, by default a square.
      path: of the leaf; all leaves but the position embeddings are left as they are.
      array: the checkpoint's, `[1, positions, width]`.
      shape: of the leaf.

    Returns:
      `[1, positions', width]` of the same dtype; the array itself where it is for the model's own grid.

    Raises:
      WeightsError: the positions do not form a grid.

    References:
      Keys, Cubic convolution interpolation for digital image processing, 1981.
    """
    if path != POSITIONS or array.ndim != 3 or (config.checkpoint_size is None and array.shape == shape):
        return array
    count, prefix = array.shape[1] - config.prefix, config.prefix
    old = _stored_grid(config, count)
    if old == config.grid:
        return array
    wide = array[0, prefix:].astype(np.float32).reshape(*old, -1)
    rows, columns = (_resampling(o, n, antialias=config.antialias) for o, n in zip(old, config.grid, strict=True))
    moved = np.einsum("Hh,hwd->Hwd", rows, wide, optimize=True)
    moved = np.einsum("Ww,Hwd->HWd", columns, moved, optimize=True).astype(array.dtype)
    return np.concatenate([array[:, :prefix], moved.reshape(1, -1, array.shape[2])], axis=1)


def _stored_grid(config: ViTConfig, count: int) -> tuple[int, int]:
    edge = math.isqrt(max(count, 0))
    height, width = config.checkpoint_size or (edge * config.patch_size, edge * config.patch_size)
    grid = height // config.patch_size, width // config.patch_size
    if count < 1 or grid[0] * grid[1] != count:
        raise WeightsError(
            f"the checkpoint has position embeddings for {count} patches, which are not a grid of {grid[0]}x{grid[1]}: "
            f"set checkpoint_size= to the size of its pictures, or check that it has {config.prefix} tokens before them"
        )
    return grid


def _resampling(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """The weights `[new, old]` of bicubic interpolation between pixel centres, as `torch.nn.functional.interpolate`."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    if antialias:
        stretch = max(old / new, 1.0)
        matrix += _cubic((np.arange(old) - centres[:, None]) / stretch, -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    first = np.floor(centres).astype(int)
    for tap in range(-1, 3):
        # Beyond the edge, the pixel at the edge is taken again.
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), _cubic(first + tap - centres, -0.75))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: int | float) -> np.ndarray:
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


# Checkpoints without a configuration

_HEADS = {1280: 16}
"""Heads of the widths that are not made of heads of 64 channels: that of ViT-H."""


def infer(
    shapes: Mapping[str, tuple[int, ...]], file: str, overrides: Mapping[str, Any] | None = None
) -> ViTConfig | None:
    """The configuration of a checkpoint that comes without one.

    Tensors do not tell the activation (gelu), the epsilon of norms (1e-12 in transformers, 1e-6 elsewhere), the heads
    (of 64 channels, as in the papers) nor the statistics of pictures: those of ImageNet in torchvision's files and in
    those of DeiT, which have a distillation token or are named so; 0.5 otherwise.

    Args:
      shapes: of all tensors by name.
      file: its name.
      overrides: fields that the caller sets: what tensors do not tell.

    Returns:
      The configuration, or None where a tensor has no place in a ViT.

    Raises:
      ConfigError: what tensors do not tell has no value as in the papers.
    """
    for layout in LAYOUTS:
        named = {layout.rename(name): shape for name, shape in shapes.items()}
        parts = _parts(named)
        keys = layout.keys(ViTConfig(**parts))
        found = {rule.path: named.get(rule.source) for rule in keys}
        blocks = [rule.source for rule in keys if rule.path == "encoder/layer_*/mlp/up/kernel"]
        patches, positions, block = found["embeddings/patches/kernel"], found[POSITIONS], named.get(blocks[0].format(0))
        if patches is None or positions is None or block is None or len(patches) != 4:
            continue
        depth = next(i for i in range(len(named) + 1) if blocks[0].format(i) not in named)
        count, given = positions[1] - parts["class_token"] - parts["distillation_token"], dict(overrides or {})
        size = given.get("image_size") or (_edge(count, patches[3]),) * 2
        config = ViTConfig(
            **parts,
            num_hidden_layers=depth,
            hidden_size=block[1],
            intermediate_size=block[0],
            num_attention_heads=given.get("num_attention_heads") or _heads(block[1]),
            num_channels=patches[1],
            patch_size=patches[3],
            image_size=(size[0], size[1]),
            qkv_bias=any(name.endswith(("query.bias", "qkv.bias", "in_proj_bias")) for name in named),
            layer_norm_eps=1e-12 if layout.name.startswith("transformers") else 1e-6,
            antialias=layout.name == "timm",
            input=_input(layout.name, "deit" in file.lower() or parts["distillation_token"], size[0]),
        )
        if all(_has_place(name, keys, layout.ignored(config)) for name in named):
            return config
    return None


def _parts(named: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that a model has, by the last segments of its tensors' names."""

    def has(*names: str) -> bool:
        return any(f".{tensor}".endswith(tuple(f".{name}" for name in names)) for tensor in named)

    parts = {
        "class_token": has("cls_token", "class_token"),
        "distillation_token": has("dist_token", "distillation_token"),
        "pool": "cls",
        "norm_after_pool": has("fc_norm.weight"),
    }
    if parts["norm_after_pool"] or not parts["class_token"]:
        return parts | {"pool": "mean", "distillation_token": False}
    if parts["distillation_token"] and has("distillation_classifier.weight", "head_dist.weight"):
        return parts | {"pool": "distilled"}
    return parts | ({"pool": "pooler"} if has("pooler.dense.weight") and not has("classifier.weight") else {})


def _edge(patches: int, pixels: int) -> int:
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise ConfigError(f"position embeddings for {patches} patches are not those of a square: set image_size=")
    return math.isqrt(patches) * pixels


def _heads(width: int) -> int:
    if width not in _HEADS and width % 64:
        raise ConfigError(f"the tensors do not tell how many heads share the width {width}: set num_attention_heads=")
    return _HEADS.get(width, width // 64)


_IMAGENET = {"image_mean": list(ImageInput.mean), "image_std": list(ImageInput.std)}


def _input(library: str, imagenet: bool, edge: int) -> ImageInput:
    if library == "torchvision":
        return ImageInput((edge, edge), "torchvision", round(edge * 256 / 224), "bilinear")
    if library == "timm":
        statistics = {} if imagenet else {"mean": HALF, "std": HALF}
        return image_input({"input_size": (3, edge, edge), "crop_pct": 0.9 if edge <= 224 else 1.0, **statistics})
    return image_input({"image_processor_type": "DeiT", **_IMAGENET} if imagenet else {"image_processor_type": "ViT"})


def _has_place(name: str, keys: Sequence[KeyRule], ignored: Sequence[str]) -> bool:
    sources = (re.escape(rule.source).replace(r"\{\}", r"\d+") for rule in keys)
    path = name.replace(".", "/")
    return any(re.fullmatch(source, name) for source in sources) or any(matches(p, path) for p in ignored)

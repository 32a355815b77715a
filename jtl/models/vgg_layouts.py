"""Where the tensors of a VGG are in the checkpoints of torchvision, timm and Keras.

`infer` tells the configuration of a checkpoint that comes without one.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jtl.models.convolution import conv_rules, norm_rules
from jtl.models.family import ImageInput, KeyLayout
from jtl.models.pictures import image_input
from jtl.models.vgg_config import CAFFE, VggConfig
from jtl.weights.convert import HWIO, KEEP, TRANSPOSE, KeyRule, Layout


def _at(config: VggConfig) -> Iterator[tuple[int, int, int]]:
    """Stage, place in it, and index in PyTorch's `features` of each convolution."""
    index = 0
    for stage, depth in enumerate(config.depths):
        for place in range(depth):
            yield stage, place, index
            index += 3 if config.batch_norm else 2  # an activation has an index as well
        index += 1  # and a maximum


def _features(config: VggConfig) -> list[KeyRule]:
    rules = []
    for stage, place, index in _at(config):
        rules += conv_rules(f"stages_{stage}/conv_{place}", f"features.{index}", bias=True)
        if config.batch_norm:
            rules += norm_rules(f"stages_{stage}/norm_{place}", f"features.{index + 1}")
    return rules


def _dense(path: str, source: str, layout: Layout, leaf: str = "weight") -> list[KeyRule]:
    return [KeyRule(f"{path}/kernel", f"{source}.{leaf}", layout), KeyRule(f"{path}/bias", f"{source}.bias", KEEP)]


def torchvision_rules(config: VggConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of torchvision."""
    dense = [*_dense("fc_0", "classifier.0", _flat_rows(config)), *_dense("fc_1", "classifier.3", TRANSPOSE)]
    return [*_features(config), *dense, *_dense("head", "classifier.6", TRANSPOSE)]


def timm_rules(config: VggConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of timm, whose dense layers are convolutions."""
    dense = [*_dense("fc_0", "pre_logits.fc1", HWIO), *_dense("fc_1", "pre_logits.fc2", POINT)]
    return [*_features(config), *dense, *_dense("head", "head.fc", TRANSPOSE)]


def keras_rules(config: VggConfig) -> Sequence[KeyRule]:
    """Where each leaf's tensor is in a checkpoint of Keras, by the names of its layers; see `keras_name`."""
    rules = [*_dense("fc_0", "fc1", _flat(config), "kernel"), *_dense("fc_1", "fc2", KEEP, "kernel")]
    for stage, place, _ in _at(config):
        rules += _dense(f"stages_{stage}/conv_{place}", f"block{stage + 1}_conv{place + 1}", KEEP, "kernel")
    return [*rules, *_dense("head", "predictions", KEEP, "kernel")]


# What does not have the shape that a layout is for is given back as it is, for `convert` to report.


def _point(x: np.ndarray) -> np.ndarray:
    return x[:, :, 0, 0].T if x.shape[2:] == (1, 1) else x


POINT = Layout(_point, lambda x: x.T[:, :, None, None], _point)
"""PyTorch's kernels of one pixel `[out, in, 1, 1]` against `[in, out]`."""


def _flat(config: VggConfig) -> Layout:
    """Keras's `[height * width * in, out]` against `[height, width, in, out]`."""
    window = (config.pool_size, config.pool_size, config.widths[-1])

    def read(x: np.ndarray) -> np.ndarray:
        return x.reshape(*window, x.shape[1]) if x.ndim == 2 and len(x) == math.prod(window) else x

    return Layout(read, lambda x: x.reshape(-1, x.shape[-1]))


def _flat_rows(config: VggConfig) -> Layout:
    """PyTorch's `[out, in * height * width]` against `[height, width, in, out]`."""
    window = (config.widths[-1], config.pool_size, config.pool_size)

    def read(x: np.ndarray) -> np.ndarray:
        fits = x.ndim == 2 and x.shape[1] == math.prod(window)
        return HWIO.read(x.reshape(-1, *window)) if fits else x

    return Layout(read, lambda x: HWIO.write(x).reshape(x.shape[-1], -1), read)


def keras_name(name: str) -> str:
    """A tensor's layer and leaf, from its path in a file of Keras.

    Read are the `.weights.h5` of a model whose blocks are attributes with layers of their own, and the weights that
    Keras distributes itself.

    >>> keras_name("block1.layers.conv2d_1.vars.0"), keras_name("block1_conv2.block1_conv2_b_1:0")
    ('block1_conv2.kernel', 'block1_conv2.bias')
    """
    if found := re.fullmatch(r"(block\d+)\.layers\.conv2d(?:_(\d+))?\.vars\.([01])", name):
        block, place, leaf = found.groups()
        return f"{block}_conv{int(place or 0) + 1}.{('kernel', 'bias')[int(leaf)]}"
    if found := re.fullmatch(r"(?:model_weights\.)?(\w+)\.(?:\1[._])?(kernel|bias|W|b)(?:_1)?(?::0)?", name):
        layer, leaf = found.groups()
        return f"{layer}.{ {'W': 'kernel', 'b': 'bias'}.get(leaf, leaf) }"
    return name


def torch_name(name: str) -> str:
    """A tensor's name without the prefix that data-parallel training adds."""
    return name.removeprefix("module.")


def _ignored(dense: Sequence[str], others: Sequence[str]) -> Callable[[VggConfig], Sequence[str]]:
    """What has no place in the tree: the dense layers where they are left out, and others at all times."""
    return lambda config: (*others, *(dense if config.hidden is None else ()))


_COUNTERS = ("**/num_batches_tracked",)
_EDGES = ("dsn*", "fuse")  # the outputs of a detector of edges, and their fusion

LAYOUTS = (
    KeyLayout("torchvision", torchvision_rules, _ignored(("classifier/0", "classifier/3"), _COUNTERS), torch_name),
    KeyLayout("timm", timm_rules, _ignored(("pre_logits",), _COUNTERS), torch_name),
    KeyLayout("keras", keras_rules, _ignored(("fc1", "fc2"), _EDGES), keras_name),
)


def infer(
    shapes: Mapping[str, tuple[int, ...]], file: str, overrides: Mapping[str, Any] | None = None
) -> VggConfig | None:
    """The configuration that a checkpoint's tensors tell.

    They do not tell what is done with maps of another size, the dropout, nor the input: these are the defaults of
    the library whose names they have. Those of Keras are taken for descendants of the authors' own weights.

    Args:
      shapes: of the tensors by name.
      file: the name of the checkpoint's file.
      overrides: fields that the caller sets.

    Returns:
      The configuration, or None where the tensors are not of a VGG.
    """
    del overrides  # tensors and file tell all
    torch = {torch_name(name): shape for name, shape in shapes.items()}
    if "features.0.weight" in torch:
        return _from_torch(torch, file)
    keras = {keras_name(name): shape for name, shape in shapes.items()}
    return _from_keras(keras) if "block1_conv1.kernel" in keras else None


class _Kernel(NamedTuple):
    """A convolution in a checkpoint: its stage, channels, and height and width."""

    stage: int
    inputs: int
    features: int
    window: tuple[int, ...]


def _from_torch(shapes: Mapping[str, tuple[int, ...]], file: str) -> VggConfig | None:
    features = [name for name in shapes if name.startswith("features.")]
    if not all(re.fullmatch(r"features\.\d+\.\w+", name) for name in features):
        return None
    batch_norm = "features.1.running_mean" in shapes
    indices = {int(name.split(".")[1]): shapes[name] for name in features if len(shapes[name]) == 4}
    stage, last, kernels = 0, 0, []
    for index, (out, inputs, *window) in sorted(indices.items()):
        stage += index - last > (3 if batch_norm else 2)  # a maximum lies between
        kernels.append(_Kernel(stage, inputs, out, tuple(window)))
        last = index
    if "pre_logits.fc1.weight" in shapes:
        dense, chosen = shapes["pre_logits.fc1.weight"], {"pooling": "sliding", "dropout": 0.0}
    else:
        dense, chosen = shapes.get("classifier.0.weight"), {"input": _named_input(file)}
    return _config(kernels, dense, {"batch_norm": batch_norm, **chosen})


def _from_keras(shapes: Mapping[str, tuple[int, ...]]) -> VggConfig | None:
    places = {
        (int(found[1]), int(found[2])): shape
        for name, shape in shapes.items()
        if (found := re.fullmatch(r"block(\d+)_conv(\d+)\.kernel", name)) and len(shape) == 4
    }
    kernels = [_Kernel(stage, *shape[2:], shape[:2]) for (stage, _), shape in sorted(places.items())]
    dense = shapes.get("fc1.kernel")
    return _config(kernels, None if dense is None else dense[::-1], {"input": CAFFE, "dropout": 0.0})


def _config(kernels: Sequence[_Kernel], dense: tuple[int, ...] | None, chosen: Mapping[str, Any]) -> VggConfig | None:
    """The configuration with these kernels and this first dense layer `[out, ...]`, or None where there is none."""
    stages = [list(group) for _, group in itertools.groupby(kernels, lambda kernel: kernel.stage)]
    if not stages or any(kernel.window != (3, 3) for kernel in kernels):
        return None
    widths, depths = tuple(stage[0].features for stage in stages), tuple(map(len, stages))
    channels = [
        kernels[0].inputs,
        *itertools.chain(*([width] * depth for width, depth in zip(widths, depths, strict=True))),
    ]
    if [kernel[1:3] for kernel in kernels] != list(itertools.pairwise(channels)) or 0 in channels:
        return None
    if dense is None:
        return VggConfig(channels[0], widths, depths, hidden=None, **chosen)
    size = math.isqrt(math.prod(dense[1:]) // widths[-1])
    if len(dense) < 2 or 0 in dense or math.prod(dense[1:]) != size * size * widths[-1]:
        return None
    return VggConfig(channels[0], widths, depths, hidden=dense[0], pool_size=size, **chosen)


def _named_input(file: str) -> ImageInput:
    # torchvision's published weights, such as vgg16-397923af.pth, are evaluated on bilinear pictures.
    if re.fullmatch(r"vgg\d+(_bn)?-[0-9a-f]{8}\.pth", file) is None:
        return ImageInput()
    return image_input({"input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.875})

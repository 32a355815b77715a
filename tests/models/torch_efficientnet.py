"""EfficientNet in PyTorch as timm, torchvision and lukemelas' EfficientNet-PyTorch have it: for parity tests.

Arithmetic and names of tensors are those of the three libraries; each builds on its own table of stages.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional


class Stage(NamedTuple):
    """A row of the table: repeats, kernel, stride, ratio of expansion, channels."""

    repeats: int
    kernel: int
    stride: int
    ratio: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution padded as in TensorFlow."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def conv(same, inputs, outputs, kernel=1, stride=1, groups=1, bias=False):
    settings = {"stride": stride, "groups": groups, "bias": bias}
    if same:
        return SameConv(inputs, outputs, kernel, **settings)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def round_channels(channels, width, divisor=8):
    channels = channels * width
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class Norms:
    """Makes batch normalisations."""

    def __init__(self, eps, momentum):
        self.settings = {"eps": eps, "momentum": momentum}

    def __call__(self, channels):
        return nn.BatchNorm2d(channels, **self.settings)


def lively(module):
    """Initial weights with which signals and gradients keep their size through the layers."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
            elif isinstance(part, nn.Conv2d):
                part.weight.normal_(std=math.sqrt(2 / part.weight[0].numel()))
    return module


# timm


class TimmSqueeze(nn.Module):
    def __init__(self, channels, squeezed, act):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, squeezed, 1), act()
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class TimmSeparable(nn.Module):
    def __init__(self, inputs, stage, features, stride, make):
        super().__init__()
        same, norm, act, squeeze = make
        self.skip, self.act = stride == 1 and inputs == features, act()
        self.conv_dw, self.bn1 = conv(same, inputs, inputs, stage.kernel, stride, inputs), norm(inputs)
        self.se = TimmSqueeze(inputs, round(inputs * squeeze), act) if squeeze else nn.Identity()
        self.conv_pw, self.bn2 = conv(same, inputs, features), norm(features)

    def forward(self, x):
        y = self.bn2(self.conv_pw(self.se(self.act(self.bn1(self.conv_dw(x))))))
        return y + x if self.skip else y


class TimmInverted(nn.Module):
    def __init__(self, inputs, stage, features, stride, make):
        super().__init__()
        same, norm, act, squeeze = make
        inner = round_channels(inputs * stage.ratio, 1.0)
        self.skip, self.act = stride == 1 and inputs == features, act()
        self.conv_pw, self.bn1 = conv(same, inputs, inner), norm(inner)
        self.conv_dw, self.bn2 = conv(same, inner, inner, stage.kernel, stride, inner), norm(inner)
        self.se = TimmSqueeze(inner, round(inner * squeeze / stage.ratio), act) if squeeze else nn.Identity()
        self.conv_pwl, self.bn3 = conv(same, inner, features), norm(features)

    def forward(self, x):
        y = self.act(self.bn2(self.conv_dw(self.act(self.bn1(self.conv_pw(x))))))
        y = self.bn3(self.conv_pwl(self.se(y)))
        return y + x if self.skip else y


class TimmEfficientNet(nn.Module):
    """`efficientnet_*`, `tf_efficientnet_*` (same), `*_lite*` (fixed, no squeeze, ReLU6) and `mobilenetv2_*`."""

    def __init__(
        self,
        stages=STAGES,
        width=1.0,
        depth=1.0,
        same=False,
        eps=1e-5,
        squeeze=0.25,
        act=nn.SiLU,
        fixed=False,
        fixed_width=None,
        head=1280,
        classes=1000,
        channels=3,
    ):
        super().__init__()
        norm, fixed_width = Norms(eps, 0.1), fixed if fixed_width is None else fixed_width
        inputs = 32 if fixed_width else round_channels(32, width)
        self.conv_stem, self.bn1, self.act = conv(same, channels, inputs, 3, 2), norm(inputs), act()
        parts = []
        for i, stage in enumerate(stages):
            repeats = stage.repeats if fixed and i in (0, len(stages) - 1) else math.ceil(stage.repeats * depth)
            features, kind = round_channels(stage.channels, width), TimmInverted if stage.ratio > 1 else TimmSeparable
            blocks = []
            for j in range(repeats):
                stride = stage.stride if j == 0 else 1
                blocks.append(kind(inputs, stage, features, stride, (same, norm, act, squeeze)))
                inputs = features
            parts.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*parts)
        head = head if fixed_width else round_channels(head, width)
        self.conv_head, self.bn2 = conv(same, inputs, head), norm(head)
        self.classifier = nn.Linear(head, classes)

    def features(self, x):
        x = self.act(self.bn1(self.conv_stem(x)))
        return self.act(self.bn2(self.conv_head(self.blocks(x))))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


# torchvision


def conv_norm_act(inputs, outputs, norm, kernel=1, stride=1, groups=1, act=nn.SiLU):
    layers = [conv(False, inputs, outputs, kernel, stride, groups), norm(outputs)]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class TorchvisionSqueeze(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(functional.silu(self.fc1(functional.adaptive_avg_pool2d(x, 1)))))


class TorchvisionBlock(nn.Module):
    def __init__(self, inputs, stage, features, stride, norm):
        super().__init__()
        inner = round_channels(inputs, stage.ratio)
        self.skip = stride == 1 and inputs == features
        layers = [conv_norm_act(inputs, inner, norm)] if inner != inputs else []
        layers.append(conv_norm_act(inner, inner, norm, stage.kernel, stride, inner))
        layers.append(TorchvisionSqueeze(inner, max(1, inputs // 4)))
        self.block = nn.Sequential(*layers, conv_norm_act(inner, features, norm, act=None))

    def forward(self, x):
        return x + self.block(x) if self.skip else self.block(x)


class TorchvisionEfficientNet(nn.Module):
    def __init__(self, stages=STAGES, width=1.0, depth=1.0, eps=1e-5, momentum=0.1, classes=1000):
        super().__init__()
        norm, inputs = Norms(eps, momentum), round_channels(32, width)
        layers = [conv_norm_act(3, inputs, norm, 3, 2)]
        for stage in stages:
            features, blocks = round_channels(stage.channels, width), []
            for j in range(math.ceil(stage.repeats * depth)):
                stride = stage.stride if j == 0 else 1
                blocks.append(TorchvisionBlock(inputs, stage, features, stride, norm))
                inputs = features
            layers.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*layers, conv_norm_act(inputs, 4 * inputs, norm))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * inputs, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


# lukemelas


class LukemelasBlock(nn.Module):
    def __init__(self, inputs, stage, features, stride, norm, squeeze, act):
        super().__init__()
        inner = inputs * stage.ratio
        self.skip, self.act = stride == 1 and inputs == features, act()
        if stage.ratio != 1:
            self._expand_conv, self._bn0 = conv(True, inputs, inner), norm(inner)
        self._depthwise_conv, self._bn1 = conv(True, inner, inner, stage.kernel, stride, inner), norm(inner)
        if squeeze:
            squeezed = max(1, int(inputs * squeeze))
            self._se_reduce = conv(True, inner, squeezed, bias=True)
            self._se_expand = conv(True, squeezed, inner, bias=True)
        self._project_conv, self._bn2 = conv(True, inner, features), norm(features)

    def forward(self, x):
        y = self.act(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self.act(self._bn1(self._depthwise_conv(y)))
        if hasattr(self, "_se_reduce"):
            gate = self._se_expand(self.act(self._se_reduce(functional.adaptive_avg_pool2d(y, 1))))
            y = torch.sigmoid(gate) * y
        y = self._bn2(self._project_conv(y))
        return y + x if self.skip else y


class LukemelasEfficientNet(nn.Module):
    """`EfficientNet` of EfficientNet-PyTorch, and of its fork with the Lite networks (`lite`)."""

    def __init__(self, stages=STAGES, width=1.0, depth=1.0, lite=False, classes=1000):
        super().__init__()
        norm, act, squeeze = Norms(1e-3, 0.01), nn.ReLU6 if lite else nn.SiLU, 0 if lite else 0.25
        inputs = 32 if lite else round_channels(32, width)
        self._conv_stem, self._bn0, self.act = conv(True, 3, inputs, 3, 2), norm(inputs), act()
        self._blocks = nn.ModuleList()
        for i, stage in enumerate(stages):
            repeats = stage.repeats if lite and i in (0, len(stages) - 1) else math.ceil(stage.repeats * depth)
            features = round_channels(stage.channels, width)
            for j in range(repeats):
                stride = stage.stride if j == 0 else 1
                self._blocks.append(LukemelasBlock(inputs, stage, features, stride, norm, squeeze, act))
                inputs = features
        head = 1280 if lite else round_channels(1280, width)
        self._conv_head, self._bn1, self._fc = conv(True, inputs, head), norm(head), nn.Linear(head, classes)

    def features(self, x):
        x = self.act(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return self.act(self._bn1(self._conv_head(x)))

    def forward(self, x):
        return self._fc(self.features(x).mean((2, 3)))

"""MobileNetV2 in PyTorch as torchvision has it: for parity tests. That of timm is `TimmEfficientNet`."""

from torch import nn

from .torch_efficientnet import Norms, Stage, TimmEfficientNet, conv, conv_norm_act, round_channels

STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(3, 3, 2, 6, 32),
    Stage(4, 3, 2, 6, 64),
    Stage(3, 3, 1, 6, 96),
    Stage(3, 3, 2, 6, 160),
    Stage(1, 3, 1, 6, 320),
)


def timm_mobilenet(width=1.0, depth=1.0, fixed=False, classes=1000):
    """`mobilenetv2_*`: with `fixed`, the first and last convolution and the repeats of the end stages do not scale."""
    settings = {"squeeze": 0, "act": nn.ReLU6, "fixed": fixed, "classes": classes}
    # Below a multiplier of one the last convolution keeps its width.
    model = TimmEfficientNet(STAGES, width, depth, **settings)
    if width < 1 and not fixed:
        inputs = model.conv_head.in_channels
        model.conv_head, model.bn2 = conv(False, inputs, 1280), nn.BatchNorm2d(1280)
        model.classifier = nn.Linear(1280, classes)
    return model


class InvertedResidual(nn.Module):
    def __init__(self, inputs, stage, features, stride, norm):
        super().__init__()
        inner = round(inputs * stage.ratio)
        self.skip = stride == 1 and inputs == features
        layers = [conv_norm_act(inputs, inner, norm, act=nn.ReLU6)] if stage.ratio != 1 else []
        layers.append(conv_norm_act(inner, inner, norm, 3, stride, inner, act=nn.ReLU6))
        self.conv = nn.Sequential(*layers, conv(False, inner, features), norm(features))

    def forward(self, x):
        return x + self.conv(x) if self.skip else self.conv(x)


class TorchvisionMobileNetV2(nn.Module):
    def __init__(self, stages=STAGES, width=1.0, divisor=8, classes=1000):
        super().__init__()
        norm, inputs = Norms(1e-5, 0.1), round_channels(32, width, divisor)
        layers = [conv_norm_act(3, inputs, norm, 3, 2, act=nn.ReLU6)]
        for stage in stages:
            features = round_channels(stage.channels, width, divisor)
            for j in range(stage.repeats):
                layers.append(InvertedResidual(inputs, stage, features, stage.stride if j == 0 else 1, norm))
                inputs = features
        head = round_channels(1280, max(1.0, width), divisor)
        self.features = nn.Sequential(*layers, conv_norm_act(inputs, head, norm, act=nn.ReLU6))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))

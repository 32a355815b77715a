"""VGG in PyTorch with the names of torchvision and of timm: the reference where neither is installed.

Written from the paper (arXiv 1409.1556) and the two libraries' state dicts. `extract` gives the last map of features,
and what the second dense layer makes of it.
"""

import torch
from torch import nn
from torch.nn import functional


def features(config):
    """The convolutions as one sequence, in which activations and maxima have an index as well."""
    layers, inputs = [], config.num_channels
    for width, depth in zip(config.widths, config.depths, strict=True):
        for _ in range(depth):
            norm = [nn.BatchNorm2d(width)] if config.batch_norm else []
            layers += [nn.Conv2d(inputs, width, 3, padding=1), *norm, nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


class Torchvision(nn.Module):
    """`features.N`, `classifier.0`, `classifier.3` and `classifier.6`."""

    def __init__(self, config, outputs):
        super().__init__()
        size, width = config.pool_size, config.widths[-1]
        self.features = features(config)
        self.avgpool = nn.AdaptiveAvgPool2d(size)
        self.classifier = nn.Sequential(
            nn.Linear(width * size * size, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, outputs),
        )

    def extract(self, pixels):
        spatial = self.features(pixels)
        return spatial, self.classifier[:5](torch.flatten(self.avgpool(spatial), 1))

    def forward(self, pixels):
        return self.classifier[5:](self.extract(pixels)[1])


class Timm(nn.Module):
    """`features.N`, `pre_logits.fc1` and `pre_logits.fc2` that are convolutions, and `head.fc`."""

    def __init__(self, config, outputs):
        super().__init__()
        self.features = features(config)
        self.pre_logits = nn.Module()
        self.pre_logits.fc1 = nn.Conv2d(config.widths[-1], config.hidden, config.pool_size)
        self.pre_logits.fc2 = nn.Conv2d(config.hidden, config.hidden, 1)
        self.head = nn.Module()
        self.head.fc = nn.Linear(config.hidden, outputs)
        self.size = config.pool_size

    def extract(self, pixels):
        spatial = x = self.features(pixels)
        if min(x.shape[2:]) < self.size:
            x = functional.adaptive_avg_pool2d(x, [max(extent, self.size) for extent in x.shape[2:]])
        x = functional.relu(self.pre_logits.fc1(x))
        return spatial, functional.relu(self.pre_logits.fc2(x)).mean((2, 3))

    def forward(self, pixels):
        return self.head.fc(self.extract(pixels)[1])


class Backbone(nn.Module):
    """`features.N` alone; pooled features are the mean over positions."""

    def __init__(self, config):
        super().__init__()
        self.features = features(config)

    def extract(self, pixels):
        spatial = self.features(pixels)
        return spatial, spatial.mean((2, 3))

"""ViT in PyTorch with the names that tensors have in timm and torchvision."""

import torch
from torch import nn
from torch.nn import functional


class _Attention(nn.Module):
    def __init__(self, width, heads, qkv_bias):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class _TimmBlock(nn.Module):
    def __init__(self, width, heads, hidden, qkv_bias):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


class TimmViT(nn.Module):
    """timm's `VisionTransformer`; with `distilled` its `VisionTransformerDistilled`.

    `pool` is timm's `global_pool`: "token" or "avg".
    """

    def __init__(
        self,
        size,
        patch,
        width,
        depth,
        heads,
        hidden,
        outputs,
        channels=3,
        qkv_bias=True,
        pool="token",
        distilled=False,
    ):
        super().__init__()
        self.grid, self.pool, self.prefix = (size[0] // patch, size[1] // patch), pool, 1 + distilled
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid[0] * self.grid[1] + self.prefix, width))
        self.blocks = nn.Sequential(*(_TimmBlock(width, heads, hidden, qkv_bias) for _ in range(depth)))
        if pool == "avg":
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, outputs)
        if distilled:
            self.dist_token = nn.Parameter(torch.randn(1, 1, width))
            self.head_dist = nn.Linear(width, outputs)

    def tokens(self, pixels):
        """Tokens `[batch, tokens, width]`, normalised unless the norm comes after the mean."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        first = [self.cls_token, self.dist_token] if self.prefix == 2 else [self.cls_token]
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in first), x], dim=1) + self.pos_embed
        x = self.blocks(x)
        return x if self.pool == "avg" else self.norm(x)

    def features(self, pixels):
        """The map `[batch, width, height, width]` and the features that classifiers are given."""
        x = self.tokens(pixels)
        spatial = x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        if self.pool == "avg":
            return spatial, self.fc_norm(x[:, self.prefix :].mean(1))
        return spatial, x[:, : self.prefix].flatten(1)

    def forward(self, pixels):
        """Logits; of a distilled model, the mean of its two classifiers."""
        pooled = self.features(pixels)[1]
        if self.prefix == 1:
            return self.head(pooled)
        first, second = pooled.chunk(2, dim=1)
        return (self.head(first) + self.head_dist(second)) / 2


class _TorchvisionBlock(nn.Module):
    def __init__(self, width, heads, hidden):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _TorchvisionEncoder(nn.Module):
    def __init__(self, length, width, depth, heads, hidden):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, length, width))
        blocks = {f"encoder_layer_{i}": _TorchvisionBlock(width, heads, hidden) for i in range(depth)}
        self.layers = nn.ModuleDict(blocks)
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        x = x + self.pos_embedding
        for block in self.layers.values():
            x = block(x)
        return self.ln(x)


class TorchvisionViT(nn.Module):
    """torchvision's `VisionTransformer`, of square pictures."""

    def __init__(self, edge, patch, width, depth, heads, hidden, outputs):
        super().__init__()
        self.grid = (edge // patch, edge // patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, patch, stride=patch)
        self.encoder = _TorchvisionEncoder((edge // patch) ** 2 + 1, width, depth, heads, hidden)
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(width, outputs))

    def features(self, pixels):
        """The map `[batch, width, height, width]` and the class token's features."""
        x = self.conv_proj(pixels).flatten(2).transpose(1, 2)
        x = self.encoder(torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1))
        return x[:, 1:].transpose(1, 2).unflatten(2, self.grid), x[:, 0]

    def forward(self, pixels):
        """Logits."""
        return self.heads(self.features(pixels)[1])

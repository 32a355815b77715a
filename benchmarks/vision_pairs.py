"""The same network in jtl and in PyTorch, with random weights, for the vision benchmarks.

PyTorch runs eagerly with channels-last tensors, or compiled; ResNet and ViT are those of transformers, MobileNetV2
and EfficientNet-Lite0 the references of the parity tests.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtl

CLASSES, RATE = 10, 1e-3
VARIANTS = {
    "EfficientNet-Lite0": "tf_efficientnet_lite0",
    "MobileNetV2": "mobilenetv2_100",
    "ResNet-50": "resnet50",
    "ViT-B/16": "vit_base_patch16_224",
}


def pictures(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise `[batch, 224, 224, 3]` and labels."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 224, 224, 3)).astype(np.float32), rng.integers(0, CLASSES, batch).astype(np.int32)


def ours(name: str, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The jtl model, computing in `dtype` from float32 parameters, and its variables."""
    head = jtl.heads.Linear(CLASSES)
    model, variables = jtl.load(VARIANTS[name], head, key=jax.random.key(0), pretrained=False)
    if dtype == jnp.float32:
        return model, variables
    fused = {"attention": "cudnn"} if name.startswith("ViT") and jax.default_backend() == "gpu" else {}
    return model.clone(dtype=dtype, **fused), variables


def our_inference(name: str, batch: int, dtype: Any = jnp.float32) -> Callable[[], Any]:
    """A compiled call of the whole network in evaluation."""
    model, variables = ours(name, dtype)
    run, images = jax.jit(model.apply), jax.device_put(pictures(batch)[0])
    return lambda: jax.block_until_ready(run(variables, images))


def our_step(name: str, batch: int, dtype: Any = jnp.float32) -> Callable[[], Any]:
    """A compiled step of full fine-tuning with AdamW."""
    model, variables = ours(name, dtype)
    tx, loss_fn = optax.adamw(RATE), jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, tx, trainable=jtl.everything(), key=jax.random.key(1))
    step = jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0)
    images, labels = map(jax.device_put, pictures(batch))

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, {"images": images, "label": labels})
        jax.block_until_ready((state, metrics))

    return run


def theirs(name: str) -> Any:
    """The PyTorch module, channels last, on the GPU where there is one."""
    import torch
    import transformers

    from tests.models import torch_efficientnet, torch_mobilenet

    torch.manual_seed(0)
    if name == "EfficientNet-Lite0":
        model = torch_efficientnet.LukemelasEfficientNet(lite=True, classes=CLASSES)
    elif name == "MobileNetV2":
        model = torch_mobilenet.TorchvisionMobileNetV2(classes=CLASSES)
    elif name == "ResNet-50":
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=CLASSES))
    else:
        model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=CLASSES))
    return model.to(device(), memory_format=torch.channels_last)


def device() -> str:
    """Where PyTorch computes: where jax does."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def their_forward(name: str, model: Any, dtype: Any) -> Callable[[Any], Any]:
    """Logits of a batch, under autocast unless in float32."""
    import torch

    half = dtype == jnp.bfloat16

    def forward(images: Any) -> Any:
        with torch.autocast(device(), torch.bfloat16, enabled=half):
            out = model(images)
        return out.logits if hasattr(out, "logits") else out

    return forward


def their_batch(batch: int) -> tuple[Any, Any]:
    """Pictures and labels as PyTorch takes them."""
    import torch

    images, labels = pictures(batch)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)  # of NHWC memory: channels last already
    return pixels.to(device()), torch.from_numpy(labels).long().to(device())


def wait() -> None:
    """Until PyTorch's device has done all that was asked."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


def their_inference(name: str, batch: int, dtype: Any = jnp.float32, *, compiled: bool = False) -> Callable[[], Any]:
    """A call of the whole network in evaluation, without gradients."""
    import torch

    model = theirs(name).eval()
    forward = their_forward(name, torch.compile(model) if compiled else model, dtype)
    images, _ = their_batch(batch)

    def run() -> None:
        with torch.inference_mode():
            forward(images)
        wait()

    return run


def their_step(name: str, batch: int, dtype: Any = jnp.float32, *, compiled: bool = False) -> Callable[[], Any]:
    """A step of full fine-tuning with AdamW."""
    import torch

    model = theirs(name).train()
    forward = their_forward(name, torch.compile(model) if compiled else model, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    images, labels = their_batch(batch)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        wait()

    return run

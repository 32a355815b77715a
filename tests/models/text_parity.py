"""What the parity tests of the families of texts share: a random reference, loading, gradients, one training step.

    reference = randomised("BertForMaskedLM", {"hidden_size": 15, ...}, seed)
    model, variables = loaded(reference, folder)
    check_gradients(gradients, grown(model, [(name, parameter.grad) for name, parameter in ...]))
    check_step(reference, model, variables, inputs, labels)

The reference's gradients are computed in float64, so that an error is ours alone.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl.models import naming, registry
from jtl.weights import convert

from .pictures_parity import run_once


def randomised(kind, settings, seed):
    """A model of transformers in float32 and evaluation mode with every parameter random, biases and norms too.

    Args:
      kind: the name of its class; the words before `Model` or `For` are those of its configuration.
      settings: of its configuration.
      seed: of the values.
    """
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, re.sub(r"(Model|For[A-Z]\w+|LMHeadModel|DoubleHeadsModel)$", "Config", kind))
    model = getattr(transformers, kind)(config(**settings, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def loaded(reference, folder, *args, **settings):
    """What `jtl.load` makes of the folder to which the reference is written."""
    reference.save_pretrained(folder)
    return jtl.load(folder, *args, **settings)


def to_torch(inputs):
    """Integers of numpy as those of torch."""
    import torch

    return {name: torch.from_numpy(np.asarray(value)).long() for name, value in inputs.items()}


def to_jax(inputs):
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def by_path(model, named):
    """Torch tensors by name, as a tree of the model's params; strict both ways."""
    layout = naming.layout_of(model)
    values = {layout.rename(name): value.detach().float().numpy() for name, value in named}
    inputs = registry.of_model(model).example(model.config)
    zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
    target = jax.eval_shape(lambda: model.init(jax.random.key(0), **zeros))["params"]
    ignored = [*layout.ignored(model.config), *layout.heads(model.config)]
    return convert.convert(target, values, layout.keys(model.config), ignored=ignored)


def reference_gradients(model, reference, total):
    """The gradient of `total(reference)`, computed in float64, as a tree of the model's params."""
    total(reference.double()).backward()
    found = [(name, parameter.grad) for name, parameter in _parameters(reference)]
    reference.float().zero_grad()
    return by_path(model, found)


def _parameters(reference):
    """By name; tied ones by each of their names, of which the layouts leave the copies out."""
    return reference.named_parameters(remove_duplicate=False)


def check_gradients(got, right):
    """Of each leaf, the norm of the difference to 1e-4 of the norm of the reference.

    A softmax does not change when all its scores move alike, so the gradient of a key's bias is zero in exact
    arithmetic and rounding noise in any other: for all leaves a difference of 1e-7 of the global norm is allowed.
    """
    floor = 1e-7 * float(optax.tree.norm(right))
    for (path, a), b in zip(jtl.tree.leaves_with_paths(got), jax.tree.leaves(right), strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + floor, path


def check_step(reference, model, variables, inputs, labels):
    """Loss, and every leaf's update, of one step of AdamW on a classifier of texts.

    Adam divides each gradient by its own size, rounding noise too; an epsilon far above the noise keeps it noise.
    """
    import torch

    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.1}
    tx = optax.adamw(1e-2, **settings)
    state, frozen = jtl.init(variables, tx, trainable=jtl.everything(), key=jax.random.key(0))
    step = jtl.train_step(jtl.supervised(model, jtl.losses.cross_entropy), tx)
    state, metrics = run_once(step, state, frozen, to_jax({**inputs, "label": labels}))

    before = {name: parameter.detach().clone() for name, parameter in _parameters(reference)}
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    loss = reference(**to_torch(inputs), labels=torch.from_numpy(labels).long()).loss
    loss.backward()
    optimizer.step()
    np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-5)
    expected = by_path(model, [(name, parameter - before[name]) for name, parameter in _parameters(reference)])
    got = jax.tree.map(jnp.subtract, state.params, variables["params"])
    for (path, left), right in zip(jtl.tree.leaves_with_paths(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6, err_msg=path)

"""`jtl audit`: proof that each phase of a strategy trains what its mask says, on random examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import jtl
from jtl.errors import ConfigError
from jtl.models import registry
from jtl.recipes import ways
from jtl.recipes.settings import Audit
from jtl.report import audit_table
from jtl.typing import Batch


def run(settings: Audit, console: Console) -> list[jtl.Audit]:
    """Audit every phase, and print what was found.

    Args:
      settings: as the command line gives them.
      console: where to print.

    Returns:
      One audit a phase.

    Raises:
      AuditError: a phase does something else than its mask says.
      JtlError: whatever is wrong with the settings.
    """
    # The first step of a warm-up has a learning rate of zero.
    if min(settings.batch_size, settings.outputs, settings.steps) < 2 or settings.length < 1:
        raise ConfigError("batch_size, outputs and steps must be at least 2, and length at least 1")
    head = jtl.heads.classifier(settings.outputs)
    model, variables = jtl.load(settings.model, head, key=jax.random.key(0), revision=settings.revision)
    batch = random_batch(model, settings)
    way = ways.way(settings, model, variables["params"], 100)
    loss_fn = jtl.supervised(way.model(model), jtl.losses.cross_entropy)
    variables, found = way.variables(variables, jax.random.key(1)), []
    state, frozen = jtl.init(variables, way.strategy, key=jax.random.key(2))
    for number, phase in enumerate(way.strategy.phases):
        if number:
            state, frozen = jtl.change(state, frozen, phase)
        step = jax.jit(jtl.train_step(loss_fn, phase.tx))
        mask = phase.trainable
        audit = jtl.audit(step, state, frozen, batch, loss_fn=loss_fn, trainable=mask, steps=settings.steps)
        name = f"{way.strategy.name}, {phase.name}" if phase.name else way.strategy.name
        console.print(audit_table(audit, f"{settings.model}: {name}"))
        found.append(audit)
    for audit in found:
        audit.require()
    return found


def random_batch(model: Any, settings: Audit) -> Batch:
    """Random examples of a model of jtl's families, with labels."""
    rng, family = np.random.default_rng(0), registry.of_model(model)
    labels = jnp.asarray(rng.integers(0, settings.outputs, settings.batch_size), jnp.int32)
    if family.modality == "image":
        spec = model.config.input
        images = rng.normal(size=(settings.batch_size, *spec.size, len(spec.mean)))
        return {"image": jnp.asarray(images, jnp.float32), "label": labels}
    most = model.config.max_length
    shape = settings.batch_size, settings.length if most is None else min(settings.length, most)
    ids = jnp.asarray(rng.integers(1, model.config.vocab_size, shape), jnp.int32)
    return {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "label": labels}

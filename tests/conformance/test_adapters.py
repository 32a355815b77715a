"""What holds for adapters on every model: only they and the head are trained, and merged they say the same."""

import jax
import numpy as np
import optax
import pytest

import jtl
from jtl import peft, quantized, transforms, tree

from . import pictures
from .cases import CASES, built

STEPS = 10
HARDEST = optax.apply_if_finite(
    transforms.exponential_average(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)), 0.9
    ),
    max_consecutive_errors=2,
)

ATTENTION = ["**/attention"]
MAKERS = {
    "lora": lambda targets, **stacked: peft.lora(targets, rank=2, **stacked),
    "dora": lambda targets, **stacked: peft.dora(targets, rank=2, **stacked),
    "ia3": lambda targets, **stacked: peft.ia3(targets, **stacked),
    "bottleneck": lambda targets, **stacked: peft.bottleneck(["**/attention/output", "**/mlp/down"], width=2),
    "prompt": lambda targets, **stacked: peft.prompt(length=2),
    "prefix": lambda targets, **stacked: peft.prefix(ATTENTION, length=2),
}
NEVER_MERGED = ("bottleneck", "prompt", "prefix")

# LoRA on every model, every adapter on one Transformer, and one on a base in few bits.
RUNS = [(case, "lora", "") for case in CASES]
RUNS += [("bert", name, "") for name in MAKERS if name != "lora"]
RUNS += [("linen", "lora", "int8"), ("scan", "lora", "nf4"), *((case, "ia3", "") for case in ("linen", "vit"))]


def made(case, name, stored):
    """Model, adapter, and variables; of `scan`, the layers of `last` are stacked."""
    model, variables = built(case)
    stacked = {"stacked": ["last"]} if case == "scan" else {}
    if stored:
        variables = peft.quantize(variables, stored, trainable=jtl.select("head"), **stacked)
    kernels = [path for path, leaf in quantized.leaves(variables["params"]) if path.endswith("kernel")]
    adapter = MAKERS[name]([path for path in kernels if not path.startswith("head/")], **stacked)
    return model, adapter, variables, peft.attach(adapter, variables, key=jax.random.key(3))


def loss_of(model):
    return jtl.supervised(model, jtl.losses.cross_entropy)


@pytest.mark.parametrize(("case", "name", "stored"), RUNS)
def test_the_laws_of_adapters(case, name, stored):
    model, adapter, variables, attached = made(case, name, stored)
    delta = peft.detach(adapter, attached)[1]
    assert tree.nbytes(attached) == tree.nbytes(variables) + tree.nbytes(delta), "the base is not copied"

    loss_fn, mask = loss_of(peft.adapted(model, adapter)), jtl.select(f"**/{adapter.name}", "head")
    state, frozen = jtl.init(attached, HARDEST, trainable=mask, key=jax.random.key(0))
    head = variables["params"]["head"]
    assert tree.size(state.params) == tree.size(delta) + tree.size(head)

    step, compiled = jax.jit(jtl.train_step(loss_fn, HARDEST)), None
    for seed in range(STEPS):
        batch = CASES[case].batch(seed)
        compiled = compiled or step.lower(state, frozen, batch).compile()
        state, _ = compiled(state, frozen, batch)  # another shape or structure would be refused
    plain, learnt = peft.detach(adapter, jtl.variables(state, frozen))
    held = [path for path in tree.paths(variables) if not path.startswith("params/head/")]
    before, after = (dict(tree.leaves_with_paths(whole)) for whole in (variables, plain))
    for path in held:
        assert np.asarray(after[path]).tobytes() == np.asarray(before[path]).tobytes(), path
    pairs = zip(jax.tree.leaves(learnt), jax.tree.leaves(delta), strict=True)
    moved = [np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs]
    assert sum(moved) > len(moved) / 2

    if name not in NEVER_MERGED:
        merged = peft.merge(adapter, peft.dequantize(jtl.variables(state, frozen)))
        assert tree.paths(merged) == tree.paths(peft.dequantize(variables))
        batch = CASES[case].batch(99)
        running = _losses(peft.adapted(model, adapter), jtl.variables(state, frozen), batch)
        np.testing.assert_allclose(running, _losses(model, merged, batch), rtol=1e-5, atol=1e-5)


def _losses(model, variables, batch):
    """The loss of each example, in evaluation."""
    loss_fn = loss_of(model)

    def losses(variables):
        collections = {name: value for name, value in variables.items() if name != "params"}
        singles = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch) for i in range(2)]
        return [loss_fn(variables["params"], collections, single, key=None)[0] for single in singles]

    return jax.jit(losses)(variables)


def test_every_family_is_there():
    assert set(pictures.CONFIGS) | {"bert"} <= {case for case, _, _ in RUNS}

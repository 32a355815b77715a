"""The audit: clean steps pass, and every planted fault is found."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors
from jtl.state import standard_promotion

RNG = np.random.default_rng(0)
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(16, 32)), jnp.float32),
    "label": jnp.asarray(RNG.integers(0, 3, 16), jnp.int32),
}
HEAD = jtl.select("head")


class Net(nn.Module):
    """Layers wide enough for the operations to be those of the layers."""

    stubborn: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        for name in ("stem", "block"):
            x = nn.Dense(32, name=name)(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")(x)
            x = nn.Dropout(0.1, deterministic=not train, name=f"{name}_dropout")(nn.relu(x))
        return nn.Dense(3, name="head")(x)


MODEL = Net()
VARIABLES = MODEL.init(jax.random.key(0), BATCH["x"])
LOSS = jtl.supervised(MODEL, jtl.losses.cross_entropy)
CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0), optax.apply_if_finite(optax.adamw(1e-2, weight_decay=0.1), max_consecutive_errors=3)
)


def failed(report):
    return {finding.check for finding in report.findings if not finding.ok}


@pytest.mark.parametrize("mask", [HEAD, HEAD | jtl.select("block"), jtl.masks.norms() | HEAD, jtl.everything()])
@pytest.mark.parametrize("jitted", [True, False])
def test_a_step_of_jtl_passes(mask, jitted):
    state, frozen = jtl.init(VARIABLES, CHAIN, trainable=mask, key=jax.random.key(1))
    step = jtl.train_step(LOSS, CHAIN, grad_norm=True)
    step = jax.jit(step, donate_argnums=0) if jitted else step
    report = jtl.audit(step, state, frozen, BATCH, loss_fn=LOSS).require()
    assert report.ok
    assert report.trained + report.frozen == jtl.tree.size(VARIABLES["params"])
    assert report.frozen_bytes == 4 * report.frozen
    assert report.state_bytes == jtl.tree.nbytes(state)
    modes = {(module.path, module.mode) for module in report.modules}
    trained = {path.split("/")[0] for path in jtl.tree.paths(state.params)}
    for name in ("stem_norm", "block_norm"):
        assert (name, "batch statistics" if name in trained else "running statistics") in modes


def whole_tree(gradient_of, tx):
    """A loop of one's own: whole trees, and an optimizer that is meant to hold still what is frozen."""

    def step(state, frozen, batch):
        variables, opt_state = state
        rest = {name: value for name, value in variables.items() if name != "params"}
        grads = jax.grad(lambda params: gradient_of(params, rest, batch))(variables["params"])
        with standard_promotion():
            updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, "params": params}, opt_state), {}

    return step, (VARIABLES, tx.init(VARIABLES["params"]))


def plain(params, rest, batch):
    return LOSS(params, rest, batch, key=None)[0]


def audit_whole(step, state, mask=HEAD, **settings):
    return jtl.audit(step, state, (), BATCH, trainable=mask, whole=lambda state, frozen: state[0], **settings)


def test_a_loop_of_ones_own_passes_when_it_is_right():
    tx = jtl.finetune(optax.adamw(1e-2), trainable=HEAD)
    assert failed(audit_whole(*whole_tree(plain, tx))) == set()


def test_decay_of_frozen_leaves_is_found():
    """`adamw` behind a mask of the gradients: their zeros do not stop the decay."""
    tx = optax.chain(optax.masked(optax.set_to_zero(), ~HEAD), optax.adamw(1e-2, weight_decay=0.1))
    report = audit_whole(*whole_tree(plain, tx))
    assert failed(report) == {"frozen drift"}
    with pytest.raises(errors.AuditError, match=r"8 of 12 frozen leaves|frozen leaves and statistics moved: params/"):
        report.require()


def test_a_clip_over_the_whole_tree_is_found():
    frozen = optax.multi_transform({"train": optax.adam(1e-2), "hold": optax.set_to_zero()}, _labels)
    tx = optax.chain(optax.clip_by_global_norm(1.0), frozen)
    report = audit_whole(*whole_tree(plain, tx), loss_fn=LOSS)
    assert failed(report) == {"operations"}
    assert report.ideal_flops is not None
    assert report.flops > 1.5 * report.ideal_flops
    right = whole_tree(plain, optax.chain(frozen))
    assert failed(audit_whole(*right, loss_fn=LOSS)) == set()


def _labels(params):
    return jax.tree.map(lambda keep: "train" if keep else "hold", HEAD(params))


def test_a_leaf_that_a_loss_has_by_a_closure_is_found():
    kernel = VARIABLES["params"]["block"]["kernel"]

    def closing(params, collections, batch, *, key):
        params = {**params, "block": {**params["block"], "kernel": kernel}}
        return LOSS(params, collections, batch, key=key)

    for mask, expected in ((HEAD, {"closures"}), (HEAD | jtl.select("block"), {"closures", "trained leaves"})):
        state, frozen = jtl.init(VARIABLES, CHAIN, trainable=mask, key=jax.random.key(1))
        report = jtl.audit(jtl.train_step(closing, CHAIN), state, frozen, BATCH, loss_fn=closing)
        assert failed(report) == expected
        assert "block/kernel" in str(report.findings)


def test_a_frozen_leaf_that_a_closure_trains_is_found():
    """The gradient of a frozen leaf, taken and applied outside of the state."""
    step = jtl.train_step(LOSS, CHAIN)
    state, frozen = jtl.init(VARIABLES, CHAIN, trainable=HEAD, key=jax.random.key(1))
    frozen = frozen._replace(params=jax.tree.map(lambda leaf: leaf, frozen.params))

    def sneaky(state, given, batch):
        kernel = frozen.params["stem"]["kernel"]
        frozen.params["stem"]["kernel"] = kernel - 0.01 * jnp.ones_like(kernel)
        return step(state, given, batch)

    report = jtl.audit(sneaky, state, frozen, BATCH)
    assert "frozen drift" in failed(report)
    assert "params/stem/kernel" in str(report.findings)


class Stubborn(nn.Module):
    """Trains its statistics whatever is frozen."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, name="norm")(nn.Dense(32, name="stem")(x))
        x = nn.Dropout(0.5, deterministic=False, name="dropout")(x)
        return nn.Dense(3, name="head")(x)


def test_training_modes_under_a_frozen_subtree_are_found():
    model = Stubborn()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, BATCH["x"])
    tx = jtl.finetune(optax.adam(1e-2), trainable=HEAD)

    def step(state, frozen, batch):
        variables, opt_state = state

        def loss(params):
            given = {**variables, "params": params}
            rngs = {"dropout": jax.random.key(3)}
            logits, moved = model.apply(given, batch["x"], mutable=["batch_stats"], rngs=rngs)
            return jtl.losses.cross_entropy(logits, batch["label"]).mean(), moved

        grads, moved = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({"params": params, **moved}, opt_state), {}

    report = audit_whole(step, (variables, tx.init(variables["params"])))
    assert failed(report) == {"frozen drift", "modes"}
    assert "norm (BatchNorm) is frozen, with batch statistics" in str(report.findings)
    # The same model in a step of jtl is held by the mask.
    loss = jtl.supervised(model, jtl.losses.cross_entropy)
    state, frozen = jtl.init(variables, CHAIN, trainable=HEAD, key=jax.random.key(1))
    assert failed(jtl.audit(jtl.train_step(loss, CHAIN), state, frozen, BATCH, loss_fn=loss)) == set()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tie_half_in_the_mask_is_found(transposed):
    table = jnp.asarray(RNG.normal(size=(32, 3)), jnp.float32)
    twin = table.T.copy() if transposed else table
    params = {"embed": {"table": twin}, "head": {"kernel": table}}
    model = jtl.from_function(lambda params, x: x @ params["head"]["kernel"] + jnp.sum(params["embed"]["table"]))
    loss, tx = jtl.supervised(model, jtl.losses.cross_entropy), optax.sgd(0.1)
    state, frozen = jtl.init({"params": params}, tx, trainable=HEAD, key=jax.random.key(0))
    report = jtl.audit(jtl.train_step(loss, tx), state, frozen, BATCH)
    assert failed(report) == {"ties"}
    assert "head/kernel is trained and embed/table" in str(report.findings)


def test_what_cannot_be_audited_is_refused():
    state, frozen = jtl.init(VARIABLES, CHAIN, trainable=HEAD, key=jax.random.key(1))
    step = jtl.train_step(LOSS, CHAIN)
    with pytest.raises(errors.ConfigError, match="steps=0"):
        jtl.audit(step, state, frozen, BATCH, steps=0)
    with pytest.raises(errors.ConfigError, match="pass trainable="):
        jtl.audit(step, (VARIABLES,), (), BATCH, whole=lambda state, frozen: state[0])
    with pytest.raises(errors.ConfigError, match=r"another mask.*block/bias"):
        jtl.audit(step, state, frozen, BATCH, trainable=HEAD | jtl.select("block"))


def test_each_part_of_the_mask_tells_its_leaves():
    mask = jtl.select("head", "**/bias") | (jtl.masks.norms() - jtl.select("stem_norm"))
    state, frozen = jtl.init(VARIABLES, CHAIN, trainable=mask, key=jax.random.key(1))
    report = jtl.audit(jtl.train_step(LOSS, CHAIN), state, frozen, BATCH, trainable=mask).require()
    found = {rule.text: (rule.paths, rule.size) for rule in report.rules}
    assert found == {
        "select('head')": (("head/bias", "head/kernel"), 99),
        "select('**/bias')": (("block/bias", "block_norm/bias", "head/bias", "stem/bias", "stem_norm/bias"), 131),
        "(norms() - select('stem_norm'))": (("block_norm/bias", "block_norm/scale"), 64),
    }
    assert report.unmatched == ("block/kernel", "stem/kernel", "stem_norm/scale")
    nameless = jtl.audit(jtl.train_step(LOSS, CHAIN), state, frozen, BATCH)
    assert [(rule.text, rule.size) for rule in nameless.rules] == [("the mask", report.trained)]

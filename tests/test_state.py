"""`init`, `variables` and `freeze`: what is copied, what is refused, what goes where."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors
from jtl.state import freeze

KEY = jax.random.key(0)
PARAMS = {"stem": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}}


def init(variables=None, trainable=None, key=KEY, tx=None):
    return jtl.init(
        {"params": PARAMS} if variables is None else variables,
        tx or optax.adam(1e-3),
        trainable=trainable or jtl.select("head"),
        key=key,
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"trainable": jtl.select("haed")}, errors.PatternError, "'haed' matches none of the 3 leaves.*head"),
        ({"trainable": jtl.select("head") & jtl.select("stem")}, errors.MaskError, "trains none of the 3 leaves"),
        ({"trainable": {"stem": True, "head": False}}, errors.MaskError, "structures differ"),
        ({"trainable": "head"}, errors.MaskError, r"select\('head'\)"),
        ({"trainable": jax.tree.map(lambda _: 1, PARAMS)}, errors.MaskError, "expected a bool"),
        ({"variables": PARAMS}, errors.ConfigError, r"\{'params'"),
        ({"variables": {"params": {"head": jnp.arange(3)}}}, errors.MaskError, "int32: only floats"),
        ({"key": jnp.zeros(2, jnp.uint32)}, errors.ConfigError, "typed random key"),
    ],
    ids=["typo", "nothing", "structure", "string", "number", "no params", "integers", "legacy key"],
)
def test_what_cannot_be_trained_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        init(**arguments)


def test_trained_leaves_are_copied_and_frozen_ones_shared():
    state, frozen = init()
    assert frozen.params["stem"]["kernel"] is PARAMS["stem"]["kernel"]
    jax.tree.map(lambda leaf: leaf.delete(), state.params)
    assert np.all(np.asarray(PARAMS["head"]["kernel"]) == 1)


def test_a_transform_that_keeps_the_params_it_was_given_can_be_donated():
    tx = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    loss_fn = jtl.supervised(jtl.from_function(lambda p, x: x @ p["head"]["kernel"]), jtl.losses.squared_error)
    state, frozen = init(tx=tx, trainable=jtl.everything())
    step = jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0)
    batch = {"x": jnp.ones((2, 3)), "label": jnp.zeros(2)}
    state, _ = step(state, frozen, batch)
    assert int(step(state, frozen, batch)[0].step) == 2


def test_trained_leaves_are_at_least_float32_and_frozen_ones_keep_their_dtype():
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    state, frozen = init({"params": low})
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert frozen.params["stem"]["kernel"].dtype == jnp.bfloat16


def test_numpy_leaves_of_any_container_are_taken():
    state, frozen = init({"params": {"stem": np.ones(2, np.float32), "head": [np.ones(1, np.float32)]}})
    assert isinstance(frozen.params["stem"], jax.Array)
    assert isinstance(state.params["head"][0], jax.Array)


def test_variables_gives_back_what_init_was_given():
    variables = {"params": PARAMS, "batch_stats": {"stem": {"mean": jnp.ones(2)}, "head": {"mean": jnp.zeros(2)}}}
    state, frozen = init(variables)
    assert jtl.tree.paths(state.collections) == ["batch_stats/head/mean"]
    assert jtl.tree.paths(frozen.collections) == ["batch_stats/stem/mean"]
    assert jtl.tree.digest(jtl.variables(state, frozen)) == jtl.tree.digest(variables)


def test_frozen_states_of_all_masks_have_one_structure_and_evaluate_alike():
    variables = nn.Dense(3).init(KEY, jnp.ones((1, 2)))
    loss_fn = jtl.supervised(nn.Dense(3), jtl.losses.cross_entropy)
    step = jax.jit(jtl.eval_step(loss_fn))
    batch = {"x": jnp.ones((2, 2)), "label": jnp.array([0, 2])}
    values = []
    for mask in (jtl.select("bias"), jtl.select("kernel"), jtl.everything()):
        state, frozen = init(variables, mask)
        plain = step(state, frozen, batch)["loss"].compute()
        values += [plain, step(*freeze(state, frozen), batch)["loss"].compute()]
    np.testing.assert_allclose(values, values[0], rtol=1e-6)
    assert step._cache_size() == 3 + 1

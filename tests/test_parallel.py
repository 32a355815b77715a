"""Meshes and placement; training on many devices equals training on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, parallel

many = pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices: JTL_TEST_DEVICES=8")


class Net(nn.Module):
    """A dense layer, BatchNorm and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(6, use_bias=False, name="stem")(x))
        return nn.Dense(3, name="head")(nn.relu(x))


def data(batches: int, size: int = 16):
    rng = np.random.default_rng(0)
    for _ in range(batches):
        x = rng.normal(size=(size, 5)).astype(np.float32)
        # Unequal halves: statistics of a replica alone would differ from those of the batch.
        x[: size // 2] += 3
        yield {"x": x, "label": rng.integers(0, 3, size).astype(np.int32)}


def trained(mesh, mask):
    variables = Net().init(jax.random.key(0), jnp.ones((1, 5)))
    loss_fn, tx = jtl.supervised(Net(), jtl.losses.cross_entropy), optax.adam(1e-2)
    state, frozen = jtl.init(variables, tx, trainable=mask, key=jax.random.key(1))
    held_out = list(data(2))
    *_, report = jtl.fit(loss_fn, tx, state, frozen, data(5), held_out=lambda: held_out, mesh=mesh)
    return jtl.variables(report.state, frozen), report.evaluation


@many
@pytest.mark.parametrize("mask", [jtl.everything(), jtl.select("head")], ids=repr)
def test_training_on_a_mesh_equals_training_on_one_device(mask):
    (single, score), (sharded, sharded_score) = trained(None, mask), trained(parallel.data_mesh(), mask)
    for path, leaf in jtl.tree.leaves_with_paths(single):
        found = dict(jtl.tree.leaves_with_paths(sharded))[path]
        np.testing.assert_allclose(found, leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    assert sharded_score == pytest.approx(score, rel=1e-5)


@many
def test_a_batch_lies_split_over_the_mesh_and_a_replica_whole_on_each_device():
    mesh = parallel.data_mesh()
    batch = parallel.shard_batch({"x": np.ones((2 * mesh.size, 3), np.float32)}, mesh)
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 3)}
    copy = parallel.replicate({"w": jnp.ones(3)}, mesh)
    assert [shard.data.shape for shard in copy["w"].addressable_shards] == [(3,)] * mesh.size


@many
@pytest.mark.parametrize(("size", "relation"), [(1, "smaller than"), (jax.device_count() + 1, "not a multiple of")])
def test_a_batch_that_does_not_fit_the_mesh_is_refused(size, relation):
    mesh = parallel.data_mesh()
    with pytest.raises(errors.DataError, match=f"a batch of {size} examples is {relation} the {mesh.size} devices"):
        parallel.shard_batch({"x": np.ones((size, 3))}, mesh)


def test_a_mesh_over_chosen_devices_has_the_axis_data():
    mesh = parallel.data_mesh(jax.devices()[:1])
    assert mesh.axis_names == ("data",)
    assert mesh.size == 1


def test_an_entry_without_a_batch_axis_is_refused():
    with pytest.raises(errors.DataError, match="single number"):
        parallel.shard_batch({"x": np.ones((8, 3)), "temperature": np.float32(1)}, parallel.data_mesh())

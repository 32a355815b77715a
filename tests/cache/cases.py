"""A small model with frozen layers, its loss and its rows."""

import flax.linen as nn
import jax
import numpy as np
import optax

import jtl
from jtl.data import batches


class Net(nn.Module):
    """Two frozen layers and a head, for rows `[batch, 5]`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(7, name="stem")(x))
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="middle")(x))
        return nn.Dense(3, name="head")(x)


class Case:
    """A model, a loss, a mask and rows."""

    def __init__(self, trainable=None, rows=22):
        rng = np.random.default_rng(0)
        self.x, self.y = rng.normal(size=(rows, 5)).astype(np.float32), rng.integers(0, 3, rows)
        self.model, self.tx = Net(), optax.adam(1e-2)
        self.variables = self.model.init(jax.random.key(0), self.x)
        self.loss_fn = jtl.supervised(self.model, jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})
        self.trainable = trainable or jtl.select("head")
        self.state, self.frozen = self.init(self.variables)

    def init(self, variables, seed=1):
        return jtl.init(variables, self.tx, trainable=self.trainable, key=jax.random.key(seed))

    def run(self, **options):
        return batches({"x": self.x}, self.y, **{"batch_size": 4, "seed": 0, "epochs": 3, **options})

    def cut(self, **options):
        return jtl.split(self.loss_fn, self.state, self.frozen, next(iter(self.run())), **options)

    def build(self, cut=None, run=None, **options):
        cut = cut or self.cut()
        return jtl.cache.build(cut.prefix, self.state, self.frozen, self.run() if run is None else run, **options)

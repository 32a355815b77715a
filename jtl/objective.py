"""From a model and a loss of single examples to a loss function of batches."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import losses
from jtl import metrics as jmetrics
from jtl.errors import ConfigError, DataError
from jtl.modes import Modes, follow
from jtl.step import Aux
from jtl.typing import Batch, Collections, Key, Params

Metric = Callable[[jax.Array, jax.Array, jax.Array], Any]

_TRAINING = {"deterministic": False, "train": True, "training": True, "is_training": True}
"""The arguments by which models take their mode, and the value that means training."""


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that compiled steps can be found by it
class Supervised:
    """A loss function of batches; made by `supervised`, which documents the fields."""

    model: Any
    loss: losses.Loss
    metrics: Mapping[str, Metric]
    inputs: Sequence[str] | None
    target: str
    call: Mapping[str, Any]

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Aux]:
        """The weighted mean loss of a batch, its metrics, and the collections after the call."""
        outputs, collections = self.apply(params, collections, batch, key=key)
        targets = batch[self.target]
        per_example = self.loss(outputs, targets)
        weight = batch.get("weight")
        weight = jnp.ones_like(per_example) if weight is None else weight.astype(per_example.dtype)
        weigh = getattr(self.loss, "weigh", None)  # as `losses.weighted` has it
        counted = weight if weigh is None else weight * weigh(targets).astype(weight.dtype)
        mean = jmetrics.Mean(jnp.sum(per_example * weight), jnp.sum(counted))
        # Never 0/0: a batch of filler rows alone, one process's share of the last one, has loss 0.
        loss = mean.total / jnp.maximum(mean.weight, jnp.finfo(weight.dtype).tiny)
        report = {"loss": mean}
        report |= {name: metric(outputs, targets, weight) for name, metric in self.metrics.items()}
        return loss, Aux(report, collections)

    def apply(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[Any, Collections]:
        """The model's outputs and its collections after the call; `key=None` means inference."""
        args, kwargs = self._inputs(batch)
        rngs = None
        if key is not None:
            # Linen falls back to the stream "params" for any stream that has no key of its own.
            dropout, rest = jax.random.split(key)
            rngs = {"dropout": dropout, "params": rest}
        result = self.model.apply(
            {"params": params, **collections},
            *args,
            **kwargs,
            **self._mode(training=key is not None),
            rngs=rngs,
            mutable=list(collections) if key is not None else False,
        )
        outputs, updated = result if key is not None else (result, collections)
        return outputs, {**collections, **updated}

    def checker(self, params: Params, collections: Collections) -> Callable[[Batch], None]:
        """A function that refuses a batch which the model or the loss cannot mean.

        It runs on the host, and traces the model once for each shape of batch.

        Args:
          params: the whole tree, arrays or shapes.
          collections: the other collections, likewise.

        Returns:
          `check(batch)`, which raises `DataError` for a missing entry, unequal lengths, entries that are no numbers,
          inputs or weights that are not finite, of arrays on the host, inputs that the model's own `check_batch(batch)`
          refuses or that it cannot be called with, or targets out of range.
        """
        leaves, structure = jax.tree.flatten((params, collections))
        described = tuple((np.shape(leaf), jax.numpy.result_type(leaf)) for leaf in leaves)

        def shape_of(batch: Batch) -> tuple[int, ...] | None:
            entries = tuple((name, np.shape(value), _dtype(value)) for name, value in sorted(batch.items()))
            return _output_shape(self, structure, described, entries)

        def check(batch: Batch) -> None:
            self._require(batch)
            rows = {name: np.shape(value)[:1] for name, value in batch.items()}
            if len(set(rows.values())) > 1:
                raise DataError(f"the batch's entries have different lengths: {rows}")
            if rows[self.target] == (0,):
                raise DataError("the batch has no example")
            losses.check_entries(batch, self.target)
            look = getattr(self.model, "check_batch", None)  # the families of texts have it
            if look is not None:
                look(batch)
            losses.check_targets(self.loss, shape_of(batch), batch[self.target])

        return check

    def _require(self, batch: Batch) -> None:
        wanted = [self.target, *(self.inputs or ())]
        missing = [name for name in wanted if not isinstance(batch, Mapping) or name not in batch]
        if missing:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise DataError(f"the batch lacks {missing}; it has {found}")

    def _inputs(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._require(batch)
        if self.inputs is not None:
            return tuple(batch[name] for name in self.inputs), {}
        entries = {name: value for name, value in batch.items() if name not in (self.target, "weight")}
        # One input has no name to get wrong: models call it x, images, input_ids.
        return (tuple(entries.values()), {}) if len(entries) == 1 else ((), entries)

    def _mode(self, *, training: bool) -> dict[str, Any]:
        known = inspect.signature(self.model.__call__).parameters
        chosen = {name: value if training else not value for name, value in _TRAINING.items() if name in known}
        return {**chosen, **self.call}


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype  # not copied from a device for it


@functools.lru_cache(maxsize=256)
def _output_shape(
    loss: Supervised, structure: Any, leaves: tuple[Any, ...], entries: tuple[Any, ...]
) -> tuple[int, ...] | None:
    """The shape of a model's outputs, None if they are not one array; one trace for each shape of batch."""
    params, collections = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    batch = {name: jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype)) for name, shape, dtype in entries}

    def infer(params: Params, collections: Collections, batch: Batch) -> Any:
        # A model may have training written into it; then only the modes make it infer.
        with follow(Modes(params, jax.tree.map(lambda _: False, params))):
            return loss.apply(params, collections, batch, key=None)[0]

    try:
        outputs = jax.eval_shape(infer, params, collections, batch)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # whatever a model says of inputs that it cannot take
        given = ", ".join(f"{name} {np.dtype(dtype).name}{list(shape)}" for name, shape, dtype in entries)
        raise DataError(
            f"the model {type(loss.model).__name__} cannot take this batch, {given}: {type(error).__name__}: {error}"
        ) from error
    return getattr(outputs, "shape", None)


def supervised(
    model: Any,
    loss: losses.Loss,
    *,
    metrics: Mapping[str, Metric] | None = None,
    inputs: Sequence[str] | None = None,
    target: str = "label",
    call: Mapping[str, Any] | None = None,
) -> Supervised:
    """The loss function of a model on labelled batches.

    A batch is a mapping of arrays that all lead with the batch axis. Its entry `weight`, if
    there is one, weighs the examples; 0 means filler.

    Args:
      model: a linen module, or what `jtl.from_nnx` or `jtl.from_function` made of another.
      loss: `(outputs, targets) -> [batch]`, from `jtl.losses` or your own; `jtl.losses.weighted` for classes that
        weigh differently.
      metrics: by name, `(outputs, targets, weight) -> accumulator`, from `jtl.metrics` or your own.
      inputs: the batch's entries that the model takes, in the order of its arguments. By
        default all but target and weight: a single one by position, several by keyword.
      target: the batch's entry that the loss compares with.
      call: further keyword arguments for the model, by which the mode it is called in can be
        set as well. By default an argument named `train`, `training`, `is_training` or
        `deterministic` is set to training, and to inference when there is no key.

    Returns:
      A loss function for `jtl.train_step`, `jtl.eval_step` and `jtl.fit`.

    Raises:
      ConfigError: `model` cannot be applied.
    """
    if not callable(getattr(model, "apply", None)):
        raise ConfigError(
            f"a model needs apply(variables, *inputs, rngs=, mutable=), as linen has it; got {type(model).__name__}. "
            "jtl.from_nnx makes one of an NNX module, jtl.from_function of any function of params"
        )
    names = None if inputs is None else tuple(inputs)
    return Supervised(model, loss, dict(metrics or {}), names, target, dict(call or {}))

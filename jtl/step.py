"""Training and evaluation steps: pure functions, not compiled for you.

    step = jax.jit(jtl.train_step(loss_fn, tx), donate_argnums=0)
    state, metrics = step(state, frozen, batch)

The loss is differentiated with respect to the trained half alone, so that nothing a user puts
into the optimizer chain can bring the gradients of frozen leaves back.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jtl import metrics as jmetrics
from jtl import tree as jtree
from jtl.errors import ConfigError, DataError
from jtl.modes import Modes, follow
from jtl.state import Frozen, TrainState, standard_promotion
from jtl.transforms.guarding import choose, finite, guards
from jtl.typing import Batch, Collections, Key, MaskLike, Params

Metrics = dict[str, Any]
Step = Callable[[TrainState, Frozen, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Frozen, Batch], Metrics]


class Aux(NamedTuple):
    """What a loss reports beside its value.

    Attributes:
      metrics: by name, scalars or accumulators of `jtl.metrics`.
      collections: the collections after the call, or `{}` if none changed.
    """

    metrics: Metrics
    collections: Collections


@runtime_checkable
class LossFn(Protocol):
    """All that jtl asks of a loss.

    `params` and `collections` are whole trees. `key` is `None` in evaluation.
    """

    def __call__(
        self, params: Params, collections: Collections, batch: Batch, *, key: Key | None
    ) -> tuple[jax.Array, Aux]:
        """Scalar loss of a batch."""
        ...


def train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    frozen_dropout: bool = False,
    grad_norm: bool = False,
    accumulate: int = 1,
) -> Step:
    """One update of the trained half.

    BatchNorm and dropout follow the mask that `state` was made with, whatever the model
    asks for: see `jtl.modes`.

    Args:
      loss_fn: the loss; it is called with whole trees.
      tx: the transform that `jtl.init` was given. `value=loss` is passed on to transforms that
        take it.
      frozen_dropout: keep dropout active inside wholly frozen modules.
      grad_norm: report the global norm of the trained leaves' gradients as `grad_norm`.
      accumulate: split each batch into so many microbatches, one after the other, whose gradients are added up
        before the one update: the memory of a microbatch, the gradient of the batch. Each counts by the weights of
        its examples: by the weight of the mean that the loss reports as `loss`, as those of `jtl.supervised` do, or by
        the sum of the batch's entry `weight`, or equally. What a loss computes of a batch as a whole it computes of
        a microbatch: BatchNorm normalises by each one's own statistics, and moves the running ones once for each, in
        order; dropout has a key for each.

    Returns:
      `step(state, frozen, batch) -> (state, metrics)`. `metrics` has `loss` and whatever the
      loss reports, accumulators computed. Where `tx` is a `jtl.transforms.guard`, a step that it skips leaves
      trained leaves, statistics and what the optimizer knows as they are, step and key go on, and `metrics` has
      `skipped` (0 or 1) and `skipped_in_a_row`, int32 scalars.

    Raises:
      ConfigError: `accumulate` is below 1.
      DataError: while a step is traced: a batch that cannot be split into so many parts.
    """
    loss_fn, tx = _unjitted(loss_fn), optax.with_extra_args_support(tx)
    if accumulate < 1:
        raise ConfigError(f"accumulate={accumulate}: expected 1 or more microbatches")

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, Metrics]:
        next_key, key = jax.random.split(state.key)

        def gradients(state: TrainState, batch: Batch, key: Key) -> tuple[jax.Array, Metrics, Collections, Params]:
            def loss_of(trained: Params) -> tuple[jax.Array, Aux]:
                return call_loss(loss_fn, state._replace(params=trained), frozen, batch, key, frozen_dropout)

            (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
            return loss, aux.metrics, _moved(state, aux.collections), grads

        if accumulate > 1:
            loss, found, collections, grads = _accumulated(gradients, state, batch, key, accumulate)
        else:
            loss, found, collections, grads = gradients(state, batch, key)
        guarded = bool(guards(state.opt_state))
        value = jnp.where(finite(collections, state.collections), loss, jnp.nan) if guarded else loss
        with standard_promotion():
            updates, opt_state = tx.update(grads, state.opt_state, state.params, value=value)
        params, report = optax.apply_updates(state.params, updates), {"loss": loss, **jmetrics.compute(found)}
        if guarded:
            in_a_row = functools.reduce(jnp.maximum, [guard.in_a_row for guard in guards(opt_state)])
            taken = in_a_row == 0
            params, collections = choose(taken, (params, collections), (state.params, state.collections))
            report |= {"skipped": (~taken).astype(jnp.int32), "skipped_in_a_row": in_a_row}
        if grad_norm:
            report["grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, collections, opt_state, next_key), report

    return step


def _accumulated(
    gradients: Callable[..., Any], state: TrainState, batch: Batch, key: Key, count: int
) -> tuple[jax.Array, Metrics, Collections, Params]:
    """The weighted mean over microbatches of what `gradients` gives, and the collections after the last one."""

    def one(carried: tuple[Collections, Params], given: tuple[Batch, Key]) -> Any:
        collections, total = carried
        part, key = given
        loss, found, collections, grads = gradients(state._replace(collections=collections), part, key)
        weight = _weight(found, part, loss)
        total = jax.tree.map(lambda total, grad: total + jmetrics.scaled(grad, weight), total, grads)
        return (collections, total), (jmetrics.scaled(loss, weight), weight, jmetrics.accumulators(found, weight))

    parts, keys = microbatches(batch, count), jax.random.split(key, count)
    start = state.collections, jax.tree.map(jnp.zeros_like, state.params)
    (collections, grads), sums = jax.lax.scan(one, start, (parts, keys))
    loss, weight, found = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
    whole = jnp.maximum(weight, jnp.finfo(weight.dtype).tiny)
    return loss / whole, found, collections, jax.tree.map(lambda leaf: leaf / whole.astype(leaf.dtype), grads)


def _weight(found: Metrics, batch: Batch, loss: jax.Array) -> jax.Array:
    """What a microbatch weighs in the mean over a batch, in the dtype of the loss."""
    mean, entries = found.get("loss"), batch if isinstance(batch, Mapping) else {}
    weight = mean.weight if isinstance(mean, jmetrics.Mean) else jnp.sum(entries.get("weight", jnp.ones(())))
    return weight.astype(loss.dtype)


def microbatches(batch: Batch, count: int) -> Batch:
    """A batch in parts of equal size: of its B examples, part i has i, i + count, ...

    So filler rows, at the end of a batch, are spread over the parts, and a batch that is split over devices stays so.

    Args:
      batch: arrays `[B, ...]`.
      count: the number of parts, which divides B.

    Returns:
      Entries `[count, B / count, ...]`.

    Raises:
      DataError: an entry without the batch axis, or a batch that cannot be split into so many.

    >>> microbatches({"x": jnp.arange(4)}, 2)["x"].tolist()
    [[0, 2], [1, 3]]
    """
    shapes = {path: jnp.shape(leaf) for path, leaf in jtree.leaves_with_paths(batch)}
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise DataError(
            f"a batch is split into microbatches along its first axis, which its entries do not share: {shapes}"
        )
    size = sizes.pop()[0]
    if not size or size % count:
        raise DataError(f"a batch of {size} cannot be split into accumulate={count} microbatches of equal size")
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(-1, count, *leaf.shape[1:]), 0, 1), batch)


def eval_step(loss_fn: LossFn) -> EvalStep:
    """The metrics of one batch, with every module in inference mode and nothing random.

    Args:
      loss_fn: the loss; it is called with `key=None`.

    Returns:
      `step(state, frozen, batch) -> metrics`, accumulators not yet computed: add those of
      several batches with `jtl.metrics.merge`, or let `jtl.evaluate` do both.
    """
    loss_fn = _unjitted(loss_fn)

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> Metrics:
        loss, aux = call_loss(loss_fn, state, frozen, batch, None, False)
        return jmetrics.accumulators({"loss": loss, **aux.metrics})

    return step


def call_loss(
    loss_fn: LossFn, state: TrainState, frozen: Frozen, batch: Batch, key: Key | None, frozen_dropout: bool
) -> tuple[jax.Array, Aux]:
    """The loss as a step calls it: with whole trees, under the modes of the mask; `key=None` is evaluation."""
    params = jtree.combine(state.params, frozen.params)
    collections = jtree.combine(state.collections, frozen.collections)
    mask = jtree.mask_of(state.params if key is not None else {}, params)
    with follow(Modes(params, mask, frozen_dropout=frozen_dropout)):
        return _checked(loss_fn(params, collections, batch, key=key))


def checker(loss_fn: LossFn, state: TrainState, frozen: Frozen) -> Callable[[Batch], None]:
    """The loss's own check of batches on the host, if it has one; it keeps shapes alone, no arrays.

    Args:
      loss_fn: the loss. Those of `jtl.supervised` have a method `checker`.
      state: the trained half.
      frozen: the frozen half.

    Returns:
      `check(batch)`, which raises `DataError` for a batch that the loss cannot mean.
    """
    make = getattr(loss_fn, "checker", None)
    if make is None:
        return lambda batch: None
    whole = jtree.combine(state.params, frozen.params), jtree.combine(state.collections, frozen.collections)
    return make(*jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole))


def _unjitted(loss_fn: LossFn) -> LossFn:
    # The step is compiled as a whole; a jit around the loss alone would only hide its jaxpr.
    return inspect.unwrap(loss_fn) if hasattr(loss_fn, "lower") else loss_fn


def _checked(result: Any) -> tuple[jax.Array, Aux]:
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Aux)):
        raise ConfigError(
            f"a loss returns (loss, jtl.Aux(metrics, collections)); this one returned {jax.tree.structure(result)}"
        )
    if jnp.shape(result[0]) != ():
        raise ConfigError(f"a loss is a scalar; this one has shape {jnp.shape(result[0])}: take its mean")
    return result


def _moved(state: TrainState, collections: Collections) -> Collections:
    """The moving statistics as the loss left them; collections it does not return stay."""
    returned = {name: collections.get(name, before) for name, before in state.collections.items()}
    after = dict(jtree.leaves_with_paths(returned))
    absent = [path for path in jtree.paths(state.collections) if path not in after]
    if absent:
        raise ConfigError(f"the loss returned collections without {absent[:3]}, which the mask lets move")
    return jtree.map_with_paths(lambda path, _: after[path], state.collections)


def finetune(tx: optax.GradientTransformation, *, trainable: MaskLike) -> optax.GradientTransformationExtraArgs:
    """The whole-tree form of the mask, for people with a training loop of their own.

    `tx` runs on the True leaves, as if the others did not exist: clipping, decay and state
    are theirs alone. The others get zero updates. Gradients of frozen leaves are still computed
    if the loop asks for them; `jtl.train_step` does not.

    Args:
      tx: any optax transform.
      trainable: the mask. True means trained.

    Returns:
      A transform over whole trees.

    Raises:
      MaskError: at `init`, if the mask does not fit the params.

    >>> params = {"head": jnp.ones(2), "stem": jnp.ones(2)}
    >>> tx = finetune(optax.adamw(0.1), trainable={"head": True, "stem": False})
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates["stem"].tolist()
    [0.0, 0.0]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> optax.OptState:
        return tx.init(jtree.partition(params, trainable)[0])

    def update(updates: Params, state: optax.OptState, params: Params | None = None, **extra: Any) -> Any:
        mask = jtree.as_bools(trainable, updates if params is None else params)
        trained = None if params is None else jtree.partition(params, mask)[0]
        chosen, rest = jtree.partition(updates, mask)
        with standard_promotion():
            chosen, state = tx.update(chosen, state, trained, **extra)
        return jtree.combine(chosen, jax.tree.map(jnp.zeros_like, rest)), state

    return optax.GradientTransformationExtraArgs(init, update)

"""Memory of a step: what it will take, and what to do where there is not enough."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import tree as jtree
from jtl.errors import OutOfMemoryError
from jtl.state import Frozen, TrainState
from jtl.step import Step
from jtl.typing import Batch, PyTree


class MemoryEstimate(NamedTuple):
    """Bytes on each device while a step runs.

    Attributes:
      arguments: the state, the frozen half and the batch.
      outputs: what the step returns and does not write over its arguments.
      temporary: activations, gradients and whatever else lives only while the step runs.
    """

    arguments: int
    outputs: int
    temporary: int

    @property
    def peak(self) -> int:
        """All of it: the most that is held at once."""
        return self.arguments + self.outputs + self.temporary


def memory_estimate(step: Callable[..., Any], state: TrainState, frozen: Frozen, batch: Batch) -> MemoryEstimate:
    """What a training step will take, from its compiled program: nothing is allocated and nothing runs.

        estimate = jtl.memory_estimate(jtl.train_step(loss_fn, tx), state, frozen, batch)
        print(estimate.peak / 2**30, "GiB")

    It is the step's own memory: the library, compiled code, other arrays that are kept and, on GPU, what the allocator
    sets aside besides are not in it.

    Args:
      step: of `jtl.train_step`, compiled here as `jtl.fit` compiles it, with its state donated; or already under
        `jax.jit`, with whatever it donates.
      state: the trained half, arrays or `jax.ShapeDtypeStruct`.
      frozen: the frozen half, likewise.
      batch: likewise; for a device of several, as `jtl.parallel.shard_batch` places it.

    Returns:
      Bytes by kind; `peak` is their sum.

    Raises:
      OutOfMemoryError: the compiler itself finds no room.
    """
    jitted: Any = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=0)
    try:
        found = jitted.lower(state, frozen, batch).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise OutOfMemoryError(f"the step does not fit: {error}") from error
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return MemoryEstimate(found.argument_size_in_bytes, outputs, found.temp_size_in_bytes)


def exhausted(error: BaseException) -> bool:
    """Whether an error of jax says that a device has no memory left."""
    # What fails while a program runs on CPU comes as an internal error with the reason inside.
    said = ("RESOURCE_EXHAUSTED", "Out of memory")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(text in str(error) for text in said)


class Microbatching:
    """A training step that goes on with smaller microbatches where the memory does not hold a batch.

    A step donates its state, which is gone when it fails. So before the first call with a batch of each shape, the
    state is copied to the host, and its result is waited for. Once memory was short, this is done at each call: what
    suffices once by little may not suffice again.

    Args:
      make: a number of microbatches to the compiled step.
      count: the number to begin with.
      devices: that each microbatch is split over.
      least: examples of a microbatch, at least.
      say: called with one line when the number changes.
      known: of each shape of batch, the number that an interrupted run had come to.
    """

    def __init__(
        self,
        make: Callable[[int], Step],
        count: int,
        *,
        devices: int = 1,
        least: int = 1,
        say: Callable[[str], None] = lambda line: None,
        known: Mapping[str, int] | None = None,
    ):
        self.counts = dict(known or {})
        self._make, self._count, self._devices, self._say = make, count, devices, say
        self._least = max(least, devices)
        self._tried: dict[Any, Step] = {}

    def __call__(self, state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """One step.

        Raises:
          OutOfMemoryError: there is too little for the smallest microbatch.
        """
        key = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if key in self._tried and not self.counts:
            return self._tried[key](state, frozen, batch)
        shape, kept = _shape(batch), _to_host(state)
        while True:
            count = self.counts.get(shape, self._count)
            step = self._make(count)
            try:
                done = jax.block_until_ready(step(state, frozen, batch))
            except jax.errors.JaxRuntimeError as error:
                if not exhausted(error) or kept is None:
                    raise
                self.counts[shape] = self._more(batch, count, error)
                state = _to_devices(kept, state)
            else:
                self._tried[key] = step
                return done

    def _more(self, batch: Batch, count: int, error: Exception) -> int:
        """The next larger number of equal microbatches that the devices can share."""
        size = jnp.shape(jax.tree.leaves(batch)[0])[0]
        fits = [
            parts
            for parts in range(2 * count, size // self._least + 1)
            if not size % parts and not size // parts % self._devices
        ]
        if not fits:
            spread = f" on {self._devices} devices" if self._devices > 1 else ""
            raise OutOfMemoryError(
                f"out of memory with a microbatch of {size // count} of {size} examples{spread}, and it cannot be made "
                f"smaller: give a batch size with more divisors, shorter or smaller examples, fewer trained blocks, or "
                f"a model with remat. {_first_line(error)}"
            ) from error
        self._say(
            f"out of memory: batches {_shape(batch)} go on as {fits[0]} microbatches of {size // fits[0]}, "
            f"each weighted as before. {_first_line(error)}"
        )
        return fits[0]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shape(batch: Batch) -> str:
    """Of a batch's entries, as text that JSON can hold."""
    return " ".join(f"{path}{list(jnp.shape(leaf))}" for path, leaf in jtree.leaves_with_paths(batch))


def _to_host(state: TrainState) -> PyTree | None:
    """Copies that nothing on a device shares; None where a part of the state is another process's."""
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        return None
    return jax.tree.map(lambda leaf: np.array(jtree.plain(leaf)), state)


def _to_devices(kept: PyTree, like: TrainState) -> TrainState:
    """The state again, where it was."""

    def back(value: np.ndarray, leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(value, leaf.sharding)
        key = jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
        return jax.device_put(key, leaf.sharding)

    return jax.tree.map(back, kept, like)

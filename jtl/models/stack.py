"""Blocks one after another: written out, as one loop over blocks, or with their activations computed twice.

The tree of parameters stays the same in all three, `layer_0`, `layer_1` ..., so masks, depth groups, adapters and
checkpoints name single blocks whatever runs them. A loop stacks the leaves of its blocks as it starts, which
copies them once a step; a compiled program is then as large as that of one block. The first block of a loop that is
trained is differentiated by its input too, for the others are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import modes
from jtl.typing import Params


def stack(
    parent: nn.Module,
    make: Callable[..., nn.Module],
    count: int,
    x: jax.Array,
    *shared: Any,
    scan: bool = False,
    remat: bool = False,
    deterministic: bool = True,
) -> jax.Array:
    """Apply `count` equal blocks.

    Neighbours whose leaves are trained alike are one loop, so that a frozen block is not differentiated, and is in its
    own mode, also under `scan`.

    Args:
      parent: the module that holds the blocks, in its compact method.
      make: `make(name=)` or `make(parent=None)` gives a block: `(x, *shared, deterministic=)` to the next x.
      count: of blocks.
      x: what the first is given; each gives an array like it.
      *shared: given to each.
      scan: run the blocks as loops.
      remat: keep only what goes from block to block, and compute the rest again in the backward pass.
      deterministic: no dropout.

    Returns:
      The array that the last block gives.
    """
    names = [f"layer_{i}" for i in range(count)]
    if parent.is_initializing() or not (scan or remat):
        for name in names:
            x = make(name=name)(x, *shared, deterministic=deterministic)
        return x
    params = [parent.get_variable("params", name) for name in names]
    draws = not deterministic and parent.has_rng("dropout")
    keys = jax.random.split(parent.make_rng("dropout"), count) if draws else None
    for run in _runs(parent, names, params) if scan else (range(i, i + 1) for i in range(count)):
        places = tuple((*parent.path, names[i]) for i in run)

        def block(x: jax.Array, given: Any, places: Any = places) -> Any:
            own, key = given
            rngs = {} if key is None else {"dropout": key}
            with modes.placed(parent, places):
                module = make(parent=None)
                y = module.apply({"params": own}, x, *shared, deterministic=deterministic, rngs=rngs)
            return y, None

        call = jax.checkpoint(block) if remat else block
        here = None if keys is None else keys[run.start : run.stop]
        if len(run) == 1:
            x, _ = call(x, (params[run.start], None if here is None else here[0]))
        else:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params[run.start : run.stop])
            x, _ = jax.lax.scan(call, x, (stacked, here))
    return x


def _runs(parent: nn.Module, names: Sequence[str], params: Sequence[Params]) -> Iterator[range]:
    """Neighbours whose leaves are alike, and trained alike."""
    mode = modes.current()
    place = "" if mode is None else mode.locate(parent)
    kinds = []
    for name, leaves in zip(names, params, strict=True):
        pattern = "" if mode is None else mode.pattern(f"{place}/{name}".strip("/"))
        shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(leaves)]
        kinds.append((pattern, jax.tree.structure(leaves), shapes))
    start = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            yield range(start, i)
            start = i

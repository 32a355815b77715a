"""Many adapters over one frozen base, in one compiled call.

stacked = peft.stack([first, second, third])                   # leaves [3, ...]; the base is not among them
outputs = peft.route(model, adapter, variables, stacked, which, input_ids)   # row b through adapter which[b]

Training N at once is a `vmap` of the step, over states alone:

    states = peft.stack([jtl.init(attached, tx, trainable=mask, key=key)[0] for attached, key in ...])
    step   = jax.jit(jax.vmap(jtl.train_step(loss_fn, tx), in_axes=(0, None, 0)), donate_argnums=0)
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError
from jtl.peft.adapted import Adapted
from jtl.peft.adapter import Adapter, joined
from jtl.typing import Params, PyTree, Variables


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Trees of one structure, such as deltas of `detach` or states of `jtl.init`, as one whose leaves lead with N.

    Args:
      trees: N of them.

    Raises:
      ConfigError: there is none, or they differ in structure or shapes.
    """
    if not trees:
        raise ConfigError("there is no adapter to stack")
    shapes = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree) for tree in trees]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ConfigError(f"adapters 0 and {number} differ in structure or shapes: they cannot be stacked")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(stacked: PyTree) -> list[PyTree]:
    """The trees that `stack` put together."""
    count = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda leaf, number=number: leaf[number], stacked) for number in range(count)]


def route(
    model: Any,
    adapter: Adapter,
    variables: Variables,
    stacked: Params,
    which: jax.Array,
    *args: Any,
    **kwargs: jax.Array,
) -> Any:
    """The outputs of a batch, each row through an adapter of its own, in inference.

    The base's products are over the whole batch, as without adapters. A head that was trained along goes in as well:
    `stacked` may replace leaves of the base.

    Args:
      model: as in `adapted`.
      adapter: that the leaves are of.
      variables: of the plain model.
      stacked: from `stack`.
      which: `[batch]` integers, the adapter of each row.
      *args: the model's inputs; arrays lead with the batch axis.
      **kwargs: likewise, by name.

    Returns:
      What the model gives, with the batch axis in front.
    """
    chosen = jax.tree.map(lambda leaf: leaf[which], stacked)

    def one(delta: Params, args: Any, kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), (args, kwargs))
        params = joined(_without(variables["params"], delta), delta)
        outputs = Adapted(model, adapter).apply({**variables, "params": params}, *args, **kwargs)
        return jax.tree.map(lambda leaf: leaf[0], outputs)

    return jax.vmap(one)(chosen, args, kwargs)


def _without(params: Any, delta: Any) -> Any:
    """The params but for the leaves that a delta replaces."""
    if not isinstance(delta, dict) or not isinstance(params, dict):
        return params
    kept = {name: _without(value, delta[name]) if name in delta else value for name, value in params.items()}
    return {name: value for name, value in kept.items() if name not in delta or isinstance(value, dict)}

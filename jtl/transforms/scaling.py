"""Learning rates that differ between the leaves of a tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jtl import rules as jrules
from jtl.errors import ConfigError
from jtl.rules import Rules
from jtl.typing import Params, PyTree


def scale_by_rules(rules: Rules) -> optax.GradientTransformation:
    """Multiply the updates of each leaf by the factor of the first rule that matches its path.

    At the end of a chain it multiplies learning rates: those of gradient and of decoupled weight decay.

    Args:
      rules: `(pattern, factor)` pairs; the first match wins. Patterns may name frozen leaves.

    Returns:
      A transform without state. Updating raises `PatternError` for a leaf that no rule covers, and for a pattern
      that matches nothing.

    Raises:
      ConfigError: a factor is negative, or not a number.

    >>> tx = scale_by_rules([("head", 1.0), ("**", 0.5)])
    >>> updates, _ = tx.update({"head": jnp.ones(1), "stem": jnp.ones(1)}, tx.init(None))
    >>> updates["stem"].tolist()
    [0.5]
    """
    for pattern, factor in rules:
        if not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise ConfigError(f"the factor of {pattern!r} is {factor!r}; expected a number that is not negative")

    def update(updates: PyTree, state: optax.OptState, params: Params | None = None) -> tuple[PyTree, optax.OptState]:
        factors = jrules.label(updates, rules)
        return jax.tree.map(lambda factor, u: jnp.asarray(factor, u.dtype) * u, factors, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class FactorState(NamedTuple):
    """What updates are multiplied by, float32 scalar."""

    factor: jax.Array


def scale_by_factor() -> optax.GradientTransformation:
    """Multiply all updates by a number that is a part of the state, 1 at first.

    At the end of a chain it multiplies learning rates. One compiled step then serves runs with many of them.
    `set_factor` sets it.
    """

    def update(updates: PyTree, state: Any, params: Params | None = None) -> tuple[PyTree, FactorState]:
        return jax.tree.map(lambda u: state.factor.astype(u.dtype) * u, updates), state

    return optax.GradientTransformation(lambda params: FactorState(jnp.ones(())), update)


def set_factor(state: optax.OptState, factor: float) -> optax.OptState:
    """An optimizer's state with another number in each of its `FactorState`s."""
    new = FactorState(jnp.asarray(factor, jnp.float32))

    def is_factor(node: PyTree) -> bool:
        return isinstance(node, FactorState)

    return jax.tree.map(lambda node: new if is_factor(node) else node, state, is_leaf=is_factor)

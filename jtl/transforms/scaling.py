"""Learning rates that differ between the leaves of a tree."""

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

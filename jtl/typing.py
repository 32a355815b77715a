"""Aliases for the types that public signatures speak of."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

PyTree = Any
"""Any nesting of registered containers with arrays as leaves."""

Params = PyTree
"""The `params` collection of a model: nested dicts of arrays in linen, any pytree elsewhere."""

Collections = PyTree
"""The other variable collections of a model, by name: `{"batch_stats": ...}`."""

Variables = Mapping[str, PyTree]
"""`{"params": params, **collections}`, as `module.init` returns it."""

MaskFn = Callable[[PyTree], PyTree]
"""A function from params to a pytree of bools of the same structure. True means trained."""

MaskLike = MaskFn | PyTree
"""What optax calls a mask: a pytree of bools with the structure of params, or a `MaskFn`."""

Batch = Any
"""A pytree of arrays that all lead with the batch axis."""

Key = jax.Array
"""A typed random key, as `jax.random.key` returns it."""

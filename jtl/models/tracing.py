"""The shapes of a model's variables without tracing each of its equal blocks."""

import contextvars
import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jtl.typing import PyTree

Initializer = Callable[..., jax.Array]

_SHAPES_ONLY: contextvars.ContextVar[bool] = contextvars.ContextVar("jtl_shapes_only", default=False)


def random_init(init: Initializer) -> Initializer:
    """An initialiser that draws nothing while only shapes are wanted: tracing the generator takes longer than a layer.

    Args:
      init: `(key, shape, dtype)` to an array.
    """

    @functools.wraps(init)
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype) if _SHAPES_ONLY.get() else init(key, shape, dtype)

    return draw


def variable_shapes(model: nn.Module, inputs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, PyTree]:
    """The shapes and dtypes of a module's variables, as `jax.eval_shape` of its `init` gives them.

    Args:
      model: a linen module.
      inputs: the arguments of its call, by name.
    """

    def init() -> dict[str, PyTree]:
        token = _SHAPES_ONLY.set(True)
        try:
            with nn.intercept_methods(_repeats()):
                zeros: Any = {name: jnp.zeros(x.shape, x.dtype) for name, x in inputs.items()}
                return dict(model.init(jax.random.key(0), **zeros))
        finally:
            _SHAPES_ONLY.reset(token)

    return jax.eval_shape(init)


def _repeats() -> Callable[..., Any]:
    """An interceptor that runs one of the submodules with equal settings and inputs, and gives the others its shapes.

    Tracing is most of what loading a checkpoint costs besides reading it, and a transformer has its block 12 times.
    """
    known: dict[Hashable, tuple[PyTree, PyTree]] = {}

    def once(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        key = _key(module, args, kwargs) if context.method_name == "__call__" else None
        if key is None:
            return call(*args, **kwargs)
        if key not in known:
            outputs = call(*args, **kwargs)
            known[key] = jax.tree.map(_shape, (dict(module.variables), outputs))
            return outputs
        variables, outputs = known[key]
        for collection, tree in variables.items():
            for name, value in tree.items():
                module.put_variable(collection, name, jax.tree.map(_stand_in, value))
        # Made anew, and not kept: what one trace (`nn.remat`, `nn.scan`) made must not appear in another.
        return jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, outputs
        )

    return once


def _key(module: nn.Module, args: Any, kwargs: Any) -> Hashable | None:
    """What decides the shapes of a submodule's variables; None where it is not known to be all."""
    settings = [getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    leaves, structure = jax.tree.flatten((args, kwargs))
    inputs = tuple((x.shape, x.dtype) if isinstance(x, jax.Array) else x for x in leaves)
    key = (type(module), tuple(settings), inputs, structure)
    # A module that holds others may keep its variables in theirs.
    if module.parent is None or any(isinstance(x, nn.Module) for x in jax.tree.leaves(settings)):
        return None
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _shape(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if isinstance(value, jax.Array) else value


def _stand_in(value: Any) -> Any:
    is_shape = isinstance(value, jax.ShapeDtypeStruct) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    return np.broadcast_to(np.zeros((), value.dtype), value.shape) if is_shape else value

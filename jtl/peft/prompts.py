"""Prompt and prefix tuning: trained vectors beside those of a sequence."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtl import quantized, rules
from jtl.errors import ConfigError
from jtl.peft import kernels
from jtl.peft.adapter import Adapter, Call, joined, unmergeable
from jtl.peft.kernels import Targets
from jtl.typing import Key, Params


class _Prompt(NamedTuple):
    """What `prompt` was given."""

    target: str
    length: int
    width: int | None
    scale: float


class _Prefix(NamedTuple):
    """What `prefix` was given."""

    targets: Targets
    length: int
    scale: float
    names: tuple[str, ...]


def prompt(target: str = "encoder", *, length: int = 20, width: int | None = None, scale: float = 0.02) -> Adapter:
    """Trained vectors in front of the sequence that a module takes; its outputs at their places are left out.

    Of a text encoder this is prompt tuning, of a vision transformer VPT-shallow. The vectors have no position
    embeddings. A mask of the sequence's positions is extended by as many that count.

    Args:
      target: the path of the module. It takes `[batch, length, width]` first, and gives the same, or a tuple whose
        first entry is. Other arrays whose last axis is as long as the sequence are masks if they are no floats, or if
        their name has "mask" in it, as linen's, of ones and zeros.
      length: number of vectors.
      width: of a vector; by default the inputs of the first dense layer of two axes in the module.
      scale: standard deviation of the initial vectors.

    Raises:
      ConfigError: `length` is below 1.
      PatternError: `target` is malformed.

    References:
      Lester et al, The power of scale for parameter-efficient prompt tuning, 2021 (arXiv 2104.08691); Jia et al, Visual
      prompt tuning, 2022 (arXiv 2203.12119).
    """
    _check_length(length)
    rules.compile_pattern(target)
    settings = _Prompt(target, length, width, scale)
    init, merge = functools.partial(_new_prompt, settings), functools.partial(_merge, "prompt")
    return Adapter("prompt", init, merge, around=_prompted, needs_call=True, in_front=True, settings=settings)


def prefix(
    targets: Sequence[str],
    *,
    length: int = 10,
    scale: float = 0.02,
    names: Sequence[str] = ("key", "value"),
    stacked: Sequence[str] = (),
) -> Adapter:
    """Trained keys and values in front of those that attention computes.

    Args:
      targets: patterns of attention modules, such as `["**/attention"]`. Masks among their arguments are extended, as
        in `prompt`.
      length: number of keys.
      scale: standard deviation of the initial keys and values.
      names: of the dense layers that give keys and values; `["qkv"]` for GPT-2, where one gives queries as well, whose
        part of a trained vector is not used.
      stacked: as in `lora`.

    Raises:
      ConfigError: `length` is below 1.
      PatternError: a pattern is malformed.

    References:
      Li and Liang, Prefix-tuning, 2021 (arXiv 2101.00190), without its reparametrisation.
    """
    _check_length(length)
    settings = _Prefix(kernels.targets(targets, (), stacked), length, scale, tuple(names))
    init, merge = functools.partial(_new_prefix, settings), functools.partial(_merge, "prefix")
    around = functools.partial(_prefixed, settings)
    return Adapter("prefix", init, merge, around=around, needs_call=True, in_front=True, settings=settings)


def _check_length(length: int) -> None:
    if length < 1:
        raise ConfigError(f"length={length}: expected a whole number from 1 on")


def _merge(name: str, params: Params, delta: Params) -> Params:
    return unmergeable(name, params, delta, lambda path: True)


def _new_prompt(settings: _Prompt, params: Params, key: Key) -> Params:
    rules.require_matches([settings.target], params)
    inner = [(path, leaf) for path, leaf in quantized.leaves(params) if path.startswith(f"{settings.target}/")]
    if not inner:
        raise ConfigError(f"{settings.target!r} is not the path of a module")
    widths = (np.shape(leaf)[0] for path, leaf in inner if path.endswith("/kernel") and np.ndim(leaf) == 2)
    width = settings.width or next(widths, None)
    if width is None:
        raise ConfigError(f"{settings.target} has no dense layer that tells its width: pass width=")
    leaf = settings.scale * jax.random.normal(key, (settings.length, width))
    return _at(settings.target, {"prompt": {"vectors": leaf}})


def _at(path: str, tree: Params) -> Params:
    for segment in reversed(path.split("/")):
        tree = {segment: tree}
    return tree


def _prompted(call: Call, part: Params) -> Any:
    if call.child:
        return call.apply(*call.args, **call.kwargs)
    sequence, *rest = call.args
    vectors = part["vectors"].astype(sequence.dtype)
    count, length = len(vectors), sequence.shape[1]
    vectors = jnp.broadcast_to(vectors, (len(sequence), *vectors.shape))
    args, kwargs = _extended((rest, call.kwargs), length, count)
    outputs = call.apply(jnp.concatenate([vectors, sequence], axis=1), *args, **kwargs)
    if isinstance(outputs, tuple):
        return (outputs[0][:, count:], *outputs[1:])
    return outputs[:, count:]


def _extended(arguments: Any, length: int, count: int) -> Any:
    """Arguments whose masks over `length` positions begin with `count` more that count."""

    def extend(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not np.ndim(leaf) or np.shape(leaf)[-1] != length:
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and "mask" not in jax.tree_util.keystr(path):
            return leaf
        return jnp.concatenate([jnp.ones((*leaf.shape[:-1], count), leaf.dtype), leaf], axis=-1)

    return jax.tree_util.tree_map_with_path(extend, arguments)


def _new_prefix(settings: _Prefix, params: Params, key: Key) -> Params:
    patterns = settings.targets.patterns
    rules.require_matches(patterns, params)
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in quantized.leaves(params):
        module, _, name = path.removesuffix("/kernel").rpartition("/")
        if (
            path.endswith("/kernel")
            and name in settings.names
            and any(rules.matches(pattern, module) for pattern in patterns)
        ):
            found.setdefault(module, {})[name] = leaf
    for pattern in patterns:
        if not any(rules.matches(pattern, module) and set(found[module]) == set(settings.names) for module in found):
            listed = " and ".join(settings.names)
            raise ConfigError(
                f"{pattern!r} names no module with the dense layers {listed}; name them with names=, of GPT-2 ['qkv']"
            )
    delta: Params = {}
    for (module, leaves), inner in zip(sorted(found.items()), jax.random.split(key, len(found)), strict=True):
        keys = jax.random.split(inner, len(settings.names))
        pair = zip(settings.names, keys, strict=True)
        part = {name: _vectors(settings, leaves[name], f"{module}/{name}/kernel", key) for name, key in pair}
        delta = joined(delta, _at(module, {"prefix": part}))
    return delta


def _vectors(settings: _Prefix, kernel: Any, path: str, key: Key) -> jax.Array:
    shape = kernels.shape_of(settings.targets, path, kernel)
    size = (*shape.stack, settings.length, *shape.outputs)
    return settings.scale * jax.random.normal(key, size, kernels.dtype_of(kernel))


def _prefixed(settings: _Prefix, call: Call, part: Params) -> Any:
    if not call.child:
        length = next(np.shape(leaf)[1] for leaf in jax.tree.leaves((call.args, call.kwargs)) if np.ndim(leaf) >= 2)
        args, kwargs = _extended((call.args, call.kwargs), length, settings.length)
        return call.apply(*args, **kwargs)
    outputs = call.apply(*call.args, **call.kwargs)
    if call.child not in settings.names:
        return outputs
    vectors = part[call.child].astype(outputs.dtype)
    axis = -vectors.ndim
    vectors = jnp.broadcast_to(vectors, (*outputs.shape[: outputs.ndim - vectors.ndim], *vectors.shape))
    return jnp.concatenate([vectors, outputs], axis=axis)

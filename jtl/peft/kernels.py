"""Which kernels an adapter changes, and which of their axes are inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jtl import quantized, rules
from jtl import tree as jtree
from jtl.errors import ConfigError, MaskError, PatternError
from jtl.rules import Rules
from jtl.typing import Params


class Targets(NamedTuple):
    """What an adapter was asked to change.

    Attributes:
      patterns: of modules or kernels.
      input_axes: rules for how many of a kernel's first axes are contracted.
      stacked: patterns of leaves whose first axis runs over layers.
    """

    patterns: tuple[str, ...]
    input_axes: Rules = ()
    stacked: tuple[str, ...] = ()


class Shape(NamedTuple):
    """A kernel's axes: over stacked layers, inputs and outputs."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def targets(patterns: Sequence[str], input_axes: Rules, stacked: Sequence[str]) -> Targets:
    """The same, checked.

    Raises:
      PatternError: no pattern, or one that is malformed.
    """
    if isinstance(patterns, str) or not patterns:
        raise PatternError(f"targets are a list of patterns, such as ['**/query']; got {patterns!r}")
    for pattern in (*patterns, *stacked):
        rules.compile_pattern(pattern)
    return Targets(tuple(patterns), tuple(input_axes), tuple(stacked))


def first(table: Rules, path: str) -> Any:
    """The value of the first rule that matches, None without one."""
    return next((value for pattern, value in table if rules.matches(pattern, path)), None)


def shape_of(chosen: Targets, path: str, leaf: Any) -> Shape:
    """The axes of a kernel.

    Raises:
      ConfigError: as many input axes as there are axes, or none.
    """
    shape, stack = tuple(np.shape(leaf)), _stack(chosen, path)
    axes = shape[stack:]
    given = first(chosen.input_axes, path)
    if given is None:
        given = {3: 2 if path.split("/")[-2:-1] == ["out"] else 1, 4: 3}.get(len(axes), 1)
    if not 1 <= given < len(axes):
        raise ConfigError(f"{path} has the axes {axes}: {given} of them cannot be its inputs")
    return Shape(shape[:stack], axes[:given], axes[given:])


def dtype_of(leaf: Any) -> Any:
    """The dtype of new leaves beside a kernel: its own, float32 at least."""
    return jtree.wide_dtype(leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.dtype(jnp.float32)


def kernels(chosen: Targets, params: Params) -> dict[str, Any]:
    """The leaves to adapt, by path.

    Raises:
      PatternError: a pattern matches nothing.
      MaskError: it matches nothing that could be adapted.
    """
    rules.require_matches(chosen.patterns, params)
    found = {}
    for path, leaf in quantized.leaves(params):
        if path.rpartition("/")[2] in ("bias", "scale"):
            continue  # those of linen's DenseGeneral have as many axes as its outputs
        if np.ndim(leaf) >= 2 + _stack(chosen, path) and any(rules.matches(p, path) for p in chosen.patterns):
            found[path] = leaf
    for pattern in chosen.patterns:
        if not any(rules.matches(pattern, path) for path in found):
            raise MaskError(f"the pattern {pattern!r} names no leaf of two or more axes that could be adapted")
    return found


def built(name: str, leaves: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A delta from the new leaves of each kernel.

    Args:
      name: of the subtrees.
      leaves: by the kernels' paths.
    """
    delta: dict[str, Any] = {}
    for path, part in leaves.items():
        *module, kernel = path.split("/")
        place = delta
        for segment in [*module, name]:
            place = place.setdefault(segment, {})
        place[kernel] = dict(part)
    return delta


def by_kernel(delta: Params) -> dict[str, dict[str, Any]]:
    """The new leaves of each kernel, by the kernels' paths."""
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in jtree.leaves_with_paths(delta):
        *module, _, kernel, name = path.split("/")
        parts.setdefault("/".join([*module, kernel]), {})[name] = leaf
    return parts


def require_kernels(parts: Mapping[str, Any], params: Params) -> None:
    """Refuse leaves for kernels that there are not, or that are stored in few bits.

    Raises:
      ConfigError: names them.
    """
    quantized.require_plain({path: leaf for path, leaf in quantized.leaves(params) if path in parts}, "merging")
    strange = sorted(set(parts) - set(jtree.paths(params)))
    if strange:
        raise ConfigError(f"the adapter has leaves for {strange[:3]}, which the params do not have")


def _stack(chosen: Targets, path: str) -> int:
    return int(any(rules.matches(pattern, path) for pattern in chosen.stacked))

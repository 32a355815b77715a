"""Floating-point operations of equations, by the usual formulas."""

import math
from typing import Any

from jax.extend import core as jex

from jtl.boundary.row_rules import CUMULATIVE, ELEMENTWISE, LAYOUT, REDUCTIONS

_FREE = LAYOUT | {"convert_element_type", "copy", "copy_p", "stop_gradient", "name", "optimization_barrier"}
_LIGHT_CALLS = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call"}
_LIGHT = ELEMENTWISE | LAYOUT | REDUCTIONS | CUMULATIVE


def flops(eqn: Any) -> int:
    """Operations of one equation: 2 for each multiply-add of a product, 1 for each element of anything else."""
    name, sizes = eqn.primitive.name, [math.prod(getattr(var.aval, "shape", ())) for var in eqn.outvars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * sizes[0] * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return 2 * sizes[0] * math.prod(kernel) // max(1, kernel[eqn.params["dimension_numbers"].rhs_spec[0]])
    inner = [flops_of_jaxpr(jaxpr) for jaxpr in _inner(eqn)]
    if inner:
        return (max if name == "cond" else sum)(inner) * eqn.params.get("length", 1)
    if name in REDUCTIONS:
        return math.prod(eqn.invars[0].aval.shape)
    return 0 if name in _FREE else sum(sizes)


def flops_of_jaxpr(jaxpr: Any) -> int:
    """Operations of a jaxpr; a loop of unknown length counts once."""
    return sum(map(flops, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def step_flops(eqn: Any, trained: int) -> int:
    """Operations of an equation with its share of the backward pass, which has a product for each trained operand."""
    return flops(eqn) * (1 + min(trained, 2))


def is_light(eqn: Any) -> bool:
    """Whether an equation is elementwise, a reduction or a matter of layout: cheaper to repeat than to store."""
    if eqn.primitive.name in _LIGHT_CALLS:
        return all(is_light(inside) for jaxpr in _inner(eqn) for inside in getattr(jaxpr, "jaxpr", jaxpr).eqns)
    return eqn.primitive.name in _LIGHT


def is_heavy(eqn: Any) -> bool:
    """Whether an equation is a product, a convolution, or a call with one inside."""
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        return True
    return any(is_heavy(inside) for jaxpr in _inner(eqn) for inside in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _inner(eqn: Any) -> list[Any]:
    values = [value for name, value in eqn.params.items() if name not in ("fwd_jaxpr_thunk", "bwd")]
    flat = [item for value in values for item in (value if isinstance(value, tuple | list) else [value])]
    return [item for item in flat if hasattr(item, "eqns") or isinstance(item, jex.ClosedJaxpr)]

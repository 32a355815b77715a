"""Which axis of each value is the batch axis, and whether each row depends on its own example alone.

An abstract interpretation of a function traced at two batch sizes, one rule per primitive. A primitive
without a rule, and a use of one that its rule does not cover, count as mixing examples; so does what
differs between the two sizes in more than the extent of the batch axis. What is not known to be safe is
never cached.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from jtl.boundary import text
from jtl.boundary.dead import scan_counts
from jtl.boundary.row_rules import ELEMENTWISE, REDUCTIONS, RULES
from jtl.boundary.states import Const, Known, Mixed, Row, State, join, moved, opaque

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""The primitives that do what a jaxpr in their parameters says, once."""

SIZED = Mixed("the size of the batch is part of the value")

_VISIBLE = frozenset("shape new_sizes limit_indices reps slice_sizes sizes sharding out_sharding".split())
"""Parameters that differ with the batch size and show in the shape of the result."""
_KEEPS = ELEMENTWISE | frozenset(
    "broadcast_in_dim reshape squeeze transpose slice concatenate rev split pad stack unstack tile".split()
)
"""Primitives of which no result depends on the extent of an axis."""


def called(eqn: Any) -> Any:
    """The jaxpr that a call holds, with its constants as `consts` if it has any."""
    return next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)


def infer(once: Any, twice: Any, known: Known) -> list[State]:
    """The states of an equation's results; enter them with the equation into `known` for the next.

    Args:
      once: the equation at one batch size.
      twice: the same equation at twice that size.
      known: states and producers of the variables of `twice`.
    """
    if once.primitive is not twice.primitive or len(once.invars) != len(twice.invars):
        return [SIZED] * len(twice.outvars)
    states = [_operand(a, b, known) for a, b in zip(once.invars, twice.invars, strict=True)]
    found = _ruled(once, twice, states, known)
    if _same_form(once, twice):
        return [
            _settled(state, once, twice, *pair) for state, *pair in zip(found, once.outvars, twice.outvars, strict=True)
        ]
    return [state if isinstance(state, Mixed) else SIZED for state in found]


def _ruled(once: Any, twice: Any, states: list[State], known: Known) -> list[State]:
    name = twice.primitive.name
    mixed = next((state for state in states if isinstance(state, Mixed)), None)
    if mixed is not None and name != "gather":
        return [mixed] * len(twice.outvars)
    if name in _NESTED:
        return _NESTED[name](once, twice, states)
    if name in RULES:
        found = RULES[name](twice, states, known)
        return found if isinstance(found, list) else [found] * len(twice.outvars)
    if any(isinstance(state, Row) for state in states):
        return [Mixed(f"jtl does not know whether {name} mixes examples")] * len(twice.outvars)
    return [opaque(var.aval) for var in twice.outvars]


def infer_jaxpr(once: Any, twice: Any, states: Sequence[State]) -> list[State]:
    """The states of a jaxpr's results, given those of its arguments."""
    consts = [getattr(jaxpr, "consts", ()) for jaxpr in (once, twice)]
    once, twice = (getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in (once, twice))
    if len(once.eqns) != len(twice.eqns):
        return [SIZED] * len(twice.outvars)
    known = Known(dict(zip(twice.invars, states, strict=True)), {})
    known.states.update(dict(zip(twice.constvars, map(closed_over, *consts), strict=True)))
    for pair in zip(once.eqns, twice.eqns, strict=True):
        known.states.update(zip(pair[1].outvars, infer(*pair, known), strict=True))
        known.producers.update(dict.fromkeys(pair[1].outvars, pair[1]))
    return [_operand(a, b, known) for a, b in zip(once.outvars, twice.outvars, strict=True)]


def closed_over(once: Any, twice: Any) -> State:
    """The state of an array that is part of the program, given it at both sizes."""
    if np.shape(once) != np.shape(twice) or text.plain(once) != text.plain(twice):
        return SIZED
    return opaque(twice)


def _operand(once: Any, twice: Any, known: Known) -> State:
    if not isinstance(twice, jex.Literal):
        return known.states[twice]
    if not isinstance(once, jex.Literal) or text.literal(once) != text.literal(twice):
        return SIZED
    return opaque(twice.aval)


def _same_form(once: Any, twice: Any) -> bool:
    """Whether two equations are one, at two sizes."""
    if len(once.outvars) != len(twice.outvars) or once.params.keys() != twice.params.keys():
        return False
    inner = {name for name, value in once.params.items() if _has_jaxpr(value) or callable(value)}
    return all(
        text.plain(once.params[name]) == text.plain(twice.params[name])
        for name in once.params.keys() - inner - _VISIBLE
    )


def _has_jaxpr(value: Any) -> bool:
    items = value if isinstance(value, tuple | list) else [value]
    return any(hasattr(item, "eqns") or hasattr(item, "jaxpr") for item in items)


def _settled(state: State, once: Any, twice: Any, before: Any, after: Any) -> State:
    """The state of a result, or `SIZED` where the batch size shows in more than the batch axis."""
    if isinstance(state, Mixed):
        return state
    shapes = before.aval.shape, after.aval.shape
    if len(shapes[0]) != len(shapes[1]):
        return SIZED
    changed = _changed(before.aval, after.aval)
    if isinstance(state, Row):
        grown = 2 * shapes[0][state.axis] == shapes[1][state.axis]
        return state if changed <= {state.axis} and grown else SIZED
    if not changed <= state.uniform:
        return SIZED
    return state if _ignores_extents(once, twice) else SIZED


def _ignores_extents(once: Any, twice: Any) -> bool:
    """Whether a value without examples is the same at both sizes, but for how often it is repeated."""
    changed = [_changed(a.aval, b.aval) for a, b in zip(once.invars, twice.invars, strict=True)]
    name = twice.primitive.name
    if not any(changed) or name in _KEEPS or name in _NESTED:
        return True
    if name in REDUCTIONS:
        return not changed[0] & set(twice.params["axes"])
    if name == "dot_general":
        return not any(
            axes & set(summed) for axes, summed in zip(changed, twice.params["dimension_numbers"][0], strict=True)
        )
    return name == "gather" and not changed[0]


def _changed(before: Any, after: Any) -> set[int]:
    shapes = getattr(before, "shape", ()), getattr(after, "shape", ())
    return {axis for axis, sizes in enumerate(zip(*shapes, strict=False)) if sizes[0] != sizes[1]}


def _call(once: Any, twice: Any, states: list[State]) -> list[State]:
    return infer_jaxpr(called(once), called(twice), states)


def _cond(once: Any, twice: Any, states: list[State]) -> list[State]:
    if not isinstance(states[0], Const):
        return [Mixed("a branch that an example decides")] * len(twice.outvars)
    branches = zip(once.params["branches"], twice.params["branches"], strict=True)
    results = zip(*(infer_jaxpr(*branch, states[1:]) for branch in branches), strict=True)
    return [join([(s, var.aval.shape) for s in found]) for found, var in zip(results, twice.outvars, strict=True)]


def _fixed_point(body: Callable[[list[State]], list[State]], carry: list[State], avals: Sequence[Any]) -> list[State]:
    """The states of a loop's carry that one more turn does not change."""
    for _ in range(len(carry) + 2):
        after = [join([(old, a.shape), (new, a.shape)]) for old, new, a in zip(carry, body(carry), avals, strict=True)]
        if after == carry:
            return carry
        carry = after
    return [Mixed("a loop whose batch axis changes from turn to turn")] * len(carry)


def _scan(once: Any, twice: Any, states: list[State]) -> list[State]:
    consts, carries = scan_counts(twice)
    fixed, carry, scanned = states[:consts], states[consts : consts + carries], states[consts + carries :]
    if any(isinstance(state, Row) and state.axis == 0 for state in scanned):
        return [Mixed("a loop over the batch axis")] * len(twice.outvars)
    inner = [moved(state, {axis: axis - 1 for axis in range(1, 32)}) for state in scanned]

    def body(carry: list[State]) -> list[State]:
        return infer_jaxpr(once.params["jaxpr"], twice.params["jaxpr"], [*fixed, *carry, *inner])

    carry = _fixed_point(lambda c: body(c)[:carries], carry, [var.aval for var in twice.outvars[:carries]])
    stacked = body(carry)[carries:]
    return [*carry, *(moved(state, {axis: axis + 1 for axis in range(32)}) for state in stacked)]


def _while(once: Any, twice: Any, states: list[State]) -> list[State]:
    first, second = twice.params["cond_nconsts"], twice.params["body_nconsts"]
    tests, fixed, carry = states[:first], states[first : first + second], states[first + second :]
    tested, body = ((once.params[name], twice.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    avals = [var.aval for var in twice.outvars]
    carry = _fixed_point(lambda c: infer_jaxpr(*body, [*fixed, *c]), carry, avals)
    if not isinstance(infer_jaxpr(*tested, [*tests, *carry])[0], Const):
        return [Mixed("a loop that an example ends")] * len(twice.outvars)
    return carry


_NESTED: dict[str, Callable[[Any, Any, list[State]], list[State]]] = {
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

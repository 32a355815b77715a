"""Which axis of each value is the batch axis, and whether each row depends on its own example alone.

An abstract interpretation of a traced function, one rule per primitive. A primitive without a rule,
and a use of one that its rule does not cover, count as mixing examples: what is not known to be
safe is never cached.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex

from jtl.boundary.row_rules import RULES
from jtl.boundary.states import Const, Known, Mixed, Row, State, constant, join, moved, opaque

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
"""The primitives that do what a jaxpr in their parameters says, once."""


def called(eqn: Any) -> Any:
    """The jaxpr that a call holds, with its constants as `consts` if it has any."""
    return next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)


def infer(eqn: Any, known: Known) -> list[State]:
    """The states of an equation's results; enter them with the equation into `known` for the next."""
    states = [constant(0) if isinstance(atom, jex.Literal) else known.states[atom] for atom in eqn.invars]
    name = eqn.primitive.name
    mixed = next((state for state in states if isinstance(state, Mixed)), None)
    if mixed is not None and name != "gather":
        return [mixed] * len(eqn.outvars)
    rule = RULES.get(name) or _NESTED.get(name)
    if rule is not None:
        found = rule(eqn, states, known)
        return found if isinstance(found, list) else [found] * len(eqn.outvars)
    if any(isinstance(state, Row) for state in states):
        return [Mixed(f"jtl does not know whether {name} mixes examples")] * len(eqn.outvars)
    return [opaque(var.aval) for var in eqn.outvars]


def infer_jaxpr(jaxpr: Any, states: Sequence[State]) -> list[State]:
    """The states of a jaxpr's results, given those of its arguments."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = Known(dict(zip(jaxpr.invars, states, strict=True)), {})
    known.states.update({var: opaque(var.aval) for var in jaxpr.constvars})
    for eqn in jaxpr.eqns:
        known.states.update(zip(eqn.outvars, infer(eqn, known), strict=True))
        known.producers.update(dict.fromkeys(eqn.outvars, eqn))
    return [constant(0) if isinstance(atom, jex.Literal) else known.states[atom] for atom in jaxpr.outvars]


def _call(eqn: Any, states: list[State], _: Known) -> list[State]:
    return infer_jaxpr(called(eqn), states)


def _cond(eqn: Any, states: list[State], _: Known) -> list[State]:
    if not isinstance(states[0], Const):
        return [Mixed("a branch that an example decides")] * len(eqn.outvars)
    results = zip(*(infer_jaxpr(branch, states[1:]) for branch in eqn.params["branches"]), strict=True)
    return [join([(s, var.aval.shape) for s in found]) for found, var in zip(results, eqn.outvars, strict=True)]


def _fixed_point(body: Callable[[list[State]], list[State]], carry: list[State], avals: Sequence[Any]) -> list[State]:
    """The states of a loop's carry that one more turn does not change."""
    for _ in range(len(carry) + 2):
        after = [join([(old, a.shape), (new, a.shape)]) for old, new, a in zip(carry, body(carry), avals, strict=True)]
        if after == carry:
            return carry
        carry = after
    return [Mixed("a loop whose batch axis changes from turn to turn")] * len(carry)


def _scan(eqn: Any, states: list[State], _: Known) -> list[State]:
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, carry, scanned = states[:consts], states[consts : consts + carries], states[consts + carries :]
    if any(isinstance(state, Row) and state.axis == 0 for state in scanned):
        return [Mixed("a loop over the batch axis")] * len(eqn.outvars)
    inner = [moved(state, {axis: axis - 1 for axis in range(1, 32)}) for state in scanned]
    avals = [var.aval for var in eqn.outvars[:carries]]
    carry = _fixed_point(lambda c: infer_jaxpr(eqn.params["jaxpr"], [*fixed, *c, *inner])[:carries], carry, avals)
    stacked = infer_jaxpr(eqn.params["jaxpr"], [*fixed, *carry, *inner])[carries:]
    return [*carry, *(moved(state, {axis: axis + 1 for axis in range(32)}) for state in stacked)]


def _while(eqn: Any, states: list[State], _: Known) -> list[State]:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, fixed, carry = states[:first], states[first : first + second], states[first + second :]
    avals = [var.aval for var in eqn.outvars]
    carry = _fixed_point(lambda c: infer_jaxpr(eqn.params["body_jaxpr"], [*fixed, *c]), carry, avals)
    if not isinstance(infer_jaxpr(eqn.params["cond_jaxpr"], [*tests, *carry])[0], Const):
        return [Mixed("a loop that an example ends")] * len(eqn.outvars)
    return carry


_NESTED: dict[str, Callable[..., State | list[State]]] = {
    **dict.fromkeys(CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}

"""Equations whose results nobody reads, and what loops are given and never read."""

from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core as jex


def live(eqns: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """The equations that the outputs need, or that have an effect."""
    wanted = {atom for atom in outputs if not isinstance(atom, jex.Literal)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(var in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted.update(atom for atom in eqn.invars if not isinstance(atom, jex.Literal))
    return kept[::-1]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].update(range(len(eqn.invars))).unpack()  # from jax 0.12 on
    return len(list(consts)), len(list(carry))


def lean_scan(eqn: Any) -> Any:
    """A scan without the operands that its body never reads.

    Linen hands random keys to every lifted loop; one that draws nothing from them is not random.
    """
    closed, (consts, carries) = eqn.params["jaxpr"], scan_counts(eqn)
    jaxpr = getattr(closed, "jaxpr", closed)
    eqns = live(jaxpr.eqns, jaxpr.outvars)
    read = {atom for inner in eqns for atom in inner.invars if not isinstance(atom, jex.Literal)}
    read |= {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    keep = [consts <= k < consts + carries or var in read for k, var in enumerate(jaxpr.invars)]
    if all(keep):
        return eqn
    effects = frozenset(effect for inner in eqns for effect in inner.effects)
    info = jex.DebugInfo("jtl.split", "scan", None, None)
    invars = [var for var, kept in zip(jaxpr.invars, keep, strict=True) if kept]
    body = jex.Jaxpr(list(jaxpr.constvars), invars, list(jaxpr.outvars), eqns, effects, info)
    consts_of = getattr(closed, "consts", ())
    whole = body if isinstance(closed, jex.Jaxpr) and not consts_of else jex.ClosedJaxpr(body, list(consts_of))
    params = {**eqn.params, "jaxpr": whole}
    if "num_consts" in params:
        params["num_consts"] = sum(keep[:consts])
    else:
        params["ft_in"] = params["ft_in"].filter_with_mask(keep)
    if "linear" in params:
        params["linear"] = tuple(one for one, kept in zip(params["linear"], keep, strict=True) if kept)
    operands = [atom for atom, kept in zip(eqn.invars, keep, strict=True) if kept]
    return eqn.replace(invars=operands, params=params)

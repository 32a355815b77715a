"""Equations as text: equal for equal computations, in any process."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jtl import tree as jtree


def literal(atom: Any) -> str:
    """A literal's value, in full, and its type."""
    value = np.asarray(atom.val)
    return f"{value if value.ndim == 0 else jtree.digest(value)}:{atom.aval}"


def plain(value: Any) -> str:
    """Parameters of an equation as text that is the same in every process."""
    if isinstance(value, Mapping):
        return ";".join(f"{key}={_counts(key, value[key])}" for key in sorted(value, key=str))
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(map(plain, value)))}}}"
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return f"({','.join(map(plain, value))})"
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return _jaxpr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return jtree.digest(value)
    if callable(value) and not isinstance(value, type):
        function = getattr(value, "f", value)
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _counts(name: Any, value: Any) -> str:
    # A scan's operands and results, from jax 0.12 on: how many of each kind, whatever was taken out of them.
    if name == "ft_in":
        return plain([len(list(part)) for part in value.unpack()])
    return "" if name == "ft_out" else plain(value)  # the carries are counted, and the results follow


def _jaxpr(value: Any) -> str:
    jaxpr = getattr(value, "jaxpr", value)
    names: dict[Any, str] = {}

    def name(atom: Any) -> str:
        return literal(atom) if isinstance(atom, jex.Literal) else names.setdefault(atom, f"v{len(names)}")

    def line(eqn: Any) -> str:
        operands = " ".join(map(name, eqn.invars))
        results = " ".join(f"{name(var)}:{var.aval}" for var in eqn.outvars)
        return f"{results}={eqn.primitive.name}[{plain(eqn.params)}] {operands}"

    arguments = " ".join(f"{name(var)}:{var.aval}" for var in (*jaxpr.constvars, *jaxpr.invars))
    consts = " ".join(jtree.digest(const) for const in getattr(value, "consts", ()))
    body = "\n".join(map(line, jaxpr.eqns))
    return f"{{{consts}|{arguments}|{body}|{' '.join(map(name, jaxpr.outvars))}}}"


def digests(inputs: Mapping[Any, Any], consts: Mapping[Any, Any], eqns: Sequence[Any]) -> dict[Any, str]:
    """A digest of how each value is computed from named inputs: equal for equal computations, in any process.

    Args:
      inputs: variables, each with a `kind` and a `path`.
      consts: arrays by variable.
      eqns: equations in order, which read only those and each other.
    """
    known = {var: f"{given.kind}:{given.path}:{var.aval}" for var, given in inputs.items()}
    known |= {var: f"const:{jtree.digest(value)}:{var.aval}" for var, value in consts.items()}
    for eqn in eqns:
        operands = [literal(atom) if isinstance(atom, jex.Literal) else known[atom] for atom in eqn.invars]
        what = "\n".join([eqn.primitive.name, plain(eqn.params), *operands])
        digest = hashlib.sha256(what.encode()).hexdigest()
        known.update({var: f"{digest}:{k}:{var.aval}" for k, var in enumerate(eqn.outvars)})
    return known


def calls_back(eqn: Any) -> bool:
    """Whether an equation calls Python, directly or inside: what it computes then has no text."""
    if "callback" in eqn.primitive.name:
        return True
    flat = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    inner = [getattr(item, "jaxpr", item) for item in flat if hasattr(item, "eqns") or hasattr(item, "jaxpr")]
    return any(calls_back(inside) for jaxpr in inner for inside in jaxpr.eqns)

"""A scan over layers, some frozen and some trained, as two scans: then the cut can lie between them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend import core as jex

from jtl.boundary.dead import scan_counts

_THROUGH = frozenset(("convert_element_type", "copy", "neg", "name", "reduce_precision"))
"""Elementwise primitives of one operand, through which a concatenation is still seen."""


class _Piece(NamedTuple):
    """A stretch of a scanned operand: `stop - start` layers of a value, and what is done to them."""

    value: Any
    then: tuple[Callable[[Any], Any], ...]
    start: int
    stop: int


def take_apart(
    eqn: Any, marks: Callable[..., Any], producers: Mapping[Any, Any], notes: list[str]
) -> tuple[Any, list[Any]] | None:
    """Two consecutive scans in the place of one whose first layers are frozen.

    Possible when every scanned operand that depends on a trained leaf is a concatenation along its
    first axis, and its first pieces do not.

    Args:
      eqn: a scan.
      marks: what a value depends on.
      producers: the equation behind each value.
      notes: gets a line if layers are frozen, but not in a way that can be taken apart.

    Returns:
      A jaxpr and its arguments, with the scan's results; None if the scan stays whole.
    """
    first = sum(scan_counts(eqn))
    before, scanned = eqn.invars[:first], eqn.invars[first:]
    if not any(marks(atom).trained for atom in scanned) or any(marks(atom).trained for atom in before):
        return None
    length, backwards = eqn.params["length"], eqn.params["reverse"]
    pieces = [_pieces(atom, length, producers) for atom in scanned]
    trained = [piece for operand in pieces for piece in operand if marks(piece.value).trained]
    at = max(piece.stop for piece in trained) if backwards else min(piece.start for piece in trained)
    if at in (0, length):
        # A leaf that is trained as a whole is trained from the first layer on; a mixture may not be.
        outermost = [p for p in trained if (p.stop == length if backwards else p.start == 0)]
        if all(marks(piece.value).frozen for piece in outermost) and marks(*before).batch:
            notes.append(_NOTE)
        return None
    return _rewritten(eqn, pieces, at)


_NOTE = (
    "a scan over layers is trained as a whole: its layers are mixed from frozen and trained leaves; "
    "scan over jnp.concatenate([frozen, trained]), or over each part by itself, and the frozen layers are cached"
)


def _pieces(atom: Any, length: int, producers: Mapping[Any, Any]) -> list[_Piece]:
    eqn = None if isinstance(atom, jex.Literal) else producers.get(atom)
    if eqn is not None and eqn.primitive.name in _THROUGH:
        inner = _pieces(eqn.invars[0], length, producers)
        again = functools.partial(_applied, eqn)
        return [piece._replace(then=(*piece.then, again)) for piece in inner]
    if eqn is not None and eqn.primitive.name == "stack" and eqn.params["axis"] == 0:
        return [_Piece(one, (_alone,), k, k + 1) for k, one in enumerate(eqn.invars)]
    if eqn is None or eqn.primitive.name != "concatenate" or eqn.params["dimension"] != 0:
        return [_Piece(atom, (), 0, length)]
    found: list[_Piece] = []
    for part in eqn.invars:
        start = found[-1].stop if found else 0
        inner = _pieces(part, part.aval.shape[0], producers)
        found += [piece._replace(start=piece.start + start, stop=piece.stop + start) for piece in inner]
    return found


def _applied(eqn: Any, value: Any) -> Any:
    return eqn.primitive.bind(value, **eqn.params)


def _alone(value: Any) -> Any:
    return lax.expand_dims(value, (0,))


def _rewritten(eqn: Any, pieces: Sequence[Sequence[_Piece]], at: int) -> tuple[Any, list[Any]]:
    consts, carries = scan_counts(eqn)
    length, backwards = eqn.params["length"], eqn.params["reverse"]
    before = eqn.invars[: consts + carries]
    halves = [(at, length), (0, at)] if backwards else [(0, at), (at, length)]
    arguments = list(dict.fromkeys(a for a in before if not isinstance(a, jex.Literal)))
    arguments = list(dict.fromkeys([*arguments, *(piece.value for operand in pieces for piece in operand)]))

    def scans(*values: Any) -> list[Any]:
        of = dict(zip(arguments, values, strict=True))
        given = [atom.val if isinstance(atom, jex.Literal) else of[atom] for atom in before]
        fixed, carry = given[:consts], given[consts:]
        stacked = {}
        for start, stop in halves:
            xs = [_stretch(operand, of, start, stop) for operand in pieces]
            results = eqn.primitive.bind(*fixed, *carry, *xs, **{**eqn.params, "length": stop - start})
            carry, stacked[start] = results[:carries], results[carries:]
        return [*carry, *(lax.concatenate(parts, 0) for parts in zip(stacked[0], stacked[at], strict=True))]

    jaxpr = jax.make_jaxpr(scans)(*(_shape(atom) for atom in arguments)).jaxpr
    return jaxpr.replace(eqns=[inner.replace(source_info=eqn.source_info) for inner in jaxpr.eqns]), arguments


def _stretch(operand: Sequence[_Piece], values: Mapping[Any, Any], start: int, stop: int) -> Any:
    found = []
    for piece in operand:
        low, high = max(start, piece.start), min(stop, piece.stop)
        if low < high:
            value = values[piece.value]
            if high - low < piece.stop - piece.start:
                value = lax.slice_in_dim(value, low - piece.start, high - piece.start)
            for function in piece.then:
                value = function(value)
            found.append(value)
    return found[0] if len(found) == 1 else lax.concatenate(found, 0)


def _shape(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)

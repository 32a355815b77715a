"""A loss as one flat list of equations, each marked by what it depends on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jtl import tree as jtree
from jtl.boundary import dead, layers_scan, text
from jtl.boundary.flops import is_heavy
from jtl.boundary.rows import CALLS, called
from jtl.errors import SplitError
from jtl.state import Frozen, TrainState
from jtl.step import LossFn, call_loss
from jtl.typing import Batch, PyTree


class Input(NamedTuple):
    """An argument of the loss.

    Attributes:
      kind: "params", "collections", "batch" or "key".
      path: of the leaf.
      trained: a trained leaf, or statistics that the mask lets move.
    """

    kind: str
    path: str
    trained: bool = False


class Marks(NamedTuple):
    """What a value depends on.

    Attributes:
      trained: the path of a trained leaf or moving statistic, or "".
      batch: the examples.
      key: the random key.
      frozen: a frozen leaf.
    """

    trained: str = ""
    batch: bool = False
    key: bool = False
    frozen: bool = False

    def __or__(self, other: "Marks") -> "Marks":  # type: ignore[override]
        return Marks(
            self.trained or other.trained,
            self.batch or other.batch,
            self.key or other.key,
            self.frozen or other.frozen,
        )


class Program(NamedTuple):
    """A traced loss.

    Attributes:
      inputs: what each input variable is.
      consts: arrays that the loss closes over, by variable.
      eqns: equations in order, calls inlined.
      outputs: variables or literals.
      out_tree: the structure of the outputs, `(loss, Aux)`.
      marks: what each variable depends on.
      notes: what could be cut deeper if it were written otherwise.
    """

    inputs: dict[Any, Input]
    consts: dict[Any, Any]
    eqns: list[Any]
    outputs: list[Any]
    out_tree: Any
    marks: dict[Any, Marks]
    notes: list[str]

    def marks_of(self, atoms: Sequence[Any]) -> Marks:
        """What values together depend on."""
        return _together(self.marks, atoms)


class Shapes(NamedTuple):
    """The arguments of a loss, as shapes and dtypes."""

    state: TrainState
    frozen: Frozen
    batch: Batch

    @classmethod
    def of(cls, state: TrainState, frozen: Frozen, batch: Batch) -> "Shapes":
        """Shapes of arrays."""
        return cls(*jax.tree.map(shape_of, (state._replace(opt_state=()), frozen, batch)))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, a number or a shape."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    dtype = dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def trace(loss_fn: LossFn, shapes: Shapes, *, training: bool, frozen_dropout: bool = False) -> Program:
    """Trace a loss as a step would call it.

    Args:
      loss_fn: the loss.
      shapes: of its arguments.
      training: with a key and the mask's modes; otherwise as an evaluation step calls it.
      frozen_dropout: as in `jtl.train_step`.
    """
    arguments = {
        "trained": (shapes.state.params, shapes.state.collections),
        "frozen": (shapes.frozen.params, shapes.frozen.collections),
        "batch": shapes.batch,
        "key": shapes.state.key if training else None,
    }

    def loss(arguments: dict[str, Any]) -> Any:
        state = shapes.state._replace(params=arguments["trained"][0], collections=arguments["trained"][1])
        return call_loss(
            loss_fn, state, Frozen(*arguments["frozen"]), arguments["batch"], arguments["key"], frozen_dropout
        )

    closed, out = jax.make_jaxpr(loss, return_shape=True)(arguments)
    jaxpr = getattr(closed, "jaxpr", closed)
    named = [_input(*pair) for pair in jax.tree_util.tree_leaves_with_path(arguments)]
    inputs = dict(zip(jaxpr.invars, named, strict=True))
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    marks = {var: _marks(given) for var, given in inputs.items()} | dict.fromkeys(consts, Marks())
    flat = _Flat(consts, marks)
    outputs = flat.add(jaxpr, dict(zip([*inputs, *consts], [*inputs, *consts], strict=True)))
    return Program(inputs, consts, dead.live(flat.eqns, outputs), outputs, jax.tree.structure(out), marks, flat.notes)


def _input(path: Any, _: Any) -> Input:
    part, *rest = path
    part = part.key
    if part in ("trained", "frozen"):
        kind, path = ("params", "collections")[rest[0].idx], jtree.path_str(tuple(rest[1:]))
        return Input(kind, path, part == "trained")
    return Input(part, jtree.path_str(tuple(rest)))


def _marks(given: Input) -> Marks:
    return Marks(
        trained=given.path if given.trained else "",
        batch=given.kind == "batch",
        key=given.kind == "key",
        frozen=given.kind in ("params", "collections") and not given.trained,
    )


def _together(marks: Mapping[Any, Marks], atoms: Sequence[Any]) -> Marks:
    found = Marks()
    for atom in atoms:
        if not isinstance(atom, jex.Literal):
            found = found | marks[atom]
    return found


class _Flat:
    """Equations with calls inlined, and scans over frozen and trained layers taken apart."""

    def __init__(self, consts: dict[Any, Any], marks: dict[Any, Marks]):
        self.consts, self.marks = consts, marks
        self.eqns: list[Any] = []
        self.producers: dict[Any, Any] = {}
        self.notes: list[str] = []

    def add(self, jaxpr: Any, env: dict[Any, Any], stack: Any = None) -> list[Any]:
        """Append a jaxpr's equations; `env` has its arguments, and gets its other variables."""

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner_stack = eqn.source_info.name_stack if stack is None else stack + eqn.source_info.name_stack
            if self._opens(eqn, operands):
                results = self._inline(eqn, operands, inner_stack)
            else:
                results = self._append(eqn, operands, inner_stack)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _opens(self, eqn: Any, operands: list[Any]) -> bool:
        name = eqn.primitive.name
        if name not in CALLS or name.startswith("custom"):
            return False  # a custom derivative holds for the call as a whole
        if name in ("remat2", "checkpoint") and _together(self.marks, operands).trained:
            # Inside a checkpoint memory is saved; it is opened only for heavy work that can be cached.
            return _has_heavy_row(called(eqn), [_together(self.marks, [atom]) for atom in operands])
        return True

    def _marks_of(self, *atoms: Any) -> Marks:
        return _together(self.marks, atoms)

    def _inline(self, eqn: Any, operands: list[Any], stack: Any) -> list[Any]:
        inner = called(eqn)
        jaxpr = getattr(inner, "jaxpr", inner)
        # A library's own jit is traced once for all its callers: then only the call tells the line.
        unknown = {id(one) for one in jaxpr.eqns if not _line(one.source_info.traceback)}
        here = eqn.source_info.traceback
        eqns = [
            one.replace(source_info=one.source_info.replace(traceback=here)) if id(one) in unknown else one
            for one in jaxpr.eqns
        ]
        jaxpr = jaxpr.replace(eqns=eqns) if unknown else jaxpr
        env = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, getattr(inner, "consts", ()), strict=True):
            env[var] = jex.Var(var.aval)
            self.consts[env[var]], self.marks[env[var]] = value, Marks()
        return self.add(jaxpr, env, stack)

    def _append(self, eqn: Any, operands: list[Any], stack: Any) -> list[Any]:
        results = [jex.Var(var.aval) for var in eqn.outvars]
        info = eqn.source_info.replace(name_stack=stack)
        eqn = eqn.replace(invars=operands, outvars=results, source_info=info)
        parts = None
        if eqn.primitive.name == "scan":
            eqn = dead.lean_scan(eqn)
            operands = eqn.invars
            parts = layers_scan.take_apart(eqn, self._marks_of, self.producers, self.notes)
        if parts is not None:
            jaxpr, arguments = parts
            return self.add(jaxpr, dict(zip(jaxpr.invars, arguments, strict=True)))
        self.eqns.append(eqn)
        self.marks.update(dict.fromkeys(results, _together(self.marks, operands)))
        self.producers.update(dict.fromkeys(results, eqn))
        return results


def merged(program: Program, other: Program) -> tuple[Program, Program]:
    """Equal equations that nothing trained reaches, made one.

    Two equations are equal if they are so in both programs: at one batch size alone, a value of the
    examples and one of a layer may have equal shapes by chance.

    Args:
      program: a traced loss.
      other: the same loss at another batch size, with the same equations.
    """
    seen: dict[Any, Any] = {}
    new: tuple[dict[Any, Any], ...] = ({}, {})
    kept: tuple[list[Any], ...] = ([], [])
    for pair in zip(program.eqns, other.eqns, strict=True):
        moved = [
            eqn.replace(
                invars=[to.get(atom, atom) if not isinstance(atom, jex.Literal) else atom for atom in eqn.invars]
            )
            for eqn, to in zip(pair, new, strict=True)
        ]
        key = None if program.marks_of(pair[0].invars).trained else tuple(map(_key, moved))
        if key is None or None in key or key not in seen:
            if key is not None:
                seen[key] = moved
            for eqns, eqn in zip(kept, moved, strict=True):
                eqns.append(eqn)
            continue
        for to, eqn, same in zip(new, moved, seen[key], strict=True):
            to.update(zip(eqn.outvars, same.outvars, strict=True))

    def renamed(one: Program, to: dict[Any, Any], eqns: list[Any]) -> Program:
        outputs = [atom if isinstance(atom, jex.Literal) else to.get(atom, atom) for atom in one.outputs]
        return one._replace(eqns=eqns, outputs=outputs)

    return renamed(program, new[0], kept[0]), renamed(other, new[1], kept[1])


def _key(eqn: Any) -> Any:
    """What makes two equations equal; None for one that is like no other."""
    if eqn.effects or text.calls_back(eqn):
        return None
    operands = (text.literal(atom) if isinstance(atom, jex.Literal) else id(atom) for atom in eqn.invars)
    return eqn.primitive.name, text.plain(eqn.params), *operands


def _has_heavy_row(jaxpr: Any, given: Sequence[Marks]) -> bool:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    marks = dict(zip(jaxpr.invars, given, strict=True)) | dict.fromkeys(jaxpr.constvars, Marks())
    for eqn in jaxpr.eqns:
        found = _together(marks, eqn.invars)
        marks.update(dict.fromkeys(eqn.outvars, found))
        if found.batch and not found.trained and is_heavy(eqn):
            return True
    return False


def digests(program: Program, eqns: Sequence[Any]) -> dict[Any, str]:
    """A digest of how each value is computed from the program's inputs."""
    return text.digests(program.inputs, program.consts, eqns)


def where(eqn: Any) -> str:
    """The module and the source line that an equation comes from."""
    module = str(eqn.source_info.name_stack)
    name = f"{eqn.primitive.name} in {module}" if module else eqn.primitive.name
    return ", ".join(part for part in (name, _line(eqn.source_info.traceback)) if part)


def _line(traceback: Any) -> str:
    """The innermost line of a user's own file, or else of a library other than those that trace."""
    tracing = (
        "/jax/",
        "/jaxlib/",
        "/flax/",
        "/jaxtyping/",
        "/jtl/boundary/",
        "/jtl/modes.py",
        "/jtl/peft/reopening.py",
        "/jtl/step.py",
        "/contextlib.py",
    )
    for skipped in ((*tracing, "/site-packages/"), tracing):
        for frame in getattr(traceback, "frames", []):
            if not any(part in frame.file_name.replace("\\", "/") for part in skipped):
                number = getattr(frame, "start_line", None) or getattr(frame, "line_num", 0)
                return f"{frame.file_name}:{number} ({frame.function_name})"
    return ""


def refuse(reason: str, eqn: Any) -> SplitError:
    """The error that an equation is at fault for."""
    return SplitError(f"{reason}: {where(eqn)}")


def function(
    program: Program, inputs: Sequence[Any], eqns: Sequence[Any], outputs: Sequence[Any]
) -> Callable[..., Any]:
    """The function from some variables of a program to others by some of its equations."""
    used = {atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, jex.Literal)}
    used |= {atom for atom in outputs if not isinstance(atom, jex.Literal)}
    consts = {var: value for var, value in program.consts.items() if var in used}
    effects = frozenset(effect for eqn in eqns for effect in eqn.effects)
    info = jex.DebugInfo("jtl.split", "jtl.split", None, None)
    jaxpr = jex.Jaxpr(list(consts), list(inputs), list(outputs), list(eqns), effects, info)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, list(consts.values())))


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path."""
    return dict(jtree.leaves_with_paths(tree))

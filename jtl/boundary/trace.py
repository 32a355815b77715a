"""A loss as one flat list of equations, each marked by what it depends on."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jtl import tree as jtree
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
    """

    inputs: dict[Any, Input]
    consts: dict[Any, Any]
    eqns: list[Any]
    outputs: list[Any]
    out_tree: Any
    marks: dict[Any, Marks]

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
    return Program(inputs, consts, flat.eqns, outputs, jax.tree.structure(out), marks)


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
    """Equations with calls inlined, and equal equations that nothing trained reaches merged."""

    def __init__(self, consts: dict[Any, Any], marks: dict[Any, Marks]):
        self.consts, self.marks = consts, marks
        self.eqns: list[Any] = []
        self._seen: dict[Any, list[Any]] = {}

    def add(self, jaxpr: Any, env: dict[Any, Any], stack: Any = None) -> list[Any]:
        """Append a jaxpr's equations; `env` has its arguments, and gets its other variables."""

        def read(atom: Any) -> Any:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            found = _together(self.marks, operands)
            inner_stack = eqn.source_info.name_stack if stack is None else stack + eqn.source_info.name_stack
            if self._opens(eqn, operands):
                results = self._inline(eqn, operands, inner_stack)
            else:
                results = self._append(eqn, operands, found, inner_stack)
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

    def _inline(self, eqn: Any, operands: list[Any], stack: Any) -> list[Any]:
        inner = called(eqn)
        jaxpr = getattr(inner, "jaxpr", inner)
        env = dict(zip(jaxpr.invars, operands, strict=True))
        for var, value in zip(jaxpr.constvars, getattr(inner, "consts", ()), strict=True):
            env[var] = jex.Var(var.aval)
            self.consts[env[var]], self.marks[env[var]] = value, Marks()
        return self.add(jaxpr, env, stack)

    def _append(self, eqn: Any, operands: list[Any], found: Marks, stack: Any) -> list[Any]:
        same = None
        if not found.trained and not eqn.effects:
            same = (eqn.primitive.name, _plain(eqn.params), *(_name(atom) for atom in operands))
            if same in self._seen:
                return self._seen[same]
        results = [jex.Var(var.aval) for var in eqn.outvars]
        info = eqn.source_info.replace(name_stack=stack)
        self.eqns.append(eqn.replace(invars=operands, outvars=results, source_info=info))
        self.marks.update(dict.fromkeys(results, found))
        if same is not None:
            self._seen[same] = results
        return results


def _has_heavy_row(jaxpr: Any, given: Sequence[Marks]) -> bool:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    marks = dict(zip(jaxpr.invars, given, strict=True)) | dict.fromkeys(jaxpr.constvars, Marks())
    for eqn in jaxpr.eqns:
        found = _together(marks, eqn.invars)
        marks.update(dict.fromkeys(eqn.outvars, found))
        if found.batch and not found.trained and is_heavy(eqn):
            return True
    return False


def _name(atom: Any) -> Any:
    return (str(atom.val), str(atom.aval)) if isinstance(atom, jex.Literal) else id(atom)


def _plain(value: Any) -> str:
    """Parameters of an equation as text that is the same in every process."""
    if isinstance(value, Mapping):
        return ";".join(f"{key}={_plain(value[key])}" for key in sorted(value, key=str))
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return f"({','.join(map(_plain, value))})"
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return _plain_jaxpr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return jtree.digest(value)
    if callable(value) and not isinstance(value, type):
        function = getattr(value, "f", value)
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _plain_jaxpr(value: Any) -> str:
    jaxpr = getattr(value, "jaxpr", value)
    names: dict[Any, str] = {}

    def name(atom: Any) -> str:
        return f"{atom.val}" if isinstance(atom, jex.Literal) else names.setdefault(atom, f"v{len(names)}")

    def line(eqn: Any) -> str:
        operands = " ".join(map(name, eqn.invars))
        results = " ".join(f"{name(var)}:{var.aval}" for var in eqn.outvars)
        return f"{results}={eqn.primitive.name}[{_plain(eqn.params)}] {operands}"

    arguments = " ".join(f"{name(var)}:{var.aval}" for var in (*jaxpr.constvars, *jaxpr.invars))
    consts = " ".join(jtree.digest(const) for const in getattr(value, "consts", ()))
    body = "\n".join(map(line, jaxpr.eqns))
    return f"{{{consts}|{arguments}|{body}|{' '.join(map(name, jaxpr.outvars))}}}"


def digests(program: Program, eqns: Sequence[Any]) -> dict[Any, str]:
    """A digest of how each value is computed from the named inputs: equal for equal computations, in any process."""
    known = {var: f"{given.kind}:{given.path}:{var.aval}" for var, given in program.inputs.items()}
    known |= {var: jtree.digest(value) for var, value in program.consts.items()}

    def text(atom: Any) -> str:
        return f"{atom.val}:{atom.aval}" if isinstance(atom, jex.Literal) else known[atom]

    for eqn in eqns:
        what = "\n".join([eqn.primitive.name, _plain(eqn.params), *map(text, eqn.invars)])
        digest = hashlib.sha256(what.encode()).hexdigest()
        known.update({var: f"{digest}:{k}:{var.aval}" for k, var in enumerate(eqn.outvars)})
    return known


def where(eqn: Any) -> str:
    """The module and the source line that an equation comes from."""
    module = str(eqn.source_info.name_stack)
    frames = getattr(eqn.source_info.traceback, "frames", [])
    skipped = ("/jax/", "/jaxlib/", "/flax/", "/jtl/boundary/", "/jtl/modes.py", "/jtl/step.py", "/contextlib.py")
    line = ""
    for frame in frames:
        if not any(part in frame.file_name.replace("\\", "/") for part in skipped):
            number = getattr(frame, "start_line", None) or getattr(frame, "line_num", 0)
            line = f"{frame.file_name}:{number} ({frame.function_name})"
            break
    return ", ".join(
        part for part in (f"{eqn.primitive.name} in {module}" if module else eqn.primitive.name, line) if part
    )


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

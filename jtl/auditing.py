"""`audit`: proof instead of belief that a training step trains what its mask says, and nothing else."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jtl import modes
from jtl import tree as jtree
from jtl.errors import AuditError, ConfigError
from jtl.masks import Mask
from jtl.modes import INFERENCE, Modes
from jtl.state import TrainState, init, standard_promotion, variables
from jtl.step import LossFn, call_loss, train_step
from jtl.typing import Batch, MaskLike, PyTree, Variables

TOLERANCE = 1.01
"""Of compiled operations, over the ideal for the mask and what an optimizer does with each trained value."""

_OPTIMIZER = 64
"""Operations that an optimizer may take for a trained value."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
      check: what was looked at.
      ok: whether it is as the mask says.
      detail: what was found.
    """

    check: str
    ok: bool
    detail: str


class Rule(NamedTuple):
    """A part of the mask.

    Attributes:
      text: the pattern, or what else the part is.
      paths: of the leaves that it trains.
      size: of their parameters.
    """

    text: str
    paths: tuple[str, ...]
    size: int


class Module(NamedTuple):
    """How a module ran.

    Attributes:
      path: in the model.
      kind: its class.
      frozen: whether no leaf of it, or of the nearest module around it that has some, is trained.
      mode: "running statistics", "batch statistics", "dropout on" or "dropout off".
    """

    path: str
    kind: str
    frozen: bool
    mode: str


class Audit(NamedTuple):
    """What `audit` found.

    Attributes:
      rules: what each part of the mask matches.
      unmatched: paths of the leaves that none matches: the frozen ones.
      trained: parameters trained.
      frozen: parameters frozen.
      trained_bytes: of the trained leaves.
      frozen_bytes: of the frozen leaves.
      state_bytes: of all that a step returns.
      flops: operations of the compiled step.
      ideal_flops: of the least that the mask needs: a forward pass, gradients of what lies above a trained leaf, and
        of trained leaves; None without a loss.
      temp_bytes: of the compiled step's temporary memory.
      modules: those with statistics or dropout.
      findings: one for each check.
    """

    rules: tuple[Rule, ...]
    unmatched: tuple[str, ...]
    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    state_bytes: int
    flops: float
    ideal_flops: float | None
    temp_bytes: int
    modules: tuple[Module, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is as the mask says."""
        return all(finding.ok for finding in self.findings)

    def require(self) -> "Audit":
        """The same, if all is well.

        Raises:
          AuditError: with each finding that is not.
        """
        if not self.ok:
            faults = [f"{finding.check}: {finding.detail}" for finding in self.findings if not finding.ok]
            raise AuditError("the step does not do what its mask says:\n  " + "\n  ".join(faults))
        return self


def audit(
    step: Callable[..., Any],
    state: Any,
    frozen: Any,
    batch: Batch,
    *,
    loss_fn: LossFn | None = None,
    trainable: MaskLike | None = None,
    whole: Callable[[Any, Any], Variables] = variables,
    steps: int = 3,
) -> Audit:
    """Run a step some times, and compare what it did, and what it costs, with what the mask says.

    The checks: frozen leaves and statistics are bit-identical afterwards; the loss depends on every trained leaf;
    frozen modules used running statistics and no dropout; no leaf is tied across the mask; the step holds no leaf of
    the model as a constant; and it computes no more than the mask needs.

    Args:
      step: `(state, frozen, batch) -> (state, anything)`, jitted or not: of `jtl.train_step`, or of one's own loop.
      state: what the step evolves. It is copied, so a step may donate it.
      frozen: what it reads.
      batch: to run it on.
      loss_fn: the loss inside, for the ideal number of operations; without it they are not compared.
      trainable: the mask; by default what `state` is a `TrainState` of. A mask with a name says more of its parts.
      whole: `(state, frozen)` to variables, `{"params": ..., **collections}`, where they are not jtl's.
      steps: how many to run.

    Returns:
      The findings, as data. `.require()` raises where one is bad.

    Raises:
      ConfigError: there is no mask, or no step to run.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: expected 1 or more")
    before = whole(state, frozen)
    mask = _mask(state, before, trainable)
    start = _flat(before)
    copied = jax.tree.map(lambda leaf: leaf, frozen)  # its containers: a step that writes to them is found by them
    done = whole(*_run(step, state, frozen, batch, steps))
    after = _flat(done)
    trained, held = jtree.partition(before["params"], mask)
    moving = {f"params/{path}" for path in jtree.paths(trained)} | _moving(before, mask)
    gradients = [] if loss_fn is None else _gradients(loss_fn, [before, done], mask, batch)
    findings = [_drift(start, after, moving), _still(start, after, trained, gradients)]
    findings.append(_ties(trained, held))
    seen, ideal = _look(step, state, copied, batch, Modes(before["params"], mask)), None
    if seen is None:
        findings.append(Finding("closures", False, "a trace of the step changes something besides what it returns"))
    else:
        ideal = _ideal(loss_fn, before, mask, batch)
        findings += [_mode(seen.modules), _constants(seen.constants, before)]
        findings += _cost(seen.flops, ideal, jtree.size(trained))
    return Audit(
        rules=_rules(trainable, mask, before["params"]),
        unmatched=tuple(jtree.paths(held)),
        trained=jtree.size(trained),
        frozen=jtree.size(held),
        trained_bytes=jtree.nbytes(trained),
        frozen_bytes=jtree.nbytes(held),
        state_bytes=jtree.nbytes(state),
        flops=math.nan if seen is None else seen.flops,
        ideal_flops=ideal,
        temp_bytes=0 if seen is None else seen.temp_bytes,
        modules=() if seen is None else seen.modules,
        findings=tuple(findings),
    )


def _mask(state: Any, whole: Variables, trainable: MaskLike | None) -> PyTree:
    given = None if trainable is None else jtree.as_bools(trainable, whole["params"])
    if not isinstance(state, TrainState):
        if given is None:
            raise ConfigError(f"the state is a {type(state).__name__}, which does not tell the mask: pass trainable=")
        return given
    mask = jtree.mask_of(state.params, whole["params"])
    if given is not None and given != mask:
        pairs = zip(jtree.leaves_with_paths(given), jax.tree.leaves(mask), strict=True)
        other = [path for (path, one), two in pairs if one != two]
        raise ConfigError(f"the state was made with another mask: it differs from trainable= at {other[:3]}")
    return mask


def _rules(trainable: MaskLike | None, mask: PyTree, params: PyTree) -> tuple[Rule, ...]:
    parts = trainable.parts if isinstance(trainable, Mask) else (Mask(lambda _: mask, "the mask"),)
    chosen = [(repr(part), jtree.partition(params, part)[0]) for part in parts]
    return tuple(Rule(text, tuple(jtree.paths(tree)), jtree.size(tree)) for text, tree in chosen)


def _flat(whole: Variables) -> dict[str, np.ndarray]:
    return {path: np.array(leaf) for path, leaf in jtree.leaves_with_paths(dict(whole))}


def _run(step: Any, state: Any, frozen: Any, batch: Batch, steps: int) -> tuple[Any, Any]:
    """The state after all steps, and what they read."""
    state = jax.tree.map(lambda leaf: jnp.array(leaf) if isinstance(leaf, jax.Array) else leaf, state)
    for _ in range(steps):
        state = step(state, frozen, batch)[0]
    return state, frozen


def _moving(whole: Variables, mask: PyTree) -> set[str]:
    collections = {name: value for name, value in whole.items() if name != "params"}
    moving = Modes(whole["params"], mask).moving(collections)
    return {path for path, moves in jtree.leaves_with_paths(moving) if moves}


def _drift(start: dict[str, np.ndarray], after: dict[str, np.ndarray], moving: set[str]) -> Finding:
    changed = [path for path, leaf in start.items() if path not in moving and not _same(leaf, after.get(path))]
    held = len(start) - len(moving & set(start))
    detail = f"{held} frozen leaves and statistics are bit-identical"
    if changed:
        detail = f"{len(changed)} of {held} frozen leaves and statistics moved: {', '.join(changed[:3])}"
    return Finding("frozen drift", not changed, detail)


def _still(
    start: dict[str, np.ndarray], after: dict[str, np.ndarray], trained: PyTree, gradients: Sequence[PyTree]
) -> Finding:
    """Leaves that the mask trains in vain. Decay moves those, too: their gradient tells.

    One may be zero at the start alone, as that of a low-rank factor whose other factor is zero.
    """
    paths = jtree.paths(trained)
    still = {path for path in paths if _same(start[f"params/{path}"], after.get(f"params/{path}"))}
    if gradients:
        zeros = [{path for path, grad in jtree.leaves_with_paths(tree) if not np.any(grad)} for tree in gradients]
        still |= set.intersection(*zeros)
    detail = f"the loss depends on all {len(paths)} trained leaves"
    if still:
        detail = f"the loss does not depend on {len(still)} of {len(paths)} trained leaves: "
        detail += ", ".join(sorted(still)[:3])
    return Finding("trained leaves", not still, detail)


def _same(one: np.ndarray, other: np.ndarray | None) -> bool:
    return other is not None and one.dtype == other.dtype and one.tobytes() == other.tobytes()


class _Seen(NamedTuple):
    """What a trace and a compilation of a step show."""

    modules: tuple[Module, ...]
    constants: tuple[Any, ...]
    flops: float
    temp_bytes: int


def _look(step: Any, state: Any, frozen: Any, batch: Batch, policy: Modes) -> _Seen | None:
    """Trace and compile; None where the step leaves traced values outside of it."""
    found: dict[tuple[str, str], tuple[str, bool]] = {}

    def record(next_fun: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        module, ruling = context.module, modes.current()
        if context.method_name == "__call__" and module.scope is not None:
            held = ruling is not None and ruling.is_frozen_module(module)
            for name in INFERENCE:
                given = kwargs.get(name)
                value = getattr(module, name, None) if given is None else given
                if value is not None:
                    infers = bool(value) or (held and ruling is not None and name in ruling.switches())
                    found.setdefault(("/".join(module.path), name), (type(module).__name__, infers))
        return next_fun(*args, **kwargs)

    # A jit around it would give a trace from before.
    plain = inspect.unwrap(step) if hasattr(step, "lower") else step
    try:
        with nn.intercept_methods(record):
            constants = jax.make_jaxpr(lambda *given: plain(*given))(state, frozen, batch).consts
        compiled = jax.jit(lambda *given: plain(*given)).lower(state, frozen, batch).compile()
    except jax.errors.UnexpectedTracerError:
        return None
    memory: Any = compiled.memory_analysis()
    rows = tuple(_module(policy, *key, *seen) for key, seen in sorted(found.items()))
    return _Seen(rows, tuple(constants), _flops(compiled), int(memory.temp_size_in_bytes))


def _module(policy: Modes, path: str, name: str, kind: str, infers: bool) -> Module:
    words = ("dropout off", "dropout on") if name == "deterministic" else ("running statistics", "batch statistics")
    return Module(path, kind, policy.is_frozen(path), words[0] if infers else words[1])


def _mode(modules: tuple[Module, ...]) -> Finding:
    bad = [module for module in modules if module.frozen and module.mode in ("batch statistics", "dropout on")]
    detail = f"{len(modules)} modules with statistics or dropout"
    if bad:
        detail = ", ".join(f"{module.path} ({module.kind}) is frozen, with {module.mode}" for module in bad[:3])
    return Finding("modes", not bad, detail)


def _ties(trained: PyTree, held: PyTree) -> Finding:
    """Leaves of equal values on both sides of the mask; a transposed one is a tie as well."""
    known: dict[bytes, str] = {}
    for path, leaf in jtree.leaves_with_paths(held):
        value = np.asarray(leaf)
        if _telling(value):
            known[value.astype(np.float64).tobytes()] = path
    tied = []
    for path, leaf in jtree.leaves_with_paths(trained):
        value = np.asarray(leaf).astype(np.float64)
        for form in (value, value.T):
            if _telling(value) and form.tobytes() in known:
                tied.append(f"{path} is trained and {known[form.tobytes()]}, which has the same values, is frozen")
                break
    return Finding("ties", not tied, "; ".join(tied[:3]) or "no leaf is tied across the mask")


def _telling(value: np.ndarray) -> bool:
    """Whether equal values can hardly be chance: not a single number, and not all ones or zeros."""
    return value.size > 1 and bool(np.any(value != value.flat[0]))


def _constants(closed: Sequence[Any], whole: Variables) -> Finding:
    """Leaves of the model that a step has from a closure: no mask reaches them, and a compiled step copies them."""
    held = {np.asarray(value).tobytes() for value in closed if hasattr(value, "shape") and not _is_key(value)}
    leaves = jtree.leaves_with_paths(dict(whole))
    found = [path for path, leaf in leaves if _telling(np.asarray(leaf)) and np.asarray(leaf).tobytes() in held]
    detail = "the step takes every leaf as an argument"
    if found:
        detail = f"the step holds {len(found)} leaves by a closure, out of the mask's reach: {', '.join(found[:3])}"
    return Finding("closures", not found, detail)


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def _ideal(loss_fn: LossFn | None, whole: Variables, mask: PyTree, batch: Batch) -> float | None:
    if loss_fn is None:
        return None
    tx = optax.sgd(1.0)
    state, frozen = init(whole, tx, trainable=mask, key=jax.random.key(0))
    with standard_promotion():
        compiled = jax.jit(train_step(loss_fn, tx)).lower(state, frozen, batch).compile()
    return _flops(compiled)


def _gradients(loss_fn: LossFn, points: Sequence[Variables], mask: PyTree, batch: Batch) -> list[PyTree]:
    """Of the trained leaves at each point, without what an optimizer makes of them."""
    halves = [init(whole, optax.identity(), trainable=mask, key=jax.random.key(0)) for whole in points]

    def loss(params: PyTree, state: TrainState, frozen: Any) -> jax.Array:
        return call_loss(loss_fn, state._replace(params=params), frozen, batch, state.key, False)[0]

    gradient = jax.jit(jax.grad(loss))
    return [gradient(state.params, state, frozen) for state, frozen in halves]


def _flops(compiled: Any) -> float:
    return float(compiled.cost_analysis()["flops"])


def _cost(flops: float, ideal: float | None, trained: int) -> list[Finding]:
    if ideal is None:
        return []
    ratio, most = flops / ideal, TOLERANCE * ideal + _OPTIMIZER * trained
    detail = f"{flops / 1e6:,.2f} MFLOP, {ratio:.3f} of the ideal for the mask"
    if flops > most:
        detail += ": gradients of frozen leaves are computed, as a clip or a norm over the whole tree asks for"
    return [Finding("operations", flops <= most, detail)]

"""Training or inference mode of every module, decided by the mask.

Frozen BatchNorm must use its running statistics, and dropout inside a wholly frozen module
must be off, in models that have never heard of jtl. `follow` does both while a loss is being
traced: it intercepts the calls of `flax.linen` modules and sets the arguments or attributes by
which they choose their mode. A module is frozen when no leaf under it is trained; a module
without leaves of its own, such as dropout, goes with the nearest module around it that has some.

Models outside linen ask `current()` for the same decision; see `jtl.interop`.
"""

import contextlib
import contextvars
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jtl import tree as jtree
from jtl.typing import Collections, Params, PyTree

INFERENCE = {"use_running_average": True, "deterministic": True}
"""The names by which modules take their mode, and the value that means inference."""


class Modes:
    """Which modules are frozen, by the identity of their leaves and by their path.

    Args:
      params: the whole tree that the loss is called with.
      mask: bools in the structure of `params`.
      frozen_dropout: keep dropout active inside wholly frozen modules.
    """

    def __init__(self, params: Params, mask: PyTree, *, frozen_dropout: bool = False):
        trained = dict(jtree.leaves_with_paths(mask))
        self._leaf_paths = list(trained)
        self._path_of = {id(leaf): path for path, leaf in jtree.leaves_with_paths(params)}
        self._by_path: dict[str, bool] = {"": any(trained.values())}
        for path, is_trained in trained.items():
            for subtree in (path, *jtree.ancestors(path)):
                self._by_path[subtree] = self._by_path.get(subtree, False) or is_trained
        self.frozen_dropout = frozen_dropout
        frozen = sorted(path for path, is_trained in self._by_path.items() if not is_trained)
        self.fingerprint = hashlib.sha256("\n".join([str(frozen_dropout), *frozen]).encode()).hexdigest()[:16]

    def recognise(self, params: Params) -> None:
        """Know the leaves of the same tree after a cast, too: they are other arrays, in the same places."""
        self._path_of |= {id(leaf): path for path, leaf in jtree.leaves_with_paths(params)}

    def is_frozen(self, path: str) -> bool:
        """Whether no leaf is trained at `path`, or in the nearest module around it that has leaves."""
        nearest = next(p for p in (path, *jtree.ancestors(path)) if p in self._by_path)
        return not self._by_path[nearest]

    def is_frozen_module(self, module: nn.Module) -> bool:
        """The same for a bound linen module.

        The identity of its leaves decides where they are leaves of `params`: a loss may apply
        a model to a subtree, and then paths do not line up. Lifted transforms such as
        `nn.remat` and casts make new leaves; then the path decides, counted from the nearest
        module around it whose place in `params` is known.
        """
        scope = module.scope
        while scope is not None:
            leaves = jax.tree.leaves(scope.variables().get("params", {}))
            known = [self._path_of[id(leaf)] for leaf in leaves if id(leaf) in self._path_of]
            if known:
                return all(map(self.is_frozen, known))
            scope = None if leaves else scope.parent
        return self.is_frozen(_place(module))

    def locate(self, module: nn.Module) -> str:
        """The place of a bound module in `params`: as its leaves tell, or by its path from the modules around it."""
        for path, leaf in _leaves(module):
            known = self._path_of.get(id(leaf), "")
            if f"/{known}".endswith(f"/{path}"):
                return known[: -len(path)].rstrip("/")
        return _place(module)

    def pattern(self, place: str) -> str:
        """Which leaves under a place are trained: all that a trace of its module depends on, its inputs apart.

        >>> Modes({"a": 1, "b": {"c": 2, "d": 3}}, {"a": True, "b": {"c": False, "d": True}}).pattern("b")
        'ft'
        """
        inside = [path for path in self._leaf_paths if f"{path}/".startswith(f"{place}/" if place else "")]
        frozen = [self.is_frozen(path) for path in inside] or [self.is_frozen(place)]
        return "".join("ft"[not held] for held in (frozen if len(set(frozen)) > 1 else frozen[:1]))

    def moving(self, collections: Collections) -> PyTree:
        """Bools that tell which statistics the mask lets move: `{"batch_stats": {...: True}}`."""

        def moves(path: str, _: Any) -> bool:
            module_path = path.partition("/")[2].rpartition("/")[0]
            return not self.is_frozen(module_path)

        return jtree.map_with_paths(moves, collections)

    def switches(self) -> dict[str, bool]:
        """The arguments and attributes to set on a frozen module."""
        return {k: v for k, v in INFERENCE.items() if k != "deterministic" or not self.frozen_dropout}


def _leaves(module: nn.Module) -> list[tuple[str, Any]]:
    scope = module.scope
    return [] if scope is None else jtree.leaves_with_paths(scope.variables().get("params", {}))


class _Frame(NamedTuple):
    """A module whose method is running: its path, its place in `params`, and what its end undoes."""

    path: tuple[str, ...]
    place: str
    stack: contextlib.ExitStack
    outer: "_Frame | None"


def _place(module: nn.Module) -> str:
    frame = _FRAME.get()
    while frame.outer is not None and module.path[: len(frame.path)] != frame.path:
        frame = frame.outer
    return "/".join([frame.place, *module.path[len(frame.path) :]]).strip("/")


_ROOT = _Frame((), "", contextlib.ExitStack(), None)
_FRAME: contextvars.ContextVar[_Frame] = contextvars.ContextVar("jtl_frame", default=_ROOT)
_TRACED_AS = jax.make_user_context(None)
_CURRENT: contextvars.ContextVar[Modes | None] = contextvars.ContextVar("jtl_modes", default=None)


def current() -> Modes | None:
    """The modes in force while a loss is traced by a jtl step, or `None` outside of one."""
    return _CURRENT.get()


_PLACES: contextvars.ContextVar[tuple[tuple[str, ...], ...]] = contextvars.ContextVar("jtl_places", default=((),))


@contextlib.contextmanager
def placed(parent: nn.Module, places: tuple[tuple[str, ...], ...]) -> Iterator[None]:
    """Say where the leaves of a module are that is applied anew inside, by itself: in a loop over equal blocks.

    Args:
      parent: the bound module that holds the blocks.
      places: the paths of the blocks; several stand for one trace, and are trained alike.
    """
    modes = current()
    with contextlib.ExitStack() as stack:
        stack.callback(_PLACES.reset, _PLACES.set(places))
        if modes is not None:
            stack.enter_context(_frame(modes, (), f"{modes.locate(parent)}/{places[0][-1]}".strip("/")))
        yield


def paths(module: nn.Module) -> list[str]:
    """The paths in the whole model that a bound module stands for: several in a loop over blocks."""
    return ["/".join((*place, *module.path)) for place in _PLACES.get()]


@contextlib.contextmanager
def follow(modes: Modes) -> Iterator[None]:
    """Make every linen module called inside follow the mask.

    The modes become part of the key of every trace. Without it, a model or loss with a `jit` of its
    own would be served from that jit's cache, with the modes of whichever mask, or whichever
    module of the same class, happened to be traced first.
    """
    token = _CURRENT.set(modes)
    try:
        with nn.intercept_methods(functools.partial(_intercept, modes)), _frame(modes, (), ""):
            yield
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def _frame(modes: Modes, path: tuple[str, ...], place: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        token = _FRAME.set(_Frame(path, place, stack, _FRAME.get()))
        stack.callback(_FRAME.reset, token)
        stack.enter_context(_TRACED_AS((modes.fingerprint, modes.pattern(place))))
        yield


def _intercept(modes: Modes, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if module.scope is None:
        return next_fun(*args, **kwargs)
    if "_validate_setup" in context.orig_method.func.__qualname__:
        # A lifted module announces itself with this call, on a copy, and no other from outside of its
        # lifting. Its trace may be that of another one of its class: the mask must tell them apart.
        frame = _FRAME.get()
        place = f"{frame.place}/{module.name or ''}".strip("/")
        frame.stack.enter_context(_TRACED_AS((modes.fingerprint, modes.pattern(place))))
        return next_fun(*args, **kwargs)
    with _frame(modes, module.path, modes.locate(module)):
        return _switched(modes, next_fun, args, kwargs, context)


def _switched(modes: Modes, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module, switches = context.module, modes.switches()
    fields = [name for name in switches if getattr(module, name, None) is not None]
    signature = inspect.signature(context.orig_method)
    parameters = [name for name in switches if name in signature.parameters and name not in fields]
    if not (fields or parameters) or not modes.is_frozen_module(module):
        return next_fun(*args, **kwargs)
    if parameters:
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update({name: switches[name] for name in parameters})
        args, kwargs = bound.args, bound.kwargs
    with _attributes(module, {name: switches[name] for name in fields}):
        return next_fun(*args, **kwargs)


@contextlib.contextmanager
def _attributes(module: nn.Module, values: dict[str, bool]) -> Iterator[None]:
    # Linen modules are frozen dataclasses, and somebody else may hold this one: whatever is
    # set here is put back, whether the call returns or raises.
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)

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
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.xla_metadata import set_xla_metadata

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
        self._by_identity = {id(leaf): trained[path] for path, leaf in jtree.leaves_with_paths(params)}
        self._by_path: dict[str, bool] = {"": any(trained.values())}
        for path, is_trained in trained.items():
            for subtree in (path, *jtree.ancestors(path)):
                self._by_path[subtree] = self._by_path.get(subtree, False) or is_trained
        self.frozen_dropout = frozen_dropout
        frozen = sorted(path for path, is_trained in self._by_path.items() if not is_trained)
        self.fingerprint = hashlib.sha256("\n".join([str(frozen_dropout), *frozen]).encode()).hexdigest()[:16]

    def is_frozen(self, path: str) -> bool:
        """Whether no leaf is trained at `path`, or in the nearest module around it that has leaves."""
        nearest = next(p for p in (path, *jtree.ancestors(path)) if p in self._by_path)
        return not self._by_path[nearest]

    def is_frozen_module(self, module: nn.Module) -> bool:
        """The same for a bound linen module.

        The identity of its leaves decides where they are leaves of `params`: a loss may apply
        a model to a subtree, and then paths do not line up. Lifted transforms such as
        `nn.remat` and casts make new leaves; then the path decides.
        """
        scope = module.scope
        while scope is not None:
            leaves = jax.tree.leaves(scope.variables().get("params", {}))
            known = [self._by_identity[id(leaf)] for leaf in leaves if id(leaf) in self._by_identity]
            if known:
                return not any(known)
            scope = None if leaves else scope.parent
        return self.is_frozen("/".join(module.path))

    def moving(self, collections: Collections) -> PyTree:
        """Bools that tell which statistics the mask lets move: `{"batch_stats": {...: True}}`."""

        def moves(path: str, _: Any) -> bool:
            module_path = path.partition("/")[2].rpartition("/")[0]
            return not self.is_frozen(module_path)

        return jtree.map_with_paths(moves, collections)

    def switches(self) -> dict[str, bool]:
        """The arguments and attributes to set on a frozen module."""
        return {k: v for k, v in INFERENCE.items() if k != "deterministic" or not self.frozen_dropout}


_CURRENT: contextvars.ContextVar[Modes | None] = contextvars.ContextVar("jtl_modes", default=None)


def current() -> Modes | None:
    """The modes in force while a loss is traced by a jtl step, or `None` outside of one."""
    return _CURRENT.get()


@contextlib.contextmanager
def follow(modes: Modes) -> Iterator[None]:
    """Make every linen module called inside follow the mask.

    The fingerprint of the modes becomes part of the trace context. Without it, a model or loss
    with a `jit` of its own would be served from that jit's cache, with the modes of whichever
    mask happened to be traced first.
    """
    token = _CURRENT.set(modes)
    try:
        with (
            nn.intercept_methods(functools.partial(_intercept, modes)),
            set_xla_metadata(jtl=modes.fingerprint),
        ):
            yield
    finally:
        _CURRENT.reset(token)


def _intercept(modes: Modes, next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
    module, switches = context.module, modes.switches()
    fields = [name for name in switches if getattr(module, name, None) is not None]
    signature = inspect.signature(context.orig_method)
    parameters = [name for name in switches if name in signature.parameters and name not in fields]
    if module.scope is None or not (fields or parameters) or not modes.is_frozen_module(module):
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

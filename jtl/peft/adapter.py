"""What an adapter is, and how its leaves live in a tree.

An adapter's leaves stand in a subtree of their own, named after it, in the module whose leaves it changes:

    query                        query
    ├── bias                     ├── bias
    └── kernel        ->         ├── kernel
                                 └── lora
                                     └── kernel
                                         ├── a
                                         └── b

So one mask still decides everything: `select("**/lora", "head")` trains adapter and head, an intersection with depth
groups adapts the last layers alone, `nn.scan` stacks the leaves as it stacks kernels, and a checkpoint has their paths.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.core import Tracer

from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.typing import Key, Params, Variables


class Layer(NamedTuple):
    """A dense layer in the middle of a call.

    Attributes:
      apply: the layer itself, of inputs.
      inputs: what it is called with.
      product: `(inputs, kernel) -> outputs` without a bias, for any kernel whose first axes are the layer's inputs.
      params: its leaves, `kernel` and perhaps `bias`, in the dtype that it computes in.
      paths: of the layer, without the root; several where a loop runs equal blocks as one.
    """

    apply: Callable[[Any], Any]
    inputs: Any
    product: Callable[[Any, Any], Any]
    params: Mapping[str, Any]
    paths: Sequence[str]


class Call(NamedTuple):
    """A module in the middle of a call.

    Attributes:
      apply: the module itself, of the arguments.
      args: that it is called with, by position.
      kwargs: and by name.
      child: "" of the module that the part belongs to, or the name of the module right below it.
    """

    apply: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    child: str


class Adapter(NamedTuple):
    """A way of changing a model by few leaves.

    Attributes:
      name: of the subtrees.
      init: `(params, key) -> delta`, new leaves at the places of the modules that they change. Merged, they change
        nothing.
      merge: `(params, delta) -> params`, in the shapes and dtypes that `params` has. What cannot be written into
        params is refused.
      call: `(layer, part, key) -> outputs` of a dense layer with its part of the delta, without a merged kernel; `key`
        is for dropout, None in inference.
      around: `(call, part) -> outputs` of any module and those right below it, for what is not of one layer.
      needs_call: whether merging does not say all, as with dropout.
      in_front: whether it puts positions in front of those of a sequence.
      settings: what it was made with.
    """

    name: str
    init: Callable[[Params, Key], Params]
    merge: Callable[[Params, Params], Params]
    call: Callable[[Layer, Params, Key | None], Any] | None = None
    around: Callable[[Call, Params], Any] | None = None
    needs_call: bool = False
    in_front: bool = False
    settings: Any = None


def unmergeable(adapter: str, params: Params, delta: Params, changes: Callable[[str], bool]) -> Params:
    """The params themselves, for an adapter that cannot be written into them, where it changes nothing yet.

    Args:
      adapter: its name.
      params: of the plain model.
      delta: the adapter's leaves.
      changes: whether a leaf of this path changes the outputs, unless it is zero.

    Raises:
      ConfigError: it changes something.
    """
    leaves = [leaf for path, leaf in jtree.leaves_with_paths(delta) if changes(path)]
    if any(isinstance(leaf, Tracer) for leaf in leaves) or any(np.any(np.asarray(leaf)) for leaf in leaves):
        raise ConfigError(
            f"a {adapter} is no change of the params: keep jtl.peft.adapted(model, adapter) for inference, too"
        )
    return params


def attach(adapter: Adapter, variables: Variables, *, key: Key) -> dict[str, Any]:
    """Variables with the adapter's new leaves among their params; nothing is copied.

    Args:
      adapter: from `lora` and the like.
      variables: `{"params": params, **collections}` of a plain model, params as nested dicts.
      key: for what begins at random.

    Raises:
      ConfigError: there are subtrees of that name already.
      PatternError: a pattern of the adapter matches nothing.
    """
    present = parts(adapter, variables["params"])
    if present:
        raise ConfigError(
            f"the params have {adapter.name!r} at {sorted(present)[:3]} already: merge or detach it first"
        )
    return {**variables, "params": joined(variables["params"], adapter.init(variables["params"], key))}


def detach(adapter: Adapter, variables: Variables) -> tuple[dict[str, Any], Params]:
    """The plain variables, and the adapter's leaves: what `attach` put together, or training made of it.

    Args:
      adapter: the one attached.
      variables: with its leaves.

    Returns:
      `(variables, delta)`; leaves are shared, not copied.
    """
    plain, delta = _apart(variables["params"], adapter.name)
    return {**variables, "params": plain}, delta


def merge(adapter: Adapter, variables: Variables) -> dict[str, Any]:
    """The variables of the plain model, changed as the adapter says: inference costs nothing more.

    Args:
      adapter: the one attached.
      variables: with its leaves.
    """
    plain, delta = detach(adapter, variables)
    return {**plain, "params": adapter.merge(plain["params"], delta)}


def parts(adapter: Adapter, params: Params) -> set[str]:
    """The paths of the modules that have leaves of the adapter."""
    segments = [path.split("/") for path in jtree.paths(params, absent=True)]
    return {"/".join(path[: path.index(adapter.name)]) for path in segments if adapter.name in path}


def joined(params: Any, delta: Any) -> Any:
    """A tree of nested dicts with the leaves of another one.

    Raises:
      ConfigError: both have a leaf at the same place.
    """
    if not (isinstance(params, Mapping) and isinstance(delta, Mapping)):
        raise ConfigError("an adapter's leaves and the params' are at the same place, or params are not nested dicts")
    names = {str(name): name for name in params}  # NNX has lists, whose keys are numbers
    delta = {names.get(str(name), name): value for name, value in delta.items()}
    shared = {name: joined(params[name], delta[name]) for name in params if name in delta}
    return {**params, **delta, **shared}


def _apart(params: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(params, Mapping):
        return params, {}
    halves = {key: _apart(value, name) for key, value in params.items() if key != name}
    delta = {key: part for key, (_, part) in halves.items() if part}
    if name in params:
        delta[name] = params[name]
    return {key: plain for key, (plain, _) in halves.items()}, delta

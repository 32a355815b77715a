"""Models from outside linen, as something with linen's `apply`.

Everything in jtl needs a pure function and a pytree of params. A linen module is one already;
these two adapters make one of an NNX module, and of any function of params (Equinox, Haiku,
plain JAX).
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jtl import modes
from jtl.errors import ConfigError
from jtl.typing import Collections, Key, PyTree, Variables


@dataclasses.dataclass(frozen=True)
class NnxModel:
    """The graph of an NNX module without its arrays; made by `from_nnx`."""

    graphdef: Any
    params: Any
    collections: Any
    randomness: Any

    def __call__(self) -> None:
        """Not callable by itself: it takes its mode from `apply`, not from an argument."""
        raise ConfigError("an adapted NNX module is called by model.apply(variables, *inputs)")

    def apply(
        self,
        variables: Variables,
        *inputs: Any,
        rngs: dict[str, Key] | None = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Call the module: in training mode when there are `rngs`, otherwise in inference mode.

        Args:
          variables: `{"params": ..., **collections}`, nested dicts as `from_nnx` gives them.
          *inputs: what the module takes.
          rngs: keys by name; `dropout` seeds every random stream of the module.
          mutable: anything but `False` also returns the collections after the call.
          **kwargs: keyword arguments of the module.

        Returns:
          The outputs, or `(outputs, collections)`.
        """
        collections = {name: value for name, value in variables.items() if name != "params"}
        states = [_filled(self.params, variables["params"])]
        states += [_filled(template, collections[name]) for name, template in self.collections.items()]
        module = nnx.merge(self.graphdef, *states, _seeded(self.randomness, rngs))
        _set_modes(module, training=rngs is not None)
        outputs = module(*inputs, **kwargs)
        return outputs if mutable is False else (outputs, _collections(module))


def from_nnx(module: nnx.Module) -> tuple[NnxModel, dict[str, PyTree]]:
    """Split an NNX module into a pure function and its variables.

    Random streams do not become variables: a step seeds them from its own key. BatchNorm and
    dropout follow the mask as they do in linen modules.

    Args:
      module: any NNX module.

    Returns:
      `(model, variables)`: `model.apply` as linen has it, and `{"params": ..., **collections}` as
      nested dicts with the paths of the module's attributes. Every kind of variable that is
      neither a parameter nor random state is a collection, named as NNX names it.

    >>> model, variables = from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (3,), 'kernel': (2, 3)}}
    """
    graphdef, params, randomness, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    templates = _by_kind(rest)
    variables = {"params": nnx.to_pure_dict(params)}
    variables |= {name: nnx.to_pure_dict(state) for name, state in templates.items()}
    return NnxModel(graphdef, params, templates, randomness), variables


def _by_kind(state: Any) -> dict[str, Any]:
    kinds = {type(variable) for _, variable in nnx.to_flat_state(state)}
    return {nnx.variable_name_from_type(kind, allow_register=True): nnx.filter_state(state, kind) for kind in kinds}


def _collections(module: nnx.Module) -> dict[str, PyTree]:
    _, _, _, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    return {name: nnx.to_pure_dict(state) for name, state in _by_kind(rest).items()}


def _filled(template: Any, values: PyTree) -> Any:
    state = jax.tree.map(lambda leaf: leaf, template)
    nnx.replace_by_pure_dict(state, values)
    return state


def _seeded(randomness: Any, rngs: dict[str, Key] | None) -> Any:
    """The module's random streams, each with a key of its own made from the step's key."""
    if rngs is None:
        return randomness
    leaves, structure = jax.tree.flatten(randomness)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    fresh = [
        jax.random.fold_in(rngs["dropout"], i) if keyed else jnp.zeros_like(leaf)
        for i, (leaf, keyed) in enumerate(zip(leaves, is_key, strict=True))
    ]
    return jax.tree.unflatten(structure, fresh)


def _set_modes(module: nnx.Module, *, training: bool) -> None:
    policy = modes.current()
    switches = modes.INFERENCE if policy is None else policy.switches()
    for path, part in nnx.iter_modules(module):
        frozen = policy is not None and policy.is_frozen("/".join(map(str, path)))
        for name, inference in modes.INFERENCE.items():
            if hasattr(part, name):
                held = not training or (frozen and name in switches)
                setattr(part, name, inference if held else not inference)


@dataclasses.dataclass(frozen=True)
class FunctionModel:
    """A function of params; made by `from_function`."""

    fn: Callable[..., Any]

    @property
    def __call__(self) -> Callable[..., Any]:
        """The function itself, so that its mode arguments are found by their names."""
        return self.fn

    def apply(
        self,
        variables: Variables,
        *inputs: Any,
        rngs: dict[str, Key] | None = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """`fn(params, *inputs)`, with `key=` if it takes one; it has no other collections."""
        if "key" in inspect.signature(self.fn).parameters:
            kwargs["key"] = None if rngs is None else rngs["dropout"]
        outputs = self.fn(variables["params"], *inputs, **kwargs)
        collections: Collections = {name: value for name, value in variables.items() if name != "params"}
        return outputs if mutable is False else (outputs, collections)


def from_function(fn: Callable[..., Any]) -> FunctionModel:
    """A model from any function `(params, *inputs) -> outputs`.

    An Equinox model splits into one:

        params, static = eqx.partition(net, eqx.is_inexact_array)
        model = jtl.from_function(lambda params, x: jax.vmap(eqx.combine(params, static))(x))
        state, frozen = jtl.init({"params": params}, tx, trainable=..., key=key)

    Args:
      fn: takes `key=` if it has a parameter of that name, `None` in inference; and `train=`,
        `training=`, `is_training=` or `deterministic=` likewise.

    Returns:
      A model for `jtl.supervised`.

    >>> model = from_function(lambda params, x: x @ params["w"])
    >>> model.apply({"params": {"w": jnp.ones((2, 1))}}, jnp.ones((1, 2))).tolist()
    [[2.0]]
    """
    return FunctionModel(fn)

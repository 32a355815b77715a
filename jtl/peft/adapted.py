"""A model whose dense layers are changed by an adapter while they run, without merged kernels."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import quantized as stored
from jtl.errors import ConfigError
from jtl.models.layers import Dense
from jtl.modes import paths
from jtl.peft import kernels
from jtl.peft.adapter import Adapter, Call, Layer, detach, joined, parts
from jtl.peft.quantization import QuantizedModel
from jtl.peft.reopening import reopening
from jtl.typing import Batch, Variables


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model and an adapter; made by `adapted`."""

    model: Any
    adapter: Adapter

    @property
    def __call__(self) -> Callable[..., Any]:
        """The model's own, so that its mode arguments are found by their names."""
        return self.model.__call__

    def check_batch(self, batch: Batch) -> None:
        """The model's own check of a batch, if it has one."""
        look = getattr(self.model, "check_batch", None)
        if look is not None:
            look(batch)

    def apply(self, variables: Variables, *args: Any, **kwargs: Any) -> Any:
        """Call the model with variables that the adapter's leaves are among; as `apply` of linen."""
        served: set[str] = set()
        unserved = parts(self.adapter, variables["params"])
        if isinstance(self.model, nn.Module):
            served, spoilt = set(), set()
            with nn.intercept_methods(_interceptor(self.adapter, served, spoilt)), reopening():
                outputs = self.model.apply(variables, *args, **kwargs)
            unserved -= served - spoilt
            # A method of the model's own, such as one that encodes alone, need not come by every layer.
            if not unserved or (self.adapter.needs_call and "method" in kwargs and not unserved & spoilt):
                return outputs
        if self.adapter.needs_call:
            raise ConfigError(
                f"{self.adapter.name} as it is set works on layers of linen that are called with one array, as dense "
                f"ones are; {sorted(unserved)[:3]} are not such"
            )
        return self._merged(variables, unserved, *args, **kwargs)

    def _merged(self, variables: Variables, unserved: set[str], *args: Any, **kwargs: Any) -> Any:
        """The same, with kernels merged where no dense layer serves them."""
        plain, delta = detach(self.adapter, variables)
        chosen = _within(delta, unserved, self.adapter.name)
        linen = isinstance(self.model, nn.Module)
        inside = set(kernels.by_kernel(chosen))
        params = stored.plainly(plain["params"], lambda path: path in inside or not linen)
        params = self.adapter.merge(params, chosen)
        rest = _within(delta, parts(self.adapter, delta) - unserved, self.adapter.name)
        served: set[str] = set()
        with nn.intercept_methods(_interceptor(self.adapter, served, set())), reopening():
            return self.model.apply({**plain, "params": joined(params, rest)}, *args, **kwargs)


def adapted(model: Any, adapter: Adapter) -> Adapted:
    """A model for `jtl.supervised` that takes variables from `attach`.

    Dense layers of linen are changed as they run: beside `x W`, thin products of x. So nothing of the size of a kernel
    is made, and no gradient of one. Other adapted leaves (convolutions, embeddings, models that are not linen's) are
    merged at the start of each call. Kernels that `peft.quantize` stored are opened where they are read.

    Args:
      model: a linen module, or what `jtl.from_nnx` or `jtl.from_function` made.
      adapter: from `lora` and the like.
    """
    return Adapted(model.model if isinstance(model, QuantizedModel) else model, adapter)


def _interceptor(adapter: Adapter, served: set[str], spoilt: set[str]) -> Callable[..., Any]:
    if adapter.around is not None:
        return _around(adapter.name, adapter.around, served, spoilt)
    change = adapter.call

    def intercept(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if module.scope is None:
            return next_fun(*args, **kwargs)
        part = _part(module, adapter.name)
        if not part:
            return next_fun(*args, **kwargs)
        leaves = module.scope.variables()["params"]
        places = paths(module)
        product = _product(module)
        alone = context.method_name == "__call__" and set(part) == {"kernel"} and len(args) == 1 and not kwargs
        if change is None or product is None or not alone:
            if context.method_name != "setup":
                spoilt.update(places)
            return next_fun(*args, **kwargs)
        served.update(places)
        key = module.make_rng("dropout") if adapter.needs_call and module.has_rng("dropout") else None
        params = {name: stored.plain(value) for name, value in leaves.items() if name != adapter.name}
        return change(Layer(next_fun, args[0], product, params, places), part, key)

    return intercept


def _around(name: str, change: Callable[[Call, Any], Any], served: set[str], spoilt: set[str]) -> Callable[..., Any]:
    """For an adapter of whole modules: the module with the leaves, and those right below it."""

    def intercept(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__":
            for owner, child in ((module, ""), (module.parent, module.name)):
                part = _part(owner, name)
                if part:
                    served.update(paths(owner))
                    spoilt.difference_update(served)
                    return change(Call(next_fun, args, kwargs, child), part)
        elif context.method_name != "setup" and _part(module, name):
            spoilt.update(set(paths(module)) - served)  # unless something below it is called, and serves it
        return next_fun(*args, **kwargs)

    return intercept


def _part(module: Any, name: str) -> Any:
    """The leaves of an adapter that stand in a module."""
    if not isinstance(module, nn.Module) or module.scope is None:
        return None
    leaves = module.scope.variables().get("params", {})
    return leaves.get(name) if hasattr(leaves, "get") else None


def _product(module: nn.Module) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """How a dense layer multiplies; None of any other module."""
    if type(module) in (Dense, nn.Dense):
        axes: tuple[int, ...] = (-1,)
    elif type(module) is nn.DenseGeneral and not module.batch_dims:
        axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    else:
        return None
    return lambda x, kernel: jnp.tensordot(x.astype(kernel.dtype), kernel, (axes, tuple(range(len(axes)))))


def _within(delta: Any, modules: set[str], name: str, path: str = "") -> Any:
    """The parts of a delta that belong to some modules."""
    found = {}
    for key, value in delta.items():
        if key == name:
            if path in modules:
                found[key] = value
            continue
        inner = _within(value, modules, name, f"{path}/{key}".strip("/"))
        if inner:
            found[key] = inner
    return found

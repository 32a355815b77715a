"""`load`: a pretrained model as a pure function and a pytree of parameters."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import tree as jtree
from jtl.errors import ConfigError, JtlError
from jtl.models import registry
from jtl.models.family import Family, KeyLayout
from jtl.models.recognise import Checkpoint, opened, with_overrides
from jtl.models.tracing import variable_shapes
from jtl.typing import Key, PyTree
from jtl.weights import convert
from jtl.weights.convert import KeyRule
from jtl.weights.reading import Memory
from jtl.weights.source import Source, resolve
from jtl.weights.tensors import Tensors


def load(
    source: str | Path,
    head: nn.Module | None = None,
    *,
    key: Key | None = None,
    revision: str | None = None,
    pretrained: bool = True,
    dtype: jax.typing.DTypeLike | None = jnp.float32,
    **overrides: Any,
) -> tuple[Any, dict[str, PyTree]]:
    """A pretrained model, with its head swapped for a new one.

        checkpoint                         variables
        resnet.embedder...          ->     params/stem/...
        ...running_mean             ->     batch_stats/stem/norm/mean
        classifier...  (ignored)           params/head/...   (new, from `key`)

    The family and the layout are told by the folder's `config.json`, as transformers and timm write it, or else by
    the names and shapes of the tensors, so that a bare state dict loads as well.

    Args:
      source: a checkpoint folder, a file of weights (`.safetensors`, `.pth`, `.bin`, Keras' `.weights.h5`), a
        folder written by `jtl.save`, a hub id such as `org/name`, or the short name of a packaged asset
        (`jtl models` lists them). With `pretrained=False` also a variant such as `resnet50`.
      head: a module from pooled features `[batch, width]` to outputs, such as
        `jtl.heads.classifier(2)`. Without one the model keeps the classifier that the checkpoint has, and
        returns features if it has none; `model.apply(variables, inputs, method="features")` always does.
      key: the random key of what is newly initialised: the head, or everything.
      revision: a branch, tag or commit of a hub repository.
      pretrained: `False` gives the same architecture with random weights.
      dtype: of the parameters; `None` keeps the checkpoint's own.
      **overrides: fields of the family's configuration to change, such as `pool="cls"`.

    Returns:
      `(model, variables)`: a linen module and its collections, `{"params": ...}` and, with batch normalisation,
      `{"batch_stats": ...}`: nested dicts of arrays.

    Raises:
      SourceNotFoundError: there is no such folder, asset or repository.
      ConfigError: settings that the family does not have, or a missing key.
      WeightsError: the checkpoint does not hold exactly the model's tensors, or not finite ones.
    """
    if key is None and (head is not None or not pretrained):
        raise ConfigError("a new head or random weights need key=, such as jax.random.key(0)")
    variant = None if pretrained else registry.variant(str(source))
    if variant is not None:
        family, config = variant
        model = family.build(with_overrides(family, config, overrides), head)
        return model, _random(family, model, key, dtype)
    checkpoint = opened(resolve(source, revision=revision), overrides, weights=pretrained, own_head=head is None)
    family, model = checkpoint.family, checkpoint.family.build(checkpoint.config, head or checkpoint.head)
    if not pretrained:
        return model, _random(family, model, key, dtype)
    tensors = Tensors({}, {}.__getitem__) if checkpoint.tensors is None else checkpoint.tensors
    with tensors.memory() as memory:  # whose pages come while the shapes are traced
        variables = _filled(checkpoint, model, tensors, memory, dtype, new_head=head is not None)
    if head is not None:
        for collection, tree in _random(family, model, key, dtype, "head").items():
            variables[collection] |= tree
    return model, variables


def build(source: Source, head: nn.Module | None, overrides: Mapping[str, Any]) -> tuple[Family, Any]:
    """The family of a checkpoint, and its model without parameters.

    Args:
      source: from `jtl.weights.source.resolve`.
      head: a new head, or `None` for the one that the checkpoint has, if any.
      overrides: fields of the configuration to change.

    Raises:
      ConfigError: no such family, or a field that its configuration does not have.
    """
    checkpoint = opened(source, overrides, weights=False, own_head=head is None)
    return checkpoint.family, checkpoint.family.build(checkpoint.config, head or checkpoint.head)


def shapes(family: Family, model: Any) -> dict[str, PyTree]:
    """The shapes and dtypes of a model's variables, without computing any.

    Raises:
      ConfigError: the settings are of a model that cannot be, such as one whose sizes no array has.
    """
    try:
        return variable_shapes(model, family.example(model.config))
    except JtlError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"no {family.name} can be made by these settings: {reason:.300}") from error


def _filled(
    checkpoint: Checkpoint, model: Any, tensors: Tensors, memory: Memory, dtype: Any, *, new_head: bool
) -> dict[str, PyTree]:
    """The variables of a checkpoint; None in the place of a new head's."""
    family, config, layout = checkpoint.family, checkpoint.config, checkpoint.layout
    target = shapes(family, model)
    collection_of = {path.partition("/")[2]: path.partition("/")[0] for path in jtree.paths(target)}
    if layout is None:
        named = {path: f"{collection}/{path}" for path, collection in collection_of.items()}
        layout = KeyLayout("jtl", lambda _: [KeyRule(path, name, convert.KEEP) for path, name in named.items()])
    keys = layout.keys(config)
    without_own = new_head or model.head is None
    ignored = [*layout.ignored(config), *(layout.heads(config) if without_own or layout.tasks else ())]
    if checkpoint.layout is None and new_head:
        ignored.append("*/head")

    def finish(path: str, array: Any) -> jax.Array:
        return convert.owned(array, dtype if collection_of[path] == "params" else None)

    filled = convert.convert(
        {path.partition("/")[2]: leaf for path, leaf in jtree.leaves_with_paths(target)},
        tensors,
        keys,
        new=("head",) if new_head else (),
        ignored=ignored,
        name=checkpoint.source.name,
        adapt=functools.partial(family.adapt, config),
        finish=finish,
        memory=memory,
    )
    return jtree.map_with_paths(lambda path, _: filled[path.partition("/")[2]], target)


def _random(family: Family, model: Any, key: Key | None, dtype: Any, subtree: str | None = None) -> dict[str, PyTree]:
    """Newly initialised variables, or those of a subtree."""

    # Compiled, so that what lies outside the wanted subtree is never computed.
    @jax.jit
    def init(key: Key) -> dict[str, PyTree]:
        variables = model.init(key, **_zeros(family, model))
        if subtree is None:
            return variables
        return {name: {subtree: tree[subtree]} for name, tree in variables.items() if subtree in tree}

    variables = init(key)  # a tied head has no leaf
    params = jax.tree.map(lambda leaf: convert.as_dtype(leaf, dtype), variables.get("params", {}))
    return {**variables, "params": params}


def _zeros(family: Family, model: Any) -> dict[str, jax.Array]:
    return {name: jnp.zeros(value.shape, value.dtype) for name, value in family.example(model.config).items()}

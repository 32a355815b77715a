"""`load`: a pretrained model as a pure function and a pytree of parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jtl import heads
from jtl import tree as jtree
from jtl.errors import ConfigError, SourceNotFoundError
from jtl.models import registry
from jtl.models.family import Family, read_json
from jtl.typing import Key, Params, PyTree
from jtl.weights import convert, safetensors
from jtl.weights.assets import ASSETS
from jtl.weights.source import Source, resolve

OWN = "jtl.json"
"""The file that marks a folder as written by `jtl.save`."""


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

        checkpoint                         variables["params"]
        bert.embeddings...          ->     embeddings/...
        bert.encoder.layer.0...     ->     encoder/layer_0/...
        classifier...  (ignored)           head/...   (new, from `key`)

    Args:
      source: a checkpoint folder, a folder written by `jtl.save`, a hub id such as `org/name`, or the
        short name of a packaged asset (`jtl models` lists them).
      head: a module from pooled features `[batch, width]` to outputs, such as
        `jtl.heads.classifier(2)`. Without one the model returns features; a model from
        `jtl.save` keeps the head it was saved with.
      key: the random key of what is newly initialised: the head, or everything.
      revision: a branch, tag or commit of a hub repository.
      pretrained: `False` gives the same architecture with random weights.
      dtype: of the parameters; `None` keeps the checkpoint's own.
      **overrides: fields of the family's configuration to change, such as `pool="cls"`.

    Returns:
      `(model, variables)`: a linen module and `{"params": ...}`, nested dicts of arrays.

    Raises:
      SourceNotFoundError: there is no such folder, asset or repository.
      ConfigError: settings that the family does not have, or a missing key.
      WeightsError: the checkpoint does not hold exactly the model's tensors.
    """
    if key is None and (head is not None or not pretrained):
        raise ConfigError("a new head or random weights need key=, such as jax.random.key(0)")
    found = resolve(source, revision=revision)
    family, model = build(found, head, overrides)
    if not pretrained:
        return model, {"params": convert.as_dtype(_initial(family, model, key), dtype)}
    tensors = safetensors.read_tensors(found.path)
    params = convert.as_dtype(_filled(found, family, model, tensors, new_head=head is not None), dtype)
    if head is not None:
        params["head"] = convert.as_dtype(_initial(family, model, key, "head"), dtype)
    return model, {"params": params}


def build(source: Source, head: nn.Module | None, overrides: Mapping[str, Any]) -> tuple[Family, Any]:
    """The family of a checkpoint, and its model without parameters.

    Args:
      source: from `jtl.weights.source.resolve`.
      head: a new head, or `None` for the one of a folder written by `jtl.save`, if any.
      overrides: fields of the configuration to change.

    Raises:
      ConfigError: no such family, or a field that its configuration does not have.
    """
    folder = _folder(source)
    if (folder / OWN).is_file():
        settings = read_json(folder / OWN)
        family = registry.get(settings.get("family"))
        config = family.parse(settings.get("config", {}), None, overrides)
        saved = settings.get("head")
        head = heads.Linear(**saved) if head is None and saved else head
    else:
        settings = read_json(_config_file(source))
        family = registry.get(settings.get("model_type"))
        config = family.parse(settings, folder, overrides)
    return family, family.build(config, head)


def shapes(family: Family, model: Any) -> Params:
    """The shapes and dtypes of a model's parameters, without computing any."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), **_zeros(family, model)))["params"]


def _filled(source: Source, family: Family, model: Any, tensors: Mapping[str, Any], *, new_head: bool) -> Params:
    target = shapes(family, model)
    new = ("head",) if new_head else ()
    keys, ignored = family.keys(model.config), family.ignored(model.config)
    if (_folder(source) / OWN).is_file():
        # Saved by jtl: each tensor is named by its path among the variables.
        keys = [convert.KeyRule(path, f"params/{path}", convert.KEEP) for path in jtree.paths(target)]
        ignored = ("params/head",) if new_head else ()
    else:
        tensors = convert.renamed(tensors, family.rename, source.name)
    return convert.convert(target, tensors, keys, new=new, ignored=ignored, name=source.name)


def _folder(source: Source) -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _config_file(source: Source) -> Path:
    path = _folder(source) / "config.json"
    asset = ASSETS.get(source.name) if source.kind == "asset" else None
    if asset is not None and asset.family not in registry.FAMILIES:
        raise ConfigError(f"{asset.name} is of the family {asset.family!r}; jtl has {sorted(registry.FAMILIES)}")
    if not path.is_file():
        raise SourceNotFoundError(f"{path} does not exist: a checkpoint has its config.json beside its weights")
    return path


def _initial(family: Family, model: Any, key: Key | None, subtree: str | None = None) -> Params:
    # Compiled, so that what lies outside the wanted subtree is never computed.
    @jax.jit
    def init(key: Key) -> Params:
        params = model.init(key, **_zeros(family, model))["params"]
        return params if subtree is None else params[subtree]

    return init(key)


def _zeros(family: Family, model: Any) -> dict[str, jax.Array]:
    return {name: jnp.zeros(value.shape, value.dtype) for name, value in family.example(model.config).items()}

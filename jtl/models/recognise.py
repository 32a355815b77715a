"""Of which family a checkpoint is, with which configuration, in which library's layout."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jtl import heads
from jtl.errors import ConfigError, JtlError, SourceNotFoundError, WeightsError
from jtl.models import registry
from jtl.models.family import Family, KeyLayout, Task, check_overrides, fields_from_json
from jtl.weights import convert
from jtl.weights.assets import ASSETS
from jtl.weights.json_file import read_json
from jtl.weights.source import Source
from jtl.weights.tensors import Tensors, open_tensors

OWN = "jtl.json"
"""The file that marks a folder as written by `jtl.save`."""


class Checkpoint(NamedTuple):
    """A checkpoint whose tensors are not read yet.

    Attributes:
      source: where it is.
      family: of its model.
      config: of its model.
      head: the head that it has, if any.
      tensors: by the names of its layout; None where there is a configuration without weights.
      layout: how they are named; None for those of `jtl.save`, which are named by path.
    """

    source: Source
    family: Family
    config: Any
    head: nn.Module | None
    tensors: Tensors | None
    layout: KeyLayout | None


def opened(source: Source, overrides: Mapping[str, Any], *, weights: bool = True, own_head: bool = True) -> Checkpoint:
    """Recognise a checkpoint.

    Args:
      source: from `jtl.weights.source.resolve`.
      overrides: fields of the configuration to change.
      weights: whether they must be there.
      own_head: whether the head that it has is wanted, and so must fit its settings.

    Raises:
      ConfigError: no such family, or settings that it does not have.
      SourceNotFoundError: there are no weights.
      WeightsError: the weights are damaged, or in a layout that no family has.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    if (folder / OWN).is_file():
        return _own(source, read_json(folder / OWN), overrides)
    tensors = _tensors(source, required=weights)
    family, config, settings = _configured(source, folder, tensors, overrides)
    _check_depth(source, config, tensors)
    if tensors is None:
        return Checkpoint(source, family, config, None, None, None)
    layout = _layout(family, config, tensors, source.name)
    named = tensors.renamed(layout.rename, source.name)
    with _of_file(folder / "config.json"):
        config = family.settle(config, named)
        head, layout = _head(family, config, layout, named, settings) if own_head else (None, layout)
    return Checkpoint(source, family, config, head, named, layout)


def _own(source: Source, settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> Checkpoint:
    family = registry.get(settings.get("family"))
    with _of_file(source.path / OWN):
        given = settings.get("config", {})
        config = family.parse(given, None, overrides)
        check_overrides(type(config), given)
        head = _own_head(family, config, settings)
    tensors = open_tensors(source.path)
    _check_depth(source, config, tensors)
    return Checkpoint(source, family, config, head, tensors, None)


@contextlib.contextmanager
def _of_file(file: Path) -> Iterator[None]:
    """Say of which file the settings are, whatever is wrong with them: a list for a text, a text for a number."""
    try:
        yield
    except JtlError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{file} has settings that cannot be read: {reason:.200}; fetch it again") from error


_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "depths", "num_block_repeats")
"""The fields of configurations that say how many blocks there are, in all or in each stage."""


_MOST_BLOCKS = 512
"""Where there are no tensors to hold their number to."""


def _check_depth(source: Source, config: Any, tensors: Tensors | None) -> None:
    """Refuse more blocks than there are tensors, before anything is made for each block."""
    found = [getattr(config, name, None) or 0 for name in _BLOCKS]
    blocks = sum(sum(value) if isinstance(value, tuple) else value for value in found)
    blocks *= getattr(config, "depth_coefficient", 1.0)
    if tensors is None and blocks > _MOST_BLOCKS:
        raise ConfigError(
            f"{source.name} is to have {blocks:,.0f} blocks by its settings: expected {_MOST_BLOCKS} at most"
        )
    if tensors is not None and blocks > max(len(tensors), 1):
        raise ConfigError(
            f"{source.name} is to have {blocks:,.0f} blocks by its settings, and has {len(tensors)} tensors: they are "
            "not of one checkpoint"
        )


def _own_head(family: Family, config: Any, settings: Mapping[str, Any]) -> nn.Module | None:
    saved = settings.get("head")
    if saved is None:
        return None
    known = {**heads.KINDS, **{type(head).__name__: type(head) for head in [family.head(config, 1)]}}
    kind = saved.get("kind", type(family.head(config, 1)).__name__)
    if kind not in known:
        raise ConfigError(f"{OWN} has a head of the kind {kind!r}; jtl has {sorted(known)}")
    given = {name: value for name, value in saved.items() if name != "kind"}
    check_overrides(known[kind], given)
    if {"parent", "name"} & set(given):
        raise ConfigError(f"{OWN} gives its head {sorted(given)}: the parent and the name are linen's own")
    return known[kind](**fields_from_json(known[kind], given))


def _tensors(source: Source, *, required: bool) -> Tensors | None:
    try:
        return open_tensors(source.path)
    except SourceNotFoundError:
        if required:
            raise
        return None


def _configured(
    source: Source, folder: Path, tensors: Tensors | None, overrides: Mapping[str, Any]
) -> tuple[Family, Any, Mapping[str, Any]]:
    """The family, its configuration, and the settings that tell it, empty where only the tensors do."""
    asset = ASSETS.get(source.name) if source.kind == "asset" else None
    if asset is not None and asset.family not in registry.FAMILIES:
        raise ConfigError(f"{asset.name} is of the family {asset.family!r}; jtl has {sorted(registry.FAMILIES)}")
    if (folder / "config.json").is_file():
        settings = read_json(folder / "config.json")
        _refuse_code(folder / "config.json", settings)
        timm = "architecture" in settings and "model_type" not in settings
        family = (
            registry.of_architecture(settings["architecture"]) if timm else registry.get(settings.get("model_type"))
        )
        with _of_file(folder / "config.json"):
            return family, family.parse(settings, folder, overrides), settings
    if tensors is None:
        raise SourceNotFoundError(f"{folder / 'config.json'} does not exist: a checkpoint has it beside its weights")
    family, config = _inferred(source, tensors, overrides)
    return family, with_overrides(family, config, overrides), {}


def _refuse_code(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that means more than its settings say: what its own code would make of them."""
    asked = [name for name in ("auto_map", "custom_pipelines", "trust_remote_code") if settings.get(name)]
    if asked:
        raise ConfigError(
            f"{file} asks for Python code from its checkpoint ({', '.join(asked)}), which is never run; if it is a "
            f"plain {settings.get('model_type')!r} all the same, take that out of the file"
        )


def with_overrides(family: Family, config: Any, overrides: Mapping[str, Any]) -> Any:
    """A configuration with some fields changed.

    Raises:
      ConfigError: a field that it does not have, or a value that it cannot have.
    """
    plain = {field.name: getattr(config, field.name) for field in fields(config)}
    return family.parse(plain, None, overrides) if overrides else config


def _inferred(source: Source, tensors: Tensors, overrides: Mapping[str, Any]) -> tuple[Family, Any]:
    shapes = {name: signature.shape for name, signature in tensors.signatures.items()}
    file = source.path.name
    for family in registry.families():
        config = family.infer(shapes, file, overrides)
        if config is not None:
            return family, config
    folder = source.path if source.path.is_dir() else source.path.parent
    raise WeightsError(
        f"{folder / 'config.json'} does not exist, and no family of jtl's has this layout of tensors; "
        f"{_nearest(tensors)}. Its first tensors: {', '.join(list(tensors)[:4])}"
    )


def _nearest(tensors: Iterable[str]) -> str:
    """The families whose layouts share the most names with a checkpoint."""
    scores, tensors = {}, list(itertools.islice(tensors, _ENOUGH))
    for family in registry.families():
        config = next(iter(family.variants.values()), None)
        for layout in family.layouts if config is not None else ():
            scores[f"{family.name} ({layout.name})"] = _likeness(layout, config, tensors)
    best = sorted(scores, key=lambda name: -scores[name])[:3]
    return f"the nearest families are {', '.join(best)}"


_ENOUGH = 500
"""Names of tensors that tell which families are near; ten times as many tell a family's layouts apart."""

_NUMBER = re.compile(r"\d+|\{\}")


def _likeness(layout: KeyLayout, config: Any, tensors: Iterable[str]) -> float:
    """The share of a layout's names that a checkpoint has, whatever the numbers in them."""
    wanted = {_plain(rule.source) for rule in layout.keys(config)}
    return len(wanted & {_plain(layout.rename(name)) for name in tensors}) / max(len(wanted), 1)


def _plain(name: str) -> str:
    return _NUMBER.sub("*", name)


def _layout(family: Family, config: Any, tensors: Tensors, name: str) -> KeyLayout:
    names = list(itertools.islice(tensors, 10 * _ENOUGH))
    scores = [_likeness(layout, config, names) for layout in family.layouts]
    if not any(scores):
        known = ", ".join(layout.name for layout in family.layouts)
        raise WeightsError(
            f"{name} should hold a model of the family {family.name}, but none of its tensors has a name of the "
            f"layouts that jtl reads ({known}); {_nearest(tensors)}. Its first tensors: {', '.join(list(tensors)[:4])}"
        )
    return family.layouts[int(np.argmax(scores))]


def _head(
    family: Family, config: Any, layout: KeyLayout, tensors: Tensors, settings: Mapping[str, Any]
) -> tuple[nn.Module | None, KeyLayout]:
    """The head that a checkpoint has, and the layout with the rules of its leaves; None where it has none."""
    if not layout.tasks:
        outputs = _outputs("head/kernel", config, layout, tensors, settings)
        return None if outputs is None else family.head(config, outputs), layout
    architecture = str(next(iter(settings.get("architectures") or ()), ""))
    prefix = family.prefix(settings.get("model_type"))
    name = next((name for name, t in layout.tasks.items() if architecture == prefix + name and t.fits(config)), None)
    if name is None:  # a backbone, or the heads of pretraining, which several tasks share
        return None, layout
    task, layout = layout.tasks[name], layout.of_task(name)
    _check_copies(task, tensors)
    outputs = 0 if task.outputs is None else _outputs(task.outputs, config, layout, tensors, settings)
    if outputs is None:
        wanted = [rule.source for rule in task.keys(config)]
        raise WeightsError(
            f"config.json says {architecture}, but the head's tensors {wanted} are missing; pass head= for a new one"
        )
    return task.head(config, outputs), layout


def _check_copies(task: Task, tensors: Tensors) -> None:
    """Refuse a head whose second tensor is no copy: what it holds would be lost."""
    for copy, original in task.copies.items():
        if copy in tensors and original in tensors and not convert.equal(tensors, copy, original):
            raise WeightsError(
                f"{copy} differs from {original}: jtl's head has one tensor for both (tie_word_embeddings=True); "
                "pass head= for a new one"
            )


def _outputs(leaf: str, config: Any, layout: KeyLayout, tensors: Tensors, settings: Mapping[str, Any]) -> int | None:
    """The number of outputs of the head that a checkpoint has, None where it has not the leaf that tells it."""
    rule = next((rule for rule in layout.keys(config) if rule.path == leaf), None)
    if rule is None or rule.source not in tensors:
        return None
    got = int(rule.layout.read(np.broadcast_to(np.float32(0), convert.shape_of(tensors, rule.source))).shape[-1])
    labels = settings.get("id2label")
    declared = settings.get("num_classes", settings.get("num_labels", len(labels) if labels else None))
    if declared is not None and declared != got:
        raise WeightsError(
            f"config.json declares {declared} classes, and {rule.source} has {got} outputs: they are not of one "
            "checkpoint; pass head= for a new classifier"
        )
    return got

"""What a model of jtl's is called in transformers: its class, and its tensors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jtl.errors import ConfigError
from jtl.models import registry
from jtl.models.family import KeyLayout
from jtl.weights import convert
from jtl.weights.convert import Layout


def task_of(model: Any) -> str | None:
    """The task whose head a model has, by the end of its class's name in transformers; None without a head.

    Raises:
      ConfigError: transformers has no class of the family with such a head.
    """
    family = registry.of_model(model)
    if model.head is None:
        return None
    prefix = family.prefix(getattr(model.config, "model_type", None))
    tasks = {name: task for name, task in family.layouts[0].tasks.items() if task.fits(model.config)}
    for name, task in tasks.items():
        if like(task.head(model.config, getattr(model.head, "outputs", 0)), model.head):
            return name
    known = ", ".join(f"{prefix}{name}{_differing(task, model)}" for name, task in tasks.items())
    raise ConfigError(
        f"transformers has no {prefix or family.name} with the head {type(model.head).__name__}; "
        f"it has {known}: use format='jtl', or the head of one of these"
    )


def like(one: nn.Module, other: nn.Module) -> bool:
    """Whether two heads compute the same, of the same parameters: all but dropout and initial values."""
    return type(one) is type(other) and _computed(one) == _computed(other)


def _computed(head: nn.Module) -> dict[str, Any]:
    return {name: v for name, v in head_settings(head).items() if name not in ("dropout", "outer_dropout", "scale")}


def _differing(task: Any, model: Any) -> str:
    """In brackets, with which settings the head of a task is of the same kind as the model's."""
    theirs = task.head(model.config, getattr(model.head, "outputs", 0))
    if type(theirs) is not type(model.head):
        return ""
    ours = _computed(model.head)
    return f" ({', '.join(f'{name}={v!r}' for name, v in _computed(theirs).items() if ours[name] != v)})"


def head_settings(head: nn.Module) -> dict[str, Any]:
    """The fields of a head."""
    return {f.name: getattr(head, f.name) for f in dataclasses.fields(head) if f.name not in ("parent", "name")}


def layout_of(model: Any) -> KeyLayout:
    """The layout of transformers, with the rules of the head that a model has.

    Raises:
      ConfigError: as `task_of`.
    """
    layout = registry.of_model(model).layouts[0]
    return layout.of_task(task_of(model)) if layout.tasks else layout


def _check_needs(model: Any) -> None:
    family = registry.of_model(model)
    task = (task_of(model) or family.bare(model.config)) if family.needs else ""
    prefix = family.prefix(getattr(model.config, "model_type", None))
    for name, values in family.needs.get(task, {}).items():
        if getattr(model.config, name) not in values:
            raise ConfigError(
                f"transformers' {prefix}{task} has only {name}={values[0]!r}, this model {name}="
                f"{getattr(model.config, name)!r}: use format='jtl', or load it with {name}={values[0]!r}"
            )


def naming(model: Any) -> Callable[[str], tuple[str, Layout]]:
    """A function from a leaf's path to the name of its tensor in the file of transformers' class, and its axes.

    Raises:
      ConfigError: transformers has no such model.
    """
    family, layout, config = registry.of_model(model), layout_of(model), model.config
    if family.settings is None:
        raise ConfigError(f"transformers has no model of the family {family.name}: use format='jtl'")
    _check_needs(model)
    keys = layout.keys(config)
    task = layout.tasks.get(task_of(model) or "") if layout.tasks else None
    backbone = family.backbone if task is None or task.backbone is None else task.backbone
    if backbone is None:
        backbone = f"{family.settings(config, getattr(model.head, 'outputs', None))['model_type']}."

    def locate(path: str) -> tuple[str, Layout]:
        source, axes = convert.locate(path, keys)
        if path.startswith("head/"):
            return source, axes
        source = source.removeprefix(backbone)
        return source if model.head is None else backbone + source, axes

    return locate

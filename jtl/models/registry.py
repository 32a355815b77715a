"""Which families there are: literal tables, so that reading them imports none of them."""

import difflib
import fnmatch
import importlib
from typing import Any

from jtl.errors import ConfigError
from jtl.models.family import Family

FAMILIES: dict[str, str] = {
    "bert": "jtl.models.bert",
    "deit": "jtl.models.vit",
    "distilbert": "jtl.models.distilbert",
    "efficientnet": "jtl.models.efficientnet",
    "gpt2": "jtl.models.gpt2",
    "mobilenet_v2": "jtl.models.mobilenet_v2",
    "mt5": "jtl.models.t5",
    "resnet": "jtl.models.resnet",
    "roberta": "jtl.models.roberta",
    "t5": "jtl.models.t5",
    "vgg": "jtl.models.vgg",
    "vit": "jtl.models.vit",
    "xlm-roberta": "jtl.models.roberta",
}
"""The module of each family, by the `model_type` of its checkpoints."""

ARCHITECTURES: dict[str, str] = {
    "deit*": "vit",
    "distilgpt2": "gpt2",
    "efficientnet*": "efficientnet",
    "gpt2*": "gpt2",
    "mobilenet*v2*": "mobilenet_v2",
    "resnet*": "resnet",
    "tf_efficientnet*": "efficientnet",
    "vgg*": "vgg",
    "vit*": "vit",
}
"""The family of each architecture, by globs over the names of timm."""


def get(model_type: Any) -> Family:
    """A family by the `model_type` of a checkpoint's configuration.

    Raises:
      ConfigError: no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=3, cutoff=0.4)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise ConfigError(f"the model type {model_type!r} is not among the families jtl has: {sorted(FAMILIES)}{hint}")
    return _imported(FAMILIES[model_type])


def of_architecture(name: Any) -> Family:
    """A family by timm's name of one of its architectures, such as `resnet50.a1_in1k`.

    Raises:
      ConfigError: no family has it.
    """
    for pattern, family in ARCHITECTURES.items():
        if fnmatch.fnmatchcase(str(name), pattern):
            return get(family)
    near = difflib.get_close_matches(str(name), set(ARCHITECTURES.values()), n=3, cutoff=0.0)
    raise ConfigError(f"the architecture {name!r} is of none of jtl's families; the nearest: {', '.join(near)}")


def variant(name: str) -> tuple[Family, Any] | None:
    """The family and the configuration of a variant such as `resnet50`, or None where there is none.

    >>> variant("minilm-l6") is None
    True
    """
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ARCHITECTURES):
        return None
    family = of_architecture(name)
    return (family, family.variants[name]) if name in family.variants else None


def families() -> list[Family]:
    """Every family once."""
    return [_imported(path) for path in dict.fromkeys(FAMILIES.values())]


def of_model(model: Any) -> Family:
    """The family that a model was built by.

    Raises:
      ConfigError: the model is not one of jtl's.
    """
    for path in FAMILIES.values():
        if type(model).__module__ == path:
            return _imported(path)
    raise ConfigError(f"{type(model).__name__} is not a model of jtl's families: {sorted(FAMILIES)}")


def _imported(path: str) -> Family:
    return importlib.import_module(path).FAMILY

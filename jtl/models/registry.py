"""Which families there are: a literal table, so that reading it imports none of them."""

import importlib
from typing import Any

from jtl.errors import ConfigError
from jtl.models.family import Family

FAMILIES: dict[str, str] = {
    "bert": "jtl.models.bert",
}
"""The module of each family, by the `model_type` of its checkpoints."""


def get(model_type: Any) -> Family:
    """A family by the `model_type` of a checkpoint's configuration.

    Raises:
      ConfigError: no such family.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"the model type {model_type!r} is not among the families jtl has: {sorted(FAMILIES)}")
    return importlib.import_module(FAMILIES[model_type]).FAMILY


def of_model(model: Any) -> Family:
    """The family that a model was built by.

    Raises:
      ConfigError: the model is not one of jtl's.
    """
    for path in FAMILIES.values():
        if type(model).__module__ == path:
            return importlib.import_module(path).FAMILY
    raise ConfigError(f"{type(model).__name__} is not a model of jtl's families: {sorted(FAMILIES)}")

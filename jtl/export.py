"""`save`: a trained model as a folder that `load` takes back."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jtl import heads
from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.models import registry
from jtl.pretrained import OWN
from jtl.typing import PyTree
from jtl.weights import safetensors


def save(
    folder: str | Path,
    model: Any,
    variables: Mapping[str, PyTree],
    *,
    classes: Sequence[str] = (),
    tokenizer: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model of jtl's families to a new folder, whole or not at all.

        folder/jtl.json            family, configuration, head, classes
        folder/model.safetensors   one tensor for each leaf, named by its path
        folder/tokenizer.json ...  where a tokenizer is given

    Args:
      folder: must not exist, or be empty.
      model: as `jtl.load` gives it, with no head or one of `jtl.heads`.
      variables: the whole tree, as `jtl.variables(state, frozen)` puts it together.
      classes: names of the head's outputs.
      tokenizer: a tokenizer of Hugging Face to keep beside it.
      notes: anything else to keep in `jtl.json`, JSON values.

    Raises:
      ConfigError: the folder is not empty, or the model is not one that `jtl.load` could build.
    """
    folder = Path(folder)
    check_new(folder)
    settings = {**describe(model), "classes": list(classes), "notes": dict(notes or {})}
    tensors = dict(jtree.leaves_with_paths(dict(variables)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        safetensors.write_tensors(unfinished / safetensors.SINGLE, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        (unfinished / OWN).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuse a folder that something is in.

    Raises:
      ConfigError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty: name a new folder")


def describe(model: Any) -> dict[str, Any]:
    """What `jtl.load` needs to build a model again, as JSON values.

    Raises:
      ConfigError: the model is of no family, or its head is not one of `jtl.heads`.
    """
    family = registry.of_model(model)
    if model.head is not None and type(model.head) is not heads.Linear:  # a subclass is another module
        raise ConfigError(
            f"save knows the heads of jtl.heads, not {type(model.head).__name__}: keep the module's code yourself, "
            "and its variables with jtl.weights.safetensors.write_tensors"
        )
    head = model.head and {name: getattr(model.head, name) for name in ("outputs", "dropout", "scale")}
    return {"family": family.name, "config": dataclasses.asdict(model.config), "head": head}

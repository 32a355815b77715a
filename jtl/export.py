"""`save`: a trained model as a folder that `load` takes back."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from jtl import heads, quantized
from jtl import tree as jtree
from jtl.errors import ConfigError
from jtl.models import registry
from jtl.models.naming import head_settings, naming, task_of
from jtl.models.recognise import OWN
from jtl.typing import PyTree
from jtl.weights import safetensors
from jtl.weights.folders import check_new, exported

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


def save(
    folder: str | Path,
    model: Any,
    variables: Mapping[str, PyTree],
    *,
    format: Literal["jtl", "transformers"] = "jtl",
    classes: Sequence[str] = (),
    tokenizer: Any = None,
    notes: Mapping[str, Any] | None = None,
    problem_type: ProblemType | None = None,
) -> None:
    """Write a model of jtl's families to a new folder, whole or not at all.

        folder/jtl.json            family, configuration, head, classes        (format "jtl")
        folder/config.json         the configuration as transformers has it    (format "transformers")
        folder/model.safetensors   one tensor for each leaf, named by its path, or as transformers names it
        folder/tokenizer.json ...  where a tokenizer is given

    `jtl.load` takes both; transformers loads the second without a missing or an unexpected tensor.

    Args:
      folder: must not exist, or be empty.
      model: as `jtl.load` gives it, with no head or one of jtl's.
      variables: the whole tree, as `jtl.variables(state, frozen)` puts it together.
      format: "jtl" or "transformers".
      classes: names of the head's outputs.
      tokenizer: a tokenizer of Hugging Face to keep beside it.
      notes: anything else to keep in `jtl.json`, JSON values; not kept in the format of transformers.
      problem_type: what transformers makes of a head's outputs, in its loss and its pipelines: the logits of one class,
        those of any number of labels, or numbers. Not said by default, which means one class, or a sigmoid of a single
        output. For the format of transformers alone.

    Raises:
      ConfigError: the folder is not empty, leaves are stored in few bits, or the model is not one that `jtl.load` could
        build, or not one that transformers has.
      CheckpointError: the disk is full, with the bytes needed and free, or refuses.
    """
    if format not in ("jtl", "transformers"):
        raise ConfigError(f"format={format!r}: expected jtl or transformers")
    if problem_type is not None and (format != "transformers" or problem_type not in get_args(ProblemType)):
        kinds = ", ".join(get_args(ProblemType))
        raise ConfigError(f"problem_type={problem_type!r}: expected one of {kinds}, with format='transformers'")
    quantized.require_plain(dict(variables), "saving")
    folder = Path(folder)
    check_new(folder)
    head = getattr(model, "head", None)
    outputs = None if type(head) is heads.Span else getattr(head, "outputs", None)  # a span's are no classes
    if classes and outputs is not None and len(classes) != outputs:
        raise ConfigError(f"{len(classes)} names of classes for a head of {outputs} outputs")
    if format == "jtl":
        name, settings = OWN, {**describe(model), "classes": list(classes), "notes": dict(notes or {})}
        tensors = dict(jtree.leaves_with_paths(dict(variables)))
    else:
        name, (settings, tensors) = "config.json", _as_transformers(model, variables, classes)
        settings |= _problem(problem_type, settings)
    with exported(folder, jtree.nbytes(dict(variables))) as unfinished:
        safetensors.write_tensors(unfinished / safetensors.SINGLE, tensors, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        (unfinished / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _problem(problem: str | None, settings: Mapping[str, Any]) -> dict[str, str]:
    """The setting of transformers that says what a head's outputs are."""
    if problem is None:
        return {}
    (name,) = settings["architectures"]
    if not name.endswith(("ForSequenceClassification", "ForImageClassification")):
        raise ConfigError(f"problem_type={problem!r} is for the head of a classifier; {name} has none")
    return {"problem_type": problem}


def _as_transformers(
    model: Any, variables: Mapping[str, PyTree], classes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model's settings and tensors as transformers has them."""
    family, config = registry.of_model(model), model.config
    describe(model)  # a head of one's own has no place there
    located = naming(model)
    outputs = getattr(model.head, "outputs", None)
    settings = family.settings(config, outputs)  # pyright: ignore[reportOptionalCall]: naming has refused its absence
    prefix = family.prefix(settings.get("model_type"))
    if prefix:
        settings["architectures"] = [prefix + (task_of(model) or family.bare(config))]
    if outputs is not None and not _has_own_outputs(model):
        names = list(classes) or [f"LABEL_{k}" for k in range(outputs)]
        settings["id2label"] = {str(k): name for k, name in enumerate(names)}
        settings["label2id"] = {name: k for k, name in enumerate(names)}
    if family.modality == "image":
        settings["input"] = dataclasses.asdict(config.input)
    tensors = {}
    for path, leaf in jtree.leaves_with_paths(dict(variables)):
        path = path.partition("/")[2]
        source, axes = located(path)
        tensors[source] = axes.write(np.asarray(leaf))
        if path.endswith("/mean"):  # PyTorch counts batches beside the statistics, and reads the count nowhere
            tensors[source.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    return settings, tensors


def _has_own_outputs(model: Any) -> bool:
    """Whether the outputs of a head are no classes: positions, or the words of the model."""
    tasks = registry.of_model(model).layouts[0].tasks
    return type(model.head) is heads.Span or (bool(tasks) and tasks[task_of(model) or ""].outputs is None)


def describe(model: Any) -> dict[str, Any]:
    """What `jtl.load` needs to build a model again, as JSON values.

    Raises:
      ConfigError: the model is of no family, or its head is not one of `jtl.heads`.
    """
    family = registry.of_model(model)
    known = (*heads.KINDS.values(), type(family.head(model.config, 1)))
    if model.head is not None and type(model.head) not in known:  # a subclass is another module
        raise ConfigError(
            f"save knows the heads of jtl.heads, not {type(model.head).__name__}: keep the module's code yourself, "
            "and its variables with jtl.weights.safetensors.write_tensors"
        )
    head = None if model.head is None else {"kind": type(model.head).__name__, **head_settings(model.head)}
    return {"family": family.name, "config": dataclasses.asdict(model.config), "head": head}

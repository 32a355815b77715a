"""The tensors of networks of inverted residual blocks: their names in other libraries, and what their shapes tell."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jtl.errors import ConfigError
from jtl.models.convolution import conv_rules, norm_rules
from jtl.models.family import fields_from_json
from jtl.models.inverted_residual import Block, Network
from jtl.models.pictures import image_input
from jtl.weights.convert import KEEP, TRANSPOSE, KeyRule

Shapes = Mapping[str, tuple[int, ...]]


class BlockNames(NamedTuple):
    """What a library calls the tensors of a block: convolution and normalisation, or reduction and expansion."""

    expand: tuple[str, str]
    depthwise: tuple[str, str]
    squeeze: tuple[str, str]
    project: tuple[str, str]


class Place(NamedTuple):
    """Which block: its stage and place there, its place among all, and whether it has an expansion."""

    stage: int
    index: int
    number: int
    expands: bool


Naming = Callable[[Place], BlockNames]
"""How a library names the tensors of a block."""


def network_rules(
    network: Network, stem: tuple[str, str], naming: Naming, top: tuple[str, str], head: str
) -> list[KeyRule]:
    """The key rules of a network.

    Args:
      network: its shape.
      stem: names of convolution and normalisation.
      naming: of each block.
      top: names of convolution and normalisation.
      head: name of the linear classifier.
    """
    rules = [*layer_rules("stem", *stem), *layer_rules("top", *top)]
    rules += [KeyRule("head/kernel", f"{head}.weight", TRANSPOSE), KeyRule("head/bias", f"{head}.bias", KEEP)]
    for number, block in enumerate(network.blocks):
        names = naming(Place(block.stage, block.index, number, bool(block.expanded)))
        rules += _block_rules(f"stages_{block.stage}/blocks_{block.index}", block, names)
    return rules


def _block_rules(path: str, block: Block, names: BlockNames) -> list[KeyRule]:
    parts = ["expand", "depthwise", "project"] if block.expanded else ["depthwise", "project"]
    rules = [rule for part in parts for rule in layer_rules(f"{path}/{part}", *getattr(names, part))]
    for part, name in zip(("reduce", "expand"), names.squeeze, strict=True):
        rules += conv_rules(f"{path}/squeeze/{part}", name, bias=True) if block.squeezed else []
    return rules


def layer_rules(path: str, conv: str, norm: str) -> list[KeyRule]:
    """The key rules of a convolution and its normalisation."""
    return [*conv_rules(f"{path}/conv", conv), *norm_rules(f"{path}/norm", norm)]


def timm_names(place: Place) -> BlockNames:
    """The names of timm."""
    at = f"blocks.{place.stage}.{place.index}"
    squeeze = (f"{at}.se.conv_reduce", f"{at}.se.conv_expand")
    if place.expands:
        expand, depthwise = (f"{at}.conv_pw", f"{at}.bn1"), (f"{at}.conv_dw", f"{at}.bn2")
        return BlockNames(expand, depthwise, squeeze, (f"{at}.conv_pwl", f"{at}.bn3"))
    return BlockNames(("", ""), (f"{at}.conv_dw", f"{at}.bn1"), squeeze, (f"{at}.conv_pw", f"{at}.bn2"))


def ignored(config: Any) -> Sequence[str]:
    """Source tensors without a place in the tree: PyTorch's counters."""
    del config  # of any size
    return ("**/num_batches_tracked",)


# What shapes tell


class Found(NamedTuple):
    """What the tensors of a checkpoint say of one block: its channels, its kernel, and what it squeezes to."""

    stage: int
    inputs: int
    expanded: int
    features: int
    kernel: int
    squeezed: int


def found_blocks(shapes: Shapes, naming: Naming, *, nested: bool) -> list[Found]:
    """The blocks of a checkpoint.

    Args:
      shapes: of the tensors by name.
      naming: of each block.
      nested: whether the names tell stages; otherwise one begins wherever channels or kernel change.
    """
    found: list[Found] = []
    stage = index = 0
    while True:
        block = _found_block(shapes, naming, Place(stage, index, len(found), expands=True), nested, found)
        if block is None and (not nested or index == 0):
            return found
        if block is None:
            stage, index = stage + 1, 0
            continue
        found.append(block)
        index += 1


def _found_block(shapes: Shapes, naming: Naming, place: Place, nested: bool, before: Sequence[Found]) -> Found | None:
    for at in (place, place._replace(expands=False)):
        names = naming(at)
        depthwise, project = (shapes.get(f"{conv}.weight", ()) for conv, _ in (names.depthwise, names.project))
        expand = shapes.get(f"{names.expand[0]}.weight", ()) if at.expands else None
        squeeze = shapes.get(f"{names.squeeze[0]}.weight", (0,))
        whole = len(depthwise) == len(project) == 4 and depthwise[1] == 1 and depthwise[0] == project[1]
        if not whole or (expand is not None and (len(expand) != 4 or expand[0] != depthwise[0])):
            continue
        inputs, expanded = (expand[1], expand[0]) if expand else (depthwise[0], 0)
        features, kernel = project[0], depthwise[2]
        stage = place.stage
        if not nested:
            begins = before and (inputs != features or kernel != before[-1].kernel)
            stage = before[-1].stage + bool(begins) if before else 0
        return Found(stage, inputs, expanded, features, kernel, squeeze[0])
    return None


def by_stage(found: Sequence[Found]) -> list[list[Found]]:
    """The blocks of each stage."""
    return [list(blocks) for _, blocks in itertools.groupby(found, lambda block: block.stage)]


def as_found(network: Network) -> list[Found]:
    """What the tensors of a network would say of its blocks."""
    return [Found(b.stage, b.inputs, b.expanded, b.features, b.kernel, b.squeezed) for b in network.blocks]


# Settings of timm


def parse_timm(
    settings: Mapping[str, Any], overrides: Mapping[str, Any], variants: Mapping[str, Any], arguments: Mapping[str, str]
) -> Any:
    """The configuration of a checkpoint of timm.

    Args:
      settings: the parsed `config.json`.
      overrides: fields that the caller sets.
      variants: configurations by the names of timm.
      arguments: fields by the name of timm's argument for them.

    Raises:
      ConfigError: an architecture, an argument or a pooling that the family does not have.
    """
    name = str(settings["architecture"]).partition(".")[0]
    if name not in variants:
        near = ", ".join(difflib.get_close_matches(name, variants, n=3, cutoff=0.0))
        raise ConfigError(f"config.json sets architecture={name!r}, which jtl does not have; nearest: {near}")
    if settings.get("global_pool", "avg") != "avg":
        raise ConfigError(f"config.json sets global_pool={settings['global_pool']!r}; jtl has only 'avg'")
    given = settings.get("model_args") or {}
    for key, value in given.items():
        if key not in arguments:
            raise ConfigError(f"config.json sets model_args {key}={value!r}; jtl has only {', '.join(arguments)}")
    chosen = {**{arguments[key]: value for key, value in given.items()}, **overrides}
    if "input" not in chosen:
        chosen["input"] = image_input(settings.get("pretrained_cfg"), variants[name].input)
    return dataclasses.replace(variants[name], **fields_from_json(type(variants[name]), chosen))

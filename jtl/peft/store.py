"""Adapters in the format of the PEFT library: `adapter_config.json` beside `adapter_model.safetensors`.

Each adapted tensor `<module>.weight` of the model in transformers has two thin ones:

    base_model.model.<module>.lora_A.weight            [r, in], a convolution's [r, in, height, width]
    base_model.model.<module>.lora_B.weight            [out, r], a convolution's [out, r, 1, 1]
    base_model.model.<module>.lora_embedding_A         [r, entries]
    base_model.model.<module>.lora_embedding_B         [width, r]
    base_model.model.<module>.lora_magnitude_vector    [out], of DoRA
    base_model.model.<module>.ia3_l                    [out, 1] or, of a layer whose inputs are scaled, [1, in]
    base_model.model.<module>.weight                   of a module that was trained whole
"""

import collections
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jtl import tree as jtree
from jtl.errors import ConfigError, SourceNotFoundError, WeightsError
from jtl.models import registry
from jtl.models.naming import layout_of, naming
from jtl.peft.adapter import Adapter, detach, joined
from jtl.peft.ia3 import ia3
from jtl.peft.lora import dora, lora, scale_of
from jtl.typing import Variables
from jtl.weights import convert, safetensors
from jtl.weights.folders import check_new, exported
from jtl.weights.json_file import read_json

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "factors",
}
_SUFFIX = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_SUFFIX |= {"outputs": "ia3_l", "inputs": "ia3_l"}

_REFUSED = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),  # of a layer that stores `[in, out]`, whose thin tensors are as others'
    "megatron_config": (None,),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "exclude_modules": (None, []),
}
"""Settings that change what an adapter computes, with the values that are read here."""


def load(folder: str | Path, model: Any, variables: Variables) -> tuple[Adapter, dict[str, Any]]:
    """An adapter that PEFT wrote, attached to a model.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      model: of jtl's families, of the adapter's base.
      variables: of the model, without an adapter.

    Returns:
      `(adapter, variables)`: the variables have the adapter's leaves, and the modules that were trained whole.

    Raises:
      SourceNotFoundError: a file is missing.
      ConfigError: an adapter of another kind, or settings that change what it computes and are not read.
      WeightsError: a tensor without a place in the model, a missing or wrongly shaped one, or values not finite.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise SourceNotFoundError(f"{folder} has no {name}: it is not an adapter of PEFT's with safe tensors")
    settings = read_json(folder / CONFIG)
    _check(folder, settings)
    places = _places(model, variables["params"])
    parts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    whole: dict[str, np.ndarray] = {}
    names: dict[str, str] = {}
    for name, tensor in safetensors.read_tensors(folder / TENSORS).items():
        path, part, module = _place(name, places, folder)
        if part is None:
            whole[path] = tensor
        else:
            part = _scaled(settings, module) if part == "factors" else part
            parts[path][part], names[path] = tensor, module
    for path, part in parts.items():
        wanted = _wanted(settings, names[path])
        if set(part) != wanted:
            raise WeightsError(
                f"{folder / TENSORS}: {path} has {sorted(part)} of an adapter; expected {sorted(wanted)}"
            )
    adapter = _adapter(settings, parts, names)
    params = _replaced(variables["params"], whole, places, folder)
    delta = _delta(adapter, params, parts, folder)
    return adapter, {**variables, "params": joined(params, delta)}


def save(
    folder: str | Path, model: Any, adapter: Adapter, variables: Variables, *, base: str = "", whole: Sequence[str] = ()
) -> None:
    """Write an adapter as PEFT reads it: `PeftModel.from_pretrained(model, folder)`.

    Args:
      folder: must not exist, or be empty.
      model: of jtl's families that transformers has.
      adapter: LoRA, DoRA or IA3.
      variables: with its leaves.
      base: the name or path of the base model, for PEFT to find it.
      whole: modules that were trained whole, such as `("head",)`, by their paths.

    Raises:
      ConfigError: the folder is not empty, the adapter is of another kind, or a path names no module.
      CheckpointError: the disk is full, or refuses.
    """
    if adapter.name not in ("lora", "dora", "ia3"):
        raise ConfigError(f"PEFT's format is written for LoRA, DoRA and IA3, not for {adapter.name}")
    folder = Path(folder)
    check_new(folder)
    plain, delta = detach(adapter, variables)
    tensors, adapted = _written(model, adapter, plain["params"], delta)
    kept = _whole(model, plain["params"], whole)
    make = _ia3_settings if adapter.name == "ia3" else _lora_settings
    settings = {
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": sorted(adapted),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in kept}) or None,
        "fan_in_fan_out": _stored_turned(model, delta),
        **make(adapter, adapted),
    }
    named = {PREFIX + name: value for name, value in {**tensors, **kept}.items()}
    with exported(folder, sum(value.nbytes for value in named.values())) as unfinished:
        safetensors.write_tensors(unfinished / TENSORS, named, metadata={"format": "pt"})
        (unfinished / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


_NUMBER = (int, float)
_KINDS = {
    "lora_alpha": _NUMBER,
    "lora_dropout": (*_NUMBER, type(None)),
    "alpha_pattern": (dict, type(None)),
    "feedforward_modules": (str, list, type(None)),
    "use_dora": (bool, type(None)),
    "use_rslora": (bool, type(None)),
}
"""Settings that are read, and their types."""


def _moderate(value: Any) -> bool:
    """Whether a number is finite, and one that float32 has; anything else is."""
    return not isinstance(value, _NUMBER) or abs(value) < 1e38  # NaN is not


def _check_kinds(file: Path, settings: Mapping[str, Any]) -> None:
    for name, kinds in _KINDS.items():
        value = settings.get(name, 0 if kinds[0] is int else None)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or not _moderate(value):
            expected = ", ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"{file} sets {name}={value!r:.80}, expected {expected}: correct the file")
    for key, alpha in (settings.get("alpha_pattern") or {}).items():
        _pattern(file, key)
        if type(alpha) not in _NUMBER or not _moderate(alpha):
            raise ConfigError(f"{file} sets alpha_pattern of {key!r:.80} to {alpha!r:.80}, expected a number")
    names = settings.get("feedforward_modules") or ()
    if isinstance(names, str):
        _pattern(file, names)
    elif not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{file} sets feedforward_modules={names!r:.80}, expected names of modules")


def _pattern(file: Path, key: str) -> None:
    """Refuse an expression that cannot be read, or that could search for years: a repetition of a repetition."""
    try:
        re.compile(key)
        reason = "repeats a group" if _REPEATED.search(key) else ""
        reason = reason or ("repeats more than three things" if len(_REPEATS.findall(key)) > 3 else "")
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"is no regular expression: {error}"
    if reason:
        raise ConfigError(f"{file}: the pattern {key!r:.80} {reason}; name the modules plainly")


_REPEATED, _REPEATS = re.compile(r"\)[*+?{]"), re.compile(r"[*+{]")


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") not in ("LORA", "IA3"):
        raise ConfigError(f"{folder} holds an adapter of the type {settings.get('peft_type')!r}; LORA and IA3 are read")
    _check_kinds(folder / CONFIG, settings)
    for name, allowed in _REFUSED.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ConfigError(f"{folder / CONFIG} sets {name}={settings[name]!r:.80}, which jtl does not have")
    start = settings.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "eva", "orthogonal"):
        raise ConfigError(
            f"{folder / CONFIG} has init_lora_weights={start!r}, which changes the base model's weights too: "
            "convert the adapter with PEFT first"
        )


def _places(model: Any, params: Any) -> dict[str, tuple[str, Any]]:
    """Normalised names of tensors in transformers, with the path and the layout of each leaf."""
    layout = layout_of(model)
    keys = layout.keys(model.config)
    found = {path: convert.locate(path, keys) for path in jtree.paths(params)}
    return {layout.rename(source): (path, axes) for path, (source, axes) in found.items()} | {"": ("", layout.rename)}


def _place(name: str, places: Mapping[str, tuple[str, Any]], folder: Path) -> tuple[str, str | None, str]:
    """The leaf's path, which part of its adapter a tensor is, and the name of the module."""
    rename = places[""][1]
    inner = name.removeprefix(PREFIX)
    suffix = next((suffix for suffix in _PARTS if inner.endswith(f".{suffix}")), None)
    module = inner.removesuffix(f".{suffix}") if suffix else inner.rpartition(".")[0]
    source = rename(f"{module}.weight" if suffix else inner.replace(".modules_to_save.default.", "."))
    if not source or source not in places:
        raise WeightsError(f"{folder / TENSORS}: the tensor {name} has no place in the model")
    return places[source][0], None if suffix is None else _PARTS[suffix], module


def _scaled(settings: Mapping[str, Any], module: str) -> str:
    """Whether factors are of a layer's inputs or outputs."""
    given = settings.get("feedforward_modules") or ()
    if isinstance(given, str):
        return "inputs" if re.fullmatch(given, module) else "outputs"
    return "inputs" if any(f".{module}".endswith(f".{name}") for name in given) else "outputs"


def _wanted(settings: Mapping[str, Any], module: str) -> set[str]:
    """The parts that the adapter of a module has."""
    if settings["peft_type"] == "IA3":
        return {_scaled(settings, module)}
    return {"a", "b", "magnitude"} if settings.get("use_dora") else {"a", "b"}


def _adapter(
    settings: Mapping[str, Any], parts: Mapping[str, Mapping[str, np.ndarray]], names: Mapping[str, str]
) -> Adapter:
    if settings["peft_type"] == "IA3":
        inputs = sorted(path for path, part in parts.items() if "inputs" in part)
        return ia3(sorted(set(parts) - set(inputs)), inputs=inputs)
    ranks = {path: part["a"].shape[0] for path, part in parts.items()}
    make = dora if settings.get("use_dora") else lora
    alphas = {path: _alpha(settings, names[path]) for path in ranks}
    return make(
        sorted(ranks),
        rank=sorted(ranks.items()),
        alpha=sorted(alphas.items()),
        rank_stabilized=bool(settings.get("use_rslora")),
        dropout=float(settings.get("lora_dropout") or 0.0),
    )


def _alpha(settings: Mapping[str, Any], module: str) -> float:
    patterns = settings.get("alpha_pattern") or {}
    found = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return float(next(found, settings.get("lora_alpha", 8)))


def _replaced(params: Any, whole: Mapping[str, np.ndarray], places: Mapping[str, Any], folder: Path) -> Any:
    layouts = {path: axes for path, axes in places.values() if path}

    def replace(path: str, leaf: Any) -> Any:
        if path not in whole:
            return leaf
        value = layouts[path].read(whole[path])
        if value.shape != leaf.shape:
            raise WeightsError(f"{folder / TENSORS}: {path} has shape {leaf.shape}, the file {value.shape}")
        return jnp.asarray(value, leaf.dtype)

    return jtree.map_with_paths(replace, params)


def _delta(adapter: Adapter, params: Any, parts: Mapping[str, Any], folder: Path) -> Any:
    shapes = jax.eval_shape(lambda: adapter.init(params, jax.random.key(0)))

    def fill(path: str, leaf: Any) -> Any:
        *module, _, kernel, name = path.split("/")
        target = "/".join([*module, kernel])
        value = _read(parts[target][name], name)
        if value.shape != leaf.shape:
            raise WeightsError(f"{folder / TENSORS}: {name} of {target} has shape {value.shape}, expected {leaf.shape}")
        if not np.isfinite(value).all():
            raise WeightsError(f"{folder / TENSORS}: {name} of {target} has values that are not finite")
        return jnp.asarray(value, leaf.dtype)

    return jtree.map_with_paths(fill, shapes)


def _read(value: np.ndarray, name: str) -> np.ndarray:
    if name in ("magnitude", "inputs", "outputs"):
        return value.reshape(-1)
    if value.ndim == 4 and name == "b":
        value = value[:, :, 0, 0]
    return np.transpose(value, (2, 3, 1, 0)) if value.ndim == 4 else value.T


def _write(value: np.ndarray, name: str, kernel: Any) -> np.ndarray:
    if name == "magnitude":
        return value.reshape(1, -1, 1, 1) if kernel.ndim == 4 else value
    if name in ("inputs", "outputs"):
        return value.reshape(1, -1, 1, 1) if kernel.ndim == 4 else np.expand_dims(value, 1 if name == "outputs" else 0)
    if kernel.ndim != 4:
        return value.T
    return np.transpose(value, (3, 2, 0, 1)) if name == "a" else value.T[:, :, None, None]


def _written(model: Any, adapter: Adapter, params: Any, delta: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The adapter's tensors by name, and of each module its rank and scale, or whether inputs or outputs are scaled."""
    kernels, located = dict(jtree.leaves_with_paths(params)), _naming(model)
    tensors, adapted = {}, {}
    for path, leaf in jtree.leaves_with_paths(delta):
        *module, _, kernel, name = path.split("/")
        target = "/".join([*module, kernel])
        base = located(target)[0].removesuffix(".weight")
        embedding = kernel == "embedding"
        suffix = _SUFFIX[name]
        if embedding and name != "magnitude":
            suffix = f"lora_embedding_{name.upper()}"
        tensors[f"{base}.{suffix}"] = _write(np.asarray(leaf), name, kernels[target])
        if name == "a":
            adapted[base] = leaf.shape[-1], scale_of(adapter, target, leaf.shape[-1])
        elif adapter.name == "ia3":
            adapted[base] = name
    return tensors, adapted


def _naming(model: Any) -> Callable[[str], tuple[str, convert.Layout]]:
    """A leaf's path to the name of its tensor among the modules of the class of transformers, and its axes."""
    located, in_memory = naming(model), registry.of_model(model).layouts[0].in_memory

    def locate(path: str) -> tuple[str, convert.Layout]:
        source, axes = located(path)
        return source if path.startswith("head/") else in_memory(source), axes

    return locate


def _whole(model: Any, params: Any, modules: Sequence[str]) -> dict[str, np.ndarray]:
    located, found = _naming(model), {}
    for module in modules:
        leaves = [(path, leaf) for path, leaf in jtree.leaves_with_paths(params) if path.startswith(f"{module}/")]
        if not leaves:
            raise ConfigError(f"{module!r} is no module of the model")
        for path, leaf in leaves:
            name, axes = located(path)
            found[name] = axes.write(np.asarray(leaf))
    return found


def _stored_turned(model: Any, delta: Any) -> bool:
    """Whether the adapted layers store `[in, out]` in transformers, as GPT-2's do."""
    located = _naming(model)
    owners = {tuple(path.split("/")) for path in jtree.paths(delta)}
    kernels = {"/".join([*owner[:-3], owner[-2]]) for owner in owners if owner[-2] == "kernel"}
    return bool(kernels) and all(located(path)[1] is convert.KEEP for path in kernels)


def _ia3_settings(adapter: Adapter, adapted: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT's configuration of IA3 has of its own."""
    del adapter
    inputs = sorted(name for name, scaled in adapted.items() if scaled == "inputs")
    return {"peft_type": "IA3", "feedforward_modules": inputs, "init_ia3_weights": True}


def _lora_settings(adapter: Adapter, adapted: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """What PEFT's of LoRA has. A scale is written as its alpha, so rank stabilisation is already in it."""
    alphas = {name: scale * rank for name, (rank, scale) in adapted.items()}
    (rank, _), (alpha, _) = (
        collections.Counter(values).most_common(1)[0]
        for values in ([rank for rank, _ in adapted.values()], list(alphas.values()))
    )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(name): r for name, (r, _) in adapted.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "lora_dropout": adapter.settings.dropout,
        "use_rslora": False,
        "use_dora": adapter.name == "dora",
        "bias": "none",
        "init_lora_weights": True,
    }

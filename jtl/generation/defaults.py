"""`defaults`: the settings of generation that a checkpoint comes with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jtl.errors import ConfigError
from jtl.weights.json_file import read_json

FILE = "generation_config.json"

_TOKENS = {"eos_token_id", "pad_token_id"}
_STARTS = ("decoder_start_token_id", "bos_token_id")
"""What a decoder without a prompt reads first, the preferred first."""

_LENGTHS = {"max_new_tokens", "min_new_tokens", "max_length", "min_length"}
_NEW = 20
"""New tokens where the file names no length, as in transformers."""

_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""Read where tokens are drawn, with the values that transformers fills in."""

_BEAMS = {"length_penalty": 1.0, "early_stopping": False}
"""Read where beams are searched."""

_READ = {*_TOKENS, *_LENGTHS, *_SAMPLING, *_BEAMS, "do_sample", "num_beams", *_STARTS}

# How it is computed, what is returned beside the tokens, and how fast: none of it changes the tokens.
_IDLE = {
    *("_from_model_config", "transformers_version", "remove_invalid_values", "low_memory"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "use_mtp"),
    *("compile_config", "disable_compile", "continuous_batching_config", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_early_exit", "assistant_lookbehind", "assistant_ensemble_weight", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "speculation_type"),
}

# Not supported: the values with which they change nothing, beside null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "renormalize_logits": (False,),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "max_time": (),
    "stop_strings": ([],),
    "token_healing": (False,),
}


def defaults(folder: str | Path, *, ignore: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """The settings of generation that a checkpoint comes with, as arguments of `generate`.

        settings = jtl.generation.defaults(folder, max_new_tokens=40)
        written = jtl.generate(model, variables, inputs, **settings)

    Where the file has no `eos_token_id` no text ends early, and where it has no length there are 20 new tokens, as in
    transformers. A checkpoint that draws tokens (`do_sample`) needs `key=`, here and not beside the result; `key=None`
    takes the likeliest instead.

    Args:
      folder: a checkpoint of transformers with `generation_config.json`, or, where an old one has none, with the same
        settings in `config.json`. It is read as JSON, and nothing else.
      ignore: names of settings of the file that are left out.
      **settings: arguments of `generate`, which go before the file's.

    Returns:
      Arguments of `generate` by name.

    Raises:
      ConfigError: the folder has neither file, or the file asks for what `generate` does not have, such as
        `no_repeat_ngram_size`; named with its value. What changes no token is passed over.
      WeightsError: a file that is no JSON object.
    """
    folder = Path(folder)
    path, found, config = _found(folder)
    found = {name: value for name, value in found.items() if value is not None and name not in ignore}
    _refuse(path, found)
    encodes = bool(config.get("is_encoder_decoder"))
    chosen = {name: _tuple(found[name]) for name in sorted(_TOKENS & set(found))}
    if path.name == FILE and "eos_token_id" not in {*found, *ignore}:
        chosen["eos_token_id"] = ()  # transformers does not look for it among the model's settings either
    if encodes and "decoder_start_token_id" not in ignore and (starts := [found[n] for n in _STARTS if n in found]):
        chosen["decoder_start_token_id"] = starts[0]
    chosen |= _lengths(path, found, encodes, settings)
    if not {"max_new_tokens", "max_length"} & {*ignore, *chosen}:
        chosen["max_new_tokens"] = _NEW
    if _samples(path, found, settings):
        chosen |= {name: found.get(name, value) for name, value in _SAMPLING.items()}
    beams = settings.get("beams", found.get("num_beams", 1))
    if beams > 1:
        chosen |= {"beams": beams, **{name: found.get(name, value) for name, value in _BEAMS.items()}}
    return {**chosen, **settings}


def _found(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The file that has the settings, they themselves, and the model's settings."""
    own, general = folder / FILE, folder / "config.json"
    if not own.is_file() and not general.is_file():
        raise ConfigError(f"{folder} has no {FILE} and no config.json: give generate its settings as arguments")
    config = read_json(general) if general.is_file() else {}
    if own.is_file():
        return own, read_json(own), config
    known = _READ | set(_NEUTRAL)
    return general, {name: value for name, value in config.items() if name in known}, config


def _refuse(path: Path, found: Mapping[str, Any]) -> None:
    for name, value in found.items():
        if name not in _READ | _IDLE and value not in _NEUTRAL.get(name, ()):
            raise ConfigError(
                f"{path} sets {name}={value!r}, which generate does not have and which changes the text: "
                f"ignore=[{name!r}] leaves it out"
            )


def _lengths(path: Path, found: Mapping[str, Any], encodes: bool, settings: Mapping[str, Any]) -> dict[str, int]:
    """The counts of new tokens. Those of whole texts include the decoder's first token, or else a prompt."""
    chosen = {name: found[name] for name in ("max_new_tokens", "min_new_tokens") if name in found}
    for whole, new, least in (("max_length", "max_new_tokens", 2), ("min_length", "min_new_tokens", 0)):
        value = found.get(whole, 0)
        if whole not in found or new in chosen or new in settings or (value == 0 and not least):
            continue
        if not encodes:
            raise ConfigError(
                f"{path} sets {whole}={value}, which counts the prompt too: give {new}=, or ignore=[{whole!r}]"
            )
        if type(value) is not int or value < least:
            raise ConfigError(
                f"{path} sets {whole}={value!r}: expected an integer of at least {least}, as the decoder's first token "
                f"counts; give {new}=, or ignore=[{whole!r}]"
            )
        chosen[new] = value - 1
    return chosen


def _samples(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    if "key" in settings:
        return settings["key"] is not None
    if found.get("do_sample"):
        raise ConfigError(f"{path} draws tokens (do_sample): give key=, or key=None for the likeliest tokens")
    return False


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

"""What a generation is asked for, checked on the host."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl.errors import ConfigError


class Generated(NamedTuple):
    """New texts.

    Attributes:
      tokens: `[batch, max_new_tokens]` int32, without the prompts; padding after the end.
      lengths: `[batch]` int32, how many tokens of each row count, the one that ends it included.
      scores: `[batch]` float32, the sum of the logarithms of the probabilities that the model gives to these tokens,
        whatever temperature they were drawn at; of beams divided by `length ** length_penalty`.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


class Settings(NamedTuple):
    """What a compiled generation depends on, besides model and shapes; `generate` documents the fields.

    Attributes:
      max_new_tokens: the length of the loop.
      min_new_tokens: how many come before an end.
      temperature: of drawn tokens.
      top_k: of drawn tokens; 0 for all.
      top_p: of drawn tokens.
      beams: 1 without a search.
      length_penalty: of beams.
      early_stopping: of beams.
      ends: the tokens that end a text.
      padding: what stands after the end.
      start: the first token of a decoder that reads no prompt; None of one that does.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    beams: int
    length_penalty: float
    early_stopping: bool | str
    ends: tuple[int, ...]
    padding: int
    start: int | None = None


def ends(eos_token_id: int | Sequence[int] | None, config: Any) -> tuple[int, ...]:
    """The tokens that end a text, each once.

    Args:
      eos_token_id: as `generate` takes them.
      config: of the model.

    Raises:
      ConfigError: one that the model does not have, or no token left that goes on.
    """
    given = getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id
    given = () if given is None else (given,) if isinstance(given, int) else given
    found, vocabulary = tuple(dict.fromkeys(int(token) for token in given)), config.vocab_size
    wrong = [token for token in found if not 0 <= token < vocabulary]
    if wrong:
        whose = "the model's own settings have" if eos_token_id is None else "got"
        raise ConfigError(
            f"eos_token_id: {whose} {wrong[0]}, which is not among the model's tokens, 0 to {vocabulary - 1}; "
            "eos_token_id=() lets no text end early"
        )
    if len(found) >= vocabulary:
        raise ConfigError(f"eos_token_id names all {vocabulary} tokens of the model: none is left to go on with")
    return found


def padding(pad_token_id: int | None, config: Any, found: tuple[int, ...]) -> int:
    """What stands after the end: as asked, as the model's settings have it, or the first token that ends a text."""
    candidates = (pad_token_id, getattr(config, "pad_token_id", None), *found, 0)
    return next(token for token in candidates if token is not None)


def start(decoder_start_token_id: int | None, network: Any) -> int | None:
    """What the decoder reads first: as asked, or as the model's settings have it; None where it goes on from inputs.

    Raises:
      ConfigError: it goes on from inputs and one was asked for, or the model does not have it.
    """
    if network.prompted:
        if decoder_start_token_id is not None:
            raise ConfigError(
                f"decoder_start_token_id={decoder_start_token_id!r}: {type(network).__name__} goes on from its inputs, "
                "which have a first token; leave it out"
            )
        return None
    given, last = decoder_start_token_id, network.config.vocab_size - 1
    token = network.config.decoder_start_token_id if given is None else given
    if type(token) is not int or not 0 <= token <= last:
        raise ConfigError(f"decoder_start_token_id must be one of the model's tokens, 0 to {last}, got {token!r}")
    return token


def check(settings: Settings, key: Any) -> None:
    """Refuse settings that cannot work, or that would be ignored.

    Args:
      settings: as `generate` makes them.
      key: what it was given.

    Raises:
      ConfigError: names the setting, what was expected, and the remedy.
    """
    _check_numbers(settings)
    if key is None:
        _refuse_unused(settings, {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, "draws tokens, which needs key=")
    if settings.beams == 1:
        _refuse_unused(settings, {"length_penalty": 1.0, "early_stopping": False}, "is of beams: set beams=")
    elif key is not None:
        raise ConfigError(f"beams={settings.beams} with a key: beams are searched, not drawn; leave out one of the two")


def _check_numbers(settings: Settings) -> None:
    whole = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "beams": 1}
    for name, least in whole.items():
        value = getattr(settings, name)
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
    if settings.min_new_tokens > settings.max_new_tokens:
        raise ConfigError(f"min_new_tokens={settings.min_new_tokens} is above max_new_tokens={settings.max_new_tokens}")
    if not (math.isfinite(settings.temperature) and settings.temperature > 0):
        raise ConfigError(
            f"temperature={settings.temperature}: expected above 0; without key= the likeliest token is taken"
        )
    if not 0 < settings.top_p <= 1:
        raise ConfigError(f"top_p={settings.top_p}: expected in (0, 1]; 1 keeps all tokens")
    if not math.isfinite(settings.length_penalty):
        raise ConfigError(f"length_penalty={settings.length_penalty}: expected a finite number")
    if settings.early_stopping != "never" and type(settings.early_stopping) is not bool:
        raise ConfigError(f"early_stopping={settings.early_stopping!r}: expected True, False or 'never'")


def _refuse_unused(settings: Settings, neutral: dict[str, Any], why: str) -> None:
    for name, value in neutral.items():
        if getattr(settings, name) != value:
            raise ConfigError(f"{name}={getattr(settings, name)!r} {why}")


def row_keys(key: jax.Array | None, batch: int) -> jax.Array | None:
    """A key for each row, `[batch]`.

    Raises:
      ConfigError: no typed key, or keys for other rows.
    """
    if key is None:
        return None
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise ConfigError(f"key is a {type(key).__name__}: expected one of jax.random.key")
    if key.shape not in ((), (batch,)):
        raise ConfigError(f"key has shape {list(key.shape)}: expected one key, or one for each of {batch} rows")
    return key if key.ndim else jax.random.split(key, batch)

"""`generate`: new texts of a model, by one compiled function."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jtl.generation import beams as searching
from jtl.generation import settings as asked
from jtl.generation import single
from jtl.generation.prompts import generating, prepare
from jtl.generation.settings import Generated, Settings
from jtl.typing import Key, Variables


def generate(
    model: Any,
    variables: Variables,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    key: Key | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    decoder_start_token_id: int | None = None,
) -> Generated:
    """Write on.

    The likeliest token at each step; with `key` one that is drawn; with `beams` the best text that a beam search finds.

        tokens = tokenizer(texts, padding=True, return_tensors="np")
        written = jtl.generate(model, variables, tokens, max_new_tokens=40)
        texts = tokenizer.batch_decode(np.asarray(written.tokens), skip_special_tokens=True)

    `defaults(folder)` gives the settings that a checkpoint comes with.

    The inputs are read once, then one token of each row a step; keys and values of all before are kept, and updated in
    place. A row's text does not depend on the other rows. Inputs are padded to a multiple of 32 tokens, and one
    compilation serves all inputs of such a length, batch size and settings. The loop ends when all rows have.

    Args:
      model: a model with `start` and `decode`, such as GPT-2 or T5, with a head of logits of words; or what
        `jtl.peft.adapted` made of one.
      variables: its variables.
      inputs: `input_ids` and `attention_mask`, `[batch, length]`, padded on either side: what a text begins with for
        GPT-2, what the encoder reads for T5. Without a mask all are real tokens.
      max_new_tokens: the most of each row, and the width of the result.
      min_new_tokens: no row ends before.
      key: draws the tokens: one key, or `[batch]`, one for each row, whose text is then the same in any batch. The
        keys of rows are `jax.random.split(key, batch)`.
      temperature: logits are divided by it; below 1 likely tokens become likelier.
      top_k: only so many of the likeliest tokens are drawn from; 0 for all.
      top_p: of these, only the fewest that have this probability together; 1 for all.
      beams: how many texts of a row are followed side by side.
      length_penalty: a text's score is the sum of its logarithms of probabilities, divided by
        `length ** length_penalty`; above 0 favours longer texts.
      early_stopping: when a row's search ends that has as many ended texts as beams. True: at once. False: when the
        best that goes on would be worth no more than the worst of them, did it end now. "never": when it can become
        worth no more at any length.
      eos_token_id: the tokens that end a row; by default those of the model's `config`, and `()` for none, so that all
        rows are `max_new_tokens` long.
      pad_token_id: what stands after the end; by default that of the model's `config`, or the first that ends a row.
      decoder_start_token_id: what the decoder of T5 reads first; by default that of the model's `config`.

    Returns:
      `Generated(tokens, lengths, scores)`.

    Raises:
      ConfigError: a model that does not generate, settings that cannot work or would be ignored, or a row and its new
        tokens longer than the model's longest text.
      DataError: an id that the model does not have, by row and position; or a row of padding alone.

    References:
      Fan et al, 2018 (arXiv 1805.04833), for top-k; Holtzman et al, 2020 (arXiv 1904.09751), for top-p. Settings mean
      what they mean in transformers.
    """
    network = generating(model)
    ends = asked.ends(eos_token_id, network.config)
    settings = Settings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=float(temperature),
        top_k=top_k,
        top_p=float(top_p),
        beams=beams,
        length_penalty=float(length_penalty),
        early_stopping=early_stopping,
        ends=ends,
        padding=asked.padding(pad_token_id, network.config, ends),
        start=asked.start(decoder_start_token_id, network),
    )
    asked.check(settings, key)
    prompts = prepare(inputs, network, max_new_tokens)
    return _run(model, settings, variables, *prompts, asked.row_keys(key, len(prompts.ids)))


@functools.partial(jax.jit, static_argnums=(0, 1))  # equal models and settings are compiled once
def _run(
    model: Any, settings: Settings, variables: Variables, ids: jax.Array, mask: jax.Array, keys: jax.Array | None
) -> Generated:
    if settings.beams > 1:
        return searching.search(model, variables, ids, mask, settings)
    return single.write(model, variables, ids, mask, keys, settings)

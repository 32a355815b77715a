"""Beam search: the best text of each row among several that are followed side by side.

Equal to that of transformers 5: which texts are kept, when a search ends, and what a text of some length is worth. A
text that has ended keeps its place among the best K of its row, while K others go on. Rows do not see each other.

Shape suffixes: B batch, K beams, C candidates, N new tokens, V vocabulary.

References:
  Graves, Sequence transduction with recurrent neural networks, 2012 (arXiv 1211.3711), for beams of networks.
  Wu et al, Google's neural machine translation system, 2016 (arXiv 1609.08144), for scores by length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jtl.generation.choosing import is_end, without_early_ends
from jtl.generation.decoding import begin, follow, repeated
from jtl.generation.settings import Generated, Settings
from jtl.typing import PyTree, Variables

_HOPELESS = -jnp.inf
"""The score of a text that there is not."""


class Beams(NamedTuple):
    """Texts that go on, the best first.

    Attributes:
      tokens: `[batch, beams, new]`.
      scores: `[batch, beams]`, sums of logarithms of probabilities.
      sources: `[batch, beams]`, the beam before the last step that each goes on from.
      last: `[batch, beams]`, the last token of each.
    """

    tokens: jax.Array
    scores: jax.Array
    sources: jax.Array
    last: jax.Array


class Finished(NamedTuple):
    """The best texts that have ended, the best first.

    Attributes:
      tokens: `[batch, beams, new]`.
      scores: `[batch, beams]`, by length.
      lengths: `[batch, beams]`.
      ended: `[batch, beams]` bool, False of places that are not taken yet.
    """

    tokens: jax.Array
    scores: jax.Array
    lengths: jax.Array
    ended: jax.Array


class Search(NamedTuple):
    """A search under way.

    Attributes:
      step: how many tokens were chosen.
      running: texts that go on.
      finished: texts that have ended.
      open: `[batch]` bool, whether a running text may still become better than a finished one.
    """

    step: jax.Array
    running: Beams
    finished: Finished
    open: jax.Array


def search(model: Any, variables: Variables, ids: jax.Array, mask: jax.Array, settings: Settings) -> Generated:
    """The best text that `settings.beams` beams find for each row; see `generate`.

    Args:
      model: one that generates.
      variables: its variables.
      ids: `[batch, length]`.
      mask: `[batch, length]` bool.
      settings: of the generation.
    """
    # The inputs are read once for a row, and what is kept of them is then repeated for its beams.
    logits, cache, decoder = begin(model, variables, ids, mask, settings)
    decoder, cache = repeated(decoder, cache, settings.beams)

    def more(carry: tuple[Search, PyTree]) -> tuple[Search, PyTree]:
        now, cache = carry
        cache = _of_sources(cache, now.running.sources)
        logits, cache = follow(decoder, now.running.last.reshape(-1), cache, now.step - 1)
        return _advanced(now, logits, settings), cache

    logits = jnp.repeat(logits, settings.beams, axis=0)
    first = _advanced(_empty(len(ids), settings), logits, settings)
    (_, _, finished, _), _ = jax.lax.while_loop(lambda carry: _unfinished(carry[0], settings), more, (first, cache))
    return Generated(finished.tokens[:, 0], finished.lengths[:, 0], finished.scores[:, 0])


def _empty(batch: int, settings: Settings) -> Search:
    places = (batch, settings.beams)
    none = jnp.zeros(places, jnp.int32)
    tokens_BxKxN = jnp.full((*places, settings.max_new_tokens), settings.padding, jnp.int32)
    hopeless_BxK = jnp.full(places, _HOPELESS, jnp.float32)
    # All beams are the same before the first token, so the first one alone counts.
    running = Beams(tokens_BxKxN, hopeless_BxK.at[:, 0].set(0), none, none)
    finished = Finished(tokens_BxKxN, hopeless_BxK, none, none.astype(bool))
    return Search(jnp.zeros((), jnp.int32), running, finished, jnp.ones(batch, bool))


def _of_sources(cache: PyTree, sources: jax.Array) -> PyTree:
    """What is kept, of the beams that the running ones go on from."""
    batch, beams = sources.shape
    rows = (sources + jnp.expand_dims(jnp.arange(batch) * beams, 1)).reshape(-1)
    return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), cache)


def _unfinished(now: Search, settings: Settings) -> jax.Array:
    going_on = (now.step < settings.max_new_tokens) & jnp.any(now.open)
    return going_on & ~jnp.all(now.finished.ended) if settings.early_stopping is True else going_on


def _advanced(now: Search, logits: jax.Array, settings: Settings) -> Search:
    """The search after one more token, of whose logits there are `[batch * beams, vocabulary]`."""
    candidates = _candidates(now, logits, settings)
    ends_BxC = is_end(candidates.last, settings) | (now.step + 1 == settings.max_new_tokens)
    running = _best(candidates, jnp.where(ends_BxC, _HOPELESS, candidates.scores), settings.beams)
    finished = _with_ended(now, candidates, ends_BxC, settings)
    return Search(now.step + 1, running, finished, now.open & _may_improve(now.step + 1, running, finished, settings))


def _candidates(now: Search, logits: jax.Array, settings: Settings) -> Beams:
    """The best continuations of all beams: so many that K of them go on even if all others end."""
    batch, beams, _ = now.running.tokens.shape
    scores = without_early_ends(jax.nn.log_softmax(logits, axis=-1), now.step, settings)
    scores_BxKxV = scores.reshape(batch, beams, -1) + jnp.expand_dims(now.running.scores, 2)
    vocabulary = scores_BxKxV.shape[-1]
    count = max(2, 1 + len(settings.ends)) * beams
    scores_BxC, places_BxC = jax.lax.top_k(scores_BxKxV.reshape(batch, -1), count)
    sources_BxC, last_BxC = places_BxC // vocabulary, (places_BxC % vocabulary).astype(jnp.int32)
    tokens_BxCxN = _taken(now.running.tokens, sources_BxC).at[:, :, now.step].set(last_BxC)
    return Beams(tokens_BxCxN, scores_BxC, sources_BxC.astype(jnp.int32), last_BxC)


def _best(texts: Beams, scores: jax.Array, count: int) -> Beams:
    scores, places = jax.lax.top_k(scores, count)
    return jax.tree.map(lambda x: _taken(x, places), texts)._replace(scores=scores)


def _with_ended(now: Search, candidates: Beams, ends_BxC: jax.Array, settings: Settings) -> Finished:
    """The best of the texts that had ended, and of those among the K best candidates that end now."""
    length, among = now.step + 1, jnp.arange(ends_BxC.shape[1]) < settings.beams
    ended_BxC = ends_BxC & jnp.expand_dims(among, 0)
    closed_B = ~now.open
    if settings.early_stopping is True:
        closed_B = closed_B | jnp.all(now.finished.ended, axis=1)
    scores_BxC = candidates.scores / length.astype(jnp.float32) ** settings.length_penalty
    scores_BxC = jnp.where(ended_BxC & jnp.expand_dims(~closed_B, 1), scores_BxC, _HOPELESS)
    new = Finished(candidates.tokens, scores_BxC, jnp.full_like(candidates.last, length), ended_BxC)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), now.finished, new)
    _, places = jax.lax.top_k(both.scores, settings.beams)
    return jax.tree.map(lambda x: _taken(x, places), both)


def _may_improve(length: jax.Array, running: Beams, finished: Finished, settings: Settings) -> jax.Array:
    """Whether the best running text may yet be worth more than the worst finished one, `[batch]`.

    A guess of its worth at its present length; a bound at its greatest length for "never" and a positive penalty.
    """
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = jnp.full_like(length, settings.max_new_tokens)
    best_B = running.scores[:, 0] / length.astype(jnp.float32) ** settings.length_penalty
    worst_B = jnp.min(jnp.where(finished.ended, finished.scores, _HOPELESS), axis=1)
    return best_B > worst_B


def _taken(values: jax.Array, places: jax.Array) -> jax.Array:
    """`[batch, several, ...]` to `[batch, chosen, ...]` by places `[batch, chosen]`."""
    return jnp.take_along_axis(values, jnp.expand_dims(places, tuple(range(2, values.ndim))), axis=1)

"""`jtl quickstart`: real weights, real reviews, one table of what each way of transfer buys.

MiniLM on the Rotten Tomatoes reviews, split by film: feature extraction, fine-tuning of the last two
blocks, full fine-tuning; and two controls, the same architecture from random weights, and TF-IDF
with logistic regression. Learning rates were chosen on the validation films; the table is of the
test films.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jtl
from jtl import strategies
from jtl.data import Examples, examples, text, tfds
from jtl.errors import ConfigError, missing_extra
from jtl.recipes import progress, texts, training
from jtl.recipes.settings import Quickstart
from jtl.weights import assets

MODEL, DATA = "minilm-l6", "rotten-tomatoes"


class Way(NamedTuple):
    """A row of the table: how the model is trained."""

    strategy: jtl.Strategy
    epochs: int
    pretrained: bool = True

    @property
    def name(self) -> str:
        """Of the row."""
        return self.strategy.name


class Row(NamedTuple):
    """A row's outcomes, one for each seed."""

    name: str
    outcomes: Sequence[training.Outcome]


def run(settings: Quickstart, console: Console) -> list[Row]:
    """Run every way and every seed, and print the table.

    Args:
      settings: sizes and seeds.
      console: where to print.

    Returns:
      The rows.

    Raises:
      ConfigError: there are not as many labelled reviews.
    """
    _check(settings)
    with console.status("fetching weights and reviews"):
        folder = assets.fetch(MODEL)
        train, held_out = tfds.load(DATA, "train"), tfds.load(DATA, settings.split)
        held_out = examples.subset(held_out, min(settings.held_out, held_out.size), seed=0)
        model, pretrained = jtl.load(folder, jtl.heads.classifier(2), key=jax.random.key(0))
    if settings.labels > train.size:
        raise ConfigError(f"labels={settings.labels}: there are {train.size} reviews to train on")
    tokenizer = text.tokenizer(folder)
    rows = []
    with progress.steps(console) as advance:
        for way in _ways(settings, model):
            outcomes = list(_outcomes(settings, way, model, pretrained, tokenizer, train, held_out, advance))
            rows.append(Row(way.name, outcomes))
        rows.append(
            Row(
                "TF-IDF + logistic regression",
                [_tf_idf(settings, seed, train, held_out) for seed in range(settings.seeds)],
            )
        )
    _print(settings, rows, held_out, console)
    return rows


def _check(settings: Quickstart) -> None:
    if min(settings.labels, settings.held_out) < 2 or min(settings.seeds, settings.batch_size) < 1:
        raise ConfigError("labels and held_out must be at least 2, seeds and batch_size at least 1")


def _ways(settings: Quickstart, model: Any) -> list[Way]:
    steps = -(-settings.labels // settings.batch_size)
    groups = strategies.depth_groups(model)
    full = strategies.full(training.optimizer(2e-4, steps))
    return [
        Way(strategies.feature_extraction(training.optimizer(2e-2, 2 * steps)), 2),
        Way(strategies.last_blocks(training.optimizer(2e-4, 2 * steps), groups, 2), 2),
        Way(full, 1),
        Way(full._replace(name="random weights, full"), 1, pretrained=False),
    ]


def _outcomes(
    settings: Quickstart,
    way: Way,
    model: Any,
    pretrained: dict[str, Any],
    tokenizer: Any,
    train: Examples,
    held_out: Examples,
    advance: Callable[[str, int], progress.OnStep],
) -> Iterator[training.Outcome]:
    sizes: dict[str, Any] = {"max_length": settings.max_length, "batch_size": settings.batch_size}
    test = texts.text_batches(tokenizer, held_out, **sizes).batches
    loss_fn = _loss(model)
    for seed in range(settings.seeds):
        subset = examples.subset(train, settings.labels, seed=seed)
        batches = texts.text_batches(tokenizer, subset, seed=seed, epochs=way.epochs, **sizes).batches
        head_key, run_key = jax.random.split(jax.random.key(seed))
        variables = _start(model, pretrained if way.pretrained else None, head_key)
        on_step = advance(f"{way.name}, seed {seed}", len(batches))
        yield training.run(
            loss_fn, way.strategy, variables, batches, test, key=run_key, cache=settings.cache, on_step=on_step
        ).outcome


@functools.lru_cache(maxsize=1)  # one object for all runs, so that each step compiles once
def _loss(model: Any) -> Any:
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics={"balanced accuracy": jtl.metrics.balanced_accuracy})


def _start(model: Any, pretrained: dict[str, Any] | None, key: jax.Array) -> dict[str, Any]:
    """The variables of a run: the pretrained ones under a head of its own, or all of them random."""
    if pretrained is None:
        return jtl.load(MODEL, model.head, key=key, pretrained=False)[1]
    head = model.head.init(key, jnp.zeros((1, model.config.hidden_size)))["params"]
    return {"params": {**pretrained["params"], "head": head}}


def _tf_idf(settings: Quickstart, seed: int, train: Examples, held_out: Examples) -> training.Outcome:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import balanced_accuracy_score
    except ImportError as error:
        raise missing_extra("scikit-learn", "all") from error
    subset = examples.subset(train, settings.labels, seed=seed)
    vectorizer, classifier = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0)
    started = time.perf_counter()
    classifier.fit(vectorizer.fit_transform(subset.columns["text"]), subset.labels)
    seconds = time.perf_counter() - started
    predicted = classifier.predict(vectorizer.transform(held_out.columns["text"]))
    score = float(balanced_accuracy_score(held_out.labels, predicted))
    weights = int(np.size(classifier.coef_) + np.size(classifier.intercept_))
    return training.Outcome(weights, 0, 0.0, 0.0, seconds, subset.size / seconds, {"balanced accuracy": score})


def _print(settings: Quickstart, rows: Sequence[Row], held_out: Examples, console: Console) -> None:
    films = 0 if held_out.groups is None else len(set(held_out.groups))
    table = Table(
        title=f"{MODEL} on {settings.labels} reviews; {held_out.size} reviews of {films} other films held out",
        caption=f"accuracy: mean and 95% t interval over {settings.seeds} seeds; GFLOP by XLA's count, at the most "
        "frequent length; seconds of one seed, without compilation; compilation once for all seeds",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("strategy")
    for name in (
        "trained",
        "optimizer\nbytes",
        "GFLOP/\nexample",
        "compile\ns",
        "s",
        "examples\n/s",
        "balanced\naccuracy",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, *_cells(row.outcomes))
    console.print(table)


def _cells(outcomes: Sequence[training.Outcome]) -> list[str]:
    first = outcomes[0]
    mean, half = jtl.metrics.interval([outcome.scores["balanced accuracy"] for outcome in outcomes])
    return [
        f"{first.trained:,}",
        f"{first.state_bytes:,}",
        f"{first.gflops:.3f}" if first.gflops else "-",
        f"{first.compile_seconds:.1f}" if first.gflops else "-",
        f"{np.mean([outcome.seconds for outcome in outcomes]):.1f}",
        f"{np.mean([outcome.examples_per_second for outcome in outcomes]):,.0f}",
        f"{mean:.3f}" + (f" ± {half:.3f}" if len(outcomes) > 1 else ""),
    ]

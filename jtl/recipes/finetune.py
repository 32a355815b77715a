"""`jtl finetune`: a user's own labelled texts or pictures, from files to a trained model in a folder."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jtl
from jtl.data import Examples, compare, examples, picture_batches, read, text, tfds
from jtl.errors import ConfigError, DataError
from jtl.pretrained import build
from jtl.recipes import progress, training, ways
from jtl.recipes.settings import Finetune
from jtl.weights.folders import check_new
from jtl.weights.source import Source, resolve


def run(settings: Finetune, console: Console) -> training.Outcome:
    """Read, check, train, evaluate, and save.

    Args:
      settings: as the command line gives them.
      console: where to print.

    Returns:
      The outcome.

    Raises:
      JtlError: whatever is wrong with data, model or settings, before anything is compiled.
    """
    _check(settings)
    if settings.out is not None:
        check_new(settings.out)
    train, held_out = _examples(settings)
    _report_data(train, held_out, console)
    head_key, run_key = jax.random.split(jax.random.key(settings.seed))
    head = jtl.heads.classifier(len(train.classes))
    with console.status(f"loading {escape(settings.model)}"):
        source = resolve(settings.model, revision=settings.revision)
        modality = _check_modality(settings, source, train)
        model, variables = jtl.load(source.path, head, key=head_key)
        tokenizer = text.tokenizer(source.path) if modality == "text" else None
    if modality == "image":
        for line in compare(train, held_out).lines():
            console.print(line, markup=False, soft_wrap=True)
    batches, augment, test = _batches(settings, model, tokenizer, train, held_out, console)
    strategy = ways.strategy(settings, model, len(batches))
    metrics = {"accuracy": jtl.metrics.accuracy, "balanced accuracy": jtl.metrics.balanced_accuracy}
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy, metrics=metrics)
    mesh = jtl.parallel.data_mesh() if jax.device_count() > 1 else None
    with progress.steps(console) as advance:
        on_step = advance(escape(strategy.name), len(batches))
        done = training.run(
            loss_fn,
            strategy,
            variables,
            batches,
            test,
            key=run_key,
            mesh=mesh,
            cache=settings.cache,
            augment=augment,
            on_step=on_step,
        )
    if done.why:
        console.print(done.why, markup=False, soft_wrap=True)
    _print(strategy.name, done.outcome, held_out, console)
    if settings.out is not None:
        notes = {"settings": _plain(settings), "outcome": done.outcome._asdict(), "source": source.name}
        whole = jtl.variables(done.state, done.frozen)
        jtl.save(settings.out, model, whole, classes=train.classes, tokenizer=tokenizer, notes=notes)
        console.print(
            f"saved to {settings.out}; jtl.load({str(settings.out)!r}) takes it back", markup=False, soft_wrap=True
        )
    return done.outcome


def _check(settings: Finetune) -> None:
    for name in ("epochs", "batch_size"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(settings, name)}")
    if settings.learning_rate is not None and not settings.learning_rate > 0:
        raise ConfigError(f"learning_rate must be above 0, got {settings.learning_rate}")
    if settings.augment != "none":
        training.check_cache(settings.cache)
    devices = jax.device_count()
    if settings.batch_size % devices:
        few = "smaller than" if settings.batch_size < devices else "not a multiple of"
        raise ConfigError(f"a batch of {settings.batch_size} examples is {few} the {devices} devices")


def _examples(settings: Finetune) -> tuple[Examples, Examples]:
    whole = _read(settings, settings.data, settings.classes)
    share = _share(settings.held_out)
    if share is None:
        train, held_out = whole, _read(settings, settings.held_out, whole.classes)
    else:
        train, held_out = examples.split(whole, [1 - share, share], seed=settings.seed)
    if settings.labels_per_class is not None:
        train = examples.per_class(train, settings.labels_per_class, seed=settings.seed)
    return examples.check(train), held_out


def _read(settings: Finetune, place: str, classes: tuple[str, ...]) -> Examples:
    if not place.startswith("tfds:"):
        return read(
            place,
            text=settings.text,
            label=settings.label,
            group=settings.group,
            classes=classes or None,
            skip_bad=settings.skip_bad,
        )
    name, _, split = place.removeprefix("tfds:").partition(":")
    found = tfds.load(name, split or "train", text=settings.text, label=settings.label, group=settings.group)
    if classes and found.classes != classes:
        raise DataError(f"{place} has the classes {found.classes}, expected {classes}")
    return found


def _share(held_out: str) -> float | None:
    try:
        share = float(held_out)
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ConfigError(f"held_out is a share between 0 and 1, or a file, folder or tfds:NAME:SPLIT; got {held_out}")
    return share


def _check_modality(settings: Finetune, source: Source, data: Examples) -> str:
    modality = build(source, None, {})[0].modality
    if modality not in data.columns:
        raise ConfigError(f"{source.name} takes {modality}; {data.name} holds {', '.join(data.columns)}")
    if settings.augment != "none" and modality != "image":
        raise ConfigError(f"augment={settings.augment!r} changes pictures; {source.name} takes {modality}")
    return modality


def _batches(
    settings: Finetune, model: Any, tokenizer: Any, train: Examples, held_out: Examples, console: Console
) -> tuple[Any, Any, Any]:
    """Batches to train on, what is to be done to them on the device, and batches to evaluate on."""
    if tokenizer is None:
        spec, rows = model.config.input, settings.batch_size
        order = {"batch_size": rows, "seed": settings.seed, "epochs": settings.epochs}
        batches, augment = training.training_pictures(train, spec, settings.augment, **order)
        console.print(f"{len(batches)} steps of pictures of {spec.size[0]}x{spec.size[1]} pixels")
        return batches, augment, picture_batches(held_out, spec, batch_size=rows)
    longest = min(settings.max_length, model.config.max_position_embeddings)
    sizes = {"max_length": longest, "batch_size": settings.batch_size}
    batches, cut = training.text_batches(tokenizer, train, seed=settings.seed, epochs=settings.epochs, **sizes)
    test, cut_test = training.text_batches(tokenizer, held_out, **sizes)
    shapes = ", ".join(f"{rows}x{length} ({count})" for (rows, length), count in sorted(batches.shapes.items()))
    console.print(f"{len(batches)} steps in {len(batches.shapes)} shapes: {shapes}")
    if cut or cut_test:
        console.print(f"{cut} training and {cut_test} held-out texts were cut to {longest} tokens")
    return batches, None, test


def _report_data(train: Examples, held_out: Examples, console: Console) -> None:
    counts = f"{train.size} examples to train on, {held_out.size} held out"
    console.print(f"{counts}, classes {', '.join(train.classes)}", markup=False)
    for skipped in train.skipped:
        console.print(f"skipped {skipped.file}, row {skipped.row}: {skipped.reason}", markup=False, soft_wrap=True)
    if train.skipped:
        console.print(f"{len(train.skipped)} rows skipped")


def _print(name: str, outcome: training.Outcome, held_out: Examples, console: Console) -> None:
    console.print(f"\n{escape(name)}, on {held_out.size} held-out examples")
    table = Table("", "", box=None, show_header=False)
    table.columns[1].justify = "right"
    values = {
        "trained parameters": f"{outcome.trained:,}",
        "optimizer bytes": f"{outcome.state_bytes:,}",
        "GFLOP/example": f"{outcome.gflops:.3f}",
        "compilation, s": f"{outcome.compile_seconds:.1f}",
        "training, s": f"{outcome.seconds:.1f}",
        "examples/s": f"{outcome.examples_per_second:,.0f}",
        **{metric: f"{value:.3f}" for metric, value in outcome.scores.items()},
    }
    for row in values.items():
        table.add_row(*row)
    console.print(table)


def _plain(settings: Finetune) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}

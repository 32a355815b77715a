"""What a step takes, and steps that find less: a run goes on in microbatches, as if it had begun with them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl import errors, loop, memory

from .runs import victim

ROOT = Path(__file__).parents[1]


def script(path, *flags):
    """What a process of its own prints on its last line, as JSON."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, ROOT / path, *flags]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def small(count):
    """A device with room for so many examples; what it was given is gone when it fails, as with a donated state."""
    compiled = loop.compiled_train

    def make(loss_fn, tx, accumulate=1):
        step = compiled(loss_fn, tx, **({"accumulate": accumulate} if accumulate > 1 else {}))

        def call(state, frozen, batch):
            if len(batch["label"]) > count * accumulate:
                jax.tree.map(lambda leaf: leaf.delete(), state)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 42 bytes.")
            return step(state, frozen, batch)

        return call

    return make


def test_arguments_are_the_bytes_of_the_trees_and_donated_ones_are_counted_once():
    strategy, loss_fn, state, frozen = victim.start("last blocks")
    batch = next(iter(victim.data()))
    found = jtl.memory_estimate(jtl.train_step(loss_fn, strategy.tx), state, frozen, batch)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state, frozen, batch)))
    unused = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen.params["stem"]["bias"]))
    assert whole - 64 - unused <= found.arguments <= whole + 64
    assert found.outputs < 256  # metrics: the new state lies where the old one was
    kept = jtl.memory_estimate(jax.jit(jtl.train_step(loss_fn, strategy.tx)), state, frozen, batch)
    assert kept.outputs >= found.outputs + jtl.tree.nbytes(state.opt_state)
    shapes = jax.eval_shape(lambda: (state, frozen, batch))
    assert jtl.memory_estimate(jtl.train_step(loss_fn, strategy.tx), *shapes) == found
    assert found.peak == found.arguments + found.outputs + found.temporary


@pytest.mark.parametrize("trained", ["head", "all"])
def test_the_peak_of_a_step_is_the_one_measured(trained):
    found = script("benchmarks/memory_estimate.py", "--one", "perceptron", trained)
    assert found["estimated"] == pytest.approx(found["measured"], rel=0.15)


def test_a_step_that_the_machine_cannot_hold_goes_on_in_microbatches():
    """Under a true limit on the memory of a process."""
    found = script("tests/starved.py")
    assert found["steps"] == [4, 4]
    assert not found["said"][0]
    assert found["said"][1]  # how often depends on what the allocator has reserved
    assert all("out of memory: batches" in line and "microbatches of" in line for line in found["said"][1])
    assert found["from free"] < 1e-5 * found["moved"]


@pytest.mark.parametrize(("room", "parts", "cache"), [(7, 2, "auto"), (1, 8, "off")])
def test_a_run_without_room_has_the_bits_of_one_in_microbatches(monkeypatch, room, parts, cache):
    expected = victim.train(strategy="gradual", accumulate=parts, cache=cache)
    monkeypatch.setattr(loop, "compiled_train", small(room))
    assert victim.train(strategy="gradual", cache=cache) == expected


def test_a_shape_is_split_by_itself_and_said_once():
    _, loss_fn, state, frozen = victim.start("full")
    tx, said, made = victim.TX, [], []
    step = memory.Microbatching(
        lambda count: made.append(count) or small(4)(loss_fn, tx, accumulate=count), 1, say=said.append
    )
    batches = [next(iter(victim.data(batch_size=size))) for size in (4, 6, 4, 6, 8)]
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        assert np.isfinite(metrics["loss"])
    assert made == [1, 1, 2, 1, 2, 1, 2]  # the fourth batch is not tried whole again
    assert list(step.counts.values()) == [2, 2]
    assert len(said) == 2
    assert "x[6, 4]" in said[0]
    assert "2 microbatches of 3" in said[0]
    assert jax.random.key_impl(state.key) == jax.random.key_impl(jax.random.key(0))


def test_what_cannot_be_split_further_is_said(monkeypatch):
    monkeypatch.setattr(loop, "compiled_train", small(0))
    with pytest.raises(errors.OutOfMemoryError, match=r"1 of 8 examples, and it cannot be made smaller.*42 bytes"):
        victim.train(strategy="full")
    _, loss_fn, state, frozen = victim.start("full")
    spread = memory.Microbatching(lambda count: small(1)(loss_fn, victim.TX, accumulate=count), 1, devices=4)
    with pytest.raises(MemoryError, match="4 of 8 examples on 4 devices"):
        spread(state, frozen, next(iter(victim.data())))


def test_a_suffix_takes_two_examples_at_least(monkeypatch):
    strategy, loss_fn, state, frozen = victim.start("feature extraction")
    cached = jtl.cache.prepare(loss_fn, state, frozen, victim.data(), mode="require")
    monkeypatch.setattr(loop, "compiled_train", small(1))
    with pytest.raises(errors.OutOfMemoryError, match="2 of 8 examples"):
        list(jtl.fit(cached.loss_fn, strategy, state, frozen, cached.batches, cache="off", say=lambda line: None))


def test_other_errors_pass(monkeypatch):
    def broken(loss_fn, tx):
        def call(state, frozen, batch):
            raise jax.errors.JaxRuntimeError("INTERNAL: no such thing")

        return call

    monkeypatch.setattr(loop, "compiled_train", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        victim.train(strategy="full")


def test_a_resumed_run_is_split_as_before_even_where_there_is_room_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "compiled_train", small(2))
        expected = victim.train(strategy="full")
        assert victim.train(tmp_path / "run", "full", stop=33, run={"every": 5}) is None
    assert victim.train(tmp_path / "run", "full", run={"every": 5}) == expected
    assert victim.train(strategy="full") != expected  # so the bits do tell one from the other


def test_the_state_that_was_given_stays_usable(monkeypatch):
    monkeypatch.setattr(loop, "compiled_train", small(3))
    _, loss_fn, state, frozen = victim.start("full")
    before = jax.tree.map(np.array, state.params)
    for _ in jtl.fit(loss_fn, victim.TX, state, frozen, victim.data().until(3), cache="off", say=lambda line: None):
        pass
    jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert jnp.isfinite(optax.tree.norm(state.params))

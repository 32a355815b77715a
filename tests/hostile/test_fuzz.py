"""Whatever bytes a file has: it is read or refused by a typed error, quickly, in little memory, and nothing is run.

The short form; `LONG.md` has the long one. A worker ends where a file takes two seconds of the processor.
"""

import pytest

from . import fuzz, mutations, seeds

COUNT = {"own": 60, "config": 100, "settings": 200, "tokenizer": 80, "adapter": 150}
LEAST = 6  # kinds of answers, so that mutations reach more than the first check


@pytest.mark.parametrize("name", sorted(fuzz.SHARES))
def test_mutated_files_are_read_or_refused(name, tmp_path):
    count = COUNT.get(name, 500)
    report = fuzz.run(count, tmp_path, chosen=[name])[name]
    assert report["failures"] == []
    assert report["count"] == count
    assert report["kinds"] >= LEAST


def test_the_watchdog_bites(tmp_path):
    """A reader that hangs, one that writes, and one that raises something else are all caught."""
    import signal
    import time

    signal.signal(signal.SIGPROF, fuzz._alarm)

    def hang(path):
        while True:
            time.process_time()

    def bug(path):
        raise KeyError("x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 0.05)
        with pytest.raises(fuzz.Hang):
            fuzz._guarded(hang, tmp_path)
    with pytest.raises(KeyError):
        fuzz._guarded(bug, tmp_path)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def test_mutations_change_files():
    import random

    rng, file = random.Random(0), seeds.single()["model.safetensors"]
    changed = [mutations.safetensors(rng, file) for _ in range(200)]
    assert sum(data != file for data in changed) > 190
    assert len(set(changed)) > 150

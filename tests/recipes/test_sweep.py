"""`jtl sweep` and `jtl audit` from the command line, on a tiny checkpoint."""

import json

import pytest

import jtl
from jtl import cli

from ..models import checkpoints  # noqa: TID252
from .test_finetune import ROWS, csv


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = checkpoints.CONFIG | {"num_hidden_layers": 2}
    return checkpoints.write_tokenizer(checkpoints.write(tmp_path_factory.mktemp("tiny"), config))


def sweep(model, folder, *more):
    common = ("--model", model, "--batch-size", 8, "--max-length", 16, "--epochs", 1, "--held-out", "0.5")
    cli.main(list(map(str, ("sweep", "--data", csv(folder), *common, *more))))


def test_a_sweep_writes_a_table_its_runs_and_a_picture(model, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(
        model, tmp_path, "--strategies", "feature-extraction", "last-blocks", "--depths", 1, "--seeds", 2, "--out", out
    )
    printed = capsys.readouterr().out
    for word in ("feature extraction", "last 1 of 2 blocks", "sweet spot: ", "30 runs", f"saved to {out}"):
        assert word in printed
    written = json.loads((out / "sweep.json").read_text())
    assert len(written["trials"]) == 2 * (12 + 3)
    head, last = written["rows"]
    assert (head["trained"], last["trained"]) == (2 * 12 + 2, 2 * 12 + 2 + _block(12, 20))
    assert written["spot"]["arm"] in (head["arm"], last["arm"])
    for row in (head, last):
        mine = [trial for trial in written["trials"] if trial["arm"] == row["arm"] and trial["factor"] == row["factor"]]
        assert row["mean"] == pytest.approx(sum(trial["scores"]["balanced accuracy"] for trial in mine) / 2)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "last 1 of 2 blocks" in (out / "table.txt").read_text()


def _block(width, inner):
    """Of a Transformer's block, and the pooler above the last one."""
    block = 4 * (width * width + width) + 2 * width * inner + width + inner + 4 * width
    return block + width * width + width


def test_one_seed_has_no_interval_and_the_json_is_json(model, tmp_path):
    out = tmp_path / "out"
    sweep(model, tmp_path, "--strategies", "feature-extraction", "--seeds", 1, "--out", out)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    written = json.loads((out / "sweep.json").read_text(), parse_constant=refuse)
    assert written["spot"]["half"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seeds", 0), "above 0"),
        (("--minutes", 0), "above 0"),
        (("--rates", -1), "multiples above 0"),
        (("--rates", "inf"), "multiples above 0"),
        (("--seed", -1), "seed must be from 0 to 4294967293, got -1"),
        (("--seed", 2**32 - 2), "seed must be from 0"),
        (("--depths", 3), "last_blocks trains 1 to 2 blocks"),
        (("--strategies", "lp-ft", "--batch-size", 32), "give it more epochs"),
    ],
)
def test_an_impossible_sweep_is_refused(model, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as end:
        sweep(model, tmp_path, *more)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_lora_is_merged_into_what_finetune_saves(model, tmp_path, capsys):
    out = tmp_path / "out"
    common = ("--batch-size", "8", "--max-length", "16", "--held-out", "0.5", "--strategy", "lora", "--rank", "2")
    cli.main(["finetune", "--data", str(csv(tmp_path)), "--model", str(model), "--out", str(out), *common])
    assert "LoRA, rank 2" in capsys.readouterr().out
    before, after = jtl.load(model)[1]["params"], jtl.load(out)[1]["params"]
    moved = {path for path, leaf in jtl.tree.leaves_with_paths(before) if (leaf != dict(_leaves(after))[path]).any()}
    expected = {path for path, _ in _leaves(before) if path.endswith(("query/kernel", "value/kernel"))}
    assert moved == expected


def _leaves(params):
    return jtl.tree.leaves_with_paths(params)


def test_an_audit_prints_each_phase_and_its_verdict(model, capsys):
    cli.main(["audit", str(model), "--strategy", "lp-ft", "--length", "5", "--steps", "2"])
    printed = capsys.readouterr().out
    for word in ("LP-FT, probe", "LP-FT, fine-tune", "select('head')", "everything()", "frozen drift", "of the ideal"):
        assert word in printed
    assert printed.count("The step does what its mask says.") == 2


def test_an_audit_that_finds_a_fault_ends_with_one(model, capsys, monkeypatch):
    monkeypatch.setattr("jtl.recipes.audit.random_batch", _filler)
    with pytest.raises(SystemExit) as end:
        cli.main(["audit", str(model), "--trainable", "embeddings/word", "--length", "5", "--steps", "2"])
    assert end.value.code == 1
    captured = capsys.readouterr()
    assert "The step does not do what its mask says." in captured.out
    assert "the loss does not depend on 1 of 1 trained leaves" in captured.err


def _filler(model, settings):
    """A batch of filler rows alone: no trained leaf matters to its loss."""
    import jax.numpy as jnp

    ones = jnp.ones((4, 5), jnp.int32)
    return {"input_ids": ones, "attention_mask": ones, "label": ones[:, 0], "weight": jnp.zeros(4)}


def test_a_sweep_needs_as_many_rows_as_it_splits(model, tmp_path, capsys):
    path = csv(tmp_path, ROWS[:2] + ROWS[-2:], "few.csv")
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", "--data", str(path), "--model", str(model), "--held-out", "0.25"])
    assert end.value.code == 2
    assert "jtl: " in capsys.readouterr().err

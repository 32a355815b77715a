"""`jtl finetune` from a file to a folder, and every way in which what it is given can be wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jtl
from jtl import cli, errors
from jtl.data import Examples
from jtl.recipes import finetune, task, training
from jtl.recipes.settings import Finetune
from jtl.recipes.texts import text_batches

from ..models import checkpoints  # noqa: TID252

GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "dull")
ROWS = [(f"{a} film {b}", name) for name, words in (("pos", GOOD), ("neg", BAD)) for a in words for b in words]
COMMON = ("--batch-size", "8", "--max-length", "16", "--epochs", "1", "--blocks", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = checkpoints.CONFIG | {"num_hidden_layers": 1}
    return checkpoints.write_tokenizer(checkpoints.write(tmp_path_factory.mktemp("tiny"), config))


def csv(folder, rows=ROWS, name="data.csv"):
    path = folder / name
    path.write_text("".join(f"{text},{label}\n" for text, label in [("text", "label"), *rows]))
    return path


def jsonl(folder):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS))
    return path


def texts(folder, rows=ROWS):
    for i, (text, label) in enumerate(rows):
        (folder / "texts" / label).mkdir(parents=True, exist_ok=True)
        (folder / "texts" / label / f"{i}.txt").write_text(text)
    return folder / "texts"


def pictures(folder):
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "pictures" / name / f"{i}.png")
    return folder / "pictures"


def test_what_both_parts_have_and_what_one_lacks_is_printed(model, tmp_path):
    """And one class is enough to evaluate on, for a table and a folder."""
    train, console = csv(tmp_path, [*ROWS, ("odd film", "odd")]), Console(record=True, width=300)
    for held_out in (csv(tmp_path, [("good film good", "pos")], "other.csv"), texts(tmp_path, ROWS[:16])):
        classes = ("neg", "none", "odd", "pos")
        given = Finetune(data=str(train), held_out=str(held_out), model=str(model), classes=classes)
        task.task(given, 0, console)
        printed = console.export_text()
        assert "without a held-out example, so not evaluated: neg, odd" in printed
        assert "without any example, so not learnt: none" in printed
        assert "held-out examples are in the training data, which flatters the scores" in printed
        assert "good film good is good film good" in printed


# Training


@pytest.mark.parametrize("write", [csv, jsonl, texts])
def test_what_is_saved_predicts_as_what_was_evaluated(write, model, tmp_path):
    data, out, console = write(tmp_path), tmp_path / "out", Console(record=True, width=300)
    settings = Finetune(
        data=str(data),
        model=str(model),
        strategy="full",
        out=out,
        held_out=str(data),
        batch_size=8,
        epochs=3,
        max_length=16,
    )
    outcome = finetune.run(settings, console)
    loaded, variables = jtl.load(out)
    written = json.loads((out / "jtl.json").read_text())
    examples = jtl.data.read(data, classes=written["classes"])
    tokens = jtl.data.tokenizer(out)(list(examples.columns["text"]), padding=True, return_tensors="np")
    logits = jax.jit(loaded.apply)(
        variables, *(jnp.array(tokens[n], jnp.int32) for n in ("input_ids", "attention_mask"))
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    right = np.argmax(log_p, axis=1) == examples.labels
    assert outcome.scores["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert outcome.scores["loss"] == pytest.approx(-log_p[np.arange(len(ROWS)), examples.labels].mean(), rel=1e-4)
    assert written["notes"]["outcome"]["scores"] == outcome.scores
    assert written["notes"]["settings"]["seed"] == settings.seed
    printed = console.export_text()
    for word in ("trained parameters", "accuracy", f"{outcome.scores['accuracy']:.3f}", f"saved to {out}"):
        assert word in printed


def test_training_lowers_the_loss_and_leaves_frozen_leaves_alone(model, tmp_path):
    data = str(csv(tmp_path))
    common = {"held_out": data, "batch_size": 8, "max_length": 16, "trainable": ("head", "encoder/layer_0/mlp")}
    runs = [
        finetune.run(
            Finetune(data=data, model=str(model), out=tmp_path / str(rate), learning_rate=rate, epochs=8, **common),
            Console(quiet=True),
        )
        for rate in (1e-12, 3e-2)
    ]
    assert runs[1].scores["loss"] < 0.7 * runs[0].scores["loss"]
    before, after = jtl.load(model)[1]["params"], jtl.load(tmp_path / "0.03")[1]["params"]
    moved = {
        path
        for (path, a), b in zip(
            jtl.tree.leaves_with_paths(before), jax.tree.leaves({k: after[k] for k in before}), strict=True
        )
        if np.any(a != b)
    }
    assert moved == {path for path in jtl.tree.paths(before) if path.startswith("encoder/layer_0/mlp/")}


def test_skipped_rows_are_counted_and_listed(model, tmp_path, capsys):
    data = csv(tmp_path, [*ROWS[:5], (",,", "pos"), *ROWS[5:], ("", "neg")])
    cli.main(["finetune", "--data", str(data), "--model", str(model), "--skip-bad", *COMMON])
    out = capsys.readouterr().out
    assert "2 rows skipped" in out
    assert f"{data}, row 7" in out
    assert f"{data}, row {len(ROWS) + 3}" in out


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_that_is_finite_no_more_ends_and_saves_no_model(kept, model, tmp_path):
    """Weights of 1e37 are finite; what is computed with them is not."""
    data, out = str(csv(tmp_path)), tmp_path / "out" if kept else None
    given = Finetune(data=data, held_out=data, model=str(model), batch_size=8, max_length=16, epochs=8, out=out)
    with pytest.raises(errors.DivergedError, match=r"\d+ steps (in a row )?were (all )?skipped"):
        finetune.run(dataclasses.replace(given, learning_rate=1e37, strategy="full"), Console(quiet=True))
    assert not kept or not (out / "jtl.json").exists()


def test_names_that_look_like_markup_are_printed_as_they_are(model, tmp_path, capsys):
    data = csv(tmp_path, [(text, f"[/{label}]") for text, label in ROWS])
    out = tmp_path / "[bold]"
    cli.main(["finetune", "--data", str(data), "--model", str(model), "--out", str(out), *COMMON])
    printed = capsys.readouterr().out
    assert "[/neg], [/pos]" in printed
    assert f"saved to {out}" in printed


# Refusals


@pytest.mark.parametrize(("words", "expected"), [((3, 20), {16, 32}), ((3, 30, 50), {16, 32, 56})])
def test_held_out_texts_are_padded_to_lengths_that_are_compiled_already(model, words, expected):
    tokenizer = jtl.data.tokenizer(model)
    held_out = Examples({"text": ["good " * count for count in words]}, np.zeros(len(words), np.int32), ("a", "b"))
    batches = text_batches(tokenizer, held_out, max_length=60, known=(16, 32), batch_size=1).batches
    assert {batch["input_ids"].shape[1] for batch in batches} == expected


@pytest.fixture
def refused(model, tmp_path, capsys, monkeypatch):
    """Run a command that must end with 2 before a step is compiled, and write nothing; gives the message."""

    def run(data, *args):
        monkeypatch.setattr(training, "compiled_train", lambda *args: pytest.fail("compiled a training step"))
        out = tmp_path / "runs" / "out"
        with pytest.raises(SystemExit) as end:
            cli.main(["finetune", "--data", str(data), "--model", str(model), "--out", str(out), *COMMON, *args])
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert err.startswith("jtl: ")
        assert not out.parent.exists()
        return err

    return run


def test_a_malformed_row_is_named_by_file_and_row(refused, tmp_path):
    data = csv(tmp_path, [*ROWS[:3], ("one, two", "pos"), *ROWS[3:]])
    assert f"{data}, row 5: 3 fields; expected 2" in refused(data)


def test_a_line_that_is_not_json_is_named_by_file_and_row(refused, tmp_path):
    data = jsonl(tmp_path)
    data.write_text(data.read_text() + '{"text": "good"\n')
    assert f"{data}, row {len(ROWS) + 1}: not JSON" in refused(data)


def test_a_label_outside_the_declared_classes(refused, tmp_path):
    data = csv(tmp_path, [*ROWS, ("good", "pso")])
    message = refused(data, "--classes", "neg", "pos")
    assert f"{data}, row {len(ROWS) + 2}: label 'pso' is not a declared class" in message
    assert "'pos'" in message


def test_bytes_that_are_not_utf8(refused, tmp_path):
    data = csv(tmp_path)
    data.write_bytes(data.read_bytes() + b"caf\xe9,pos\n")
    assert f"{data}, row {len(ROWS) + 2}: byte 0xE9 is not UTF-8" in refused(data)


def test_a_single_class(refused, tmp_path):
    assert "data.csv" in (message := refused(csv(tmp_path, [(text, "pos") for text, _ in ROWS])))
    assert "class" in message


def test_a_column_that_is_there_twice(refused, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("text,label,text\na,b,c\n")
    assert f"{data}: the header has 'text' more than once" in refused(data)


def test_a_missing_column_names_the_nearest(refused, tmp_path):
    assert "no column 'lable'" in (message := refused(csv(tmp_path), "--label", "lable"))
    assert "did you mean 'label'" in message


def test_a_missing_file_names_the_nearest(refused, tmp_path):
    csv(tmp_path)
    message = refused(tmp_path / "dta.csv")
    assert "dta.csv: there is no such file or folder; did you mean 'data.csv'?" in message


def test_pictures_for_a_model_of_texts(refused, tmp_path):
    message = refused(pictures(tmp_path))
    assert "takes text" in message
    assert "holds image" in message


def test_an_augmentation_of_texts(refused, tmp_path):
    message = refused(csv(tmp_path), "--augment", "flip")
    assert "augment='flip' changes pictures" in message
    assert "takes text" in message


def test_a_picture_that_cannot_be_read_is_named(refused, tmp_path):
    broken = pictures(tmp_path) / "dog" / "b.png"
    broken.write_bytes((broken.parent / "0.png").read_bytes()[:40])
    assert f"{broken}: the picture cannot be read" in refused(tmp_path / "pictures")


def test_an_output_folder_that_is_not_empty(model, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", "--data", "absent.csv", "--model", str(model), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "out exists and is not empty" in capsys.readouterr().err  # said before the data are looked for
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("size", "fault"), [(5, "smaller than"), (12, "not a multiple of")])
def test_a_batch_that_the_devices_cannot_share(refused, tmp_path, monkeypatch, size, fault):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert f"a batch of {size} examples is {fault} the 8 devices" in refused(csv(tmp_path), "--batch-size", str(size))


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan", "2"])
def test_a_share_that_holds_out_nothing_or_everything(refused, tmp_path, share):
    assert "held_out is a share between 0 and 1" in refused(csv(tmp_path), f"--held-out={share}")


def test_a_held_out_file_that_is_missing_or_has_other_labels(refused, tmp_path):
    data = csv(tmp_path)
    assert "there is no such file" in refused(data, "--held-out", str(tmp_path / "absent.csv"))
    other = csv(tmp_path, [("good", "maybe")], "other.csv")
    assert f"{other}, row 2: label 'maybe' is not a declared class" in refused(data, "--held-out", str(other))


@pytest.mark.parametrize(
    "flags",
    [
        ("--epochs", "0"),
        ("--batch-size", "0"),
        ("--learning-rate", "0"),
        ("--learning-rate", "inf"),
        ("--blocks", "2"),
        ("--spike", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
    ],
)
def test_numbers_that_cannot_work(refused, tmp_path, flags):
    assert flags[1] in refused(csv(tmp_path), *flags)


def test_a_length_without_room_for_a_token(refused, tmp_path):
    assert "max_length=2" in refused(csv(tmp_path), "--max-length", "2")


def test_a_mistyped_pattern_names_the_nearest_path(refused, tmp_path):
    message = refused(csv(tmp_path), "--trainable", "encoder/layer0")
    assert "'encoder/layer0' matches none" in message
    assert "encoder/layer_0" in message


def test_a_model_without_a_tokenizer(refused, tmp_path):
    bare = checkpoints.write(tmp_path / "bare")
    assert str(bare) in refused(csv(tmp_path), "--model", str(bare))

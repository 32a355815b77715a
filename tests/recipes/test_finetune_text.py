"""`jtl finetune` on pairs of texts, texts with several labels, and texts with numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jtl
from jtl import cli, errors
from jtl.data import Examples
from jtl.recipes import finetune, goals, training
from jtl.recipes.settings import Finetune

from ..models import checkpoints  # noqa: TID252

WORDS = ("good", "fine", "great", "bad", "poor", "dull")
TEXTS = [f"{a} film {b}" for a in WORDS for b in WORDS]
SIZES = {"batch_size": 12, "max_length": 8, "strategy": "feature-extraction", "cache": "off"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = checkpoints.CONFIG | {"num_hidden_layers": 1}
    return checkpoints.write_tokenizer(checkpoints.write(tmp_path_factory.mktemp("tiny"), config))


def parquet(folder, **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data.parquet")
    return str(folder / "data.parquet")


def outputs(folder, texts, second=None):
    """What the saved model gives for texts, in one batch."""
    loaded, variables = jtl.load(folder)
    tokens = jtl.data.tokenizer(folder)(texts, second, padding=True, return_tensors="np", return_token_type_ids=True)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return np.asarray(jax.jit(loaded.apply)(variables, *(jnp.array(tokens[name], jnp.int32) for name in names)))


def run(data, model, out, console=None, **settings):
    given = Finetune(**{"data": data, "held_out": data, "model": str(model), "out": out, **SIZES, **settings})
    return finetune.run(given, console or Console(quiet=True)).scores


def test_pairs_are_trained_on_as_pairs(model, tmp_path):
    first, second = [a for a in WORDS for _ in WORDS], [b for _ in WORDS for b in WORDS]
    labels = ["same" if (a in WORDS[:3]) == (b in WORDS[:3]) else "other" for a, b in zip(first, second, strict=True)]
    data = parquet(tmp_path, a=first, b=second, y=labels)
    scores = run(data, model, tmp_path / "out", text="a", second="b", label="y")
    log_p = jax.nn.log_softmax(outputs(tmp_path / "out", first, second))
    expected = -np.mean([row[int(label == "same")] for row, label in zip(np.asarray(log_p), labels, strict=True)])
    assert scores["loss"] == pytest.approx(expected, rel=1e-4)


def test_several_labels_are_scored_as_scikit_learn_scores_them(model, tmp_path):
    from sklearn.metrics import f1_score

    labels = [[word for word in ("good", "bad", "dull") if word in text] for text in TEXTS]
    data = parquet(tmp_path, text=TEXTS, label=labels)
    scores = run(data, model, tmp_path / "out", task="multilabel", epochs=20, learning_rate=1e-1)
    assert json.loads((tmp_path / "out" / "jtl.json").read_text())["classes"] == ["bad", "dull", "good"]
    logits = outputs(tmp_path / "out", TEXTS)
    true = np.array([[word in row for word in ("bad", "dull", "good")] for row in labels])
    assert scores["F1"] == pytest.approx(f1_score(true, logits > 0, average="micro"), rel=1e-5)
    assert scores["F1"] > 0
    assert scores["all labels right"] == pytest.approx(((logits > 0) == true).all(axis=1).mean())
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -np.sum(np.where(true, np.log(p), np.log(1 - p)), axis=1).mean()
    assert scores["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_saved_model_tells_numbers_in_their_own_units(model, tmp_path):
    labels = [1000.0 + 50 * sum(word in WORDS[:3] for word in text.split()) for text in TEXTS]
    data, console = parquet(tmp_path, text=TEXTS, label=labels), Console(record=True, width=300)
    scores = run(data, model, tmp_path / "out", console, task="regression", epochs=20, learning_rate=1e-1)
    found, true = outputs(tmp_path / "out", TEXTS)[:, 0], np.array(labels)
    error = np.square(found - true).mean()
    assert scores["mean squared error"] == pytest.approx(error, rel=1e-3)
    assert scores["R squared"] == pytest.approx(1 - error / true.var(), abs=1e-3)
    assert scores["correlation"] == pytest.approx(np.corrcoef(found, true)[0, 1], abs=1e-3)
    assert scores["R squared"] > 0.2  # numbers about 1000 are within reach of a few steps
    assert "numbers from 1000 to 1100" in console.export_text()


def test_a_head_undoes_what_was_done_to_the_numbers():
    train = Examples({"text": ["a", "b", "c"]}, np.array([5.0, 7.0, 9.0], np.float32), ())
    goal = goals.goal(train)
    learnt = goal.learnt(train)
    assert learnt.labels.mean() == pytest.approx(0)
    assert learnt.labels.std() == pytest.approx(1)
    head, other = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([0.5])}, {"kernel": jnp.ones(3)}
    told = goal.told({"params": {"head": head, "other": other}})["params"]
    x, scale = 0.25, np.sqrt(8 / 3)
    output = x * np.asarray(told["head"]["kernel"])[0] + np.asarray(told["head"]["bias"])
    assert output == pytest.approx((x * 2 + 0.5) * scale + 7)
    assert told["other"] is other


def test_numbers_are_centred_before_they_are_rounded(tmp_path):
    """Beside 1e9, float32 knows no difference below 64."""
    labels = np.array([1e9, 1e9 + 1, 1e9 + 2])
    train = jtl.data.read(parquet(tmp_path, text=["a", "b", "c"], label=labels), task="regression")
    learnt = goals.goal(train).learnt(train).labels
    assert learnt.dtype == np.float32
    assert learnt == pytest.approx((labels - 1e9 - 1) / np.sqrt(2 / 3))
    assert "in float32, in steps of 64" in goals.goal(train).rounded()
    assert not goals.goal(train._replace(labels=labels - 1e9)).rounded()


def test_of_one_number_there_is_no_correlation_and_json_has_none(model, tmp_path):
    parts = []
    for name, count in (("train", 36), ("held out", 1)):
        (tmp_path / name).mkdir()
        parts.append(parquet(tmp_path / name, text=TEXTS[:count], label=list(map(float, range(count)))))
    scores = run(parts[0], model, tmp_path / "out", task="regression", held_out=parts[1], epochs=1)
    written = json.loads((tmp_path / "out" / "jtl.json").read_text(), parse_constant=pytest.fail)
    assert written["notes"]["outcome"]["scores"]["correlation"] is None
    assert np.isnan(scores["correlation"])


# Refusals


@pytest.fixture
def refused(model, tmp_path, capsys, monkeypatch):
    """Run a command that must end with 2 before a step is compiled; gives the message."""

    def run(data, *args):
        monkeypatch.setattr(training, "compiled_train", lambda *args: pytest.fail("compiled a training step"))
        with pytest.raises(SystemExit) as end:
            cli.main(["finetune", "--data", str(data), "--model", str(model), "--max-length", "16", *args])
        assert end.value.code == 2
        return capsys.readouterr().err

    return run


def test_data_that_do_not_suit_the_task(refused, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\ngood film,1\nbad film,two\nfilm,3\n")
    assert f"{path}, row 3: 'label' is 'two' (str); expected a number" in refused(path, "--task", "regression")
    assert "no column 'other'" in refused(path, "--second", "other")
    message = refused(path, "--task", "multilabel", "--classes", "1", "3")
    assert f"{path}, row 3: label 'two' is not a declared class" in message
    assert "have not one each" in refused(path, "--task", "multilabel", "--labels-per-class", "1")
    assert "task='regression' needs a table" in refused("tfds:rotten-tomatoes", "--task", "regression")


def test_a_text_that_the_tokenizer_makes_nothing_of(refused, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("text,label\n" + "good,1\nbad,2\n" * 4)
    other = tmp_path / "other.csv"
    other.write_text("text,label\ngood,1\n\ufffd,2\n")
    message = refused(path, "--held-out", str(other), "--model", str(_cleaning(tmp_path)))
    assert "text 1 is '\ufffd', of which the tokenizer makes no token" in message


def _cleaning(folder):
    """A model whose tokenizer leaves characters without width out, as BERT's does."""
    config = checkpoints.CONFIG | {"num_hidden_layers": 1}
    path = checkpoints.write_tokenizer(checkpoints.write(folder / "cleaning", config))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_a_long_text_is_what_its_windows_say_in_the_mean(model, tmp_path):
    long = [" ".join(WORDS[i % 6] for i in range(start, start + length)) for start in range(6) for length in (3, 9, 16)]
    labels = [["a", "b"][len(text) % 2] for text in long]
    data = parquet(tmp_path, text=long, label=labels)
    scores = run(data, model, tmp_path / "out", stride=2, epochs=2, learning_rate=1e-2)
    # Six tokens of a text fit beside the two special ones, so windows begin at every fourth token.
    pieces = [[" ".join(text.split()[i : i + 6]) for i in range(0, max(1, len(text.split()) - 2), 4)] for text in long]
    logits = np.array([outputs(tmp_path / "out", windows).mean(0) for windows in pieces])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert scores["loss"] == pytest.approx(
        -np.mean([row["ab".index(y)] for row, y in zip(log_p, labels, strict=True)]), rel=1e-4
    )
    assert scores["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == [["a", "b"].index(y) for y in labels]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 6}, "stride=6: expected 0 to 5"),
        ({"stride": -1}, "stride=-1: expected 0 to 5"),
        ({"stride": 2, "second": "label"}, "windows are of single texts"),
    ],
)
def test_strides_that_make_no_windows_are_refused(model, tmp_path, settings, message):
    data = parquet(tmp_path, text=TEXTS, label=["a", "b"] * 18)
    with pytest.raises(errors.JtlError, match=message):
        run(data, model, None, **settings)


def test_a_tokenizer_of_another_model_is_refused_before_any_text_is_read(model, tmp_path):
    data = parquet(tmp_path, text=TEXTS, label=["a", "b"] * 18)
    for name, change, message in (
        ("fewer", {"vocab_size": 5}, r"has the id \d+, and the model knows 0 to 4"),
        ("padding", {"pad_token_id": 7}, r"padding is 0 \('\[PAD\]'\) to the tokenizer and 7 to the model"),
    ):
        config = checkpoints.CONFIG | {"num_hidden_layers": 1} | change
        folder = checkpoints.write_tokenizer(checkpoints.write(tmp_path / name, config))
        with pytest.raises(errors.ConfigError, match=message):
            run(data, folder, None)

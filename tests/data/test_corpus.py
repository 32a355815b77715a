import gzip
import inspect
import itertools
import json

import numpy as np
import pytest
import tensorflow_datasets

from jtl import errors
from jtl.data import batches, corpus, packing

from .tokenizers_by_hand import PIECES, wordpiece

TEXTS = ["a b", "c", "new york is biger"]
EXPECTED = ["[CLS] a b [SEP]", "[CLS] c [SEP]", "[CLS] new york is big ##er [SEP]"]


@pytest.fixture
def tokenizer():
    return wordpiece()


def rows(found):
    return [" ".join(PIECES[i] for i in part) for part in np.split(found.rows.values, found.rows.offsets[1:-1])]


def write(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path)
        return path
    content = {
        "csv": "text\n" + "".join(f"{text}\n" for text in texts),
        "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "txt": "\n\n".join(texts),
    }[kind].encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Texts


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.txt", "a.txt.gz", "a.jsonl.gz"])
def test_each_kind_of_file_gives_the_same_texts(tmp_path, name):
    path = write(tmp_path / name)
    found = list(corpus.texts(path))
    assert [text.text for text in found] == TEXTS
    lines = {"a.csv": [2, 3, 4], "a.txt": [1, 3, 5], "a.txt.gz": [1, 3, 5]}.get(name, [1, 2, 3])
    assert [(text.file, text.row) for text in found] == [(str(path), line) for line in lines]


def test_a_text_file_may_be_one_text(tmp_path):
    path = write(tmp_path / "a.txt")
    assert list(corpus.texts(path, per="file")) == [(str(path), None, "\n\n".join(TEXTS))]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for name, text in {"b/y.txt": "3", "a.csv": "1", "b/x.jsonl": "2", ".hidden/z.txt": "0", "b/.z.txt": "0"}.items():
        write(tmp_path / name, [text])
    assert [text.text for text in corpus.texts(tmp_path)] == ["1", "2", "3"]
    several = [tmp_path / "b" / "y.txt", str(tmp_path / "a.csv")]
    assert [text.text for text in corpus.texts(several)] == ["3", "1"]


class Notes(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """Three texts."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = {"body": tensorflow_datasets.features.Text()}
        return tensorflow_datasets.core.DatasetInfo(
            builder=self, features=tensorflow_datasets.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((i, {"body": text}) for i, text in enumerate(TEXTS))


def test_texts_of_tfds_are_tokenised_as_those_of_files(tmp_path, tokenizer):
    Notes(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    source = f"tfds:{tmp_path}/tfds/notes/1.0.0:train"
    found = corpus.tokenised(source, tokenizer, tmp_path / "out", text="body")
    assert sorted(rows(found)) == sorted(EXPECTED)
    assert not corpus.tokenised(source, tokenizer, tmp_path / "out", text="body").new
    with pytest.raises(errors.DataError, match="no feature 'text'"):
        list(corpus.texts(source))


BAD = [
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "row 2: not JSON"),
    ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "row 2: 'text' is 3"),
    ("a.csv", "text\na\n \n", "row 3: 'text' is empty"),
    ("a.csv", "text\na\n\u200b\n", "row 3: 'text' is "),
    ("a.csv", "text\na\nb,c\n", "row 3: 2 fields; expected 1"),
    ("a.txt", b"a\n\n\xff\n", "row 3: byte 0xFF is not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_row_is_named_or_left_out(tmp_path, tokenizer, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(errors.DataError, match=f"{name}, {message}"):
        list(corpus.texts(path))
    with pytest.raises(errors.DataError, match=f"{name}, {message}"):
        corpus.tokenised(path, tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    found = corpus.tokenised(path, tokenizer, tmp_path / "out", skip_bad=True)
    assert rows(found) == ["[CLS] a [SEP]"]
    again = corpus.tokenised(path, tokenizer, tmp_path / "out", skip_bad=True)
    assert (again.new, again.skipped) == (False, found.skipped)
    (skipped,) = found.skipped
    assert f"row {skipped.row}: {skipped.reason}".startswith(message.partition(";")[0])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.txt", "", errors.DataError, "the file is empty"),
        ("a.csv", "body\na\n", errors.DataError, "no column 'text'"),
        ("a.csv", "text\n", errors.DataError, "no texts to tokenise"),
        ("a.txt", "\u0301\n", errors.DataError, "row 1: the tokenizer makes no token of"),
        ("a.docx", "a", errors.ConfigError, "a.docx: files of this kind are not read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, tokenizer, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        corpus.tokenised(tmp_path / name, tokenizer, tmp_path / "out")


def test_what_is_not_there_is_refused(tmp_path, tokenizer):
    with pytest.raises(errors.SourceNotFoundError, match=r"none.txt: there is no such file"):
        corpus.tokenised(tmp_path / "none.txt", tokenizer, tmp_path)
    with pytest.raises(errors.DataError, match="the folder holds no files"):
        corpus.tokenised(tmp_path, tokenizer, tmp_path / "out")


# Tokens


def test_tokens_are_written_once_and_mapped(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.txt")
    found = corpus.tokenised(path, tokenizer, tmp_path / "out")
    assert rows(found) == EXPECTED
    assert (found.new, found.truncated, found.skipped) == (True, 0, ())
    assert isinstance(found.rows.values, np.memmap)
    monkeypatch.setattr(corpus, "_write", lambda *args: pytest.fail("tokenised again"))
    tokenizer(["a b c"], truncation=True, max_length=3)  # leaves a trace in the tokenizer's state, and not in the key
    again = corpus.tokenised(path, wordpiece(), tmp_path / "out")
    assert (again.new, rows(again)) == (False, EXPECTED)
    assert corpus.tokenised(tmp_path / "a.txt", tokenizer, tmp_path / "out").folder == found.folder


def test_texts_are_tokenised_in_parts_as_in_one(tmp_path, tokenizer, monkeypatch):
    texts = [" ".join("abcde"[k % 5] for k in range(i % 7 + 1)) for i in range(23)]
    path = write(tmp_path / "a.jsonl", texts)
    whole = corpus.tokenised(path, tokenizer, tmp_path / "one")
    monkeypatch.setattr("jtl.data.text.CHUNK", 4)
    monkeypatch.setattr(corpus, "_CHARACTERS", 20)
    parts = corpus.tokenised(path, tokenizer, tmp_path / "two")
    assert rows(parts) == rows(whole) == [f"[CLS] {text} [SEP]" for text in texts]


def test_lengths_and_special_tokens_are_as_they_are_asked_for(tmp_path, tokenizer):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    tokenizer.eos_token = "?"
    cut = corpus.tokenised(path, tokenizer, out, max_length=4, eos=True)
    assert rows(cut) == ["[CLS] a [SEP] ?", "[CLS] c [SEP] ?", "[CLS] new [SEP] ?"]
    assert cut.truncated == 2
    assert corpus.tokenised(path, tokenizer, out, max_length=4, eos=True).truncated == 2
    bare = corpus.tokenised(path, tokenizer, out, special_tokens=False, eos=True)
    assert rows(bare) == ["a b ?", "c ?", "new york is big ##er ?"]


def test_whatever_decides_the_tokens_decides_the_key(tmp_path, tokenizer):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    other = wordpiece()
    other.add_tokens(["zz"])
    left, split = wordpiece(), wordpiece()
    left.truncation_side, split.split_special_tokens = "left", True
    folders = [
        corpus.tokenised(path, left, out).folder,
        corpus.tokenised(path, split, out).folder,
        corpus.tokenised(path, tokenizer, out).folder,
        corpus.tokenised(path, other, out).folder,
        corpus.tokenised(path, tokenizer, out, max_length=5).folder,
        corpus.tokenised(path, tokenizer, out, per="file").folder,
        corpus.tokenised(path, tokenizer, out, special_tokens=False).folder,
        corpus.tokenised(path, tokenizer, out, skip_bad=True).folder,
        corpus.tokenised(write(tmp_path / "a.txt", [*TEXTS[:2], "new york is bigs"]), tokenizer, out).folder,
    ]
    assert len(set(folders)) == len(folders)


def test_mapped_rows_go_through_batches_and_packing(tmp_path, tokenizer):
    found = corpus.tokenised(write(tmp_path / "a.txt"), tokenizer, tmp_path / "out").rows
    (batch,) = batches({"input_ids": found}, batch_size=3)
    assert batch["input_ids"][1].tolist() == [2, 12, 3, 0, 0, 0, 0]
    assert batch["input_ids"].dtype == np.int32
    plan = packing.plan(found.lengths, 7)
    filled = packing.fill(found, plan, np.arange(2))
    assert filled["segment_ids"].max(axis=1).tolist() == [1, 2]
    in_memory = found._replace(values=np.array(found.values))
    prints = [batches({"input_ids": r}, batch_size=3).fingerprint for r in (found, in_memory)]
    assert prints[0] == prints[1]


# Faults


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "corpus.json"])
@pytest.mark.parametrize("fault", ["cut", "flip", "gone"])
def test_a_damaged_file_is_refused_by_its_name(tmp_path, tokenizer, name, fault):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    damaged = corpus.tokenised(path, tokenizer, out).folder / name
    content = damaged.read_bytes()
    if fault == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:-3] if fault == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(errors.DataError, match=f"{name} is damaged.*delete .*tokens-.*made again"):
        corpus.tokenised(path, tokenizer, out)
    damaged.write_bytes(content)
    assert rows(corpus.tokenised(path, tokenizer, out)) == EXPECTED


def test_without_verification_sizes_alone_are_compared(tmp_path, tokenizer):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    tokens = corpus.tokenised(path, tokenizer, out).folder / "tokens.npy"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len(corpus.tokenised(path, tokenizer, out, verify=False).rows.lengths) == 3
    tokens.write_bytes(content[:-1])
    with pytest.raises(errors.DataError, match=r"tokens.npy is damaged"):
        corpus.tokenised(path, tokenizer, out, verify=False)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, tokenizer, monkeypatch):
    path, out = write(tmp_path / "a.jsonl", ["a"] * 9), tmp_path / "out"
    monkeypatch.setattr("jtl.data.text.CHUNK", 2)
    full, count = OSError(28, "No space left on device"), itertools.count()
    real = corpus._tokens

    def failing(*args):
        if next(count) == 2:
            raise full
        return real(*args)

    monkeypatch.setattr(corpus, "_tokens", failing)
    with pytest.raises(errors.CacheError, match="cannot be written: No space left"):
        corpus.tokenised(path, tokenizer, out)
    assert not list(out.iterdir())
    assert len(corpus.tokenised(path, tokenizer, out).rows.lengths) == 9


def test_another_process_may_be_faster(tmp_path, tokenizer, monkeypatch):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    real = corpus._write

    def slow(*args):
        monkeypatch.setattr(corpus, "_write", real)
        corpus.tokenised(path, tokenizer, out)
        return real(*args)

    monkeypatch.setattr(corpus, "_write", slow)
    assert rows(corpus.tokenised(path, tokenizer, out)) == EXPECTED
    assert [entry.name.startswith("tokens-") for entry in out.iterdir()] == [True]


def test_settings_that_cannot_work_are_refused(tmp_path, tokenizer):
    path, out = write(tmp_path / "a.txt"), tmp_path / "out"
    refused = [
        ({"eos": True}, "no token that ends a sequence"),
        ({"max_length": 2}, "max_length=2: expected above 2"),
        ({"per": "page"}, "per='page'"),
    ]
    for settings, message in refused:
        with pytest.raises(errors.ConfigError, match=message):
            inspect.unwrap(corpus.tokenised)(path, tokenizer, out, **settings)
    with pytest.raises(errors.ConfigError, match="no fast"):
        corpus.tokenised(path, object(), out)

import bz2
import csv
import gzip
import inspect
import io
import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jtl import errors
from jtl.data import tables, targets
from jtl.data.sources import read

GOOD = "text,label\ngood film,pos\nbad film,neg\n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", GOOD),
        ("a.CSV", GOOD),
        ("a.csv", "\ufeff" + GOOD),
        ("a.csv", GOOD.replace("\n", "\r\n")),
        ("a.csv", GOOD.replace("\n", "\r")),
        ("a.csv", GOOD.replace("\n", "\n\n")),
        ("a.csv", GOOD.replace("pos", " pos ")),
        ("a.tsv", GOOD.replace(",", "\t")),
        ("a.csv.gz", gzip.compress(GOOD.encode(), mtime=0)),
        ("a.csv.bz2", bz2.compress(GOOD.encode())),
        ("a.jsonl", lines({"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"})),
        ("a.v2.jsonl", '\n{"text": "good film", "label": "pos"}\r\n{"text": "bad film", "label": "neg"}'),
    ],
)
def test_every_format_reads_the_same(tmp_path, name, content):
    examples = read(write(tmp_path, name, content))
    assert examples.columns == {"text": ["good film", "bad film"]}
    assert examples.classes == ("neg", "pos")
    assert examples.labels.tolist() == [1, 0]
    assert examples.labels.dtype == "int32"
    assert (examples.groups, examples.skipped, examples.name) == (None, (), name)


def parquet(folder, name="a.parquet", **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
    return folder / name


def test_parquet_reads_as_the_others(tmp_path):
    path = parquet(tmp_path, text=["good film", "bad film"], label=["pos", "neg"], film=[7, 8], other=[[1], [2]])
    examples = read(path, group="film")
    assert examples.columns == {"text": ["good film", "bad film"]}
    assert (examples.classes, examples.labels.tolist()) == (("neg", "pos"), [1, 0])
    assert examples.groups.tolist() == ["7", "8"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None], "label": ["x", "y"]}, "row 2: 'text' is None"),
        ({"text": ["a", " "], "label": ["x", "y"]}, "row 2: 'text' is empty"),
        ({"text": ["a", "b"], "label": ["x", None]}, "row 2: 'label' is None"),
        (
            {"text": ["a", "b"], "label": [1.5, 2.5]},
            "row 1: 'label' is 1.5 .*; to predict numbers, .*--task regression",
        ),
        ({"text": [b"a", b"b"], "label": [1, 2]}, "row 1: 'text' is b'a' .bytes."),
        ({"text": ["a"], "lable": ["x"]}, "no column 'label'; .*did you mean 'lable'"),
        ({"text": [], "label": []}, "the file is empty"),
    ],
)
def test_a_bad_parquet_file_is_named(tmp_path, columns, message):
    with pytest.raises(errors.DataError, match=message):
        read(parquet(tmp_path, **columns))


def test_rows_of_parquet_are_numbered_across_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("jtl.data.tables._PARQUET_ROWS", 2)
    path = parquet(tmp_path, text=["a", "b", "c", ""], label=[1, 2, 1, 2])
    assert [skipped.row for skipped in read(path, skip_bad=True).skipped] == [4]


def test_a_damaged_parquet_file_is_refused(tmp_path):
    whole = parquet(tmp_path, text=["a"] * 99, label=[1, 2, 3] * 33).read_bytes()
    for content in (b"", b"text", whole[:-9], whole[:40] + b"\xff" * 60 + whole[100:]):
        with pytest.raises(errors.DataError, match=r"b.parquet: cannot be read"):
            read(write(tmp_path, "b.parquet", content))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = parquet(tmp_path, text=["a", "b"], label=[1, 2])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[data\]"):
        read(path)


def test_rows_are_read_as_they_are_needed(tmp_path):
    """Of a file that is damaged further on, the first rows can be had."""
    content = gzip.compress(b"text,label\n" + b"".join(b"text %d,%d\n" % (i, i) for i in range(20_000)))
    path = write(tmp_path, "a.csv.gz", content[: len(content) // 2])
    rows = tables.rows(path, ["text", "label"])
    assert next(rows).fields == {"text": "text 0", "label": "0"}
    with pytest.raises(errors.DataError, match="cannot be read"):
        list(rows)


def test_columns_may_have_other_names_and_groups(tmp_path):
    path = write(tmp_path, "a.csv", "id,body,y,film\n1,good,1,A\n2,bad,0,B\n")
    examples = read(path, text="body", label="y", group="film")
    assert examples.columns["text"] == ["good", "bad"]
    assert examples.groups.tolist() == ["A", "B"]


def test_pairs_have_a_second_text(tmp_path):
    path = write(tmp_path, "a.csv", "premise,hypothesis,label\na b,c,yes\nd,e,no\n")
    examples = read(path, text="premise", second="hypothesis")
    assert examples.columns == {"text": ["a b", "d"], "second": ["c", "e"]}
    with pytest.raises(errors.DataError, match=r"no column 'hypotesis'; .*did you mean 'hypothesis'"):
        read(path, text="premise", second="hypotesis")
    path = write(tmp_path, "b.csv", "text,other,label\na,b,yes\na,,no\n")
    with pytest.raises(errors.DataError, match="row 3: 'other' is empty"):
        read(path, second="other")


def test_texts_of_emoji_and_of_letters_unknown_to_python_are_texts(tmp_path):
    values = ["\U0001f469\u200d\U0001f4bb", "\ue000", "\U0001fae9", "\u200ba", "-"]
    path = write(tmp_path, "a.jsonl", lines(*[{"text": text, "label": i % 2} for i, text in enumerate(values)]))
    assert read(path).columns["text"] == values


def test_rows_may_have_several_labels_or_none(tmp_path):
    expected = [[0, 1, 1], [0, 0, 0], [1, 0, 0]]
    table = write(tmp_path, "a.csv", "text,label\nt,c; b\nu,\nv,a\n")
    objects = [{"text": "t", "label": ["b", "c"]}, {"text": "u", "label": []}, {"text": "v", "label": "a"}]
    columns = {"text": ["t", "u", "v"], "label": [["b", "c"], [], ["a"]]}
    for path in (table, write(tmp_path, "a.jsonl", lines(*objects)), parquet(tmp_path, **columns)):
        examples = read(path, task="multilabel", separator=";")
        assert examples.classes == ("a", "b", "c")
        assert examples.labels.tolist() == expected
        assert (examples.labels.dtype, examples.task) == ("float32", "multilabel")
    declared = read(table, task="multilabel", separator=";", classes=["c", "b", "a", "d"])
    assert declared.labels.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_labels_may_be_numbers(tmp_path):
    table = write(tmp_path, "a.csv", "text,label\nt,2\nu, -1.5e1\n")
    objects = lines({"text": "t", "label": 2}, {"text": "u", "label": -15.0})
    for path in (table, write(tmp_path, "a.jsonl", objects), parquet(tmp_path, text=["t", "u"], label=[2.0, -15.0])):
        examples = read(path, task="regression")
        assert examples.labels.tolist() == [2, -15]
        assert (examples.labels.dtype, examples.task, examples.classes) == ("float64", "regression", ())


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("multilabel", [["a"], ["a", "a"]], "row 2: label 'a' is there twice"),
        ("multilabel", [["a"], ["b", ""]], "row 2: 'label' is empty"),
        ("multilabel", [["a"], ["z"]], "row 2: label 'z' is not a declared class"),
        ("multilabel", [["a"], None], "row 2: 'label' is None"),
        ("multilabel", [["a"], [["b"]]], r"row 2: 'label' is \['b'\]"),
        ("multilabel", ["a,b", "b,,a"], "row 2: 'label' is empty"),
        ("multilabel", [["a"], ["a"]], "all 2 examples have the same labels"),
        ("regression", [1, "x"], "row 2: 'label' is 'x' .str.; expected a number"),
        ("regression", [1, "nan"], "row 2: 'label' is 'nan'"),
        ("regression", [1, True], "row 2: 'label' is True"),
        ("regression", [1, "1_0"], "row 2: 'label' is '1_0' .str.; expected a number"),
        ("regression", [1, "\u0661\u0662"], "row 2: 'label' is '\u0661\u0662' .str.; expected a number"),
        ("classification", [f"{i}.5" for i in range(20)], "a.jsonl: the labels are 20 different .* task='regression'"),
        ("regression", [1, None], "row 2: 'label' is None"),
        ("regression", [1, [2]], "row 2: 'label' is "),
        ("regression", [1, 10**400], "row 2: 'label' is 1000"),
        ("regression", [1, "-1e39"], "row 2: 'label' is '-1e39'; expected a number of at most 3.4e.38"),
        ("regression", [3, 3.0], "all 2 examples have the label 3"),
    ],
)
def test_labels_of_another_kind_are_refused(tmp_path, task, rows, message):
    path = write(tmp_path, "a.jsonl", lines(*[{"text": "t", "label": label} for label in rows]))
    with pytest.raises(errors.DataError, match=message):
        read(path, task=task, classes=["a", "b"] if task == "multilabel" else None)


def test_tasks_that_cannot_be_are_refused(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\nt,\nu,\n")
    with pytest.raises(errors.DataError, match=r"a.csv: no row has a label"):
        read(path, task="multilabel")
    numbers = write(tmp_path, "b.csv", "text,label\nt,1\nu,2\n")
    with pytest.raises(errors.ConfigError, match="classes a were declared, but the labels are numbers"):
        read(numbers, task="regression", classes=["a"])
    with pytest.raises(errors.ConfigError, match="separator=''"):
        read(path, task="multilabel", separator="")
    with pytest.raises(errors.ConfigError, match="task='ranking'"):
        inspect.unwrap(targets.target)("ranking", ",")
    with pytest.raises(errors.ConfigError, match="no column 'b' of second texts"):
        read(tmp_path, second="b")
    with pytest.raises(errors.ConfigError, match="task='regression' needs a table"):
        read(tmp_path, task="regression")


def test_integer_classes_sort_by_value(tmp_path):
    path = write(tmp_path, "a.jsonl", lines(*[{"text": "t", "label": i} for i in (10, 9, -1)]))
    assert read(path).classes == ("-1", "9", "10")


def test_numbers_with_few_values_are_names(tmp_path):
    rows = [{"text": "t", "label": f"{i % 10 / 2}"} for i in range(40)]
    assert len(read(write(tmp_path, "a.jsonl", lines(*rows))).classes) == 10
    several = [{"text": "t", "label": f"{i}"} for i in range(40)]
    assert len(read(write(tmp_path, "b.jsonl", lines(*several))).classes) == 40


@pytest.mark.parametrize("text", ["1", "-1.5", "+.5", "2.", "1e3", "1.5E-3", " 2 "])
def test_numbers_are_read_as_tables_have_them(tmp_path, text):
    path = write(tmp_path, "a.jsonl", lines({"text": "t", "label": text}, {"text": "t", "label": 7}))
    assert read(path, task="regression").labels[0] == float(text)


def test_declared_classes_keep_their_order(tmp_path):
    examples = read(write(tmp_path, "a.csv", GOOD), classes=[" pos", "neg ", "mixed"])
    assert examples.classes == ("pos", "neg", "mixed")
    assert examples.labels.tolist() == [0, 1]


def test_fields_above_the_csv_limit_are_read(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f"text,label\n{'x' * (limit + 1)},a\ny,b\n")
    assert len(read(path).columns["text"][0]) == limit + 1
    assert csv.field_size_limit() == limit


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
                lambda text: not tables.blank_problem("it", text)
            ),
            st.sampled_from(["a", "b"]),
        ),
        min_size=1,
    )
)
def test_any_text_comes_back_from_csv_and_jsonl(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    rows = [("first", "a"), ("second", "b"), *rows]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("text", "label"), *rows])
    expected = [text for text, _ in rows]
    assert read(write(folder, "a.csv", table.getvalue())).columns["text"] == expected
    objects = lines(*[{"text": text, "label": label} for text, label in rows])
    assert read(write(folder, "a.jsonl", objects)).columns["text"] == expected


BAD_CSV_ROWS = [
    ("one\n", "row 4: 1 fields; expected 2"),
    ("one,two,three\n", "row 4: 3 fields; expected 2"),
    (",pos\n", "row 4: 'text' is empty"),
    ("   ,pos\n", "row 4: 'text' is empty"),
    ("\u200b \ufeff,pos\n", r"row 4: 'text' is '.u200b .ufeff', without a visible character"),
    ("fine,\n", "row 4: 'label' is empty"),
    (b"caf\xe9,pos\n", "row 4: byte 0xE9 is not UTF-8"),
    (b"fine,p\xffs\n", "row 4: byte 0xFF is not UTF-8"),
    ("a\0b,pos\n", "row 4: a NUL byte"),
    ('"a" b,pos\n', "row 4: .*double a quote"),
    ("fine,other\n", "row 4: label 'other' is not a declared class; expected neg, pos"),
    ("fine,poss\n", "did you mean 'pos'"),
    ('"two\nlines",pos\nshort\n', "row 6: 1 fields"),
    ('"two\nlines",pos,more\n', "row 4: 3 fields"),
]


@pytest.mark.parametrize(("row", "message"), BAD_CSV_ROWS)
def test_a_bad_csv_row_is_named(tmp_path, row, message):
    content = GOOD.encode() + (row if isinstance(row, bytes) else row.encode()) + b"last one,pos\n"
    path = write(tmp_path, "a.csv", content)
    with pytest.raises(errors.DataError, match=f"a.csv, {message}" if message.startswith("row") else message):
        read(path, classes=["neg", "pos"])
    examples = read(path, classes=["neg", "pos"], skip_bad=True)
    assert examples.columns["text"][-1] == "last one"
    (skipped,) = examples.skipped
    assert skipped.file == str(path)
    assert re.search(message, f"row {skipped.row}: {skipped.reason}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "t", "label": "pos"', "row 3: not JSON: .*delimiter"),
        ("[1, 2]", "row 3: a JSON array; expected an object with text, label"),
        ("null", "row 3: a JSON null"),
        ("7", "row 3: a JSON number"),
        ('{"text": "t"}', "row 3: no field 'label'; the object has 'text'"),
        ('{"text": "t", "lable": 1}', "did you mean 'lable'"),
        ('{"text": null, "label": "pos"}', "row 3: 'text' is None .* expected a string"),
        ('{"text": 3, "label": "pos"}', "row 3: 'text' is 3 .* expected a string"),
        ('{"text": "t", "label": null}', "row 3: 'label' is None"),
        ('{"text": "t", "label": true}', "row 3: 'label' is True"),
        ('{"text": "t", "label": 1.5}', "row 3: 'label' is 1.5"),
        ('{"text": "t", "label": "pos", "text": "u"}', "row 3: not JSON: the field 'text' is there twice"),
        ('{"text": "\\ud83d", "label": "pos"}', "row 3: an unpaired surrogate"),
        ('{"text": "a\\u0000b", "label": "pos"}', "row 3: a NUL byte"),
        ('{"text": "t", "label": ' + "9" * 5000 + "}", "row 3: not JSON"),
        ("[" * 100_000, "row 3: not JSON"),
        (b'{"text": "caf\xe9", "label": "pos"}', "row 3: byte 0xE9"),
    ],
)
def test_a_bad_json_row_is_named(tmp_path, row, message):
    good = lines({"text": "t", "label": "pos"}, {"text": "u", "label": "neg"})
    path = write(tmp_path, "a.jsonl", good.encode() + (row if isinstance(row, bytes) else row.encode()) + b"\n")
    with pytest.raises(errors.DataError, match=message):
        read(path)
    assert [skipped.row for skipped in read(path, skip_bad=True).skipped] == [3]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.csv", "\n \n", "the file is empty"),
        ("a.csv", "\ufeff", "the file is empty"),
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "text,label\n", "no rows to use"),
        ("a.csv", "text,label\nonly\n", "row 2"),
        ("a.csv", "text,lable\nx,y\n", "no column 'label'; the header has 'text', 'lable'; did you mean 'lable'"),
        ("a.csv", "text,label,text\nx,y,z\n", "the header has 'text' more than once"),
        ("a.csv", GOOD.encode("utf-16"), r"row 1 \(the header\): a NUL byte; save the file as UTF-8 .not UTF-16"),
        ("a.csv", GOOD.replace("text", "t\xe9xt").encode("latin-1"), r"row 1 \(the header\): byte 0xE9 is not UTF-8"),
        ("a.csv", 'text,"lab"el\nx,y\n', r"row 1 \(the header\)"),
        ("a.csv", GOOD + 'x,"never closed\ny,pos\n', "row 4: a quote opens here and is never closed"),
        ("a.csv", "text,label\nx,pos\ny,pos\n", "all 2 examples are of the class 'pos'"),
        ("a.csv.gz", b"not gzip", "cannot be read"),
        ("a.csv.gz", gzip.compress(GOOD.encode(), mtime=0)[:-9], "cannot be read"),
        ("a.csv.bz2", bz2.compress(GOOD.encode())[:-9], "cannot be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, content, message, skip_bad):
    with pytest.raises(errors.DataError, match=message):
        read(write(tmp_path, name, content), skip_bad=skip_bad)


def test_a_missing_group_column_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="no column 'film'"):
        read(write(tmp_path, "a.csv", GOOD), group="film")


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "train.csv", GOOD)
    with pytest.raises(errors.SourceNotFoundError, match=r"did you mean 'train.csv'"):
        read(tmp_path / "trian.csv")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read(tmp_path / "no" / "such.csv")


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"expected .csv, .tsv, .jsonl, .parquet"):
        read(write(tmp_path, "a.xlsx", "x"))
    with pytest.raises(errors.ConfigError, match="one text, and has no 'label'"):
        read(write(tmp_path, "a.txt", "good film\n"))
    with pytest.raises(errors.ConfigError, match="a name is there twice"):
        read(write(tmp_path, "a.csv", GOOD), classes=["pos", " pos"])
    with pytest.raises(errors.ConfigError, match="a name is empty"):
        read(write(tmp_path, "a.csv", GOOD), classes=["pos", " "])
    with pytest.raises(errors.ConfigError, match="no column 'film'"):
        read(tmp_path, group="film")

import io

import numpy as np
import pytest
from PIL import Image

from jtl import errors
from jtl.data import Examples, Skipped, compare, duplicates, read, split


def texts(values, labels, classes=("neg", "pos"), name="texts", **rest):
    return Examples({"text": values}, np.array(labels, np.int32), classes, None, name, **rest)


def test_classes_that_are_missing_on_either_side_are_named():
    classes = ("cat", "dog", "eel", "fox")
    train = texts(list("abcd"), [0, 0, 1, 2], classes, "train.csv")
    held_out = texts(list("xy"), [0, 3], classes, "test.csv", skipped=(Skipped("test.csv", 4, "empty"),))
    report = compare(train, held_out)
    assert report.counts == {
        "train.csv": {"cat": 2, "dog": 1, "eel": 1, "fox": 0},
        "test.csv": {"cat": 1, "dog": 0, "eel": 0, "fox": 1},
    }
    assert (report.untrained, report.missing, report.duplicates) == (("fox",), ("dog", "eel"), ())
    assert report.lines() == [
        "train.csv: 4 examples; cat 2, dog 1, eel 1, fox 0",
        "test.csv: 2 examples; cat 1, dog 0, eel 0, fox 1",
        "test.csv: 1 left out as bad",
        "never trained on, so never right: fox",
        "without a held-out example, so not evaluated: dog, eel",
    ]


def test_parts_of_one_file_keep_apart_by_name():
    train, held_out = split(texts([str(i) for i in range(8)], [0, 1] * 4), (6, 2), seed=0)
    assert list(compare(train, held_out).counts) == ["texts (train)", "texts (held out)"]
    assert len(compare(train, held_out).lines()) == 2


def test_texts_in_both_parts_are_found_with_their_labels():
    train, held_out = texts(["a", "b", "a"], [0, 1, 0]), texts(["c", "a", "b"], [1, 1, 1])
    report = compare(train, held_out)
    assert [(found.train, found.held_out, found.labels) for found in report.duplicates] == [
        (0, 1, ("neg", "pos")),
        (1, 2, ("pos", "pos")),
    ]
    assert report.lines()[3:] == [
        "2 held-out examples are in the training data, which flatters the scores",
        "  a is a, labelled 'neg' and 'pos'",
        "  b is b",
    ]
    assert len(report.lines(most=1)) == 5


def test_long_lists_are_cut():
    classes = tuple(f"c{i:02}" for i in range(30))
    part = texts(["x" * 300] * 30, np.arange(30), classes)
    first, *_, last = compare(part, part).lines(most=1)
    assert first.endswith("c19 1, and 10 more classes")
    assert len(last) < 200


@pytest.fixture
def pictures(tmp_path):
    images = [Image.effect_noise((6, 5), 60 + i).convert("RGB") for i in range(4)]
    for place, chosen in (("train/a", images[:2]), ("train/b", images[2:3]), ("val/a", images[3:]), ("val/b", [])):
        (tmp_path / place).mkdir(parents=True)
        for i, image in enumerate(chosen):
            image.save(tmp_path / place / f"{i}.png")
    images[1].save(tmp_path / "val" / "b" / "again.bmp")
    (tmp_path / "val" / "a" / "copy.png").write_bytes((tmp_path / "train" / "b" / "0.png").read_bytes())
    return tmp_path


def test_copied_pictures_are_found_by_bytes_or_pixels(pictures):
    train, held_out = read(pictures / "train"), read(pictures / "val")
    (found,) = duplicates(train, held_out)
    assert [name[-10:] for name in found.names] == ["in/b/0.png", "a/copy.png"]
    assert found.labels == ("b", "a")
    assert [found.names[1][-9:] for found in duplicates(train, held_out, pixels=True)] == ["/copy.png", "again.bmp"]


def test_arrays_and_bytes_are_compared_by_content():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), np.uint8)
    train = Examples({"image": images}, np.array([0, 1, 0], np.int32), ("a", "b"))
    held_out = train._replace(
        columns={"image": list(images[[2, 2, 0]] // np.array([1, 2, 1], np.uint8)[:, None, None, None])}
    )
    assert [(found.train, found.held_out) for found in duplicates(train, held_out)] == [(2, 0), (0, 2)]
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    encoded = train._replace(columns={"image": [file.getvalue(), b"x", b"y"]})
    assert next((found.train, found.names[0]) for found in duplicates(encoded, encoded)) == (0, "example 0")


def test_parts_that_do_not_match_are_refused():
    with pytest.raises(errors.DataError, match=r"has the classes neg, pos, .* has pos, neg; read the second"):
        compare(texts(["a"], [0]), texts(["a"], [0], ("pos", "neg")))
    with pytest.raises(errors.DataError, match="the columns differ: texts has text; texts has image"):
        duplicates(texts(["a"], [0]), texts(["a"], [0])._replace(columns={"image": ["a"]}))


def test_a_class_without_any_example_is_named():
    report = compare(texts(["a"], [0], ("x", "y", "z")), texts(["b"], [0], ("x", "y", "z")))
    assert report.unused == ("y", "z")
    assert report.lines()[2:] == ["without any example, so not learnt: y, z"]


def test_labels_of_other_kinds_are_named_and_not_counted():
    several = Examples({"text": ["a"]}, np.array([[1, 0, 1]], np.float32), ("x", "y", "z"), None, "several")
    numbers = Examples({"text": ["a"]}, np.array([2.5], np.float32), (), None, "numbers")
    assert duplicates(several, several)[0].labels == ("x, z", "x, z")
    assert duplicates(numbers, numbers)[0].labels == ("2.5", "2.5")
    report = compare(several, several._replace(labels=np.array([[0, 1, 1]], np.float32)))
    assert (report.counts, report.untrained, report.missing, len(report.duplicates)) == ({}, ("y",), ("x",), 1)
    assert compare(numbers, numbers).lines()[1:] == ["  a is a"]
    with pytest.raises(errors.DataError, match="several is for multilabel, texts for classification"):
        compare(several, texts(["a"], [0], several.classes))

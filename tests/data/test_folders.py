import pytest
from PIL import Image

from jtl import errors
from jtl.data.sources import read


def text_folder(root):
    for name in ("neg", "pos"):
        (root / name).mkdir()
        for i in range(2):
            (root / name / f"{i}.txt").write_text(f"{name} {i}", "utf-8")
    return root


def image_folder(root):
    for i, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        for suffix in ("png", "JPG", "gif"):
            Image.new("RGB", (4, 3), (i, 0, 0)).save(root / name / f"picture.{suffix}")
    return root


def test_texts_are_read_by_class(tmp_path):
    text_folder(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "pos" / ".DS_Store").write_bytes(b"\0")
    examples = read(tmp_path)
    assert examples.columns == {"text": ["neg 0", "neg 1", "pos 0", "pos 1"]}
    assert (examples.classes, examples.labels.tolist()) == (("neg", "pos"), [0, 0, 1, 1])


def test_declared_classes_keep_their_order(tmp_path):
    assert read(text_folder(tmp_path), classes=["pos", "neg"]).labels.tolist() == [1, 1, 0, 0]


def test_pictures_are_paths(tmp_path):
    examples = read(image_folder(tmp_path))
    assert [path[len(str(tmp_path)) + 1 :] for path in examples.columns["image"][:2]] == [
        "cat/picture.JPG",
        "cat/picture.gif",
    ]
    assert examples.labels.tolist() == [0, 0, 0, 1, 1, 1]


def damage_truncate(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def damage_flip(path):
    Image.effect_noise((64, 64), 50).save(path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("bad.png", damage_truncate),
        ("bad.png", damage_flip),
        ("bad.jpg", damage_truncate),
        ("bad.png", lambda path: path.write_bytes(b"")),
        ("bad.webp", lambda path: path.write_bytes(b"no picture")),
        ("bad.bmp", lambda path: path.write_bytes(b"BM" + bytes(20))),
        ("notes.doc", lambda path: path.write_bytes(b"")),
    ],
)
def test_a_bad_picture_is_named_or_skipped(tmp_path, name, damage):
    image_folder(tmp_path)
    damage(tmp_path / "dog" / name)
    with pytest.raises(errors.DataError, match=name):
        read(tmp_path)
    examples = read(tmp_path, skip_bad=True)
    assert examples.size == 6
    assert [(skipped.file, skipped.row) for skipped in examples.skipped] == [(str(tmp_path / "dog" / name), None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "byte 0xE9 is not UTF-8"), (b" \n", "is empty"), (b"\xef\xbb\xbf", "is empty"), (b"a\0", "NUL")],
)
def test_a_bad_text_is_named_or_skipped(tmp_path, content, message):
    (text_folder(tmp_path) / "pos" / "bad.txt").write_bytes(content)
    with pytest.raises(errors.DataError, match=rf"bad\.txt: .*{message}"):
        read(tmp_path)
    assert len(read(tmp_path, skip_bad=True).skipped) == 1


def test_a_byte_order_mark_is_no_text(tmp_path):
    (text_folder(tmp_path) / "neg" / "0.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path).columns["text"][0] == "hello"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "empty").mkdir(), "empty: the class folder is empty"),
        (lambda root: (root / "stray.txt").write_text("x"), "has the file 'stray.txt' beside them"),
        (lambda root: (root / "pos" / "deep").mkdir(), "holds the folder 'deep'"),
        (lambda root: Image.new("L", (1, 1)).save(root / "pos" / "a.png"), "texts and pictures are mixed"),
    ],
)
def test_a_wrong_layout_is_refused(tmp_path, change, message):
    change(text_folder(tmp_path))
    for skip_bad in (False, True):
        with pytest.raises(errors.DataError, match=message):
            read(tmp_path, skip_bad=skip_bad)


def test_an_empty_or_unreadable_folder_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="the folder is empty"):
        read(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.parquet").write_bytes(b"")
    with pytest.raises(errors.DataError, match=r"no file is of a kind that is read \(first: x.parquet\)"):
        read(tmp_path)


def test_an_undeclared_class_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="'neg' is not a declared class; expected pos, negative"):
        read(text_folder(tmp_path), classes=["pos", "negative"])

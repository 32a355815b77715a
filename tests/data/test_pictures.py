import io
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jtl import errors
from jtl.data import folders
from jtl.data.pictures import Member, load_image, opened

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(array):
    """A 16-bit PNG of `[H, W]` or `[H, W, C]`, which Pillow cannot write in colour."""
    height, width, *channels = array.shape
    kind = {(): 0, (3,): 2, (4,): 6}[tuple(channels)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*chunks, (b"IEND", b"")]
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr"])
def test_any_mode_becomes_colour(tmp_path, mode):
    path = tmp_path / "a.tif"
    image = Image.new("RGB", (4, 3), "white")
    (image.convert("P").convert(mode) if mode == "PA" else image.convert(mode)).save(path)
    pixels = load_image(path)
    assert (pixels.shape, pixels.dtype) == ((3, 4, 3), np.uint8)
    assert pixels.min() >= 254
    assert pixels.flags.writeable
    assert load_image(path, "gray").shape == (3, 4, 1)


def test_bytes_paths_and_places_give_the_same_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(COLOURS)))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        np.testing.assert_array_equal(load_image(source), COLOURS)


def test_gray_is_the_luma_of_pillow():
    source = encoded(Image.fromarray(COLOURS))
    np.testing.assert_array_equal(load_image(source, "gray")[..., 0], np.asarray(Image.fromarray(COLOURS).convert("L")))


def test_transparency_is_dropped_and_the_colours_kept():
    alpha = RNG.integers(0, 256, (5, 7, 1), np.uint8)
    source = encoded(Image.fromarray(np.concatenate([COLOURS, alpha], axis=-1)))
    np.testing.assert_array_equal(load_image(source), COLOURS)


@pytest.mark.parametrize("transparency", [0, b"\x00\x80\xff"], ids=["one colour", "by bytes"])
def test_a_palette_with_transparency_keeps_its_colours(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    pixels = load_image(encoded(image, transparency=transparency))
    assert pixels.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_a_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    pixels = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOURS)
    expected = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS, -1),
        7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOURS),
    }[orientation]
    np.testing.assert_array_equal(load_image(encoded(image, exif=exif)), expected)


def test_cmyk_of_adobe_is_not_inverted():
    # Adobe writes ink as its negative, and Pillow knows by the marker: full yellow and magenta are red.
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    source = encoded(red, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in source
    assert np.abs(load_image(source).astype(int) - [255, 0, 0]).max() <= 2


def test_16_bit_grey_is_scaled_and_rounded():
    values = np.array([[0, 128, 129, 257, 385, 386, 40_000, 65_535]], np.uint16)
    for source in (png16(values), encoded(Image.fromarray(values)), encoded(Image.fromarray(values), "TIFF")):
        assert load_image(source)[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()]
        assert load_image(source).shape == (1, 8, 3)
        assert load_image(source, "gray").shape == (1, 8, 1)


def test_16_bit_grey_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    source = encoded(Image.fromarray(np.zeros((3, 4), np.uint16)), exif=exif)
    assert load_image(source).shape == (4, 3, 3)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_is_right_to_one_level(channels):
    values = RNG.integers(0, 65_536, (5, 7, channels), np.uint16)
    pixels = load_image(png16(values))
    assert np.abs(pixels - values[..., :3] / 257).max() <= 1
    assert pixels[values[..., :3] > 65_300].min(initial=255) >= 254


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_no_known_range_are_refused(mode):
    with pytest.raises(errors.DataError, match=f"mode {mode}; expected 8 or 16 bits"):
        load_image(encoded(Image.new(mode, (3, 2)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_picture_cut_short_is_refused_by_name(tmp_path, kind):
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    (tmp_path / "short").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(errors.DataError, match=r"short: the picture cannot be read"):
        load_image(tmp_path / "short")


def test_a_decompression_bomb_is_refused():
    with pytest.raises(errors.DataError, match="could be decompression bomb"):
        load_image(encoded(Image.new("1", (20_000, 20_000))))


def test_other_formats_are_not_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (2, 2)), "EPS"))  # would start Ghostscript
    with pytest.raises(errors.DataError, match=r"a\.png: the picture cannot be read: cannot identify"):
        load_image(tmp_path / "a.png")


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(errors.DataError, match="a picture of 7 bytes: the picture cannot be read"):
        load_image(b"nothing")
    with pytest.raises(errors.DataError, match=r"no\.png: the picture cannot be read"):
        load_image(tmp_path / "no.png")
    with pytest.raises(errors.ConfigError, match="mode='bgr': expected one of rgb, gray"):
        load_image(tmp_path / "no.png", "bgr")


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[data\]"):
        load_image(tmp_path / "a.png")


PICTURES = {f"{name}/{i}.png": encoded(Image.new("RGB", (4, 3), (i, 9, 9))) for name in ("cat", "dog") for i in (0, 1)}


def archive(path, files, prefix="", **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in files.items():
            file.writestr(prefix + name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_an_archive_is_read_like_a_folder(tmp_path, prefix):
    extra = {"__MACOSX/cat/._0.png": b"", "cat/.DS_Store": b"", ".hidden/x": b""}
    path = archive(tmp_path / "pets.zip", {**PICTURES, **extra}, prefix, compression=zipfile.ZIP_DEFLATED)
    examples = folders.read(path)
    assert (examples.classes, examples.labels.tolist()) == (("cat", "dog"), [0, 0, 1, 1])
    assert [member.path for member in examples.columns["image"]] == [prefix + name for name in PICTURES]
    assert [load_image(member)[0, 0].tolist() for member in examples.columns["image"]] == [[0, 9, 9], [1, 9, 9]] * 2
    assert not list(tmp_path.glob("*/*"))


def test_texts_in_an_archive(tmp_path):
    path = archive(tmp_path / "a.zip", {"neg/0.txt": "bad", "pos/0.txt": "good"})
    assert folders.read(path, classes=("pos", "neg")).columns == {"text": ["bad", "good"]}
    with pytest.raises(errors.DataError, match="'neg' is not a declared class"):
        folders.read(path, classes=("pos",))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"../evil/a.png": b""}, "leads out of the archive"),
        ({"/etc/a.png": b""}, "leads out of the archive"),
        ({"cat\\..\\a.png": b""}, "leads out of the archive"),
        ({"C:/cat/a.png": b""}, "leads out of the archive"),
        ({"stray.png": b""}, "has the file 'stray.png' beside them"),
        ({"empty/": b""}, "empty: the class folder is empty"),
        ({"cat/deep/a.png": b""}, "holds the folder 'deep'"),
        ({"cat/deep/": b""}, "holds the folder 'deep'"),
        ({"cat/notes.txt": b"x"}, "texts and pictures are mixed"),
        ({"cat/2.png": b"x"}, r"a\.zip/cat/2\.png: the picture cannot be read"),
    ],
)
def test_a_bad_archive_is_refused_by_member(tmp_path, extra, message):
    path = archive(tmp_path / "a.zip", {**PICTURES, **extra})
    with pytest.raises(errors.DataError, match=message):
        folders.read(path)


def test_a_bad_member_is_skipped_where_asked(tmp_path):
    path = archive(tmp_path / "a.zip", {**PICTURES, "cat/2.png": b"x"})
    examples = folders.read(path, skip_bad=True)
    assert (examples.size, [skipped.file for skipped in examples.skipped]) == (4, [f"{path}/cat/2.png"])


def test_links_encryption_and_bombs_are_refused(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = 0o120777 << 16
    path = archive(tmp_path / "link.zip", PICTURES)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(errors.DataError, match="is a link"):
        folders.read(path)
    path = archive(tmp_path / "locked.zip", PICTURES)
    raw = bytearray(path.read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(errors.DataError, match="is encrypted"):
        folders.read(path)
    path = archive(tmp_path / "bomb.zip", {**PICTURES, "cat/bomb.bmp": bytes(5_000)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(folders, "MOST_BYTES", 4_999)
    with pytest.raises(errors.DataError, match=r"'cat/bomb.bmp' would unpack to 5,000 bytes"):
        folders.read(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cat/0.png", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("cat/0.png", b"")
    with pytest.raises(errors.DataError, match="is there twice"):
        folders.read(path)


def test_what_is_no_archive_or_has_changed_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no archive")
    with pytest.raises(errors.DataError, match=r"a\.zip: .*not a zip file"):
        folders.read(path)
    member = folders.read(archive(path, PICTURES)).columns["image"][0]
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(errors.DataError, match=r"a\.zip/cat/0\.png: .*Bad CRC"):
        load_image(member)
    archive(path, {name: content for name, content in PICTURES.items() if name != "cat/0.png"})
    with pytest.raises(errors.DataError, match="has changed since it was listed"):
        load_image(member)


def test_an_archive_is_opened_once_and_read_by_many(tmp_path):
    path = str(archive(tmp_path / "a.zip", PICTURES, compression=zipfile.ZIP_DEFLATED))
    members = folders.read(tmp_path / "a.zip").columns["image"]
    with ThreadPoolExecutor(8) as pool:
        assert [image[0, 0, 0] for image in pool.map(load_image, members * 100)] == [0, 1] * 200
    assert opened(path) is opened(path)
    info = opened(path).getinfo("cat/0.png")
    assert load_image(Member(path, "cat/0.png", info.file_size, info.CRC)).shape == (3, 4, 3)

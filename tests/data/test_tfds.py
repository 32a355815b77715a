import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from jtl import errors
from jtl.data import load_image, take, tfds
from jtl.data.pictures import Record


class Small(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """20 texts, labelled by name and by number."""

    VERSION = tensorflow_datasets.core.Version("1.2.0")

    def _info(self):
        f = tensorflow_datasets.features
        features = {
            "text": f.Text(),
            "label": f.ClassLabel(names=["neg", "pos"]),
            "stars": f.Scalar(np.int64),
            "film": f.Text(),
            "raw": f.Text(),
        }
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(16)), "test": self._generate_examples(range(16, 20))}

    def _generate_examples(self, rows):
        for i in rows:
            raw = b"\xff" if i == 3 else b"fine"
            yield i, {"text": f"t\u00e9xt {i}", "label": i % 2, "stars": 5 - i % 3, "film": f"f{i // 4}", "raw": raw}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Small(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


@pytest.mark.parametrize("name", ["small", "small:1.2.0", "small/1.2.0"])
def test_prepared_data_is_found_by_name_or_folder(prepared, name):
    examples = tfds.load(name, "train", data_dir=prepared)
    assert sorted(examples.columns["text"]) == sorted(f"t\u00e9xt {i}" for i in range(16))
    assert examples.classes == ("neg", "pos")
    numbers = [int(text.split()[1]) for text in examples.columns["text"]]
    assert examples.labels.tolist() == [i % 2 for i in numbers]
    assert examples.labels.dtype == np.int32


def test_one_class_is_enough_to_evaluate_on(prepared):
    assert tfds.load("small", "train[:1]", data_dir=prepared, held_out=True).size == 1


def test_a_whole_path_names_a_folder(prepared):
    assert tfds.load(str(prepared / "small" / "1.2.0"), "test").size == 4


def test_slices_groups_and_integer_labels(prepared):
    examples = tfds.load("small", "train[:10]+test", label="stars", group="film", data_dir=prepared)
    assert examples.size == 14
    assert examples.classes == ("3", "4", "5")
    numbers = [int(text.split()[1]) for text in examples.columns["text"]]
    assert examples.groups.tolist() == [f"f{i // 4}" for i in numbers]
    assert [examples.classes[label] for label in examples.labels] == [str(5 - i % 3) for i in numbers]


@pytest.mark.parametrize(
    ("split", "options", "error", "message"),
    [
        ("trian", {}, errors.ConfigError, "'trian' cannot be read; expected a slice of .*train"),
        ("train[:5", {}, errors.ConfigError, "cannot be read"),
        ("train[:0]", {}, errors.ConfigError, "cannot be read"),
        ("train", {"text": "txt"}, errors.DataError, "no feature 'txt'; it has .*did you mean 'text'"),
        ("train", {"label": "y"}, errors.DataError, "no feature 'y'"),
        ("train", {"group": "movie"}, errors.DataError, "no feature 'movie'"),
        ("train", {"text": "raw"}, errors.DataError, "'raw' of example .* is not UTF-8"),
        ("train[:1]", {}, errors.DataError, "at least two classes"),
    ],
)
def test_bad_requests_are_refused(prepared, split, options, error, message):
    with pytest.raises(error, match=message):
        tfds.load("small", split, data_dir=prepared, **options)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("imdb_reviewz", errors.SourceNotFoundError, "did you mean 'imdb_reviews'"),
        ("roten-tomatoes", errors.ConfigError, "did you mean 'rotten-tomatoes'"),
        ("imdb_reviews", errors.SourceNotFoundError, r"download_and_prepare\(file_format='array_record'"),
        ("imdb_reviews:9.9.9", errors.ConfigError, "cannot load 'imdb_reviews:9.9.9'"),
        ("imdb_reviews/none", errors.ConfigError, "cannot load 'imdb_reviews/none'"),
        ("huggingface:imdb", errors.ConfigError, "community data set"),
        ("not a name!", errors.ConfigError, "cannot load 'not a name!'"),
    ],
)
def test_names_that_cannot_be_loaded_are_refused(tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        tfds.load(name, "train", data_dir=tmp_path)


def test_tfrecord_is_refused_with_the_way_out(prepared, tmp_path):
    copied = tmp_path / "small" / "1.2.0"
    copied.mkdir(parents=True)
    for file in (prepared / "small" / "1.2.0").iterdir():
        content = file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        (copied / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    with pytest.raises(errors.DataError, match=r"prepared as tfrecord .* prepare it as array_record"):
        tfds.load("small", "train", data_dir=tmp_path)


class Pictures(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
    """12 pictures of different sizes, coloured by their number, some grey."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        f = tensorflow_datasets.features
        features = {
            "image": f.Image(),
            "deep": f.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
            "array": f.Tensor(shape=(2, 2, 3), dtype=np.uint8),
            "label": f.ClassLabel(names=["a", "b"]),
        }
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(12):
            deep = io.BytesIO()
            Image.fromarray(np.full((2, 3), 257 * i, np.uint16)).save(deep, "PNG")
            deep.seek(0)
            picture, array = Image.new("RGB", (4 + i, 3), (i, 1, 2)), np.full((2, 2, 3), i, np.uint8)
            yield i, {"image": picture, "deep": deep, "array": array, "label": i % 2}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Pictures(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def test_pictures_stay_on_disk_until_they_are_loaded(pictures):
    examples = tfds.load("pictures", "train[:10]", image="image", data_dir=pictures)
    places = examples.columns["image"]
    assert all(isinstance(place, Record) for place in places)
    numbers = [int(load_image(place)[0, 0, 0]) for place in places]
    assert [load_image(place).shape for place in places] == [(3, 4 + i, 3) for i in numbers]
    assert examples.labels.tolist() == [i % 2 for i in numbers]
    few = take(examples, np.array([3, 1]))
    assert [int(load_image(place)[0, 0, 0]) for place in few.columns["image"]] == [numbers[3], numbers[1]]
    with ThreadPoolExecutor(4) as pool:
        assert [int(image[0, 0, 0]) for image in pool.map(load_image, places * 20)] == numbers * 20


def test_deep_pictures_and_arrays_of_tfds(pictures):
    examples = tfds.load("pictures", "train", image="deep", data_dir=pictures)
    loaded = [load_image(place, "gray") for place in examples.columns["image"]]
    assert sorted(int(image[0, 0, 0]) for image in loaded) == list(range(12))
    arrays = tfds.load("pictures", "train", image="array", data_dir=pictures).columns["image"]
    assert sorted(int(array[0, 0, 0]) for array in arrays) == list(range(12))
    floats = tensorflow_datasets.features.Image(shape=(None, None, 1), dtype=np.float32)
    with pytest.raises(errors.DataError, match="maps: the pictures are float32; expected uint8"):
        tfds._is_encoded("maps", floats)


def test_a_broken_record_is_named():
    place = Record([{"image": b"x"}], 0, "image", "flowers:train", 0)
    with pytest.raises(errors.DataError, match="flowers:train, example 0: the picture cannot be read"):
        load_image(place)


def test_published_data_sets_load_without_tensorflow():
    with tensorflow_datasets.testing.mock_data(num_examples=20):
        examples = tfds.load("imdb_reviews", "train")
    assert (examples.size, examples.classes) == (20, ("neg", "pos"))
    assert all(isinstance(text, str) for text in examples.columns["text"])
    assert "tensorflow" not in sys.modules


def test_without_tfds_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(errors.MissingExtraError, match=r"jtl\[data\]"):
        tfds.load("imdb_reviews", "train")


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["jax", "grain", "tensorflow_datasets", "PIL", "transformers", "tokenizers", "tensorflow", "torch"]
    code = f"import jtl.data, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

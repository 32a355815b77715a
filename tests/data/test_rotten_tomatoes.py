import collections

import pytest

from jtl.data import rotten_tomatoes, tfds


def test_the_split_of_a_film_never_changes():
    films = {"chicago": "train", "john_q": "validation", "abandon": "test"}
    assert {film: rotten_tomatoes.split_of(film) for film in films} == films


def test_shares_are_about_60_10_30():
    found = collections.Counter(rotten_tomatoes.split_of(f"film_{i}") for i in range(10_000))
    assert found["train"] == pytest.approx(6000, rel=0.05)
    assert found["validation"] == pytest.approx(1000, rel=0.1)


def test_the_name_is_not_taken():
    import tensorflow_datasets

    taken = tensorflow_datasets.list_builders(with_community_datasets=False)
    assert rotten_tomatoes.RottenTomatoesByMovie.name == "rotten_tomatoes_by_movie"
    assert "rotten_tomatoes_by_movie" not in taken


@pytest.mark.assets
def test_no_film_and_no_text_is_in_two_splits(tmp_path):
    parts = {name: tfds.load("rotten-tomatoes", name, data_dir=tmp_path) for name in ("train", "validation", "test")}
    assert {name: part.size for name, part in parts.items()} == {"train": 2826, "validation": 405, "test": 1632}
    films = [set(part.groups.tolist()) for part in parts.values()]
    assert [len(names) for names in films] == [90, 13, 53]
    assert len(set.union(*films)) == 156
    texts = [text for part in parts.values() for text in part.columns["text"]]
    assert len(set(texts)) == len(texts) == 4863
    fresh = sum(int(part.labels.sum()) for part in parts.values())
    assert fresh == 2453
    assert all(part.classes == ("rotten", "fresh") for part in parts.values())


@pytest.mark.assets
def test_preparing_twice_reads_what_is_there(tmp_path, capsys):
    first = tfds.load("rotten-tomatoes", "test[:50]", data_dir=tmp_path)
    second = tfds.load("rotten-tomatoes", "test[:50]", data_dir=tmp_path)
    assert first.columns == second.columns
    assert capsys.readouterr().out == ""

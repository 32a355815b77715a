"""`jtl finetune` on pictures: augmentation changes what is trained on alone, and follows the run's seed."""

import jax
import numpy as np
import pytest
from rich.console import Console

import jtl
from jtl import cli
from jtl.models import registry
from jtl.models.family import ImageInput
from jtl.models.resnet_config import ResNetConfig
from jtl.recipes import finetune, training
from jtl.recipes.settings import Finetune

INPUT = ImageInput(size=(16, 16), resize="torchvision", resize_to=20, interpolation="bilinear")
AUGMENTS = ("flip", "crop-flip", "randaugment")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = ResNetConfig(embedding_size=4, hidden_sizes=(4, 8), depths=(1, 1), layer_type="basic", input=INPUT)
    network = registry.get("resnet").build(config, None)
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    jtl.save(folder, network, variables)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 128, (24, 20 + i, 3), np.uint8)
            pixels[..., label] += 127
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def settings(data, model, **changes):
    return Finetune(
        **{"data": str(data), "model": str(model), "strategy": "full", "held_out": "0.5", "batch_size": 8, "epochs": 1}
        | changes
    )


def run(data, model, **changes):
    console = Console(record=True, width=300)
    return finetune.run(settings(data, model, **changes), console), console.export_text()


def first_batch(examples, augment):
    """A batch to train on, with and without augmentation."""
    batches, change = training.training_pictures(examples, INPUT, augment, batch_size=8)
    if change is not None:
        batches = jtl.augment.augmented(batches, change, jax.random.key(0))
    return next(iter(batches))


# What is augmented


def test_a_flip_leaves_each_picture_or_its_mirror_image(data):
    examples = jtl.data.read(data)
    plain, changed = first_batch(examples, "none")["image"], np.asarray(first_batch(examples, "flip")["image"])
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(plain, changed, strict=True)]
    mirrored = [np.allclose(a[:, ::-1], b, atol=1e-5) for a, b in zip(plain, changed, strict=True)]
    assert all(np.logical_xor(same, mirrored))
    assert any(same)
    assert any(mirrored)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_what_is_trained_on_changes_in_values_alone(data, augment):
    examples = jtl.data.read(data)
    plain, changed = first_batch(examples, "none"), first_batch(examples, augment)
    assert changed["image"].shape == plain["image"].shape
    assert changed["image"].dtype == plain["image"].dtype
    assert not np.array_equal(changed["image"], plain["image"])
    assert {name: value.tolist() for name, value in changed.items() if name != "image"} == {
        name: value.tolist() for name, value in plain.items() if name != "image"
    }


@pytest.mark.parametrize("resize", ["shortest", "torchvision", "exact", "squash", "none"])
@pytest.mark.parametrize("resize_to", [None, 20])
def test_crops_fit_every_way_of_resizing(data, resize, resize_to):
    spec = ImageInput(size=(16, 12), resize=resize, resize_to=resize_to)
    batches, change = training.training_pictures(jtl.data.read(data), spec, "crop-flip", batch_size=8)
    batch = next(iter(jtl.augment.augmented(batches, change, jax.random.key(0))))
    assert batch["image"].shape == (8, 16, 12, 3)
    assert np.isfinite(batch["image"]).all()


def test_evaluation_sees_the_pictures_as_they_are(data, model):
    frozen = {"trainable": ("head",), "learning_rate": 1e-12}  # nothing moves: scores are those of the pictures
    plain, _ = run(data, model, **frozen)
    changed, _ = run(data, model, augment="randaugment", **frozen)
    assert changed.scores == pytest.approx(plain.scores, rel=1e-6)


def test_a_run_is_decided_by_its_seed(data, model):
    first, again, plain = (run(data, model, augment=name)[0] for name in ("crop-flip", "crop-flip", "none"))
    assert first.scores == again.scores
    assert first.scores != plain.scores


# The cache


def test_a_cache_of_augmented_pictures_is_not_made_and_said_so(data, model):
    frozen = {"strategy": "feature-extraction", "epochs": 4}
    assert "cache: " in run(data, model, **frozen)[1]
    printed = run(data, model, augment="flip", **frozen)[1]
    assert "no cache: the pictures are augmented anew in each epoch" in printed


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as end:
        cli.main(["finetune", *map(str, args)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_a_cache_cannot_be_required_of_augmented_pictures(data, model, capsys):
    message = refusal(capsys, "--data", data, "--model", model, "--augment", "flip", "--cache", "require")
    assert "cache='require' with an augmentation" in message
    with pytest.raises(jtl.errors.ConfigError, match="cache='require'"):
        training.check_cache("require")


# Few labels


def test_few_labels_of_each_class(data, model, capsys):
    printed = run(data, model, labels_per_class=3)[1]
    assert "6 examples to train on, 12 held out" in printed
    assert "0 examples of each class" in refusal(capsys, "--data", data, "--model", model, "--labels-per-class", "0")

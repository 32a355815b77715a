"""Augmentation against Pillow, colorsys and scipy, and the laws of keys and of resuming."""

import colorsys
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from PIL import Image, ImageEnhance, ImageOps

import jtl
from jtl import augment, errors
from jtl.augment import colour, geometry, mixing, policy
from jtl.data import Examples, batches, picture_batches, picture_transform, preprocess
from jtl.models.family import ImageInput

RNG = np.random.default_rng(0)
# Smooth pictures with all values: Pillow's rounding to bytes is then no large difference.
GRID = np.stack(np.meshgrid(np.linspace(0, 200, 31), np.linspace(0, 255, 23)), axis=-1)
IMAGE = np.concatenate([GRID, GRID[..., :1] / 2 + GRID[..., 1:] / 3], axis=-1).astype(np.uint8)
NOISE = RNG.integers(0, 256, (23, 31, 3), np.uint8)
BATCH = RNG.integers(0, 256, (5, 12, 10, 3), np.uint8)
KEY = jax.random.key(7)
SPEC = ImageInput(size=(8, 8), resize_to=None)


def unit(image):
    return jnp.asarray(image, jnp.float32) / 255


def levels(image):
    return np.asarray(image) * 255


ENHANCERS = {
    colour.adjust_brightness: ImageEnhance.Brightness,
    colour.adjust_contrast: ImageEnhance.Contrast,
    colour.adjust_colour: ImageEnhance.Color,
    colour.adjust_sharpness: ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("ours", ENHANCERS, ids=lambda f: f.__name__)
def test_enhancements_are_those_of_pillow(ours, factor):
    for image in (IMAGE, NOISE):
        expected = np.asarray(ENHANCERS[ours](Image.fromarray(image)).enhance(factor), float)
        assert np.abs(levels(ours(unit(image), factor)) - expected).max() < 2


@pytest.mark.parametrize("image", [IMAGE, NOISE, NOISE // 2 + 40, NOISE // 64 * 64, np.full_like(IMAGE, 9)])
def test_histogram_operations_are_those_of_pillow(image):
    picture = Image.fromarray(image)
    equal = np.rint(levels(jax.jit(colour.equalize)(unit(image))))
    np.testing.assert_array_equal(equal, np.asarray(ImageOps.equalize(picture)))
    stretched = np.asarray(ImageOps.autocontrast(picture), float)
    assert np.abs(levels(colour.autocontrast(unit(image))) - stretched).max() < 1.01
    for bits in (4, 6, 8):
        expected = np.asarray(ImageOps.posterize(picture, bits))
        np.testing.assert_array_equal(np.rint(levels(colour.posterize(unit(image), bits))), expected)
    expected = np.asarray(ImageOps.solarize(picture, 128))
    np.testing.assert_allclose(levels(colour.solarize(unit(image), 127.5 / 255)), expected, atol=1e-3)


def test_gray_is_left_by_colour_operations():
    gray = unit(IMAGE[..., :1])
    np.testing.assert_array_equal(colour.adjust_colour(gray, 0.0), gray)
    assert jax.eval_shape(augment.rand_augment(), KEY, gray[None]).shape == (1, *gray.shape)
    with pytest.raises(errors.ConfigError, match=r"hue of a picture with 1 channel"):
        colour.shift_hue(gray, 0.1)


@pytest.mark.parametrize("shift", [-0.4, 0.0, 0.1, 0.5])
def test_hue_is_that_of_colorsys(shift):
    pixels = np.concatenate([NOISE.reshape(-1, 3)[:200], [[0, 0, 0], [9, 9, 9], [255, 0, 0], [0, 255, 255]]]) / 255
    turned = []
    for red, green, blue in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        turned.append(colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value))
    result = colour.shift_hue(jnp.asarray(pixels, jnp.float32).reshape(1, -1, 3), shift)
    np.testing.assert_allclose(result[0], turned, atol=2e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0.0, 0.0, 23.0, 31.0), (3.25, 5.5, 11.0, 19.75), (10.0, 20.0, 4.5, 3.25)])
def test_a_crop_is_that_of_pillow(box, interpolation):
    top, left, height, width = box
    method = getattr(Image.Resampling, interpolation.upper())
    image = NOISE // 2 + 64  # away from 0 and 255, where Pillow cuts off after each axis
    picture = Image.fromarray(image).resize((9, 13), method, box=(left, top, left + width, top + height))
    crop = jax.jit(geometry.crop_and_resize, static_argnums=(2, 3))
    result = crop(unit(image), tuple(map(jnp.float32, box)), (13, 9), interpolation)
    assert np.abs(levels(result) - np.asarray(picture, float)).max() < 1.1


def test_crops_keep_to_their_bounds():
    one = functools.partial(geometry.random_box, height=40, width=30, scale=(0.2, 0.6), ratio=(0.5, 2.0))
    top, left, height, width = map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(KEY, 2000)))
    share, ratio = height * width / 1200, width / height
    assert share.min() >= 0.2 - 1e-5
    assert share.max() <= 0.6 + 1e-5
    assert ratio.min() >= 0.5 - 1e-5
    assert ratio.max() <= 2 + 1e-5
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + height).max() <= 40 + 1e-4
    assert (left + width).max() <= 30 + 1e-4
    assert share.std() > 0.05
    assert ratio.std() > 0.2


def test_where_no_crop_fits_the_centre_is_taken():
    box = jax.jit(geometry.random_box, static_argnums=(1, 2, 3, 4))(KEY, 10, 100, (1.0, 1.0), (0.75, 4 / 3))
    np.testing.assert_allclose(box, [0, 50 - 20 / 3, 10, 40 / 3], rtol=1e-5)


AFFINE = jax.jit(geometry.affine, static_argnums=2)
MATRICES = {
    "identity": (1, 0, 0, 0, 1, 0),
    "shear": (1, 0.3, 0, 0, 1, 0),
    "translate": (1, 0, -4.25, 0, 1, 3.5),
    "rotate": (0.9, 0.4, -5, -0.4, 0.9, 6),
}


@pytest.mark.parametrize("name", MATRICES)
def test_affine_maps_are_those_of_pillow(name):
    matrix = MATRICES[name]
    for image in (IMAGE, NOISE):
        picture = Image.fromarray(image)
        size = picture.size
        expected = picture.transform(
            size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
        )
        result = AFFINE(unit(image), jnp.array(matrix, jnp.float32).reshape(2, 3), 128 / 255)
        assert np.abs(levels(result) - np.asarray(expected, float)).max() < 1.1


def test_flips_are_exact_and_half_of_all():
    images = unit(np.repeat(IMAGE[None], 400, axis=0))
    flipped = np.asarray(augment.flip()(KEY, images))
    same = (flipped == np.asarray(images)).all(axis=(1, 2, 3))
    assert (flipped[~same] == np.asarray(images)[~same][:, :, ::-1]).all()
    assert 150 < same.sum() < 250
    np.testing.assert_array_equal(augment.flip(0.0)(KEY, images), images)
    np.testing.assert_array_equal(augment.flip(1.0)(KEY, images), images[:, :, ::-1])


ALL = {
    "crop": augment.random_resized_crop((8, 8)),
    "flip": augment.flip(),
    "jitter": augment.colour_jitter(0.4, 0.4, 0.4, 0.1),
    "rand_augment": augment.rand_augment(2, 9),
}


RUNS = {name: jax.jit(augmentation) for name, augmentation in ALL.items()}


@pytest.mark.parametrize("name", ALL)
def test_a_result_depends_on_key_and_position_alone(name):
    run = RUNS[name]
    whole = np.asarray(run(KEY, BATCH))
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() <= 1
    np.testing.assert_array_equal(whole, run(KEY, BATCH))
    np.testing.assert_array_equal(whole[:2], run(KEY, np.concatenate([BATCH[:2], BATCH[:3]]))[:2])
    if name == "crop":
        np.testing.assert_allclose(whole[:3], run(KEY, BATCH[:3]), atol=1e-6)
    assert any(np.abs(whole - run(jax.random.key(i), BATCH)).max() > 0.01 for i in (8, 9, 10))


@pytest.mark.parametrize("name", ["crop", "flip", "jitter", "rand_augment"])
def test_examples_differ_from_each_other(name):
    same = np.asarray(RUNS[name](KEY, np.repeat(BATCH[:1], len(BATCH), axis=0)))
    assert len({image.tobytes() for image in same}) > 1


def test_every_operation_of_rand_augment_is_reached_and_of_its_strength():
    run = jax.jit(functools.partial(policy.operation, strength=0.3, fill=0.5))
    picture = Image.fromarray(IMAGE)
    names = [*policy.COLOURS, *policy.PLACES]
    results = {name: levels(run(unit(IMAGE), jnp.int32(i), jnp.float32(1))) for i, name in enumerate(names)}
    assert len({result.tobytes() for result in results.values()}) == len(names) == 14
    expected = {
        "brightness": ImageEnhance.Brightness(picture).enhance(1.27),
        "sharpness": ImageEnhance.Sharpness(picture).enhance(1.27),
        "posterize": ImageOps.posterize(picture, 7),
        "solarize": ImageOps.solarize(picture, 179),
        "rotate": picture.rotate(9, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
        "shear_x": _moved(picture, 1, 0.09, 0, 0, 1, 0),
        "shear_y": _moved(picture, 1, 0, 0, 0.09, 1, 0),
        "translate_x": _moved(picture, 1, 0, 31 * 45 / 331, 0, 1, 0),
        "translate_y": _moved(picture, 1, 0, 0, 0, 1, 23 * 45 / 331),
        "identity": picture,
    }
    for name, image in expected.items():
        assert np.abs(results[name] - np.asarray(image, float)).max() < 2, name


def _moved(picture, *matrix):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )


def test_normalizing_is_what_evaluation_does():
    for channels in ("rgb", "bgr"):
        spec = ImageInput(size=(12, 10), resize="exact", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), channels=channels)
        expected = np.stack([preprocess(image, spec) for image in BATCH])
        result = augment.compose(augment.normalize(spec))(KEY, BATCH)
        np.testing.assert_allclose(result, expected, atol=1e-6)
        np.testing.assert_allclose(augment.denormalize(spec)(KEY, result), unit(BATCH), atol=1e-6)
    with pytest.raises(errors.ConfigError, match=r"have 1 channels; expected 3"):
        augment.normalize(SPEC)(KEY, BATCH[..., :1])


PIPELINE = augment.compose(ALL["crop"], ALL["flip"], ALL["jitter"], ALL["rand_augment"], augment.normalize(SPEC))


def test_steps_of_a_pipeline_have_keys_of_their_own():
    whole = augment.on_batch(PIPELINE)({"image": BATCH[:4], "x": 1}, key=KEY)
    assert (whole["image"].shape, whole["image"].dtype, whole["x"]) == ((4, 8, 8, 3), jnp.float32, 1)
    twice = jax.jit(augment.compose(augment.flip(), augment.flip()))
    flipped = [np.asarray(twice(jax.random.key(i), BATCH)) for i in range(4)]
    assert any((image != np.asarray(unit(BATCH))).any() for image in flipped)


def run_of(n=11, **settings):
    rows = {"image": RNG.integers(0, 256, (n, 12, 10, 3), np.uint8)}
    return batches(rows, np.arange(n) % 3, batch_size=4, seed=1, epochs=2, **settings)


def test_a_resumed_run_is_the_tail_of_the_whole_bit_for_bit():
    run = augment.augmented(run_of(), PIPELINE, KEY)
    whole = list(run)
    assert len(whole) == len(run) == 6
    for start in (0, 2, 5, 6):
        tail = list(run.at(start))
        assert len(tail) == len(run.at(start)) == 6 - start
        for left, right in zip(whole[start:], tail, strict=True):
            assert left.keys() == right.keys()
            assert all(np.array_equal(left[name], right[name]) for name in left)
    direct = augment.on_batch(PIPELINE)(list(run.batches)[3], key=jax.random.fold_in(KEY, 3))
    np.testing.assert_array_equal(whole[3]["image"], direct["image"])


def test_epochs_and_processes_are_augmented_differently():
    rows = {"image": np.repeat(BATCH[:1], 4, axis=0)}
    run = augment.augmented(batches(rows, batch_size=2, epochs=2), ALL["crop"], KEY)
    assert len({np.asarray(batch["image"]).tobytes() for batch in run}) == 4
    shards = [augment.augmented(batches(rows, batch_size=2, shard=(i, 2)), ALL["crop"], KEY) for i in range(2)]
    first, second = (np.asarray(next(iter(shard))["image"]) for shard in shards)
    assert (first != second).any()


class Net(nn.Module):
    @nn.compact
    def __call__(self, image):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(5, name="stem")(image.reshape(image.shape[0], -1))))


LOSS = jtl.supervised(Net(), jtl.losses.cross_entropy, metrics={"accuracy": jtl.metrics.accuracy})


@functools.cache
def started(select="**"):
    variables = jax.jit(Net().init)(KEY, jnp.zeros((1, 8, 8, 3)))
    tx = optax.sgd(0.1)
    return tx, *jtl.init(variables, tx, trainable=jtl.select(select), key=KEY)


def test_fit_trains_on_augmented_batches_and_resumes_exactly():
    tx, state, frozen = started()
    run = augment.augmented(run_of(), PIPELINE, KEY)
    steps = [report.state for report in jtl.fit(LOSS, tx, state, frozen, run)]
    middle = None
    for report in jtl.fit(LOSS, tx, state, frozen, list(run)[:2]):
        middle = jax.tree.map(jnp.copy, report.state)
    *_, last = jtl.fit(LOSS, tx, middle, frozen, run.at(2))
    for left, right in zip(jax.tree.leaves(last.state.params), jax.tree.leaves(steps[-1].params), strict=True):
        np.testing.assert_array_equal(left, right)


PREPARE = picture_transform(SPEC)
READY = augment.on_batch(augment.compose(augment.denormalize(SPEC), augment.flip(), augment.normalize(SPEC)))


def prepared(batch):  # plain functions: a cache key reads code, and not that of the suite's type checks
    return PREPARE(batch)


def view(batch, *, key):
    return READY(batch, key=key)


def test_a_view_of_a_cache_is_one_seed_of_an_augmentation():
    _, state, frozen = started(select="head")
    images = RNG.integers(0, 256, (6, 9, 8, 3), np.uint8)
    examples = Examples({"image": images}, np.arange(6, dtype=np.int32) % 3, ("a", "b", "c"))
    run = dataclasses.replace(picture_batches(examples, SPEC, batch_size=6), transform=prepared)
    (batch,) = run
    cut = jtl.split(LOSS, state, frozen, batch)
    cache = jtl.cache.build(cut.prefix, state, frozen, run, views=2, augment=view, key=KEY)
    views = list(cache.batches(batch_size=6, epochs=2))
    for i, cached in enumerate(views):
        key = jax.random.fold_in(jax.random.fold_in(KEY, i), 0)
        expected = cut.prefix(frozen, {}, READY(batch, key=key))
        assert all(np.allclose(cached[name], expected[name], atol=1e-6) for name in expected)
    assert any((views[0][name] != views[1][name]).any() for name in views[0])


@pytest.mark.parametrize("settings", [{"mixup": 0.4}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_mixing_is_the_loss_of_mixed_labels(settings):
    _, state, frozen = started()
    params = jtl.combine(state.params, frozen.params)
    batch = {"image": jax.random.normal(KEY, (6, 8, 8, 3)), "label": jnp.arange(6) % 3, "weight": jnp.ones(6)}

    def reference(params, batch, key):
        images, partner, share = mixing.mix(jax.random.split(key)[0], batch["image"], **settings)
        own, other = (jax.nn.one_hot(labels, 3) for labels in (batch["label"], batch["label"][partner]))
        soft = jnp.expand_dims(share, 1) * own + jnp.expand_dims(1 - share, 1) * other
        return optax.losses.softmax_cross_entropy(Net().apply({"params": params}, images), soft).mean()

    loss, aux = jax.jit(augment.mixed(LOSS, **settings))(params, {}, batch, key=KEY)
    np.testing.assert_allclose(loss, jax.jit(reference)(params, batch, KEY), rtol=1e-5)
    assert set(aux.metrics) == {"loss", "accuracy"}


def test_weights_of_classes_are_mixed_as_the_labels_are():
    """Cross-entropy of soft labels with PyTorch's weights: each class's term weighs, and the weights' sum divides."""
    _, state, frozen = started()
    weights = np.array([0.2, 3.0, 1.0], np.float32)
    loss_fn = jtl.supervised(Net(), jtl.losses.weighted(jtl.losses.cross_entropy, weights))
    params = jtl.combine(state.params, frozen.params)
    batch = {"image": jax.random.normal(KEY, (6, 8, 8, 3)), "label": jnp.arange(6) % 3}
    images, partner, share = mixing.mix(jax.random.split(KEY)[0], batch["image"], mixup=0.8)
    own, other = (np.eye(3)[np.asarray(labels)] for labels in (batch["label"], batch["label"][partner]))
    soft = np.asarray(share)[:, None] * own + (1 - np.asarray(share))[:, None] * other
    logs = jax.nn.log_softmax(Net().apply({"params": params}, images))
    expected = -(soft * weights * np.asarray(logs)).sum() / (soft * weights).sum()
    found, _ = jax.jit(augment.mixed(loss_fn, mixup=0.8))(params, {}, batch, key=KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_evaluation_is_not_mixed_and_batches_are_still_checked():
    tx, state, frozen = started()
    loss_fn = augment.mixed(LOSS, mixup=0.2)
    batch = {"image": np.ones((4, 8, 8, 3), np.float32), "label": np.arange(4, dtype=np.int32) % 3}
    params = jtl.combine(state.params, frozen.params)
    ours, plain = (jax.jit(functools.partial(fn, key=None))(params, {}, batch)[0] for fn in (loss_fn, LOSS))
    np.testing.assert_array_equal(ours, plain)
    report = list(jtl.fit(loss_fn, tx, state, frozen, [batch] * 3, held_out=lambda: [batch]))[-1]
    assert set(report.evaluation) == {"loss", "accuracy"}
    with pytest.raises(errors.DataError, match="label 9"):
        list(jtl.fit(loss_fn, tx, state, frozen, [{**batch, "label": np.full(4, 9, np.int32)}]))


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 0.7}], ids=str)
def test_shares_say_how_much_of_a_picture_is_left(settings):
    size = 64
    # Each picture holds its own number, so that the mean says what it was mixed of.
    images = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32).reshape(-1, 1, 1, 1), (size, 20, 30, 3))
    mixed, partner, share = jax.jit(functools.partial(mixing.mix, **settings))(KEY, images)
    expected = np.asarray(share) * np.arange(size) + (1 - np.asarray(share)) * np.asarray(partner)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), expected, rtol=1e-4)
    assert sorted(partner.tolist()) == list(range(size))
    assert 0.2 < float(share.mean()) < 0.8
    assert float(share.std()) > 0.1
    if set(settings) == {"cutmix"}:
        values = [np.unique(image).tolist() for image in np.asarray(mixed)]
        assert all(set(found) <= {i, int(partner[i])} for i, found in enumerate(values))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 8.0])
def test_shares_have_the_beta_distribution(alpha):
    shares = np.asarray(mixing.symmetric_beta(KEY, alpha, 20_000), float)
    edges = np.linspace(0, 1, 11)
    counts, _ = np.histogram(shares, edges)
    expected = np.diff(scipy.stats.beta(alpha, alpha).cdf(edges)) * len(shares)
    likely = expected > 5
    assert counts.sum() == len(shares)
    assert scipy.stats.chi2.sf(np.sum((counts - expected)[likely] ** 2 / expected[likely]), likely.sum()) > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.random_resized_crop((8, 8), scale=(0.5, 2.0)), "no scale above 1"),
        (lambda: augment.random_resized_crop((8, 8), ratio=(2.0, 1.0)), "low <= high"),
        (lambda: augment.random_resized_crop((8, 8), interpolation="area"), "expected one of bilinear"),
        (lambda: augment.flip(2.0), "probability=2.0"),
        (lambda: augment.colour_jitter(-1.0), "expected 0 or more"),
        (lambda: augment.colour_jitter(hue=0.6), "hue up to 0.5"),
        (lambda: augment.rand_augment(2, 31), "operations of 0 to 30"),
        (lambda: augment.mixed(LOSS), "one or both above 0"),
        (lambda: augment.mixed(lambda *a, key: 0, mixup=1.0), "needs a loss function of jtl.supervised"),
        (lambda: mixing.mix(KEY, jnp.asarray(BATCH), mixup=1.0), "images are uint8"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()

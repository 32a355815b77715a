"""Augmentation on the device. Of pictures: functions `(key, images) -> images` of whole batches, to be jitted.

    augment = jtl.augment.compose(
        jtl.augment.random_resized_crop((224, 224)),
        jtl.augment.flip(),
        jtl.augment.rand_augment(),
        jtl.augment.normalize(spec),
    )
    batches = jtl.augment.augmented(batches, augment, key)

Images are `[batch, height, width, channels]`, bytes or floats from 0 to 1, and come out as floats from 0 to 1
until `normalize`. What happens to an example depends on the key and its position in the batch alone.
`mixed` is mixup and cutmix, which change the loss. So does `masked`, which hides words of texts for a model to guess.
"""

from jtl.augment.colour import colour_jitter
from jtl.augment.core import Augmentation, augmented, compose, denormalize, each, normalize, on_batch
from jtl.augment.geometry import flip, random_resized_crop
from jtl.augment.mixing import mixed
from jtl.augment.policy import rand_augment
from jtl.augment.words import mask_words, masked

__all__ = [
    "Augmentation",
    "augmented",
    "colour_jitter",
    "compose",
    "denormalize",
    "each",
    "flip",
    "mask_words",
    "masked",
    "mixed",
    "normalize",
    "on_batch",
    "rand_augment",
    "random_resized_crop",
]

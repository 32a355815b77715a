"""Ids, masks and lengths that a model of texts cannot mean are refused before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jtl
from jtl.errors import DataError
from jtl.models.inputs import check_tokens

from . import checkpoints

IDS = np.array([[2, 5, 6, 3], [2, 7, 3, 0]], np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.int32)


def batch(**changes):
    return {"input_ids": IDS, "attention_mask": MASK, "label": np.array([0, 1], np.int32), **changes}


def at(array, place, value):
    changed = array.copy()
    changed[place] = value
    return changed


LONG = {"input_ids": np.ones((2, 17), np.int32), "attention_mask": np.ones((2, 17))}
FAULTS = {
    "beyond": ({"input_ids": at(IDS, (1, 2), 40)}, "input_ids of row 1 has 40 at position 2: .* 0 to 39"),
    "negative": ({"input_ids": at(IDS, (0, 3), -1)}, "row 0 has -1 at position 3"),
    "too long": (LONG, "17 long.* 16 positions"),
    "floats": ({"input_ids": IDS.astype(np.float32)}, r"float32\[2, 4\]: expected integers"),
    "one axis": ({"input_ids": IDS[:, 0]}, r"int32\[2\]"),
    "types": ({"token_type_ids": at(0 * IDS, (1, 0), 2)}, "token_type_ids of row 1 has 2 at position 0: .* 0 to 1;"),
    "no token": ({"attention_mask": at(MASK, 1, 0)}, "row 1 has no token"),
    "another mask": ({"attention_mask": MASK[:, :3]}, r"shape \[2, 3\], the ids \[2, 4\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_never_sees_it(fault, tmp_path):
    changes, message = FAULTS[fault]
    model, variables = jtl.load(
        checkpoints.write(tmp_path / "tiny"), jtl.heads.classifier(2), key=jax.random.key(0), pool="mean"
    )
    loss_fn = jtl.supervised(model, jtl.losses.cross_entropy)
    with pytest.raises(DataError, match=message):
        for _ in jtl.fit(
            loss_fn,
            optax.sgd(0.1),
            *jtl.init(variables, optax.sgd(0.1), trainable=jtl.select("head"), key=jax.random.key(1)),
            [batch(**changes)],
        ):
            pass


def test_what_is_right_passes():
    check_tokens(batch(token_type_ids=MASK), vocabulary=8, longest=4, types=2)
    check_tokens({"x": jnp.ones(3)}, vocabulary=8)


def test_a_row_that_only_fills_up_may_be_empty():
    empty = at(MASK, 1, 0)
    check_tokens(batch(attention_mask=empty, weight=np.array([1.0, 0.0])), vocabulary=8)
    with pytest.raises(DataError, match="row 1 has no token"):
        check_tokens(batch(attention_mask=empty, weight=np.array([1.0, 0.5])), vocabulary=8)

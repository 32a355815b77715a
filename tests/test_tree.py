import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jtl import errors, tree

from .conformance.cases import Pair, masked_trees, quick, trees


def is_leaf(node):
    return node is None


@quick
@given(masked_trees())
def test_combine_undoes_partition_leaf_for_leaf(pair):
    whole, mask = pair
    again = tree.combine(*tree.partition(whole, mask))
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True))


@quick
@given(masked_trees())
def test_partition_puts_each_leaf_on_the_side_its_bool_says_and_none_in_its_place(pair):
    whole, mask = pair
    keep = dict(tree.leaves_with_paths(mask))
    selected, rest = tree.partition(whole, mask)
    for half, side in ((selected, True), (rest, False)):
        assert tree.paths(half) == [path for path in tree.paths(whole) if keep[path] is side]
        assert jax.tree.structure(half, is_leaf=is_leaf) == jax.tree.structure(whole, is_leaf=is_leaf)


@quick
@given(masked_trees(), st.randoms())
def test_combine_takes_the_parts_in_any_order(pair, random):
    whole, mask = pair
    selected, rest = tree.partition(whole, mask)
    parts = [*tree.partition(selected, lambda t: jax.tree.map(lambda _: random.random() < 0.5, t)), rest]
    random.shuffle(parts)
    again = tree.combine(*parts)
    assert [id(leaf) for leaf in jax.tree.leaves(again)] == [id(leaf) for leaf in jax.tree.leaves(whole)]


@quick
@given(masked_trees())
def test_mask_of_a_selected_half_is_the_mask(pair):
    whole, mask = pair
    assert tree.mask_of(tree.partition(whole, mask)[0], whole) == mask


@quick
@given(trees())
def test_paths_lead_to_the_leaves_in_the_order_of_jax(whole):
    def follow(node, path):
        for name in filter(None, path.split("/")):
            node = (
                getattr(node, name) if isinstance(node, Pair) else node[int(name) if isinstance(node, list) else name]
            )
        return node

    pairs = tree.leaves_with_paths(whole)
    assert [id(leaf) for _, leaf in pairs] == [id(leaf) for leaf in jax.tree.leaves(whole)]
    assert all(follow(whole, path) is leaf for path, leaf in pairs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"head": True}, "missing .'stem'."),
        ({"head": True, "stem": False, "tail": True}, "not in the tree .'tail'."),
        ({"head": True, "stem": {"kernel": True}}, "structures differ"),
        ({"head": True, "stem": 1}, "stem is 1 of type int"),
        ({"head": True, "stem": jnp.array(True)}, "stem"),
        ("head", "select"),
        (lambda params: {"head": True}, "missing .'stem'."),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(mask, message):
    with pytest.raises(errors.MaskError, match=message):
        tree.partition({"head": 1, "stem": 2}, mask)


@pytest.mark.parametrize(
    "parts",
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 2}),
        ({"a": None}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": None}),
        ([1, None], [None, 2, 3]),
    ],
)
def test_combine_refuses_what_no_partition_can_have_made(parts):
    with pytest.raises(ValueError):  # noqa: PT011
        tree.combine(*parts)


def test_combine_names_a_leaf_that_two_trees_have():
    with pytest.raises(ValueError, match="head/bias"):
        tree.combine({"head": {"bias": 1}}, {"head": {"bias": 2}})


def test_sizes_are_those_of_the_arrays():
    params = {"a": np.zeros((2, 3), np.float16), "b": [None, np.zeros((), np.int8)], "c": jax.random.key(0)}
    assert tree.size(params) == 6 + 1 + 1
    assert tree.nbytes(params) == 12 + 1 + 8
    assert tree.nbytes(jax.eval_shape(lambda: jnp.zeros((3, 5), jnp.bfloat16))) == 30


@quick
@given(trees())
def test_equal_trees_have_equal_digests(whole):
    assert tree.digest(whole) == tree.digest(jax.tree.map(np.copy, whole))


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.float32([1, 2, 3])},
        {"b": np.float32([1, 2])},
        {"a": np.float32([[1, 2]])},
        {"a": np.float32([1, 2]).view(np.int32)},
        {"a": np.nextafter(np.float32([1, 2]), np.float32(9))},
        {"a": np.float32([2, 1])},
    ],
)
def test_a_digest_tells_paths_shapes_dtypes_and_bits_apart(other):
    assert tree.digest({"a": np.float32([1, 2])}) != tree.digest(other)

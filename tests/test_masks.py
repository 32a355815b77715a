import inspect

import jax
import numpy as np
import optax
import pytest
from hypothesis import given

from jtl import errors, masks, tree

from .conformance.cases import Pair, masked_trees, quick, trees

PARAMS = {
    "stem": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)},
    "norm": {"scale": np.zeros(2), "bias": np.zeros(2)},
    "head": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)},
    "headline": np.zeros(1),
}


def mask(bools):
    return masks.Mask(lambda _: bools, "mask")


def chosen(trainable, params=PARAMS):
    return {path for path, keep in tree.leaves_with_paths(trainable(params)) if keep}


@quick
@given(masked_trees(3))
def test_masks_form_a_boolean_algebra(drawn):
    whole, *bools = drawn
    a, b, c = map(mask, bools)
    for left, right in [
        (~(a | b), ~a & ~b),
        (~(a & b), ~a | ~b),
        (a - b, a & ~b),
        (a & (b | c), (a & b) | (a & c)),
        (a | (b & c), (a | b) & (a | c)),
        (a | b, b | a),
        (a & b, b & a),
        ((a | b) | c, a | (b | c)),
        (~~a, a),
        (a | a, a),
        (a | masks.nothing(), a),
        (a & masks.everything(), a),
        (a | masks.everything(), masks.everything()),
        (a & masks.nothing(), masks.nothing()),
        (a | ~a, masks.everything()),
        (a & ~a, masks.nothing()),
        (masks.everything() - a, ~a),
    ]:
        assert left(whole) == right(whole)


@quick
@given(masked_trees(2))
def test_the_algebra_is_that_of_sets_of_leaves(drawn):
    whole, *bools = drawn
    a, b = map(mask, bools)
    in_a, in_b = chosen(a, whole), chosen(b, whole)
    assert chosen(a | b, whole) == in_a | in_b
    assert chosen(a & b, whole) == in_a & in_b
    assert chosen(a - b, whole) == in_a - in_b
    assert chosen(~a, whole) == set(tree.paths(whole)) - in_a


@pytest.mark.parametrize("other", [{"a": True, "b": False}, lambda t: {"a": True, "b": False}])
def test_operands_may_be_bools_or_functions_on_either_side(other):
    params, one = {"a": 0, "b": 0}, masks.select("b")
    assert (one | other)(params) == (other | one)(params) == {"a": True, "b": True}
    assert (one & other)(params) == (other & one)(params) == {"a": False, "b": False}
    assert (one - other)(params) == {"a": False, "b": True}
    assert (other - one)(params) == {"a": True, "b": False}


def test_a_string_is_no_mask():
    with pytest.raises(errors.MaskError, match="select"):
        masks.select("head") | "stem"
    with pytest.raises(errors.MaskError, match="select"):
        "stem" & masks.select("head")


def test_an_operand_of_another_structure_is_refused():
    with pytest.raises(errors.MaskError, match="structures differ"):
        (masks.select("head") | {"head": True})(PARAMS)


def test_select_takes_the_union_of_its_patterns():
    assert chosen(masks.select("head", "*/scale")) == {"head/kernel", "head/bias", "norm/scale"}


def test_select_refuses_a_pattern_that_matches_nothing_and_lists_the_nearest_paths():
    with pytest.raises(errors.PatternError, match=r"'haed' matches none of the 7 leaves; nearest paths: head"):
        masks.select("stem", "haed")(PARAMS)


@pytest.mark.parametrize("patterns", [(), ("",), ("a//b",), (["head"],), (("head", "stem"),)])
def test_select_refuses_malformed_patterns_at_once(patterns):
    with pytest.raises(errors.PatternError):
        inspect.unwrap(masks.select)(*patterns)  # what is not a string, the suite's type checks would catch first


def test_kinds_of_leaves():
    assert chosen(masks.biases()) == {"stem/bias", "norm/bias", "head/bias"}
    assert chosen(masks.kernels()) == {"stem/kernel", "head/kernel"}
    assert chosen(masks.norms()) == {"norm/scale", "norm/bias"}
    assert chosen(masks.where(lambda path, leaf: leaf.size == 1)) == {"headline"}


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(None, 1, {"a"}), (-1, None, {"d", "e"}), (1, 3, {"b", "c"}), (-2, None, {"c", "d", "e"})],
)
def test_depth_counts_groups_like_a_slice(start, stop, expected):
    groups = [["a"], ["b"], ["c"], ["d", "e"]]
    assert chosen(masks.depth(groups, start, stop), dict.fromkeys("abcde", 0)) == expected


def test_an_empty_range_of_depth_is_refused():
    with pytest.raises(errors.ConfigError, match="1 groups"):
        masks.depth([["a"]], 1)


@quick
@given(trees())
def test_masks_mean_the_same_on_a_partitioned_tree(whole):
    """Half of a tree, with `None` or optax's placeholder for what is absent, has half of the mask."""
    tables = (masks.select("**"), masks.biases(), masks.norms(), masks.kernels(), ~masks.biases() | masks.norms())
    half, rest = tree.partition(whole, masks.biases() | masks.kernels())
    hole = optax.MaskedNode()
    marked = jax.tree.map(lambda leaf, keep: leaf if keep else hole, whole, tree.mask_of(half, whole))
    for trainable in tables if tree.paths(whole) else ():
        bools = dict(tree.leaves_with_paths(trainable(whole)))
        for part in (half, rest, marked):
            values = trainable(part)
            assert jax.tree.structure(values) == jax.tree.structure(part)
            assert all(bools[path] == value for path, value in tree.leaves_with_paths(values))


@pytest.mark.parametrize("hole", [None, optax.MaskedNode()])
def test_patterns_may_name_absent_leaves(hole):
    half = Pair({"kernel": np.zeros(2), "bias": hole}, hole)
    assert chosen(masks.select("left/bias", "right", "left/kernel"), half) == {"left/kernel"}
    with pytest.raises(errors.PatternError, match="rihgt"):
        masks.select("rihgt")(half)


def test_repr_tells_what_a_mask_selects():
    assert repr(~masks.select("a", "b") - masks.biases()) == "(~select('a', 'b') - biases())"

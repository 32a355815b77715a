import fnmatch
import string

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jtl import errors, rules, tree

from .conformance.cases import quick, trees

LETTERS = "ab[^-"
segments = st.text(LETTERS, min_size=1, max_size=3)
pieces = st.sampled_from(["*", "?", "[ab]", "[!a]", "[a-b]", "[[]", "[^]", "a", "b", "^", "-"])
globs = st.lists(pieces, min_size=1, max_size=3).map("".join)
patterns = st.lists(globs | st.just("**"), min_size=1, max_size=4)
paths = st.lists(segments, min_size=1, max_size=5)


def reference(pattern, path):
    """Does the pattern name the path, or a subtree around it? Both are lists of segments."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return reference(pattern[1:], path) or (bool(path) and reference(pattern, path[1:]))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and reference(pattern[1:], path[1:])


@quick
@given(patterns, paths)
def test_matching_is_that_of_globs_segment_by_segment(pattern, path):
    assert rules.matches("/".join(pattern), "/".join(path)) == reference(pattern, path)


@quick
@given(patterns, paths)
def test_captures_put_back_into_the_pattern_spell_the_path_or_a_subtree_around_it(pattern, path):
    pattern, path = [glob.replace("[[]", "a") for glob in pattern], "/".join(path)
    found = rules.match("/".join(pattern), path)
    if found is None:
        return
    captures = iter(found)

    def fill(glob):
        if glob == "**":
            return next(captures)
        out = ""
        while glob:
            end = glob.index("]", 2) + 1 if glob[0] == "[" else 1
            out += next(captures) if glob[0] in "*?[" else glob[0]
            glob = glob[end:]
        return f"/{out}"

    prefix = "".join(map(fill, pattern))
    assert not list(captures)
    assert f"/{path}/".startswith(f"{prefix}/")


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("lora", "lora/a", True),
        ("lora", "notlora/a", False),
        ("lora", "lora_b/a", False),
        ("lora", "block/lora", False),
        ("**/lora", "block/lora/a", True),
        ("**/bias", "bias", True),
        ("**/bias", "head/unbias", False),
        ("encoder/layer_*/attention", "encoder/layer_11/attention/query/kernel", True),
        ("encoder/layer_*/attention", "encoder/layer_0/attention_norm/scale", False),
        ("encoder/layer_*/attention", "encoder/layer_0/mlp/attention", False),
        ("encoder/layer_[0-3]", "encoder/layer_3/kernel", True),
        ("encoder/layer_[0-3]", "encoder/layer_13/kernel", False),
        ("encoder/**/kernel", "encoder/kernel", True),
        ("/head/", "head/kernel", True),
        ("a.c", "abc", False),
        ("a+", "aa", False),
    ],
)
def test_a_pattern_matches_whole_segments_and_whole_subtrees(pattern, path, expected):
    assert rules.matches(pattern, path) is expected


@quick
@given(st.text(string.punctuation.translate(str.maketrans("", "", "*?[/")), min_size=1))
def test_punctuation_without_a_meaning_stands_for_itself(text):
    assert rules.match(text, text) == ()
    assert not rules.matches(text, f"{text}x")


@pytest.mark.parametrize("pattern", ["", "/", "a//b", "layer_[9-0]"])
def test_a_malformed_pattern_is_refused(pattern):
    with pytest.raises(errors.PatternError):
        rules.compile_pattern(pattern)


@quick
@given(
    trees(), st.lists(st.tuples(st.sampled_from(["**/bias", "*/x", "head", "layer_*", "**/layer_1"]), st.integers()))
)
def test_a_label_is_the_value_of_the_first_rule_that_matches(whole, table):
    table = [*table, ("**", "rest")]
    labels = dict(tree.leaves_with_paths(rules.label(whole, table, unused=True)))
    assert list(labels) == tree.paths(whole)
    for path, value in labels.items():
        # A leaf that is the whole tree has a path of no segments, which only "**" names.
        assert value == next(v for p, v in table if reference(p.split("/"), path.split("/") if path else []))


def test_an_uncovered_leaf_is_named():
    with pytest.raises(errors.PatternError, match="stem/kernel"):
        rules.label({"head": 0, "stem": {"kernel": 0}}, [("head", 1)])


def test_an_unused_rule_is_refused_unless_allowed():
    table = [("haed", 1), ("**", 2)]
    with pytest.raises(errors.PatternError, match="'haed' matches none of the 2 leaves; nearest paths: head"):
        rules.label({"head": 0, "stem": 0}, table)
    assert rules.label({"head": 0, "stem": 0}, table, unused=True) == {"head": 2, "stem": 2}


def test_a_catch_all_that_nothing_is_left_for_is_allowed():
    assert rules.label({"head": 0}, [("head", 1), ("**", 2)]) == {"head": 1}


def test_absent_leaves_count_as_places_but_get_no_label():
    assert rules.label({"head": 0, "stem": None}, [("stem", 1), ("head", 2)]) == {"head": 2, "stem": None}


def test_the_nearest_paths_are_subtrees_as_deep_as_the_pattern():
    whole = {"encoder": {f"layer_{i}": {"kernel": np.zeros(1)} for i in range(3)}, "head": {"kernel": np.zeros(1)}}
    with pytest.raises(errors.PatternError, match="encoder/layer_2"):
        rules.require_matches(["encoder/leyer_2"], whole)
    assert jax.tree.leaves(rules.label(whole, [("encoder/layer_2", 1), ("**", 0)])) == [0, 0, 1, 0]

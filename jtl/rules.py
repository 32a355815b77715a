"""Path patterns, and tables of (pattern, value) rules over the leaves of a tree.

One engine reads every table in the library: masks, learning-rate groups, weight decay,
sharding, and the key maps of checkpoint converters.

A pattern is a `/`-separated list of globs, each for one whole segment of a path:

| pattern | matches |
| --- | --- |
| `head` | the subtree `head`, never `heads` or `my_head` |
| `encoder/layer_*/attention` | that subtree in every layer |
| `**/bias` | every leaf or subtree named `bias`, at any depth |
| `encoder/layer_[0-3]` | layers 0 to 3 |

The idea of one path language for everything is big_vision's and kauldron's.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jtl import tree as jtree
from jtl.errors import PatternError
from jtl.typing import PyTree

Rules = Sequence[tuple[str, Any]]
"""First match wins: `[("head", 1e-3), ("**", 1e-5)]`."""


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; each wildcard segment is one group.

    Raises:
      PatternError: the pattern is not a string, is empty, or has an empty segment.
    """
    if not isinstance(pattern, str) or not pattern.strip("/"):
        raise PatternError(f"a pattern is a non-empty string of segments such as 'encoder/layer_*', got {pattern!r}")
    segments = pattern.strip("/").split("/")
    if "" in segments:
        raise PatternError(f"the pattern {pattern!r} has an empty segment; '**' matches any number of segments")
    # Paths are matched with a leading separator, so that every segment looks alike; what
    # follows a matched prefix is free, because a pattern takes whole subtrees.
    try:
        return re.compile("".join(_segment(segment) for segment in segments) + r"(?:/.*)?", re.DOTALL)
    except re.error as error:
        raise PatternError(f"the pattern {pattern!r} is malformed: {error}") from error


def _segment(glob: str) -> str:
    return r"((?:/[^/]+)*?)" if glob == "**" else "/" + re.sub(r"\*|\?|\[!?+.[^\]]*\]|.", _translate, glob)


def _translate(token: re.Match[str]) -> str:
    glob = token.group()
    if len(glob) > 1:
        negated = glob.startswith("[!")
        inside = re.sub(r"([^\w-])", r"\\\1", glob[2 if negated else 1 : -1])
        return f"([^/{inside}])" if negated else f"([{inside}])"
    return {"*": "([^/]*)", "?": "([^/])"}.get(glob) or re.escape(glob)


def match(pattern: str, path: str) -> tuple[str, ...] | None:
    """What the wildcards of a pattern stand for in a path, or `None` without a match.

    >>> match("encoder/layer_*/kernel", "encoder/layer_3/kernel")
    ('3',)
    >>> match("head", "head/kernel"), match("head", "heads/kernel")
    ((), None)
    """
    found = compile_pattern(pattern).fullmatch(f"/{path}")
    return None if found is None else found.groups()


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern takes a path, either as a leaf or as part of a subtree.

    >>> matches("**/bias", "bias"), matches("**/bias", "head/my_bias")
    (True, False)
    """
    return match(pattern, path) is not None


def label(tree: PyTree, rules: Rules, *, unused: bool = False) -> PyTree:
    """Give every leaf the value of the first rule that matches its path.

    Args:
      tree: any pytree.
      rules: `(pattern, value)` pairs; the first match wins.
      unused: allow rules whose pattern matches no leaf. A pattern of `**` alone always is.

    Returns:
      The values, in the structure of `tree`; absent leaves stay absent.

    Raises:
      PatternError: a leaf that no rule covers, or a rule that matches nothing.

    >>> label({"head": {"bias": 0, "kernel": 0}, "stem": 0}, [("**/bias", "a"), ("head", "b"), ("**", "c")])
    {'head': {'bias': 'a', 'kernel': 'b'}, 'stem': 'c'}
    """
    if not unused:
        require_matches([pattern for pattern, _ in rules if pattern != "**"], tree)

    def first(path: str, _: Any) -> Any:
        for pattern, value in rules:
            if matches(pattern, path):
                return value
        raise PatternError(f"no rule covers the leaf {path}; the patterns are {[p for p, _ in rules]}")

    return jtree.map_with_paths(first, tree)


def require_matches(patterns: Iterable[str], tree: PyTree) -> None:
    """Check that every pattern matches a leaf, absent leaves of a partitioned tree included.

    Raises:
      PatternError: names each pattern that matches nothing and the paths nearest to it.
    """
    available = jtree.paths(tree, absent=True)
    for pattern in patterns:
        if not any(matches(pattern, path) for path in available):
            near = ", ".join(nearest(pattern, available)) or "none: the tree has no leaf"
            raise PatternError(
                f"the pattern {pattern!r} matches none of the {len(available)} leaves; nearest paths: {near}"
            )


def nearest(pattern: str, available: Sequence[str], count: int = 3) -> list[str]:
    """The subtrees and leaves whose paths are spelled most like a pattern.

    >>> nearest("haed", ["head/kernel", "stem/kernel"], 1)
    ['head']
    """
    depth = pattern.strip("/").count("/") + 1
    candidates = {"/".join(path.split("/")[:depth]) for path in available} | set(available)
    return difflib.get_close_matches(pattern.strip("/"), sorted(candidates), n=count, cutoff=0.0)

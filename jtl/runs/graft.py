"""`graft`: leaves of a checkpoint in the place of a model's own."""

from pathlib import Path
from typing import Any

from jtl import checkpoint
from jtl import tree as jtree
from jtl.errors import CheckpointError
from jtl.masks import select
from jtl.runs import contents, folder
from jtl.runs.steps import Steps
from jtl.typing import PyTree, Variables


def graft(variables: Variables, source: str | Path, *patterns: str) -> dict[str, PyTree]:
    """A model's variables with those leaves replaced that a run has trained, or some of them.

    Args:
      variables: `{"params": params, **collections}` of the model.
      source: the folder of a run, whose newest sound checkpoint is taken, or of one checkpoint.
      *patterns: of params, as for `jtl.select`, each of which must match a leaf that the checkpoint has; by default all
        of them, and the statistics.

    Returns:
      The variables, other leaves as they were.

    Raises:
      CheckpointError: no checkpoint is sound, it lacks what a pattern matches, or a leaf has no place in the
        model or another shape or dtype there. Leaves are named.
      PatternError: a pattern matches no leaf of the model.
    """
    source = Path(source)
    items = _items(source)
    if not patterns:
        return contents.fill(variables, items)
    params, found = variables["params"], contents.part(items, contents.MODEL, "params")
    wanted = set(jtree.paths(jtree.partition(params, select(*patterns))[0]))
    lacking = sorted(wanted - found.keys())
    if lacking:
        raise CheckpointError(
            f"{source} lacks {len(lacking)} of the leaves that {', '.join(patterns)} match, such as {lacking[:3]}: "
            f"it has {len(found)}, such as {sorted(found)[:3]}, which are those that its run had trained"
        )
    return {**variables, "params": contents.replaced(params, {path: found[path] for path in wanted})}


def _items(source: Path) -> dict[str, dict[str, Any]]:
    names = (contents.MODEL,)
    if (source / checkpoint.MANIFEST).exists():
        return checkpoint.read(source, names)[0]
    folder.read(source)
    stored = Steps(source / folder.CHECKPOINTS).restore(names)
    if stored is None:
        raise CheckpointError(f"{source} has no checkpoint yet")
    return stored.items

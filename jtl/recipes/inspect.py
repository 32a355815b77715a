"""`jtl inspect`: a model's parameters as a tree, and which of them a mask trains."""

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from jtl import heads, masks
from jtl import tree as jtree
from jtl.pretrained import build, shapes
from jtl.recipes.settings import Inspect
from jtl.typing import PyTree
from jtl.weights.source import resolve


def run(settings: Inspect, console: Console) -> None:
    """Print the tree of shapes; no weights are read.

    Raises:
      PatternError: a pattern matches no leaf.
      SourceNotFoundError: there is no such model.
    """
    head = heads.regressor(settings.outputs) if settings.outputs else None
    family, model = build(resolve(settings.model, revision=settings.revision), head, {})
    params = shapes(family, model)["params"]
    patterns = settings.trainable or (("head",) if settings.outputs else ("**",))
    mask = masks.select(*patterns)(params)
    trained, whole = jtree.size(jtree.partition(params, mask)[0]), jtree.size(params)
    root = Tree(f"[bold]{escape(settings.model)}[/bold] ({family.name}): {_share(trained, whole)}")
    _grow(root, params, mask, settings.depth)
    console.print(root)


def _grow(branch: Tree, params: PyTree, mask: PyTree, depth: int) -> None:
    for name in params:
        leaf = not isinstance(params[name], dict)
        whole = jtree.size(params[name])
        trained = jtree.size(jtree.partition(params[name], mask[name])[0])
        state = "trained" if trained == whole else "partly trained" if trained else "frozen"
        style = {"trained": "green", "partly trained": "yellow", "frozen": "dim"}[state]
        detail = f"{params[name].dtype} {list(params[name].shape)}" if leaf else _count(whole)
        child = branch.add(f"[{style}]{name}  {detail}  {state}[/{style}]".replace("[]", "\\[]"), highlight=False)
        if not leaf and depth > 1:
            _grow(child, params[name], mask[name], depth - 1)


def _share(trained: int, whole: int) -> str:
    return f"{trained:,} of {whole:,} parameters trained ({trained / whole:.2%})"


def _count(number: int) -> str:
    return f"{number:,}"

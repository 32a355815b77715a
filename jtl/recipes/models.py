"""`jtl models`: what there is to load."""

import difflib
import fnmatch

from rich.console import Console
from rich.table import Table

from jtl.errors import ConfigError
from jtl.models import registry
from jtl.recipes.settings import Models
from jtl.weights.assets import ASSETS


def run(settings: Models, console: Console) -> None:
    """Print the packaged models whose names match, and the families.

    Raises:
      ConfigError: no name matches.
    """
    models = [asset for asset in ASSETS.values() if asset.kind == "model"]
    found = [asset for asset in models if fnmatch.fnmatchcase(asset.name, settings.pattern)]
    families = [name for name in registry.FAMILIES if fnmatch.fnmatchcase(name, settings.pattern)]
    if not found and not families:
        names = [*(asset.name for asset in models), *registry.FAMILIES]
        near = difflib.get_close_matches(settings.pattern.lower(), names, n=3, cutoff=0.0)
        raise ConfigError(f"no model is named like {settings.pattern!r}; nearest: {', '.join(near)}")
    table = Table(title="models")
    for column in ("name", "family", "loads from", "licence of the weights", "upstream"):
        table.add_column(column, overflow="fold")
    for asset in found:
        loads = "packaged asset" if asset.family in registry.FAMILIES else "weights only, no family yet"
        table.add_row(asset.name, asset.family, loads, asset.licence, asset.upstream)
    for name in families:
        table.add_row(f"any {name}", name, "folder or hub id", "its own", registry.get(name).paper)
    console.print(table)

"""A comparison of strategies, as a table and as a picture of score against trained share."""

import math
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from jtl import plots
from jtl.comparing import Comparison


def comparison_table(comparison: Comparison, title: str = "") -> Table:
    """One row an arm, by trained parameters; the sweet spot is marked.

    Args:
      comparison: from `jtl.compare`.
      title: above it.
    """
    rows, spot = comparison.rows, comparison.spot
    caption = (
        f"{comparison.metric}: mean and 95% t interval over seeds, at the rate that the choosing half prefers; "
        "* the fewest trained parameters within one standard error of the best"
    )
    table = Table(title=escape(title) or None, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("strategy")
    for name in ("trained", "share", "rate x", "runs", "s a run", comparison.metric):
        table.add_column(name, justify="right")
    for row in rows:
        runs = sum(trial.arm == row.arm for trial in comparison.trials)
        score = f"{row.mean:.3f}" + ("" if math.isnan(row.half) else f" ± {row.half:.3f}")
        cells = (f"{row.trained:,}", f"{row.share:.2%}", f"{row.factor:g}", f"{runs}", f"{row.seconds:.1f}", score)
        table.add_row(escape(row.arm) + (" *" if row.arm == spot.arm else ""), *cells)
    return table


def comparison_picture(comparison: Comparison, path: str | Path, title: str = "") -> None:
    """Draw score against trained share, with intervals.

    Args:
      comparison: from `jtl.compare`.
      path: of a PNG, SVG or PDF to write.
      title: above it.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    figure = plots.figure(7.0, 4.5)
    axes = figure.add_subplot()
    spot = comparison.spot
    for row in comparison.rows:
        here = row.arm == spot.arm
        half = 0.0 if math.isnan(row.half) else row.half
        form = {"fmt": "*" if here else "o", "markersize": 12 if here else 6, "capsize": 3}
        axes.errorbar(100 * row.share, row.mean, yerr=half, label=row.arm, **form)
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("trained share of the parameters, %")
    axes.set_ylabel(comparison.metric)
    axes.set_title(title or f"sweet spot: {spot.arm}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)

"""The audit as a table."""

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from jtl.auditing import Audit

_SHOWN = 12
"""Modules and rules that are listed one by one."""


def audit_table(audit: Audit, title: str = "") -> Group:
    """What a mask matches, how modules ran, each finding, and the verdict.

    Args:
      audit: from `jtl.audit`.
      title: above it.

    Returns:
      For `rich.print`, or a console.
    """
    counts = Table(title=escape(title) or None, title_justify="left", box=None, show_header=False)
    whole = audit.trained + audit.frozen
    counts.add_row(
        "trained", f"{audit.trained:,} of {whole:,} ({audit.trained / whole:.2%})", _bytes(audit.trained_bytes)
    )
    counts.add_row("frozen", f"{audit.frozen:,} in {len(audit.unmatched)} leaves", _bytes(audit.frozen_bytes))
    counts.add_row("state", "all that a step returns", _bytes(audit.state_bytes))
    cost = f"{audit.flops / 1e6:,.1f} MFLOP"
    if audit.ideal_flops:
        cost += f", {audit.flops / audit.ideal_flops:.3f} of the ideal"
    counts.add_row("step", cost, f"{_bytes(audit.temp_bytes)} of temporaries")
    verdict = "[green]The step does what its mask says.[/green]"
    if not audit.ok:
        verdict = "[red]The step does not do what its mask says.[/red]"
    return Group(counts, _rules(audit), _findings(audit), *_modules(audit), verdict)


def _rules(audit: Audit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("mask", "leaves", "parameters", "such as"):
        table.add_column(name, justify="right" if name in ("leaves", "parameters") else "left")
    for rule in audit.rules[:_SHOWN]:
        example = rule.paths[0] if rule.paths else "matches nothing"
        table.add_row(escape(rule.text), f"{len(rule.paths):,}", f"{rule.size:,}", escape(example))
    if len(audit.rules) > _SHOWN:
        table.add_row(f"and {len(audit.rules) - _SHOWN} more", "", "", "")
    example = escape(audit.unmatched[0]) if audit.unmatched else ""
    table.add_row("[dim]none: frozen[/dim]", f"{len(audit.unmatched):,}", f"{audit.frozen:,}", f"[dim]{example}[/dim]")
    return table


def _findings(audit: Audit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("check", "", "found"):
        table.add_column(name)
    for finding in audit.findings:
        mark = "[green]ok[/green]" if finding.ok else "[red]BAD[/red]"
        table.add_row(finding.check, mark, escape(finding.detail))
    return table


def _modules(audit: Audit) -> list[Table]:
    """Modules with statistics or dropout, counted by how they ran."""
    counts: dict[tuple[str, str, str], list[str]] = {}
    for module in audit.modules:
        key = (module.kind, "frozen" if module.frozen else "trained", module.mode)
        counts.setdefault(key, []).append(module.path)
    if not counts:
        return []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("module", "leaves", "mode", "count", "such as"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for (kind, state, mode), paths in sorted(counts.items()):
        table.add_row(kind, state, mode, str(len(paths)), escape(paths[0]))
    return [table]


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"

"""The command line: flags to function calls.

Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

import importlib
import os
import sys
from typing import Annotated, Any

import tyro

from jtl.errors import AuditError, JtlError
from jtl.recipes import settings

Command = (
    Annotated[settings.Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[settings.Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[settings.Models, tyro.conf.subcommand("models")]
    | Annotated[settings.Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[settings.Audit, tyro.conf.subcommand("audit")]
    | Annotated[settings.Sweep, tyro.conf.subcommand("sweep")]
)

_RECIPES = {
    settings.Quickstart: "quickstart",
    settings.Finetune: "finetune",
    settings.Models: "models",
    settings.Inspect: "inspect",
    settings.Audit: "audit",
    settings.Sweep: "sweep",
}


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Exit codes: 0 done, 1 an audit that found a fault, 2 a mistake in what was given (one message, no traceback), 75 a
    run that was asked to end and has saved (the same command goes on), 130 interrupted.

    Args:
      args: the command line; by default the process's own.
    """
    command: Any = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="jtl",
        description="Transfer learning with pretrained Flax models.",
        args=args,
    )
    from rich.console import Console

    # transformers advises, on every import, that PyTorch is missing; jtl needs its tokenizers alone.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    recipe = importlib.import_module(f"jtl.recipes.{_RECIPES[type(command)]}")
    try:
        # A pipe or a log has no width of its own; rich would fold tables at 80 columns.
        recipe.run(command, Console(width=None if sys.stdout.isatty() else 100))
    except JtlError as error:
        print(f"jtl: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, AuditError) else 2) from None
    except SystemExit as stop:
        if stop.code == 75:  # jtl.Interrupted, which is not imported for this
            print(f"jtl: {stop}; the same command goes on from there", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        print("jtl: interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None

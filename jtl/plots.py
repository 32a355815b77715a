"""What every picture begins with."""

from typing import Any

from jtl.errors import missing_extra


def figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib that belongs to no window.

    Args:
      width: in inches.
      height: in inches.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots") from error
    return Figure(figsize=(width, height), layout="constrained")

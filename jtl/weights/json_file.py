"""JSON files of other people: read whole, so only where they are of a size that settings have."""

import json
from pathlib import Path
from typing import Any

from jtl.errors import WeightsError

MOST_BYTES = 8 << 20
"""The largest file of settings. Python's objects may take twenty times the bytes of the text."""


def read_json(path: Path, most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      path: the file.
      most: bytes that it may have.

    Raises:
      WeightsError: it is larger, not JSON, nested too deeply, or not an object.
    """
    size = path.stat().st_size
    if size > most:
        raise WeightsError(f"{path} has {size:,} bytes, expected settings of at most {most:,}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} holds a {type(settings).__name__}, expected an object")
    return settings

"""SHA-256 digests of files: what a loaded weight, a fetched asset and a written checkpoint are held to."""

import hashlib
import os

from jtl.errors import DigestError


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, read in pieces.

    Args:
      path: the file.

    Returns:
      The digest as 64 lower-case hexadecimal digits.

    >>> sha256(os.devnull)
    'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(
    path: str | os.PathLike[str],
    expected: str,
    *,
    remedy: str = "it is damaged or was changed: delete it and fetch it again",
) -> None:
    """Refuse a file whose digest is not the recorded one.

    Args:
      path: the file.
      expected: the recorded digest, as `sha256` gives it.
      remedy: what the error tells the reader to do.

    Raises:
      DigestError: the digests differ.

    >>> verify(os.devnull, "0" * 64)
    Traceback (most recent call last):
    ...
    jtl.errors.DigestError: /dev/null does not have its recorded SHA-256 digest
      expected: 0000000000000000000000000000000000000000000000000000000000000000
      got:      e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
      it is damaged or was changed: delete it and fetch it again
    """
    got = sha256(path)
    if got != expected:
        raise DigestError(
            f"{os.fspath(path)} does not have its recorded SHA-256 digest\n"
            f"  expected: {expected}\n  got:      {got}\n  {remedy}"
        )

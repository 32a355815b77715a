"""What can happen to the files of a checkpoint, and what a run makes of it."""

import hashlib
import json
import os
from pathlib import Path

import jtl
from jtl import checkpoint


def files(step):
    """Every file of a checkpoint that holds a byte."""
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path, rng):
    """One bit."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def delete(path, rng):
    """No file any more."""
    path.unlink()


def truncate(path, rng):
    """The beginning alone."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero(path, rng):
    """As many zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def garble(path, rng):
    """Some bytes, a piece repeated, moved or taken out."""
    content = bytearray(path.read_bytes())
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(4):
        case 0:
            content[a:b] = rng.randbytes(b - a)
        case 1:
            content[a:a] = content[a:b]
        case 2:
            content[a:b] = content[a:b][::-1]
        case 3:
            del content[a:b]
    path.write_bytes(content)


def reshape(path, rng):
    """Other numbers in JSON; in other files, other bytes."""
    try:
        text = json.loads(path.read_bytes())
    except ValueError:
        return garble(path, rng)
    for _ in range(rng.randint(1, 3)):
        text = _other(text, rng)
    return path.write_text(json.dumps(text))


STRANGE = (
    None,
    True,
    -1,
    0,
    1 << 40,
    1 << 70,
    1.5,
    "",
    "..",
    "../../x",
    "/etc/passwd",
    "object",
    "key<x>",
    [],
    {},
    [[]],
)


def _other(value, rng):
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {(str(rng.choice(STRANGE)) if name == key else name): inner for name, inner in value.items()}
        return {**value, key: _other(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        return [*value[:at], _other(value[at], rng), *value[at + 1 :]]
    return rng.choice(STRANGE)


def sign(step):
    """Write the manifest's digests anew, so that changed files pass for what was written."""
    path = step / checkpoint.MANIFEST
    try:
        content = json.loads(path.read_bytes())["manifest"]
        found = {file.relative_to(step).as_posix(): file for file in step.rglob("*") if file.is_file() and file != path}
        content["files"] = {
            name: (file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()) for name, file in found.items()
        }
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        stated = hashlib.sha256(canonical.encode()).hexdigest()
        path.write_text(json.dumps({"sha256": stated, "manifest": content}))
    except (ValueError, TypeError, KeyError, OSError):
        pass


class Subject:
    """A run's checkpoints, of which the newest is damaged and mended again and again."""

    def __init__(self, folder: Path):
        self.steps = jtl.runs.Steps(folder)
        self.older, self.newest = (self.steps.path(step) for step in self.steps.found()[-2:])
        self.whole = {path: path.read_bytes() for path in self.newest.rglob("*") if path.is_file()}
        self.content = _digest(self.steps.restore())
        self.before = int(self.older.name)

    def suffer(self, damage, path, rng, *, signed=False):
        """Damage a file, restore, and mend it.

        Returns:
          "harmless" where what was restored is what was written, "fallen back" where the older one was, and the file
          was named (unless its digest was signed anew); anything else is a description of what is wrong.
        """
        try:
            damage(path, rng)
            if signed:
                sign(self.newest)
            return self._verdict(path, signed)
        finally:
            for file, content in self.whole.items():
                if not file.exists() or file.read_bytes() != content:
                    file.write_bytes(content)

    def _verdict(self, path, signed):
        found = self.steps.restore()
        if found.step != self.before:
            return "harmless" if _digest(found) == self.content else f"{path.name}: silently wrong"
        named = str(path) in found.refused[0] or (signed and str(self.newest) in found.refused[0])
        return "fallen back" if named else f"{path.name}: not named in {found.refused[0]!r}"


def _digest(stored):
    return jtl.tree.digest(stored.items), json.dumps(stored.notes, sort_keys=True)

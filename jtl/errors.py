"""Errors that tell a user what was given, what was expected, where, and what to do about it.

Each class is also the built-in error a caller would catch anyway, so
`except ValueError` keeps working; `JtlError` catches whatever jtl itself refused.
All are raised on the host, before the first compiled step.
"""


class JtlError(Exception):
    """Base of every error that jtl raises for a mistake in its input."""


class PatternError(JtlError, ValueError):
    """A path pattern is malformed, or matches no leaf of the tree it was given."""


class MaskError(JtlError, ValueError):
    """A mask does not fit its tree, or selects nothing that can be trained."""


class ConfigError(JtlError, ValueError):
    """A model, strategy or run was asked for with settings that cannot work."""


class DataError(JtlError, ValueError):
    """A data file, a label or a batch is not what the run declared."""


class SplitError(JtlError, ValueError):
    """A loss cannot be cut at the freeze boundary, or what was cut does not fit together again."""


class AuditError(JtlError, ValueError):
    """A step does not train what its mask says, or something else besides."""


class CacheError(JtlError, OSError):
    """A cache cannot be written or read."""


class CheckpointError(JtlError, OSError):
    """A checkpoint cannot be written, is not what was written, or is not of this run."""


class DivergedError(JtlError, ArithmeticError):
    """A run computes nothing finite any more."""


class OutOfMemoryError(JtlError, MemoryError):
    """A device has no room for a step, not even for its smallest microbatch."""


class WeightsError(JtlError, ValueError):
    """A checkpoint does not hold exactly the tensors that a model needs."""


class DigestError(WeightsError):
    """A file's SHA-256 digest is not the recorded one."""


class SourceNotFoundError(JtlError, FileNotFoundError):
    """A model, asset, data set or file cannot be found."""


class MissingExtraError(JtlError, ImportError):
    """A feature needs an optional dependency that is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error for an absent optional package, with the command that installs it.

    Args:
      package: the module that could not be imported.
      extra: the jtl extra that declares it.

    >>> str(missing_extra("grain", "data"))
    'this needs the package grain, which is not installed: pip install "jtl[data]"'
    """
    return MissingExtraError(
        f'this needs the package {package}, which is not installed: pip install "jtl[{extra}]"', name=package
    )

"""Exceptions of mics_ds.

Every message says what was expected, what was found, and what to do about it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .log import logger


class MicsError(Exception):
    """Base class of every error raised by mics_ds."""


class MicsConfigError(MicsError, ValueError):
    """The ``mics_*`` keys are wrong, or combined with something MiCS does not support."""


class MicsCompatError(MicsError, RuntimeError):
    """The installed DeepSpeed is one that mics_ds was not tested with, or lacks a seam it needs."""


class MicsAgreementError(MicsError, RuntimeError):
    """The ranks of one job do not agree on how MiCS is configured or where they run."""


class MicsCommError(MicsError, RuntimeError):
    """A MiCS collective failed, usually because another rank died."""


class MicsCheckpointError(MicsError, RuntimeError):
    """A checkpoint could not be written completely, or is not what it should be. Raised on every rank."""


class MicsUsageError(MicsError, RuntimeError):
    """Something was asked for at a moment when there is no right answer."""


class MicsGuardError(MicsError, RuntimeError):
    """Copies that must be equal are not, and nobody can or may repair them. Raised on every rank."""

    findings: tuple = ()
    """Findings of all ranks, of :class:`mics_ds.guard.report.Finding`."""


class MicsPlanError(MicsError, ValueError):
    """The planner was given a machine or a job that makes no sense, or that fits nowhere."""


def describe_error(error: BaseException) -> str:
    """An error in a note to the other ranks; one of ours needs no introduction."""
    said = str(error) if isinstance(error, MicsCheckpointError) else f"{type(error).__name__}: {error}"
    return said.encode(errors="backslashreplace").decode().strip().rstrip(".")


@contextmanager
def noting(errors: list[str], say: Callable[[Exception], str] = describe_error) -> Iterator[None]:
    """Note an error of the block, of whatever kind, to raise it on all ranks later.

    Raised here, it would be known to this rank alone, and the others would wait for it.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (MicsCheckpointError, OSError, pickle.PickleError)):
            logger.error("on this rank:", exc_info=True)  # the other ranks have no use for where it happened
        errors.append(say(error))

"""Errors for users: a message that names the value, the place and the next command, and an exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from raycontrolnet.signals import exit_code, last_words
from raycontrolnet.text import one_line

logger = logging.getLogger(__name__)


class UserError(Exception):
    """Bad input: a flag, a config file or a data set. The message is all the user needs; exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """Settings that cannot be run. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class DataError(UserError):
    """A data set, or one row of it, that cannot be used. Names the file or row and the reason."""


class RunError(Exception):
    """A run that failed although its input was good; the message gives the cause in one paragraph. Exit code 1."""

    exit_code = 1


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run ended at the user's wish and can be continued. Exit code 130 or 143."""

    def __init__(self, message: str):
        super().__init__(message)
        self.exit_code = exit_code()


def root_cause(error: BaseException) -> BaseException:
    """Return the error that a worker raised, without Ray's wrapping; the search ends at one of this package's own."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while not isinstance(error, (UserError, RunError)):
        # In this order: a task's, that of Ray Train's controller, Python's own.
        cause = getattr(error, "cause", None) or getattr(error, "controller_failure", None) or error.__cause__
        if cause is None:
            break
        error = cause
    return error


def tell_meanwhile(stream: TextIO, message: str) -> None:
    """Write a line of its own to a terminal that may be closed, or that another thread may be writing to."""
    with suppress(OSError, ValueError, RuntimeError):
        stream.write(f"\n{message}\n")
        stream.flush()


@contextmanager
def end_told(stream: TextIO, message: Callable[[], str], put_down: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Tell of the interruption on `stream` if a second signal ends the process before the `with` block is over.

    Args:
        message: returns what stands, and how to go on.
        put_down: called first, to write the same into files.
    """

    def say() -> None:
        with suppress(OSError):
            put_down()
        tell_meanwhile(stream, f"Interrupted. {message()}")

    with last_words(say):
        yield


def interruption(
    error: KeyboardInterrupt, message: Callable[[], str], handled: BaseException | None = None
) -> Interrupted:
    """Return what to tell of `error`: what was about to be told when it came, as a second Ctrl-C, or else `message`.

    Args:
        handled: what the caller was handling when the work began, as the interruption of other work.
    """
    before = error.__context__
    while before is not None and before is not handled:
        if isinstance(before, Interrupted):
            return before
        before = before.__context__
    return Interrupted(message())


def explained(what: str, stands: Callable[[], str], log: Path | None = None) -> AbstractContextManager[None]:
    """Turn what ends a piece of work early into one paragraph: the cause, what stands, and where the details are.

    Bad input is told as it is: its message is complete.

    Args:
        what: names the work, for "... failed".
        stands: returns what stands, and how to go on.
        log: the file that gets the traceback.

    Raises:
        Interrupted: on Ctrl-C, SIGTERM and SIGHUP.
        UserError: if one is the cause.
        RunError: on any other failure.
    """
    return _explained(what, stands, log, complete=(UserError,))


def always_explained(what: str, stands: Callable[[], str], log: Path | None = None) -> AbstractContextManager[None]:
    """Explain as `explained` does, bad input too: where it shows only later, something stands."""
    return _explained(what, stands, log)


def explained_once(what: str, stands: Callable[[], str], log: Path | None = None) -> AbstractContextManager[None]:
    """Explain as `explained` does, but pass on UserError and RunError, which were explained and logged inside."""
    return _explained(what, stands, log, passed=(UserError, RunError), complete=(UserError, RunError))


@contextmanager
def _explained(
    what: str,
    stands: Callable[[], str],
    log: Path | None,
    *,
    passed: tuple[type[Exception], ...] = (),
    complete: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Explain what is raised inside.

    Args:
        passed: errors to raise as they are, without a log.
        complete: causes whose message is complete.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except KeyboardInterrupt as error:
        raise interruption(error, lambda: f"Interrupted. {stands()}", handled) from None
    except Exception as error:
        if isinstance(error, (Interrupted, *passed)):
            raise
        logger.exception("%s failed", what)
        cause = root_cause(error)
        if not isinstance(cause, complete):
            raise _explanation(what, cause, stands(), log) from error
        if cause is error:
            raise
        raise cause from error


def _explanation(what: str, cause: BaseException, stands: str, log: Path | None) -> UserError | RunError:
    """Return the error that tells of `cause`; of a UserError, a UserError."""
    own = isinstance(cause, (UserError, RunError))
    reason = str(cause) if own else f"{what} failed: {one_line(cause)}"
    if not (isinstance(cause, UserError) or "\n" in reason):  # which may end with a command
        reason = f"{reason.rstrip('.')}."
    details = f" Details: {log}" if log else ""
    kind = UserError if isinstance(cause, UserError) else RunError
    return kind(f"{reason}\n{stands}{details}")


def out_of_memory(error: Exception, advice: str) -> RunError:
    """Return the failure to tell of when a GPU's memory is full, with `advice` on settings that need less."""
    cause = str(error).splitlines()[0].partition(" If reserved but unallocated memory is large")[0].rstrip(". ")
    return RunError(f"Out of GPU memory: {cause}. {advice}.")

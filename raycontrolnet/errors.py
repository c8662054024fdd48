"""The errors a user sees: a message that names the value, the place and the next command, and an exit code."""

from __future__ import annotations

from collections.abc import Sequence


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
    """Ctrl-C: the run ended at the user's wish and can be continued. Exit code 130."""

    exit_code = 130


def root_cause(error: BaseException) -> BaseException:
    """The error that a worker raised, without Ray's wrapping; one of this package's own tells all that matters."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while not isinstance(error, (UserError, RunError)):
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None:
            break
        error = cause
    return error

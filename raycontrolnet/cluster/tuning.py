"""Ray Tune's switches and records that its public interface does not reach.

Each name here stands in tests/test_ray_hooks.py, which fails when a new Ray has renamed it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ray.train._internal.session import get_session
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.trainable.function_trainable import FunctionTrainable

TUNE_ENVIRONMENT = {
    # Undocumented. Without it Tune prints a table of its own, which `verbose=0` does not silence.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Without it every trial's folder gets a CSV, a JSON and a TensorBoard file of Tune's beside our own.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Without it Ctrl-C does not raise KeyboardInterrupt in the driver.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Without it a trial that fails before its first measure ends the sweep: it has no objective to report.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Without it Tune keeps writing a record of the sweep; ours are the trials' folders.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    # Without it Tune warns when it writes that record twice within five seconds.
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
QUIET_LOGGER = "ray.tune.analysis"
"""Warns that Tune's own result files, which are switched off above, are missing."""


END_WITHIN_S = 60
"""Seconds that a stopped trial gets to end."""
T = TypeVar("T")


def pass_to_trials(names: Iterable[str]) -> None:
    """Let Tune give trials' processes the driver's environment variables of these names.

    Tune's list of names is private; no public name reaches these processes alone, on a Ray that is connected already.
    """
    ENV_VARS_TO_PROPAGATE.update(names)


@contextmanager
def tune_environment(of_trials: Mapping[str, str] | None = None) -> Iterator[None]:
    """Set Tune's environment variables while the context lasts, and silence the warning about missing files.

    Args:
        of_trials: variables for the processes of trials.
    """
    variables = TUNE_ENVIRONMENT | dict(of_trials or {})
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    pass_to_trials(of_trials or ())
    logging.getLogger(QUIET_LOGGER).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def config_of(trial: Any) -> dict[str, Any]:
    """Return the config of a trial. `Trial` is a developer interface, but all that Tune's callbacks get."""
    return dict(trial.config)


def trial_report(trial: Any) -> dict[str, Any]:
    """Return the last report of a trial; empty before the first."""
    return trial.last_result or {}


def trial_failures(trial: Any) -> int:
    """Return the number of times that a trial's process failed."""
    return int(trial.num_failures)


def trial_error(trial: Any) -> Exception | None:
    """Return the error for which Tune gave `trial` up; None if there is none on record, or it cannot be read here.

    `Trial.get_pickled_error` looks where Tune copies the file at the sweep's end only. Without the file a failed
    trial's record does not name the cause.
    """
    from ray import cloudpickle

    try:
        return cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # noqa: BLE001 (the file may be missing, or its class unknown here)
        return None


class OrderlyEnd(FunctionTrainable):
    """A mixin for Tune's wrapper of a trial function: gives a stopped trial time to end.

    `FunctionTrainable` is a developer interface; `__mixins__`, the attribute of a function that names this class, and
    the session are private. Without it Tune ends the process while the trial writes run.json and ends its workers, and
    counts a trial as failed if the one before in the process takes more than 2 s to end.
    """

    _occupied = False

    def step(self) -> Any:
        """Run the trial to its next report."""
        if self._occupied:
            raise RuntimeError("The previous trial did not shut down; restarting in a new process.")
        return super().step()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """End the trial so far and take the next; returns True, for Tune gives up the next trial otherwise."""
        os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(END_WITHIN_S)
        self._occupied = not super().reset_config(new_config)
        return True

    def cleanup(self) -> None:
        """End the trial before Tune ends its process."""
        thread = get_session().training_thread
        try:
            super().cleanup()
        finally:
            if thread.is_alive():
                thread.join(END_WITHIN_S)


def ends_orderly(function: T) -> T:
    """Let Tune mix `OrderlyEnd` into its wrapper of a trial's function."""
    function.__mixins__ = (OrderlyEnd,)  # type: ignore[attr-defined]
    return function

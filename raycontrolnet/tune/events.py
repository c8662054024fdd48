"""Events of trials, each as a line of words."""

from __future__ import annotations

from raycontrolnet.text import duration, printable
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.table import figure, setting


def event_of(trial: Trial, objective: str, live_step: int | None = None) -> str:
    """Return what has happened to a trial whose state has changed.

    Args:
        live_step: its last update, if known; it may be later than its last report.
    """
    record = trial.record
    worth = f"{objective} {figure(objective, trial.value(objective))}"
    why = f": {printable(record.cause)}" if record.cause else ""
    step = live_step if live_step is not None and record.state in ("failed", "interrupted") else trial.step
    happened = record.state + ("" if step is None else f" at step {step}")
    match record.state:
        case "running":
            settings = ", ".join(f"{printable(name)} {setting(value)}" for name, value in record.settings.items())
            happened = f"goes on at step {step}: {settings}" if step else f"started: {settings}"
        case "finished":
            since = trial.control_since
            control = "no control" if since is None else f"control since step {since}"
            measured = [control] if "control_gap" in trial.last else []
            happened += f": {', '.join([worth, *measured, f'in {duration(record.seconds)}'])}"
        case "stopped":
            happened += f"{why}; {worth}"
        case _:
            happened += why
    return f"trial {record.name} {happened}"

"""Events of trials, each as a line of words."""

from __future__ import annotations

from typing import NamedTuple

from raycontrolnet.text import duration, printable
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.table import figure, settings_in_words


class Event(NamedTuple):
    """Something that happened to a trial."""

    words: str
    failure: bool = False
    """Show it even where the table shows the trial's state."""


def event_of(
    before: Trial | None, trial: Trial, objective: str, *, first: bool, live_step: int | None = None
) -> Event | None:
    """Return what happened to a trial since `before`; None if that is no news.

    Args:
        before: the trial when it was last looked at; None if it was not known.
        first: this is the first look: trials that have ended are no news.
        live_step: its last update, if known.
    """
    record, name = trial.record, f"trial {trial.record.name}"
    broke_at = _at(trial.step if live_step is None else live_step)
    former = None if before is None else before.record
    if former is not None and record.attempts > former.attempts and not record.ended:
        again = f"is tried again (attempt {record.attempts + 1})"
        return Event(f"{name} failed{broke_at}{_why(record.cause)}; it {again}", failure=True)
    if record.state == ("waiting" if former is None else former.state) or (first and record.state != "running"):
        return None
    match record.state:
        case "running":
            how = f"goes on{_at(trial.step)}" if trial.step else "started"
            return Event(f"{name} {how}: {settings_in_words(record.settings)}")
        case "finished":
            return Event(f"{name} finished{_at(trial.step)}: {_worth(trial, objective)}")
        case "stopped":
            worth = f"; {objective} {figure(objective, trial.value(objective))}"
            return Event(f"{name} stopped{_at(trial.step)}{_why(record.cause)}{worth}")
        case "failed":
            return Event(f"{name} failed{broke_at}{_why(record.cause)}", failure=True)
        case "interrupted":
            return Event(f"{name} interrupted{broke_at}{_why(record.cause)}")
    return None


def _worth(trial: Trial, objective: str) -> str:
    since = trial.control_since
    parts = [
        f"{objective} {figure(objective, trial.value(objective))}",
        "no control" if since is None else f"control since step {since}",
        f"in {duration(trial.record.seconds)}",
    ]
    if "control_gap" not in trial.last:  # control was not measured
        del parts[1]
    return ", ".join(parts)


def _at(step: int | None) -> str:
    return "" if step is None else f" at step {step}"


def _why(cause: str | None) -> str:
    return f": {printable(cause)}" if cause else ""

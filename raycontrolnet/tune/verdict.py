"""What a sweep's order of trials is worth: stopping before control appears ranks what comes before control."""

from __future__ import annotations

from collections.abc import Sequence

from raycontrolnet.tune.records import Trial, control_appeared, with_control_gap

STOPPING = ("asha", "median")
"""Schedulers that end weak trials early."""


def rungs(scheduler: str, grace_period: int, reduction_factor: int, total_updates: int) -> list[int]:
    """The updates at which asha stops those that are behind; none for other schedulers."""
    found: list[int] = []
    if scheduler == "asha" and grace_period >= 1 and reduction_factor >= 2:
        while grace_period < total_updates:
            found.append(grace_period)
            grace_period *= reduction_factor
    return found


def too_early(trials: Sequence[Trial], scheduler: str, objective: str) -> str | None:
    """A warning if trials were stopped before any had shown control.

    Returns:
        None if there is nothing to warn of: also where control was not measured, or speed is what trials are ranked by.
    """
    stops = [trial.record.stopped_at for trial in trials if trial.record.state == "stopped"]
    first = min((step for step in stops if step is not None), default=None)
    if scheduler not in STOPPING or objective == "images_per_second" or first is None:
        return None
    till_then = [with_control_gap([report for report in trial.reports if report["step"] <= first]) for trial in trials]
    if not any(till_then) or any(control_appeared(reports) is not None for reports in till_then):
        return None
    return (
        f"No trial had shown control by step {first:,}, where the first were stopped: their order then says little "
        "about where control appears (it comes suddenly, arXiv:2302.05543 section 4). A longer --grace_period is safer."
    )

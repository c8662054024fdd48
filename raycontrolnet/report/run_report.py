"""report.html: a run's folder on one page, for a phone too; one file, without outside links.

    read (run_history.py) -> curves (curves.py) and pictures (thumbnails.py) -> templates/run.html

All text from files is escaped, and a policy in the page's head forbids it to load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raycontrolnet.report import curves, page
from raycontrolnet.report.curves import Column
from raycontrolnet.report.run_history import RunHistory, read
from raycontrolnet.report.thumbnails import MOST_PAIRS, MOST_STEPS, PairHistory, pair_histories
from raycontrolnet.text import STANDARD_ERRORS, counted, duration, plus_minus, short_number
from raycontrolnet.training.held_out import AVERAGES, MIN_GAP_SHARE, control_appeared, gap_and_error
from raycontrolnet.training.metrics import RATE_WINDOW_S, recent_rate
from raycontrolnet.training.status import STATUS_FILE

_PHASES = {
    "start": "start of the workers",
    "model": "loading of the models",
    "first_batch": "wait for the first batch",
    "data_wait": "data wait",
    "step": "step",
    "validation": "validation: held-out loss",
    "validation_images": "validation: images",
    "checkpoint": "checkpoint",
}
"""Phase of the worker's clock -> its name in the report, in this order."""
_BESIDE = {
    "validation_beside": "beside the training: images",
    "checkpoint_beside": "beside the training: checkpoints",
}
"""Phases while the training goes on: no part of the whole."""

_BAND = f"; band: ± {STANDARD_ERRORS} standard errors"


class Card(NamedTuple):
    """A chart in a box of the page."""

    heading: str
    svg: str
    legend: Mapping[str, str] = {}
    """CSS variable of a colour -> its meaning."""


def write_report(output_dir: Path) -> Path:
    """Write `output_dir`/report.html from the folder's files, whole or not at all, and return its path.

    The run may be running, finished, failed or hardly begun: what is missing or half written is left out.
    """
    output_dir = Path(output_dir)
    run = read(output_dir)
    pairs = pair_histories(output_dir, run.last_step)
    return page.write(output_dir, _page(output_dir.resolve().name, run, pairs))


def _page(name: str, run: RunHistory, pairs: Sequence[PairHistory]) -> str:
    appeared = control_appeared(run.held_out)
    return page.render(
        page.TEMPLATES / "run.html",
        name=name,
        kind="run",
        status_file=STATUS_FILE,
        state=run.state,
        how_far=_how_far(run),
        done=run.step,
        total=run.total_updates,
        cause=run.status.get("cause"),
        appeared=appeared is not None,
        control=_control(run, appeared),
        figures=list(_figures(run)),
        learning=list(_learning(run, appeared)),
        pairs=pairs,
        most_steps=MOST_STEPS,
        most_pairs=MOST_PAIRS,
        no_images=_no_images(run),
        speed=list(_speed(run)),
        phases=_phases(run),
        settings=page.settings(run.settings),
        versions=versions if isinstance(versions := run.status.get("versions"), dict) else None,
    )


def _how_far(run: RunHistory) -> str:
    total = run.total_updates
    words = f"{run.step:,} of {total:,} updates ({run.step / total:.0%})" if total else counted(run.step, "update")
    if run.seconds is not None:
        words += f" in {duration(run.seconds, fine=True)}"
    if run.seconds_left is not None:
        words += f", about {duration(run.seconds_left, fine=True)} left"
    return words


def _control(run: RunHistory, appeared: int | None) -> str:
    """Return what the control gap shows, in words."""
    if not run.held_out:
        if not run.status.get("held_out", 1):
            return "Control gap: not measured, as no rows are held out (--validation_split)."
        return f"Control gap: not measured{' yet' if run.state == 'running' else ''}."
    if appeared is None:
        return "No control yet: swapping the control images does not clearly raise the held-out loss."
    return f"Control has appeared at step {appeared:,}."


def _no_images(run: RunHistory) -> str:
    """Return why there are no validation images."""
    if not run.settings:
        return "No validation images."
    if not (run.settings.get("validation_prompt") and run.settings.get("validation_image")):
        return "No validation images: --validation_prompt and --validation_image were not given."
    if run.state != "running":
        return "No validation images: the run ended before any were drawn."
    return f"No validation images yet: they are drawn every {run.settings.get('validation_steps')} steps."


def _figures(run: RunHistory) -> Iterable[tuple[str, str, str]]:
    """Yield title, value and note of each figure at the top."""
    losses = run.updates["loss"][np.isfinite(run.updates["loss"])]
    if losses.size:
        smoothed = curves.smooth(losses)
        yield "loss", short_number(smoothed[-1]), f"at first {short_number(smoothed[0])}"
    if run.held_out:
        first, last = run.held_out[0], run.held_out[-1]
        of = ", of the averages" if last.get("weights") == AVERAGES else ""
        yield "held-out loss", short_number(last["val_loss"]), f"at first {short_number(first['val_loss'])}{of}"
        gap, error = gap_and_error(last)
        yield "control gap", gap, f"{error.strip()}, at step {last['step']:,}"
    if run.fidelity:
        step, fidelity = list(run.fidelity.items())[-1]
        error = plus_minus(fidelity.error).strip()
        yield "control fidelity", short_number(fidelity.mean, 3), f"{error}{', ' * bool(error)}at step {step:,}"
    samples, rates = run.updates["samples"], run.updates["images_per_second"]
    if (known := np.isfinite(samples) & (rates > 0)).any():
        rate = recent_rate(samples[known].tolist(), rates[known].tolist())
        yield "images/s", short_number(rate, 3), f"in the last {RATE_WINDOW_S:.0f} s, without validations"


def _learning(run: RunHistory, appeared: int | None) -> Iterable[Card]:
    steps, held_out = run.updates["step"], {name: _column(run, name) for name in ("step", "val_loss")}
    if steps.size or run.held_out:
        drawn = curves.loss(steps, run.updates["loss"], held_out["step"], held_out["val_loss"])
        legend = {"loss": "training (smoothed; pale: single updates)"}
        yield Card("Loss", drawn, legend | ({"held-out": "held-out rows"} if run.held_out else {}))
    if run.held_out:
        gaps, errors = _column(run, "control_gap"), _column(run, "control_gap_error")
        least = MIN_GAP_SHARE * abs(run.held_out[-1]["val_loss"])
        drawn = curves.control_gap(held_out["step"], gaps, errors, appeared, least)
        at = "" if appeared is None else f"; dashed: control appears at step {appeared:,}"
        yield Card(
            "Control gap", drawn, {"gap": f"how much worse the held-out loss is with wrong control images{_BAND}{at}"}
        )
    if len(run.fidelity) > 1:
        means, errors = np.array(list(run.fidelity.values()), dtype=np.float64).T
        drawn = curves.control_fidelity(np.array(list(run.fidelity), dtype=np.float64), means, errors)
        yield Card(
            "Control fidelity", drawn, {"fidelity": f"how well validation images obey their control images{_BAND}"}
        )


def _column(run: RunHistory, name: str) -> Column:
    return np.array([record[name] for record in run.held_out], dtype=np.float64)


def _speed(run: RunHistory) -> Iterable[Card]:
    if (steps := run.updates["step"]).size:
        drawn = curves.images_per_second(steps, run.updates["images_per_second"])
        yield Card("Images per second", drawn, {"speed": "all workers together (smoothed; pale: single updates)"})
        yield Card("Learning rate", curves.learning_rate(steps, run.updates["lr"]))


def _phases(run: RunHistory) -> list[tuple[str, float, float | None]]:
    """Return name, seconds and share of each phase; those beside the training have no share."""
    names = {phase: words for phase, words in _PHASES.items() if phase in run.seconds_by_phase}
    names |= {phase: phase.replace("_", " ") for phase in run.seconds_by_phase if phase not in (*_PHASES, *_BESIDE)}
    named = [(words, run.seconds_by_phase[phase]) for phase, words in names.items()]
    if run.state != "running" and run.seconds and (rest := run.seconds - sum(seconds for _, seconds in named)) > 0:
        named += [("everything else", rest)] if run.seconds_by_phase else []
    whole = sum(seconds for _, seconds in named) or 1.0
    beside = [(words, run.seconds_by_phase[phase]) for phase, words in _BESIDE.items() if phase in run.seconds_by_phase]
    return [
        *((words, seconds, seconds / whole) for words, seconds in named),
        *((words, seconds, None) for words, seconds in beside if seconds),
    ]

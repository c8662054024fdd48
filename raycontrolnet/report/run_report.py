"""report.html: what a run's folder tells on one page, for a phone too. One file, without scripts or outside links.

    read (run_history.py) -> curves (curves.py) and pictures (thumbnails.py) -> the page

Every text that comes from a file is escaped; a policy in the page's head forbids it to load anything all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

import numpy as np

from raycontrolnet.report import curves, page
from raycontrolnet.report.curves import STANDARD_ERRORS, Column
from raycontrolnet.report.run_history import RECENT_UPDATES, RunHistory, read
from raycontrolnet.report.thumbnails import MOST_PAIRS, MOST_STEPS, PairHistory, pair_histories
from raycontrolnet.training.held_out import control_appeared

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
"""Phase in the worker's clock -> its name in the report, in this order."""
_BESIDE = "validation_beside"
"""The one that another worker spends while the training goes on: no part of the whole."""


def write_report(output_dir: Path) -> Path:
    """Write `output_dir`/report.html, whole or not at all: what the folder's files tell, and nothing else.

    The run may be going on, finished, failed or hardly begun: what is missing or half written is left out.

    Returns:
        The report's path.
    """
    output_dir = Path(output_dir)
    run = read(output_dir)
    pairs = pair_histories(output_dir, run.last_step)
    return page.write(output_dir, _page(output_dir.resolve().name, run, pairs))


def _page(name: str, run: RunHistory, pairs: Sequence[PairHistory]) -> str:
    sections = [*_summary(name, run), *_learning(run), *_pictures(run, pairs), *_speed(run), *_settings(run)]
    return page.frame(name, run.state, sections)


def _summary(name: str, run: RunHistory) -> Iterable[str]:
    """In words and a few figures: how far, how well, and what went wrong."""
    yield page.title(name, run.state)
    yield f"<p>{_how_far(run)}</p>"
    if run.total_updates:
        yield page.progress(run.state, run.step, run.total_updates)
    if cause := run.status.get("cause"):
        yield f'<p class="cause">{escape(str(cause))}</p>'
    kind, words = _control(run)
    yield f'<p class="control {kind}">{words}</p>'
    yield from page.figures(_figures(run))


def _how_far(run: RunHistory) -> str:
    total = run.total_updates
    words = (
        f"{run.step:,} of {total:,} updates ({run.step / total:.0%})"
        if total
        else f"{run.step:,} update{'s' * (run.step != 1)}"
    )
    if run.seconds is not None:
        words += f" in {page.time(run.seconds)}"
    if run.seconds_left is not None:
        words += f", about {page.time(run.seconds_left)} left"
    if run.last_sign_s is not None:
        seen = datetime.fromtimestamp(run.last_sign_s, timezone.utc)
        words += f'. <span class="pale seen">As of {seen:%Y-%m-%d %H:%M} UTC.</span>'
    return words


def _control(run: RunHistory) -> tuple[str, str]:
    """(class for the style sheet, what the control gap shows)."""
    if not run.held_out:
        yet = " yet" if run.state == "running" and run.status.get("held_out", 1) else ""
        return "", f"Control gap: not measured{yet}."
    appeared = _appeared(run)
    if appeared is None:
        return "", "No control yet: swapping the control images does not clearly raise the held-out loss."
    return "appeared", f"Control has appeared at step {appeared:,}."


def _appeared(run: RunHistory) -> int | None:
    return control_appeared(run.held_out)


def _figures(run: RunHistory) -> Iterable[tuple[str, str, str]]:
    """(title, value, note) of each figure at the top; as HTML."""
    losses = run.updates["loss"][np.isfinite(run.updates["loss"])]
    if losses.size:
        smoothed = curves.smooth(losses)
        yield "loss", f"{smoothed[-1]:.4g}", f"at first {smoothed[0]:.4g}"
    if run.held_out:
        first, last = run.held_out[0], run.held_out[-1]
        yield "held-out loss", f"{last['val_loss']:.4g}", f"at first {first['val_loss']:.4g}"
        error = STANDARD_ERRORS * last["control_gap_error"]
        yield "control gap", f"{last['control_gap']:.2g}", f"± {error:.2g}, at step {last['step']:,}"
    if run.fidelity:
        step, fidelity = list(run.fidelity.items())[-1]
        error = "" if math.isnan(fidelity.error) else f"± {STANDARD_ERRORS * fidelity.error:.2g}, "
        yield "control fidelity", f"{fidelity.mean:.3g}", f"{error}at step {step:,}"
    rates = run.updates["images_per_second"][-RECENT_UPDATES:]
    if (rates := rates[np.isfinite(rates)]).size:
        yield "images/s", f"{np.median(rates):.3g}", f"last {rates.size} updates"


def _learning(run: RunHistory) -> Iterable[str]:
    steps, held_out = run.updates["step"], {name: _column(run, name) for name in ("step", "val_loss")}
    yield '<h2>Learning</h2>\n<div class="cards">'
    if not steps.size and not run.held_out:
        yield '<p class="card pale">No update is done yet.</p>'
    else:
        drawn = curves.loss(steps, run.updates["loss"], held_out["step"], held_out["val_loss"])
        legend = {"loss": "training (smoothed; pale: single updates)"} | (
            {"held-out": "held-out rows"} if run.held_out else {}
        )
        yield page.card("Loss", legend, drawn)
    if run.held_out:
        appeared = _appeared(run)
        drawn = curves.control_gap(
            held_out["step"], _column(run, "control_gap"), _column(run, "control_gap_error"), appeared
        )
        at = "" if appeared is None else f"; control appears at step {appeared:,} (dashed)"
        yield page.card("Control gap", {"gap": f"loss with swapped control images less loss{at}"}, drawn)
    if len(run.fidelity) > 1:
        means, errors = np.array(list(run.fidelity.values()), dtype=np.float64).T
        drawn = curves.control_fidelity(np.array(list(run.fidelity), dtype=np.float64), means, errors)
        yield page.card("Control fidelity", {"fidelity": "how well validation images obey their control images"}, drawn)
    if steps.size:
        drawn = curves.learning_rate(steps, run.updates["lr"])
        yield page.card("Learning rate", {}, drawn)
    yield "</div>"


def _column(run: RunHistory, name: str) -> Column:
    return np.array([record[name] for record in run.held_out], dtype=np.float64)


def _pictures(run: RunHistory, pairs: Sequence[PairHistory]) -> Iterable[str]:
    yield "<h2>What it draws</h2>"
    if not pairs:
        wanted = run.settings.get("validation_prompt")
        yield f'<p class="pale">No validation images{" yet" if wanted and run.state == "running" else ""}.</p>'
        return
    most = f"at most {MOST_STEPS} steps of at most {MOST_PAIRS} prompts"
    yield f'<p class="pale">The newest first; {most}. All are in the folder <code>validation</code>.</p>'
    for pair in pairs:
        prompt = escape(pair.prompt) if pair.prompt.strip() else "(empty prompt)"
        yield f'<section class="card pair"><h3>{prompt}</h3>'
        yield f'<div class="strip" tabindex="0" role="group" aria-label="Images of: {prompt}">'
        if pair.control:
            yield _picture(pair.control, "control image", f"control image of: {prompt}")
        for step, tile in reversed(pair.tiles.items()):
            yield _picture(tile, f"step {step:,}", f"step {step:,}: {prompt}")
        yield "</div></section>"


def _picture(source: str, caption: str, alt: str) -> str:
    return f'<figure><img src="{source}" alt="{alt}"><figcaption><small>{caption}</small></figcaption></figure>'


def _speed(run: RunHistory) -> Iterable[str]:
    steps = run.updates["step"]
    if not steps.size and not run.seconds_by_phase:
        return
    yield '<h2>Speed</h2>\n<div class="cards">'
    if steps.size:
        drawn = curves.images_per_second(steps, run.updates["images_per_second"])
        yield page.card("Images per second", {"speed": "all workers together (smoothed; pale: single updates)"}, drawn)
    if run.seconds_by_phase:
        yield page.card("Time by phase", {}, _phases(run))
    yield "</div>"


def _phases(run: RunHistory) -> str:
    phases = {phase: run.seconds_by_phase[phase] for phase in _PHASES if phase in run.seconds_by_phase}
    others = {phase: seconds for phase, seconds in run.seconds_by_phase.items() if phase not in (*_PHASES, _BESIDE)}
    named = {_PHASES[phase]: seconds for phase, seconds in phases.items()}
    named |= {phase.replace("_", " "): seconds for phase, seconds in others.items()}
    if run.state != "running" and run.seconds and (rest := run.seconds - sum(named.values())) > 0:
        named["everything else"] = rest
    whole = sum(named.values()) or 1.0
    items = [
        f"<li><span>{escape(name)}</span><span>{page.time(seconds)} · {seconds / whole:.0%}</span>"
        f'<i style="width: {100 * seconds / whole:.1f}%"></i></li>'
        for name, seconds in named.items()
    ]
    if seconds := run.seconds_by_phase.get(_BESIDE):
        items.append(f"<li><span>beside the training: images</span><span>{page.time(seconds)}</span></li>")
    return '<ul class="phases">\n' + "\n".join(items) + "\n</ul>"


def _settings(run: RunHistory) -> Iterable[str]:
    yield from page.settings("Settings", run.settings)
    yield from page.versions(run.status.get("versions"))

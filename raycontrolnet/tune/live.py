"""The table of a sweep while it runs: redrawn in place on a terminal, printed now and then in a plain log."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

from rich.text import Text

from raycontrolnet.text import Screen, duration, printable
from raycontrolnet.training import metrics
from raycontrolnet.tune.events import event_of
from raycontrolnet.tune.records import Trial, TrialRecord, measured, ranked
from raycontrolnet.tune.table import LiveState, figure, trial_table

logger = logging.getLogger(__name__)

DRAW_INTERVAL_S = 0.5
TABLE_INTERVAL_S = 60.0
"""Without a terminal, the whole table is printed at most this often, and at the end."""
JOIN_S = 10.0
"""A terminal that takes nothing (Ctrl-S) delays the end of the sweep by this at most."""
RECENT_UPDATES = 20
"""The loss of a running trial is the mean of this many updates."""

DIM_STATES = ("waiting", "stopped", "failed", "interrupted")


class TrialProgress:
    """Follows the updates of a trial in its metrics file."""

    def __init__(self, folder: Path):
        self.step: int | None = None
        self._tail = metrics.Tail(folder / metrics.METRICS_FILE)
        self._updates: deque[dict[str, Any]] = deque(maxlen=RECENT_UPDATES)
        self._running = False
        self._seconds, self._since = 0.0, 0.0

    def now(self, record: TrialRecord) -> LiveState:
        """Return where the trial is; once it no longer runs only the step: its record and reports have the rest."""
        if (runs := record.state == "running") and not self._running:
            self._seconds, self._since = record.seconds, time.monotonic()
        if runs or self._running:  # once more after its end
            self._read()
        self._running = runs
        if not runs:
            return LiveState(self.step)
        losses = [float(update["loss"]) for update in self._updates]
        mean = math.fsum(losses) / len(losses) if losses else None
        return LiveState(self.step, mean, self._seconds + time.monotonic() - self._since)

    def _read(self) -> None:
        try:
            records, restarted = self._tail.read()
        except (OSError, ValueError):  # it is being replaced
            return
        if restarted:
            self._updates.clear()
        self._updates.extend(record for record in records if {"step", "loss"} <= record.keys())
        if self._updates:
            self.step = int(self._updates[-1]["step"])


class LiveTable:
    """Shows a sweep: a summary line and a table of its trials; in a log also what happens to them.

    A thread reads and draws: `update` never waits for the stream, and never raises. On a terminal nothing else should
    write to the stream meanwhile.

    Args:
        total_trials: number of trials of the whole sweep, if they are not all known from the start.
        total_steps: updates of a trial, unless its own settings name max_train_steps.
    """

    def __init__(
        self,
        name: str,
        objective: str,
        stream: TextIO,
        *,
        total_trials: int | None = None,
        total_steps: int | None = None,
    ):
        self.name, self.objective = printable(name), objective
        self.total_trials, self.total_steps = total_trials or 0, total_steps
        self._screen = Screen(stream)
        self._updates: SimpleQueue[Sequence[Trial]] = SimpleQueue()
        self._trials: Sequence[Trial] | None = None
        self._tabled: Sequence[Trial] | None = None
        self._tabled_at = self._started = time.monotonic()
        self._progress: dict[int, TrialProgress] = {}
        self._complained = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep-table", daemon=True)

    def __enter__(self) -> LiveTable:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(JOIN_S)

    def update(self, trials: Sequence[Trial]) -> None:
        """Take note of all trials as they are now."""
        self._updates.put(list(trials))

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(DRAW_INTERVAL_S)
            with self._harmless():
                self._tell_news()
            with self._harmless():
                self._draw(over)
        with self._harmless():
            self._screen.close()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Log what goes wrong with the table, once: the sweep goes on."""
        try:
            yield
        except Exception as error:
            logger.debug("traceback of the sweep's table", exc_info=True)
            if not self._complained:
                self._complained = True
                logger.warning("the sweep's table cannot be shown (%s: %s)", type(error).__name__, error)

    def _tell_news(self) -> None:
        """Print what has happened to trials; on a terminal, whose table shows their states, only failures."""
        while not self._updates.empty():
            known = None if self._trials is None else {trial.record.index: trial.record.state for trial in self._trials}
            self._trials = self._updates.get()
            for trial in self._trials:
                index, state = trial.record.index, trial.record.state
                if state == "waiting" or (self._screen.live and state != "failed"):
                    continue
                # At the first look, trials that have ended are no news.
                is_news = state == "running" if known is None else state != known.get(index, "waiting")
                if is_news:
                    progress = self._progress.get(index)
                    self._screen.say(event_of(trial, self.objective, progress.step if progress else None))

    def _draw(self, last: bool) -> None:
        """Draw the table, or print it in a log if there is something new and it is time."""
        if self._trials is None:
            return
        now = self._follow(self._trials)
        if self._screen.live:
            self._screen.draw(self._on_terminal(self._trials, now, *self._screen.size()))
        elif self._trials != self._tabled and (last or time.monotonic() - self._tabled_at >= TABLE_INTERVAL_S):
            self._tabled, self._tabled_at = self._trials, time.monotonic()
            for line in (self._header(self._trials), *self._table(self._trials, now)):
                self._screen.say(line.plain)

    def _follow(self, trials: Sequence[Trial]) -> Mapping[int, LiveState]:
        """Return where the trials are that have run since this table began."""
        now = {}
        for trial in trials:
            index = trial.record.index
            if trial.record.state == "running" and index not in self._progress:
                self._progress[index] = TrialProgress(trial.folder)
            if index in self._progress:
                now[index] = self._progress[index].now(trial.record)
        return now

    def _header(self, trials: Sequence[Trial]) -> Text:
        """Return `sweep NAME: 7 finished, 3 stopped, 2 running of 16 | best val_loss 0.1234 (0003) | 12:34`."""
        total = max(self.total_trials, len(trials))
        counts = Counter(trial.record.state for trial in trials)
        counts["waiting"] += total - len(trials)
        order = ("finished", "stopped", "failed", "interrupted", "running", "waiting")
        told = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
        parts = [f"sweep {self.name}: {told} of {total}" if told else f"sweep {self.name}: no trials yet"]
        if best := self._best(trials):
            worth = figure(self.objective, best.value(self.objective))
            parts.append(f"best {self.objective} {worth} ({best.record.name})")
        return Text(" | ".join([*parts, duration(time.monotonic() - self._started)]))

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        return next(iter(measured(trials, self.objective)), None)

    def _table(self, trials: Sequence[Trial], now: Mapping[int, LiveState], width: int | None = None) -> list[Text]:
        """Return the headings, and a line per trial: the running ones, then the others, the best first."""
        rows = sorted(ranked(trials, self.objective), key=lambda trial: trial.record.state != "running")
        if not rows:
            return []
        best, lines = self._best(trials), trial_table(rows, self.objective, now, self.total_steps, width)
        styles = ["bold" if trial is best else "dim" if trial.record.state in DIM_STATES else "" for trial in rows]
        for line, style in zip(lines, ["bold", *styles], strict=True):
            line.style = style
        return lines

    def _on_terminal(
        self, trials: Sequence[Trial], now: Mapping[int, LiveState], width: int, height: int
    ) -> list[Text]:
        """Return the lines that fit a terminal of this size."""
        header, rows = self._header(trials), height - 2
        header.truncate(width, overflow="ellipsis")
        if not trials or rows < min(2, len(trials)):
            return [header]
        names, *table = self._table(trials, now, width)
        if len(table) > rows:
            table[rows - 1 :] = [Text(f"... and {len(table) - (rows - 1)} more"[:width])]
        return [header, names, *table]

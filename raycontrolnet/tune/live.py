"""The table of a sweep while it runs: redrawn in place on a terminal, printed now and then in a plain log."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.cells import cell_len
from rich.text import Text

from raycontrolnet.text import Screen, duration, printable
from raycontrolnet.training import metrics
from raycontrolnet.tune.events import event_of
from raycontrolnet.tune.records import STATES, Trial, TrialRecord, measured, ranked
from raycontrolnet.tune.table import LiveState, clip, columns_of, figure, lay_out

logger = logging.getLogger(__name__)

DRAW_INTERVAL_S = 0.5
TABLE_INTERVAL_S = 60.0
"""Without a terminal, the whole table is printed at most this often, and at the end."""
JOIN_S = 10.0
"""A terminal that takes nothing (Ctrl-S) delays the end of the sweep by this at most."""
RECENT_UPDATES = 20
"""The loss of a running trial is the mean of this many updates."""

DIM_STATES = ("waiting", "stopped", "failed", "interrupted")


class Running:
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
    """Shows a sweep: a summary line and a table of its trials.

    with LiveTable("my-sweep", "val_loss", sys.stderr) as table: table.update(trials)

    A thread reads and draws: `update` and `say` never wait for the stream, and never raise. On a terminal nothing else
    should write to the stream meanwhile; single lines go through `say`.

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
        self.total_trials, self.total_steps = total_trials, total_steps
        self._screen = Screen(stream)
        self.live = self._screen.live
        self._lock = threading.RLock()  # held for moments; a signal handler may call `say` meanwhile
        self._trials: Sequence[Trial] | None = None
        self._words: deque[str] = deque()
        self._changed = False
        self._running: dict[int, Running] = {}
        self._tabled_at = self._started = time.monotonic()
        self._complained = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep-table", daemon=True)

    def __enter__(self) -> LiveTable:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(JOIN_S)

    def update(self, trials: Sequence[Trial]) -> None:
        """Take note of all trials as they are now."""
        with self._harmless():
            self._note(list(trials))

    def say(self, words: str) -> None:
        """Print a line above the table."""
        with self._lock:
            self._words.append(words)

    def _note(self, trials: Sequence[Trial]) -> None:
        with self._lock:
            known = None if self._trials is None else {trial.record.index: trial for trial in self._trials}
            self._trials = trials
            self._changed |= known is None
            for trial in trials:
                before = None if known is None else known.get(trial.record.index)
                running = self._running.get(trial.record.index)
                live_step = running.step if running is not None else None
                event = event_of(before, trial, self.objective, first=known is None, live_step=live_step)
                if event is not None and (not self.live or event.failure):
                    self._words.append(event.words)
                self._changed |= before is None or (before.record, before.last) != (trial.record, trial.last)

    def _watch(self) -> None:
        last = False
        while not last:
            last = self._stop.wait(DRAW_INTERVAL_S)
            with self._harmless():
                self._draw(last)

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

    def _draw(self, last: bool) -> None:
        due = self.live or last or time.monotonic() - self._tabled_at >= TABLE_INTERVAL_S
        with self._lock:
            trials, changed = self._trials, self._changed
            self._changed &= not due
            words = [self._words.popleft() for _ in range(len(self._words))]
        lines: list[Text] = []
        with self._harmless():  # the words are printed in any case
            lines = self._lines(trials, changed and due)
        for line in words:
            self._screen.say(line)
        if self.live and lines:
            self._screen.draw(lines)
        elif not self.live:
            for row in lines:
                self._screen.say(row.plain)
        if last:
            self._screen.close()

    def _lines(self, trials: Sequence[Trial] | None, wanted: bool) -> list[Text]:
        """Return the lines on the terminal, or the whole table for the log if it is `wanted`."""
        now = self._follow(trials or [])
        if trials is None or not (self.live or wanted):
            return []
        if self.live:
            return self._on_terminal(trials, now, *self._screen.size())
        self._tabled_at = time.monotonic()
        return [Text(self.header(trials)), *self._table(trials, now, None)]

    def _follow(self, trials: Sequence[Trial]) -> Mapping[int, LiveState]:
        """Return where the trials are that have run since this table began."""
        now = {}
        for trial in trials:
            index = trial.record.index
            if trial.record.state == "running" and index not in self._running:
                self._running[index] = Running(trial.folder)
            if index in self._running:
                now[index] = self._running[index].now(trial.record)
        return now

    def header(self, trials: Sequence[Trial], width: int | None = None) -> str:
        """Return `sweep NAME: 7 finished, 3 stopped, 2 running of 16 | best val_loss 0.1234 (0003) | 12:34`."""
        counts = {state: sum(trial.record.state == state for trial in trials) for state in STATES}
        total = max(self.total_trials or 0, len(trials))
        counts["waiting"] += total - len(trials)
        order = ("finished", "stopped", "failed", "interrupted", "running", "waiting")
        told = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
        parts = [f"sweep {self.name}: {told} of {total}" if told else f"sweep {self.name}: no trials yet"]
        shorter = list(parts)
        if (best := self._best(trials)) is not None:
            worth = f"{figure(self.objective, best.value(self.objective))} ({best.record.name})"
            parts.append(f"best {self.objective} {worth}")
            shorter.append(f"best {worth}")
        parts.append(duration(time.monotonic() - self._started))
        choices = [" | ".join(some) for some in (parts, parts[:-1], shorter, shorter[:1])]
        if width is None:
            return choices[0]
        return next((line for line in choices if cell_len(line) <= width), clip(choices[-1], width))

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        return next(iter(measured(trials, self.objective)), None)

    def _table(self, trials: Sequence[Trial], now: Mapping[int, LiveState], width: int | None) -> list[Text]:
        """Return the names of the columns and a row per trial, in their styles."""
        columns, rows = columns_of(trials, self.objective, self.total_steps), self._order(trials)
        cells = [[column.cell(t, now.get(t.record.index, LiveState())) for column in columns] for t in rows]
        if not cells:
            return []
        best, lines = self._best(trials), lay_out(columns, cells, width)
        styles = ["bold" if t is best else "dim" if t.record.state in DIM_STATES else "" for t in rows]
        return [Text(line, style) for line, style in zip(lines, ["bold", *styles], strict=True)]

    def _order(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the running trials, then the others, the best first."""
        return sorted(ranked(trials, self.objective), key=lambda trial: trial.record.state != "running")

    def _on_terminal(
        self, trials: Sequence[Trial], now: Mapping[int, LiveState], width: int, height: int
    ) -> list[Text]:
        """Return the lines that fit a terminal of this size."""
        header = Text(self.header(trials, width))
        rows = height - 2
        if not trials or rows < min(2, len(trials)):
            return [header]
        names, *table = self._table(trials, now, width)
        if len(table) > rows:
            table[rows - 1 :] = [Text(clip(f"... and {len(table) - (rows - 1)} more", width))]
        return [header, names, *table]

"""The table of a sweep while it goes on: redrawn in place on a terminal, now and then in a plain log."""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from raycontrolnet.text import duration
from raycontrolnet.training import metrics
from raycontrolnet.tune.events import event_of
from raycontrolnet.tune.records import STATES, Trial, TrialRecord, measured, ranked
from raycontrolnet.tune.table import LiveState, clip, columns_of, figure, lay_out, plain, text_width

logger = logging.getLogger(__name__)

DRAW_INTERVAL_S = 0.5
TABLE_INTERVAL_S = 60.0
"""Without a terminal, the whole table is printed at most this often, and at the end."""
JOIN_S = 10.0
"""A terminal that takes nothing (Ctrl-S) holds the end of the sweep up no longer than this."""
RECENT_UPDATES = 20
"""Of a running trial, the mean loss of so many is shown."""

BOLD, DIM, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[0m"
ERASE_BELOW, ERASE_RIGHT = "\x1b[J", "\x1b[K"
DIM_STATES = ("waiting", "stopped", "failed", "interrupted")


class Size(NamedTuple):
    """Of the terminal."""

    columns: int
    lines: int


class Running:
    """Follows the updates of a trial in its metrics file."""

    def __init__(self, folder: Path):
        self.step: int | None = None
        self._tail = metrics.Tail(folder / metrics.METRICS_FILE)
        self._updates: deque[dict[str, Any]] = deque(maxlen=RECENT_UPDATES)
        self._going_on = False
        self._seconds, self._since = 0.0, 0.0

    def now(self, record: TrialRecord) -> LiveState:
        """Where it is; of one that no longer runs only the step, the rest is in its record and reports."""
        if (going_on := record.state == "running") and not self._going_on:
            self._seconds, self._since = record.seconds, time.monotonic()
        if going_on or self._going_on:  # once more after its end
            self._read()
        self._going_on = going_on
        if not going_on:
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
    """Shows a sweep: a line that sums it up and a table of its trials.

    with LiveTable("my-sweep", "val_loss", sys.stderr) as table: table.update(trials)

    A thread of its own reads and draws: `update` and `say` never wait for the stream. Nothing raises; a stream that is
    broken is ignored.
    On a terminal nothing else should write there meanwhile: what there is to tell goes through `say`.

    Args:
        total_trials: of the whole sweep, if they are not all known from the start.
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
        self.name, self.objective, self.stream = plain(name), objective, stream
        self.total_trials, self.total_steps = total_trials, total_steps
        self.live = _is_terminal(stream)
        self.styled = self.live and not os.environ.get("NO_COLOR")
        self._lock = threading.RLock()  # held for moments; a signal handler may call `say` meanwhile
        self._trials: Sequence[Trial] | None = None
        self._words: deque[str] = deque()
        self._changed = False
        self._running: dict[int, Running] = {}
        self._drawn: Sequence[str] = ()
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
        """These are all the trials, as they stand now."""
        with self._harmless():
            self._note(list(trials))

    def say(self, words: str) -> None:
        """Print a line of its own, above the table."""
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
        """Whatever goes wrong with the table, the sweep goes on."""
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
        lines: list[str] = []
        with self._harmless():  # the words are told in any case
            lines = self._lines(trials, changed and due)
        if self.live:
            self._redraw(words, lines, last)
        elif words or lines:
            self._write("".join(line + "\n" for line in [*map(plain, words), *lines]))

    def _lines(self, trials: Sequence[Trial] | None, wanted: bool) -> list[str]:
        """What stands on the terminal, or the whole table if it is `wanted` in the log."""
        now = self._follow(trials or [])
        if trials is None or not (self.live or wanted):
            return []
        if self.live:
            return self._screen(trials, now, self._size())
        self._tabled_at = time.monotonic()
        return [self.header(trials), *self._table(trials, now, None)]

    def _follow(self, trials: Sequence[Trial]) -> Mapping[int, LiveState]:
        """Where the trials are that have run while this looked on."""
        now = {}
        for trial in trials:
            index = trial.record.index
            if trial.record.state == "running" and index not in self._running:
                self._running[index] = Running(trial.folder)
            if index in self._running:
                now[index] = self._running[index].now(trial.record)
        return now

    def header(self, trials: Sequence[Trial], width: int | None = None) -> str:
        """sweep NAME: 7 finished, 3 stopped, 2 running, 4 waiting of 16 | best val_loss 0.1234 (0003) | 12:34."""
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
        return next((line for line in choices if text_width(line) <= width), clip(choices[-1], width))

    def _best(self, trials: Sequence[Trial]) -> Trial | None:
        return next(iter(measured(trials, self.objective)), None)

    def _table(self, trials: Sequence[Trial], now: Mapping[int, LiveState], width: int | None) -> list[str]:
        columns = columns_of(trials, self.objective, self.total_steps)
        cells = [
            [column.cell(t, now.get(t.record.index, LiveState())) for column in columns] for t in self._order(trials)
        ]
        return lay_out(columns, cells, width) if cells else []

    def _order(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that run, then the others, the best first."""
        return sorted(ranked(trials, self.objective), key=lambda trial: trial.record.state != "running")

    def _screen(self, trials: Sequence[Trial], now: Mapping[int, LiveState], size: Size) -> list[str]:
        """The lines on a terminal of this size: one column and one line less, or it would wrap or scroll."""
        width, height = max(1, size.columns - 1), max(1, size.lines - 1)
        lines = [self.header(trials, width)]
        rows = height - 2
        if not trials or rows < min(2, len(trials)):
            return lines
        best = self._best(trials)
        names, *table = self._table(trials, now, width)
        styled = [self._style(line, trial, best) for line, trial in zip(table, self._order(trials), strict=True)]
        if len(styled) > rows:
            more = f"... and {len(styled) - (rows - 1)} more"
            styled = [*styled[: rows - 1], clip(more, width)]
        return [*lines, f"{BOLD}{names}{PLAIN}" if self.styled else names, *styled]

    def _style(self, line: str, trial: Trial, best: Trial | None) -> str:
        style = BOLD if trial is best else DIM if trial.record.state in DIM_STATES else ""
        return f"{style}{line}{PLAIN}" if style and self.styled else line

    def _redraw(self, words: Sequence[str], lines: Sequence[str], last: bool) -> None:
        """Take the former table's place; the cursor waits at the end of its last line."""
        columns = self._size().columns
        # A terminal that became narrower has wrapped the lines that no longer fit.
        rows = sum(max(1, math.ceil(text_width(_bare(line)) / columns)) for line in self._drawn)
        start = "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "")
        above = ERASE_BELOW + "".join(plain(line) + "\n" for line in words) if words else ""
        below = (ERASE_RIGHT + "\n").join(lines) + ERASE_RIGHT + ERASE_BELOW if lines else ""
        self._write(start + above + below + ("\n" if last and lines else ""))
        self._drawn = lines

    def _size(self) -> Size:
        try:
            found = Size(*os.get_terminal_size(self.stream.fileno()))
        except (OSError, ValueError, AttributeError):
            found = Size(0, 0)
        return found if found.columns > 0 and found.lines > 0 else Size(*shutil.get_terminal_size())

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError):  # closed, or nobody reads it
            logger.debug("the sweep's table cannot be written", exc_info=True)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError, AttributeError):
        return False


def _bare(line: str) -> str:
    for style in (BOLD, DIM, PLAIN):
        line = line.replace(style, "")
    return line

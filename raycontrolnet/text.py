"""Numbers, sizes, durations and errors in words."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TextIO

PLAIN_INTERVAL_S = 15.0
"""Without a terminal, a line of its own is printed this often, and for the first and the last update."""


SHOWN_PROBLEMS = 10
"""Problems of one kind that are listed; the rest is counted."""


def duration(seconds: float, *, fine: bool = False) -> str:
    """Return 3725 as 1:02:05 and 65 as 1:05.

    Args:
        fine: return times below a minute as 20.5 s instead of 0:20.
    """
    if fine and seconds < 60:
        return f"{seconds:.3g} s"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def file_size(num_bytes: float) -> str:
    """Return 65536 as 65.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def counted(number: float, noun: str) -> str:
    """Return `1 image`, `2 images` or `1,000 images`."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'s' * (number != 1)}"


def short_number(number: float, digits: int = 4) -> str:
    """Return 2500 as 2.5k and 0.00001 as 1e-5."""
    for unit, sign in ((1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.{digits}g}{sign}"
    return re.sub(r"e([+-])0*", r"e\1", f"{number:.{digits}g}").replace("e+", "e")


def error_message(error: BaseException, most: int | None = None) -> str:
    """Return what `error` says, in one line of at most `most` letters; its kind if it says nothing."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    return words[:most] or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the kind of `error` and the last line of its message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def shorten(problems: Sequence[str], what: str) -> list[str]:
    """Return the first few of `problems`, and the number of all if there are more; `what` names their kind."""
    if len(problems) <= SHOWN_PROBLEMS:
        return list(problems)
    return [*problems[:SHOWN_PROBLEMS], f"... {len(problems):,} {what} in all"]


class Counter:
    """`latents: 640/50,000 images | 12.3 images/s | 1:06:00 left`."""

    def __init__(self, name: str, unit: str, total: int, done: int, stream: TextIO):
        self.name, self.unit, self.total, self.done, self.stream = name, unit, total, done, stream
        self.first = done
        self.started = time.monotonic()
        self.live = stream.isatty()
        self._printed_at, self._shown = float("-inf"), -1
        self._show()

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        self._show()

    def close(self) -> None:
        """Show the last count, and end the line."""
        self._show(last=True)
        if self.live:
            self.stream.write("\n")
        self.stream.flush()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def line(self) -> str:
        """The line as it stands."""
        parts = [f"{self.name}: {self.done:,}/{self.total:,} {self.unit}"]
        rate = (self.done - self.first) / max(self.seconds, 1e-9)
        if self.done > self.first:
            parts += [f"{rate:.3g} {self.unit}/s", f"{duration((self.total - self.done) / rate)} left"]
        return " | ".join(parts)

    def _show(self, *, last: bool = False) -> None:
        if self.live:
            self.stream.write("\r\x1b[2K" + self.line())
        elif self.done != self._shown and (last or time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S):
            self.stream.write(self.line() + "\n")
            self._printed_at, self._shown = time.monotonic(), self.done
        self.stream.flush()

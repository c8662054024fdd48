"""Numbers, sizes, durations and errors in words, and how such lines reach a terminal or a log."""

from __future__ import annotations

import difflib
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

STANDARD_ERRORS = 2
"""Shown on either side of a control gap or fidelity, everywhere."""
PLAIN_INTERVAL_S = 15.0
"""Without a terminal, a line is printed this often, and for the first and the last update."""

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


def plus_minus(error: float, noise: float = 0.0) -> str:
    """Return ` ± 0.004 (2 standard errors)` for a standard error of 0.002; nothing for nan; `noise` as of `above`."""
    return "" if math.isnan(error) else f" {spread(error, noise)} ({STANDARD_ERRORS} standard errors)"


def spread(error: float, noise: float) -> str:
    """Return `± 0.004` for a standard error of 0.002; `noise` as of `above`."""
    return f"± {above(STANDARD_ERRORS * error, STANDARD_ERRORS * noise, 1)}"


def above(number: float, noise: float, digits: int = 4) -> str:
    """Return a short number; `<5e-7` for one that is not 0 and not above `noise`, which may be all of it."""
    return f"<{short_number(noise, 1)}" if 0 < abs(number) <= noise else short_number(number, digits)


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


def decimals(number: float, places: int = 4) -> str:
    """Return 0.25 as 0.2500, and what would lose all but one of its digits with two of them: 0.00034, 1e-8."""
    small = 0 < abs(number) < 10.0 ** (1 - places)
    return short_number(number, 2) if small else f"{number:.{places}f}"


def short_number(number: float, digits: int = 4) -> str:
    """Return 2500 as 2.5k, 2567000000 as 2.567B and 0.00001 as 1e-5."""
    rounded = f"{number:.{digits}g}"
    for unit, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(float(rounded)) < 1000 * unit:
            return f"{float(rounded) / unit:.{digits}g}{sign}"
    return short_exponent(rounded)


def short_exponent(number: str) -> str:
    """Return 1e-05 as 1e-5, and 1e+06 as 1e6."""
    return re.sub(r"e([+-])0*", r"e\1", number).replace("e+", "e")


def error_message(error: BaseException, most: int | None = None) -> str:
    """Return what `error` says, in one line of at most `most` letters; its kind if it says nothing."""
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    return words[:most] or type(error).__name__


def one_line(error: BaseException) -> str:
    """Return the kind of `error` and the last line of its message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def shorten(problems: Sequence[str], what: str, total: int | None = None) -> list[str]:
    """Return the first few of `problems`, and the number of all if there are more; `what` names their kind.

    Args:
        total: number of all, if not all are given.
    """
    if len(problems) <= SHOWN_PROBLEMS:
        return list(problems)
    return [*problems[:SHOWN_PROBLEMS], f"... {total or len(problems):,} {what} in all"]


def first_of(words: Sequence[str], most: int = SHOWN_PROBLEMS) -> str:
    """Return `a, b and 3 more`: the first `most` of `words`, and the number of the others."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more:,} more" if more > 0 else "")


def perhaps(word: str, known: Iterable[str]) -> str:
    """Return a hint at the name in `known` that is nearest to `word`: `; perhaps you meant ...`; empty without one.

    Upper and lower case are the same.
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1)
    return f"; perhaps you meant {names[near[0]]}" if near else ""


NOT_UTF8 = "is not UTF-8 text; save it as UTF-8"


def is_unicode(text: str) -> bool:
    """Check that `text` can be written as UTF-8: half of a surrogate pair, which JSON can hold, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return `text` as one line, without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


class Screen:
    """A terminal whose last lines are redrawn in place, or a plain log.

    On a terminal nothing else should write to the stream meanwhile; single lines go through `say`. A stream that is
    closed or broken is ignored; letters that it cannot encode become `?`.
    """

    def __init__(self, stream: TextIO):
        self._stream: Any = _Tolerant(stream)
        self.live = False
        with suppress(OSError, ValueError, AttributeError):
            self.live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn: Sequence[Text] = ()
        self._columns = 0
        self._shown: Live | None = None

    def size(self) -> tuple[int, int]:
        """Return the terminal's columns and lines, less one of each: some terminals wrap or scroll at the last."""
        try:
            columns, lines = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError, AttributeError):
            columns = lines = 0
        if not columns or not lines:
            columns, lines = shutil.get_terminal_size()
        return max(1, columns - 1), max(1, lines - 1)

    def draw(self, lines: Sequence[Text]) -> None:
        """Show `lines` in the place of those that were drawn before."""
        from rich.console import Group

        live = self._live()
        live.console.size = self.size()
        self._unwrap(live.console.width + 1)
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        self._drawn = lines
        live.update(Group(*lines), refresh=True)

    def say(self, line: str) -> None:
        """Print a line of its own, on a terminal above what is drawn."""
        line = line if line.isprintable() else printable(line)
        if self.live:
            from rich.text import Text

            self._live().console.print(Text(line), soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave what is drawn where it is."""
        if self._shown:
            self._shown.stop()

    def _live(self) -> Live:
        if self._shown is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(
                file=self._stream,
                force_terminal=True,
                force_interactive=True,
                color_system=None if os.environ.get("NO_COLOR") else "auto",
            )
            self._shown = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._shown.start()
            console.show_cursor()  # a killed run would leave it hidden
        return self._shown

    def _unwrap(self, columns: int) -> None:
        """Move to where rich expects the cursor: a terminal that became narrower has wrapped the drawn lines."""
        if columns < self._columns:
            wrapped = sum(math.ceil(line.cell_len / columns) - 1 for line in self._drawn if line.cell_len)
            self._stream.write(f"\x1b[{wrapped}A\x1b[J" if wrapped else "")
        self._columns = columns


class _Tolerant:
    """A text stream that ignores errors when it is written to: it is closed, or nobody reads it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with suppress(OSError, ValueError):
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()


class StatusLine(Screen):
    """One line that tells how far something is: redrawn on a terminal, printed now and then in a plain log."""

    def __init__(self, stream: TextIO):
        super().__init__(stream)
        self._printed_at, self._printed = -math.inf, -1.0

    def show(self, line: str, done: float, *, last: bool = False) -> None:
        """Show `line`; a log gets it every `PLAIN_INTERVAL_S`, and only if `done` has changed."""
        if self.live:
            from rich.text import Text

            self.draw([Text(printable(line))])
        elif done != self._printed and (last or time.monotonic() - self._printed_at >= PLAIN_INTERVAL_S):
            self.say(line)
            self._printed_at, self._printed = time.monotonic(), done


class Counter:
    """`latents: 640/50,000 images | 12.3 images/s | 1:06:00 left`."""

    def __init__(self, name: str, unit: str, total: int, done: int, stream: TextIO):
        self.name, self.unit, self.total, self.done = name, unit, total, done
        self.first = done
        self.started = time.monotonic()
        self._status = StatusLine(stream)
        self._status.show(self.line(), self.done)

    def advance(self, count: int) -> None:
        """Count `count` more."""
        self.done += count
        self._status.show(self.line(), self.done)

    def close(self) -> None:
        """Show the last count, and end the line."""
        self._status.show(self.line(), self.done, last=True)
        self._status.close()

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.started

    def line(self) -> str:
        """Return the line as it stands."""
        parts = [f"{self.name}: {self.done:,}/{self.total:,} {self.unit}"]
        rate = (self.done - self.first) / max(self.seconds, 1e-9)
        if self.done > self.first:
            parts += [f"{short_number(rate, 3)} {self.unit}/s", f"{duration((self.total - self.done) / rate)} left"]
        return " | ".join(parts)

"""A live line that counts: done of total, rate and time left; a line now and then where there is no terminal."""

from __future__ import annotations

import time
from typing import TextIO

from raycontrolnet.run.progress import PLAIN_INTERVAL_S, duration


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

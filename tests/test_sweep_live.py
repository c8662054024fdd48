"""The table of a sweep: the screen of a terminal after all that was written, and the lines of a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
from sweep_trials import update, write_trial, write_updates

from raycontrolnet.tune import live
from raycontrolnet.tune.live import LiveTable
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.table import LiveState, setting, trial_table

SETTINGS: dict[str, Any] = {"learning_rate": 1e-5, "lr_scheduler": "cosine", "proportion_empty_prompts": 0.25}
SCREEN = """\
sweep circles: 2 finished, 1 stopped, 1 failed, 1 running, 3 waiting of 8 | best val_loss 0.1234 (0001) | TIME
trial  state     learning_rate  lr_scheduler  proportion_empty_prompts     step  val_loss    loss  gap (* control)  time
0003   running   1e-5           cosine        0.25                      100/200    0.3500  0.5000               0   0:00
0001   finished  0.000123       cosine        0.25                      200/200    0.1234  0.5000           0.021*  2:10
0000   finished  1e-5           cosine        0.25                      200/200    0.2000  0.5000               0   1:05
0002   stopped   1e-5           constant      0.25                      100/200    0.4000  0.5000               0   3:15
0004   waiting   1e-5           cosine        0.25                            -         -       -               -      -
0005   failed    1e-5           cosine        0.25                            -         -       -               -   6:30
"""


class Emulator:
    """A terminal of a few control sequences; `lines` has what scrolled off as well."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines: list[list[str]] = [[]]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        for sequence, char in re.findall(r"\x1b\[(\??\d*[A-Za-z])|(.|\n)", text):
            if char:
                self._put(char)
            elif sequence == "J":
                del self.lines[self.row + 1 :]
                del self.lines[self.row][self.column :]
            elif sequence == "2K":
                self.lines[self.row].clear()
            elif sequence.endswith("A"):
                self.row = max(self.row - int(sequence[:-1]), len(self.lines) - self.rows, 0)
            else:
                assert sequence in ("0m", "1m", "2m", "?25l", "?25h"), sequence

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down()
        else:
            width = 2 if unicodedata.east_asian_width(char) in "WF" else 1
            if self.column + width > self.columns:
                self._down()
            line = self.lines[self.row]
            line.extend(" " * (self.column - len(line)))
            line[self.column : self.column + width] = [char] + [""] * (width - 1)
            self.column += width

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.lines):
            self.lines.append([])

    @property
    def text(self) -> list[str]:
        assert not any(self.lines[self.row + 1 :])
        return ["".join(line).rstrip() for line in self.lines[: self.row + 1]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self, columns: int, rows: int) -> list[str]:
        emulator = Emulator(columns, rows)
        emulator.feed(self.getvalue())
        return emulator.text


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "DRAW_INTERVAL_S", 0.01)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def resize(monkeypatch: pytest.MonkeyPatch, columns: int, lines: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


def timeless(lines: Sequence[str]) -> list[str]:
    """Replace the time since the sweep's start."""
    return [re.sub(r" \| \d+:\d\d$", " | TIME", line) for line in lines]


def shown(stream: TextIO, trials: Sequence[Trial], objective: str = "val_loss", **options: Any) -> None:
    """Show `trials` once, to the end."""
    with LiveTable("circles", objective, stream, **options) as table:
        table.update(trials)
    assert not [thread for thread in threading.enumerate() if thread.name == "sweep-table"]


def on_screen(monkeypatch: pytest.MonkeyPatch, columns: int, trials: Sequence[Trial], **options: Any) -> list[str]:
    """Return the lines of a terminal on which `trials` were shown."""
    resize(monkeypatch, columns, 24)
    shown(stream := Terminal(), trials, **options)
    return timeless(stream.screen(columns, 24))


def some_trials(folder: Path) -> list[Trial]:
    return [
        write_trial(folder, 0, SETTINGS, losses=(0.3, 0.2)),
        write_trial(folder, 1, SETTINGS | {"learning_rate": 0.000123456}, losses=(0.3, 0.1234), gap=0.021),
        write_trial(folder, 2, SETTINGS | {"lr_scheduler": "constant"}, "stopped", [0.4], stopped_at=100),
        write_trial(folder, 3, SETTINGS, "running", [0.35], seconds=0.0),
        write_trial(folder, 4, SETTINGS, "waiting", seconds=0.0),
        write_trial(folder, 5, SETTINGS, "failed", cause="CUDA out of memory"),
    ]


def test_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 140, 24)
    stream = Terminal()
    shown(stream, some_trials(tmp_path), total_trials=8, total_steps=200)
    assert timeless(stream.screen(140, 24)) == SCREEN.split("\n")
    bold = [line for line in stream.getvalue().split("\n") if "\x1b[1m" in line]
    assert {line.partition("\x1b[1m")[2][:5] for line in bold} == {"trial", "0001 "}
    assert "\x1b[2m0002 " in stream.getvalue()


def test_a_setting_with_the_name_of_a_figure(tmp_path: Path) -> None:
    """The kind of loss and the loss are two columns."""
    settings = ({"loss": "huber"}, {"loss": "mse"})
    trials = [write_trial(tmp_path, index, given, losses=[0.25]) for index, given in enumerate(settings)]
    head, *rows = (line.plain.split() for line in trial_table(trials, "val_loss", {0: LiveState(loss=0.5)}))
    assert head[:5] == ["trial", "state", "--loss", "step", "val_loss"]
    assert [row[2] for row in rows] == ["huber", "mse"]
    assert rows[0][head.index("loss")] == "0.5000"


def test_it_is_drawn_in_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 80, 24)
    stream = Terminal()
    stream.write("$ raycontrolnet sweep\n")
    trials = some_trials(tmp_path)
    with LiveTable("circles", "val_loss", stream, total_steps=200) as table:
        table.update(trials)
        until(lambda: stream.getvalue().count("circles") >= 3)
        trials[3] = write_trial(tmp_path, 3, SETTINGS, "failed", [0.35], cause="it broke\x1b[2J\nbadly: " + "m" * 90)
        table.update(trials[:4])
    lines = stream.screen(80, 24)
    assert lines[0] == "$ raycontrolnet sweep"
    assert lines[1] + lines[2] == "trial 0003 failed at step 100: it broke?[2J badly: " + "m" * 90
    assert [line.split()[0] for line in lines[3:-1]] == ["sweep", "trial", "0001", "0000", "0002", "0003"]


def test_a_running_trial_moves_between_its_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 140, 24)
    stream = Terminal()
    trial = write_trial(tmp_path, 0, {"seed": 1}, "running", [0.35], seconds=3600.0)
    with LiveTable("s", "val_loss", stream, total_steps=200) as table:
        table.update([trial])
        until(lambda: "100/200" in stream.getvalue())
        with (trial.folder / "metrics.jsonl").open("a") as file:
            file.write(update(101, 0.7) + update(102, 0.9) + '{"step": 103, "lo')
        until(lambda: "102/200    0.3500  0.8000" in stream.getvalue())
        assert re.search(r"0\.8000 +0 +1:00:\d\d\x1b", stream.getvalue())

        write_updates(trial.folder, 50, loss=0.6)  # it was restarted from a checkpoint
        until(lambda: " 50/200    0.3500  0.6000" in stream.getvalue())
        (trial.folder / "metrics.jsonl").unlink()
        drawn = stream.getvalue().count("sweep s")
        until(lambda: stream.getvalue().count("sweep s") > drawn + 2)
    assert "50/200    0.3500  0.6000" in stream.screen(140, 24)[-2]


def test_many_trials_on_a_low_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [write_trial(tmp_path, index, {"seed": index}, losses=[1 - index / 100]) for index in range(38)]
    trials += [write_trial(tmp_path, index, {"seed": index}, "running") for index in (38, 39)]
    for height, rows in ((24, 20), (5, 1), (4, 0), (1, 0)):
        resize(monkeypatch, 80, height)
        stream = Terminal()
        with LiveTable("s", "val_loss", stream) as table:
            table.update(trials)
            until(lambda: stream.getvalue().count("sweep s") >= 3)  # noqa: B023
        lines = stream.screen(80, height)
        assert lines[0].startswith("sweep s: 38 finished, 2 running of 40 | best val_loss 0.6300 (0037)")
        first = [line[:4] for line in lines[2 : 2 + rows]]
        assert first == ["0038", "0039", *(f"{index:04d}" for index in range(37, 0, -1))][:rows]
        if rows:
            assert lines[1].startswith("trial  state")
            assert lines[2 + rows :] == [f"... and {40 - rows} more", ""]
        assert len(lines) == (rows + 4 if rows else 2)
        assert len(lines) <= max(height, 2)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (140, SCREEN.split("\n")[1]),
        (100, "trial state learning_ra… lr_scheduler proportion_… step val_loss loss gap time"),
        (80, "trial state lr ls pep step val_loss gap time"),
        (60, "trial state lr step val_loss gap"),
        (45, "trial state step val_loss gap"),
        (24, "trial val_loss"),
        (4, "tr…"),
        (1, "…"),
    ],
)
def test_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int, names: str) -> None:
    """First settings and their names are cut, then columns are left out."""
    lines = on_screen(monkeypatch, columns, some_trials(tmp_path), total_steps=200)
    assert len(lines) == 9
    assert lines[1].split() == names.split()
    assert max(map(len, lines)) <= max(1, columns - 1)


def test_wide_letters_and_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 75, 24)
    settings = [
        {"instance_prompt": text}
        for text in ("圆圈在方块的旁边还有三角形和星星", "\x1b[31mred\x07\n\udc80", "cafe\u0301")
    ]
    trials = [write_trial(tmp_path, index, some, losses=[0.5]) for index, some in enumerate(settings)]
    stream = Terminal()
    with LiveTable("圆\x1b[2J", "val_loss", stream) as table:
        table.update(trials)
        until(lambda: stream.getvalue().count("sweep") >= 3)
    lines = stream.screen(75, 24)
    assert lines[0].startswith("sweep 圆?[2J: 3 finished of 3")
    assert len(lines) == 6
    places = [line.index("0.5000") + sum(unicodedata.east_asian_width(c) in "WF" for c in line) for line in lines[2:5]]
    assert places[0] == places[1]
    assert [line.split()[2] for line in lines[2:5]] == ["圆圈在方块", "?[31mred?", "cafe\u0301"]


def test_a_stream_of_ascii(tmp_path: Path) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    shown(stream, [write_trial(tmp_path, 0, {"prompt": "ü圆"}, "running")])
    assert written.getvalue().startswith(b"trial 0000 started: prompt ??\n")


def test_no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_screen(monkeypatch, 80, [], total_trials=16) == ["sweep circles: 16 waiting of 16 | TIME", ""]
    assert on_screen(monkeypatch, 80, []) == ["sweep circles: no trials yet | TIME", ""]
    shown(plain := io.StringIO(), [])
    assert timeless(plain.getvalue().splitlines()) == ["sweep circles: no trials yet | TIME"]
    with LiveTable("never told anything", "val_loss", plain_silent := io.StringIO()):
        pass
    assert plain_silent.getvalue() == ""


def test_an_objective_that_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [write_trial(tmp_path, 0, {"seed": 1}, losses=[0.5]), write_trial(tmp_path, 1, {"seed": 2})]
    lines = on_screen(monkeypatch, 160, trials, objective="control_fidelity")
    assert lines[0] == "sweep circles: 2 finished of 2 | TIME"
    assert lines[2].split() == ["0000", "finished", "1", "100", "-", "0.5000", "0.5000", "0", "1:05"]
    assert lines[3].split() == ["0001", "finished", "2", "-", "-", "-", "-", "-", "2:10"]


def test_a_plain_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    waiting = [write_trial(tmp_path, index, SETTINGS, "waiting", seconds=0.0) for index in range(4)]
    earlier = write_trial(tmp_path, 4, SETTINGS, losses=[0.9])
    with LiveTable("circles", "val_loss", stream, total_steps=200) as table:
        table.update([*waiting, earlier])
        table.update([*(write_trial(tmp_path, index, SETTINGS, "running") for index in range(4)), earlier])
        trials = [
            write_trial(tmp_path, 0, SETTINGS, losses=(0.3, 0.1234), gap=0.02),
            write_trial(tmp_path, 1, SETTINGS, "stopped", [0.3], stopped_at=100, cause="asha: behind the best quarter"),
            write_trial(tmp_path, 2, SETTINGS, "failed", cause="CUDA out of memory"),
            write_trial(tmp_path, 3, SETTINGS, "running", [0.3]),
            earlier,
        ]
        table.update(trials)
        table.update(trials)
        trials[3] = write_trial(tmp_path, 3, SETTINGS, "interrupted", [0.3])
        table.update(trials)
        until(lambda: "interrupted" in stream.getvalue())
        monkeypatch.setattr(live, "TABLE_INTERVAL_S", 0.0)
        until(lambda: "sweep circles" in stream.getvalue())
        drawn = stream.getvalue()
        time.sleep(0.1)
        assert stream.getvalue() == drawn  # there is nothing new
        monkeypatch.setattr(live, "TABLE_INTERVAL_S", 60.0)
        trials[3] = write_trial(tmp_path, 3, SETTINGS, "running", [0.3])
        table.update(trials)
    words = "learning_rate 1e-5, lr_scheduler cosine, proportion_empty_prompts 0.25"
    assert stream.getvalue().splitlines()[:8] == [
        *(f"trial {index:04d} started: {words}" for index in range(4)),
        "trial 0000 finished at step 200: val_loss 0.1234, control since step 200, in 1:05",
        "trial 0001 stopped at step 100: asha: behind the best quarter; val_loss 0.3000",
        "trial 0002 failed: CUDA out of memory",
        "trial 0003 interrupted at step 100",
    ]
    assert "\x1b" not in stream.getvalue()
    rest = stream.getvalue().splitlines()[8:]
    assert [line.partition(" ")[0] for line in rest] == [
        *("sweep", "trial", "0000", "0004", "0001", "0003", "0002"),
        "trial",  # 0003 goes on
        *("sweep", "trial", "0003", "0000", "0004", "0001", "0002"),
    ]
    assert rest[1].startswith("trial  state        learning_rate  lr_scheduler  ")
    assert rest[7] == f"trial 0003 goes on at step 100: {words}"


def test_no_color_and_a_dumb_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 80, 24)
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    shown(stream, some_trials(tmp_path))
    assert "\x1b[2K" in stream.getvalue()
    assert not re.search(r"\x1b\[\d*m", stream.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    shown(stream, some_trials(tmp_path))
    assert "\x1b" not in stream.getvalue()


class Broken(Terminal):
    def write(self, text: str) -> int:
        raise BrokenPipeError("nobody reads")


def test_a_broken_stream_and_a_broken_table_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials = some_trials(tmp_path)
    shown(Broken(), trials)
    closed = io.StringIO()
    with LiveTable("circles", "val_loss", closed) as table:
        closed.close()
        table.update(trials)
    assert caplog.records == []

    with LiveTable("circles", "no such objective", stream := Terminal()) as table:
        table.update(trials[:5])
        until(lambda: caplog.records)
        table.update(trials)
        until(lambda: "trial 0005 failed: CUDA out of memory" in stream.getvalue())
        table.update([None])  # type: ignore[list-item]
    (record,) = caplog.records
    assert "the sweep's table cannot be shown (KeyError: 'no such objective')" in record.getMessage()


def test_a_stream_that_takes_nothing_holds_no_one_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "JOIN_S", 0.05)
    blocked, release = threading.Event(), threading.Event()

    class RunStopped(Terminal):
        def write(self, text: str) -> int:
            blocked.set()
            release.wait()
            return len(text)

    with LiveTable("circles", "val_loss", RunStopped()) as table:
        table.update(some_trials(tmp_path))
        assert blocked.wait(20)
        table.update(some_trials(tmp_path))
    release.set()
    until(lambda: "sweep-table" not in {thread.name for thread in threading.enumerate()})


def test_an_error_in_the_sweep_ends_the_thread_and_is_passed_on() -> None:
    with pytest.raises(ValueError, match="of the sweep"), LiveTable("s", "loss", io.StringIO()):
        raise ValueError("of the sweep")
    assert "sweep-table" not in {thread.name for thread in threading.enumerate()}


def test_a_terminal_that_is_resized(tmp_path: Path) -> None:
    """A real terminal is asked for its size at each drawing, and lines that it wrapped are removed."""
    control, side = pty.openpty()
    stream = os.fdopen(side, "w")
    read: list[str] = []

    def read_on() -> None:
        with suppress(OSError):  # the other side was closed
            while part := os.read(control, 65536):
                read.append(part.decode())

    def set_size(rows: int, columns: int) -> None:
        fcntl.ioctl(control, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    reader = threading.Thread(target=read_on)
    reader.start()
    set_size(24, 140)
    with LiveTable("circles", "val_loss", stream, total_steps=200) as table:
        table.update(some_trials(tmp_path))
        until(lambda: "learning_rate" in "".join(read))
        set_size(24, 40)
        until(lambda: "\x1b[J" in "".join(read))
        set_size(6, 40)
        until(lambda: "... and 4 more" in "".join(read))
    stream.close()
    reader.join()
    os.close(control)
    wide = Emulator(140, 24)
    before, up, after = re.split(r"(\x1b\[\d+A\x1b\[J)", "".join(read))
    wide.feed(before)
    narrow = Emulator(40, 24)
    narrow.lines = [list(line[i : i + 40]) for line in wide.text for i in range(0, max(len(line), 1), 40)]
    narrow.row = len(narrow.lines) - 1
    assert narrow.row > len(wide.text)  # the lines became more by being wrapped
    narrow.feed(up + after.partition("trial")[0])
    assert [line.split()[:2] for line in narrow.text[:-1]] == [["sweep", "circles:"]]


def test_values_of_settings() -> None:
    values = (1e-5, 5e-05, 0.25, 1e10, 123456.0, -2e-300, 3, True, None, "cosine", [1, 2], float("nan"))
    assert " ".join(setting(value).replace(" ", "") for value in values) == (
        "1e-5 5e-5 0.25 1e10 1.23e5 -2e-300 3 true null cosine [1,2] nan"
    )

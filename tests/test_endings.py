"""Ends of runs whose object store does not answer: a second signal waits for nothing, nor does the process's end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import START_TIMEOUT_S, kill_all, processes_of_session, wait_for
from runs import Settings, column, flags, run
from s3_server import BUCKET, S3Server, elsewhere, proxy_that_falls_silent, s3, use_s3

from raycontrolnet import TrainConfig, fit

__all__ = ["elsewhere", "s3", "use_s3"]  # fixtures

LONGER = {"max_train_steps": 6, "checkpointing_steps": 2}
PATIENCE_S = 40.0
"""For what takes 2 s, or 4, if the machine is not busy; a request of pyarrow's would never end."""


class Silence(NamedTuple):
    begin: Callable[[], None]
    end: Callable[[], None]
    asked: list[str]
    """Requests that have got no answer."""


@pytest.fixture
def silence(use_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Silence]:
    """Let S3 be found by a proxy that can fall silent."""
    with proxy_that_falls_silent(use_s3.endpoint) as (address, silent, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield Silence(silent.set, silent.clear, asked)


FROM_PYTHON = textwrap.dedent("""
    import sys, time
    from raycontrolnet import fit
    from raycontrolnet.cli import parse
    from raycontrolnet.errors import Interrupted

    if __name__ == "__main__":
        try:
            fit(parse("train", sys.argv[2:]))
        except Interrupted as error:
            print(error, flush=True, file=sys.stderr)
            sys.exit(error.exit_code)
""")
STARTS = {"command": ["-m", "raycontrolnet"], "python": ["-c", FROM_PYTHON]}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("start", "num_workers"),
    [("command", "0"), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("python", "0"), ("command", "1")))],
)
def test_a_second_ctrl_c_waits_for_no_store(
    start: str, num_workers: str, silence: Silence, use_s3: S3Server, run_settings: Settings, tmp_path: Path
) -> None:
    name = f"silent-{start}-{num_workers}"
    settings = run_settings | LONGER | {"output_dir": f"s3://{BUCKET}/{name}", "num_workers": num_workers}
    command = [sys.executable, *STARTS[start], "train", *flags(settings)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            there = f"{name}/checkpoint-2/manifest"
            wait_for(lambda: bool(process.poll() is not None or use_s3.names(there)), START_TIMEOUT_S)
            silence.begin()
            wait_for(lambda: process.poll() is not None or bool(silence.asked), 60)
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            assert process.poll() is None, "the first waits for it"
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE_S)
            wait_for(lambda: not processes_of_session(process.pid), PATIENCE_S)
        finally:
            kill_all(processes_of_session(process.pid))
    assert process.returncode == 130, said
    assert "Interrupted." in said.splitlines()[-1]
    assert "--resume_from_checkpoint latest" in said.splitlines()[-1]
    silence.end()
    fit(TrainConfig(**settings | {"resume_from_checkpoint": "latest", "num_workers": "0"}))
    whole = run(run_settings | LONGER, tmp_path / "whole")
    records = use_s3.read(f"{name}/metrics.jsonl").splitlines()
    tolerance = 0.0 if num_workers == "0" else 1e-5  # for another number of threads
    assert [json.loads(record)["loss"] for record in records] == pytest.approx(column(whole, "loss"), tolerance, 0.0)

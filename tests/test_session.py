"""Start of a Ray on this machine: what goes wrong is named by its cause, and a slow start is tried again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import ray

from raycontrolnet.cluster import session
from raycontrolnet.cluster.session import is_own, ray_session
from raycontrolnet.errors import ConfigError, RunError

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Return starts(*errors): Ray's start raises one after the other, then succeeds; gives the calls."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def install(*errors: BaseException) -> list[dict[str, Any]]:
        left, calls = list(errors), []

        def init(**options: Any) -> None:
            calls.append(options)
            signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does
            if left:
                raise left.pop(0)

        monkeypatch.setattr(ray, "init", init)
        return calls

    return install


def test_a_slow_start_is_tried_again(starts: Callable[..., list[dict[str, Any]]]) -> None:
    calls = starts(Exception(SLOW))
    handler = signal.getsignal(signal.SIGTERM)
    with ray_session(None):
        assert signal.getsignal(signal.SIGTERM) is handler, "Ray's own ends the process without a word"
        assert is_own()
    assert not is_own()
    assert len(calls) == 2
    assert calls[0] == calls[1]


def test_one_that_fails_twice(starts: Callable[..., list[dict[str, Any]]]) -> None:
    calls = starts(Exception(SLOW), RuntimeError(f"{SLOW}\n" * 30))
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError) as error, ray_session(None):
        pass
    assert str(error.value).startswith("Ray could not be started on this machine, twice (The current node timed out")
    assert str(error.value).endswith("): is it overloaded? Try again when less is running")
    assert len(str(error.value)) < 350
    assert len(calls) == 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_somebody_who_accepts_and_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another program's port, or a head that hangs; Ray would crash the process after a minute."""
    monkeypatch.setattr(session, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError) as error, ray_session(address):
            pass
    assert str(error.value).startswith(
        f"--address={address}: no Ray cluster answers there (what listens there has not answered within 0.5 s). Start"
    )


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_whose_name_is_too_long(
    starts: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not RAY_ADDRESS, which nobody has set."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setitem(os.environ, name, "/tmp/" + "x" * 200)
    calls = starts(OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /tmp/xxx"))
    with pytest.raises(ConfigError) as error, ray_session(None):
        pass
    assert str(error.value) == (
        f"{name}=/tmp/{'x' * 55}...: too long for the paths of Ray's sockets (107 bytes); set RAY_TMPDIR to a short "
        "folder, such as /tmp"
    )
    assert len(calls) == 1


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: {}
    Python: {}
This process on node 10.0.0.7 was started with:
    Ray: 2.60.0
    Python: 3.12.3
"""


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            ("2.59.1", "3.12.3"),
            (
                "the cluster runs Ray 2.59.1, this process Ray 2.60.0; run pip install "
                "'ray[data,default,train,tune]==2.59.1' here, or use `ray job submit`"
            ),
        ),
        (
            ("2.60.0", "3.10.14"),
            (
                "the cluster runs Python 3.10.14, this process Python 3.12.3; start the run with Python 3.10.14, or "
                "use `ray job submit`"
            ),
        ),
        (
            ("2.60.0", "3.12.9"),
            (
                "the cluster runs Python 3.12.9, this process Python 3.12.3; start the run with Python 3.12.9, or set "
                "RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor, or use `ray job submit`"
            ),
        ),
    ],
)
def test_a_cluster_of_another_version(
    starts: Callable[..., list[dict[str, Any]]], cluster: tuple[str, str], message: str
) -> None:
    starts(RuntimeError(MISMATCH.format(*cluster)))
    with pytest.raises(ConfigError) as error, ray_session("auto"):
        pass
    assert str(error.value) == f"--address=auto: {message}"
    assert error.value.exit_code == 2


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(("setting", "shown"), [("ray.__version__ = '2.3.4'", "Ray 2.3.4"), ("", "")])
def test_rays_own_refusal_is_understood(setting: str, shown: str) -> None:
    """The words are those of the Ray that is installed."""
    address = ray.get_runtime_context().gcs_address
    code = f"""
import ray
{setting}
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.errors import ConfigError
try:
    with ray_session({address!r}):
        print("connected")
except ConfigError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    if not shown:
        assert done.stdout.strip() == "connected"
    else:
        expected = f"--address={address}: the cluster runs Ray {ray.__version__}, this process {shown}; run pip install"
        assert done.stdout.startswith(expected), done.stdout + done.stderr


@pytest.mark.slow
def test_the_usual_ports_may_be_in_use() -> None:
    """A head's, its dashboard's, its client server's, its agents' and torch's: a Ray of our own picks free ones."""
    code = """
from raycontrolnet.cluster.session import ray_session
with ray_session(None):
    import ray
    print(ray.get(ray.remote(lambda: "works").remote()))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with contextlib.ExitStack() as taken:
        for port in (6379, 8265, 10001, 52365, 29500):
            with contextlib.suppress(OSError):  # in use already
                taken.enter_context(socket.create_server(("0.0.0.0", port)))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
    assert done.stdout.strip() == "works", done.stderr

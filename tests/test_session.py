"""Start of a Ray on this machine: what goes wrong is named by its cause, and a slow start is tried again."""

from __future__ import annotations

import os
import signal
import socket
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

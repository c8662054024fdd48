"""Clusters that ask for a token and clusters that know none, by turns, from a machine that has one or not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from documents import environment
from heads import started_head

from raycontrolnet.cluster import tokens

TOKEN, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
FLAGS = ("--num-cpus=1", "--include-dashboard=false")
USE = """
import os, sys, ray
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.errors import ConfigError
@ray.remote(num_cpus=1)
class Actor:
    def answer(self):
        return "answered"
for address in sys.argv[1:]:
    try:
        with ray_session(address):
            actor = Actor.remote()
            print(ray.get(actor.answer.remote()), os.environ.get("RAY_AUTH_MODE"))
    except ConfigError as error:
        print(str(error).partition(": ")[2])
print("then", os.environ.get("RAY_AUTH_MODE"))
"""


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a head that asks for `TOKEN` and one that knows none: name -> address."""
    folder = tmp_path_factory.mktemp("heads")
    modes = {"asks": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "open": {"RAY_AUTH_MODE": "disabled"}}
    with ExitStack() as started:
        yield {
            name: started.enter_context(started_head(folder, environment(folder) | mode, *FLAGS)).head
            for name, mode in modes.items()
        }


def use(home: Path, *addresses: str, token: str | None = None, **variables: str) -> list[str]:
    """Use clusters one after the other in a process of its own; return what each said, and the mode behind them."""
    if token:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text(token)
    shell = environment(home) | {"HOME": str(home)}
    del shell["RAY_AUTH_MODE"]
    command = [sys.executable, "-c", USE, *addresses]
    used = subprocess.run(command, env=shell | variables, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr
    return used.stdout.splitlines()


def test_the_cluster_decides(heads: dict[str, str], tmp_path: Path) -> None:
    """A Ray of this machine alone, as the demo's, asks for a token, too."""
    order = [heads["open"], "local", heads["open"], heads["asks"], heads["open"]]
    token, none = "answered token", "answered disabled"
    assert use(tmp_path, *order, token=TOKEN) == [none, token, none, token, none, "then None"]


@pytest.mark.slow
def test_without_a_token(heads: dict[str, str], tmp_path: Path) -> None:
    """The local Ray writes one, which is not the cluster's."""
    found = use(tmp_path, heads["asks"], heads["open"], "local", heads["open"], heads["asks"])
    assert found[1:4] == ["answered disabled", "answered token", "answered disabled"]
    assert "the cluster asks for a token, and there is none here; copy ~/.ray/auth_token from its head" in found[0]
    assert "the cluster takes another token than ~/.ray/auth_token" in found[4]
    assert found[5] == "then None"


@pytest.mark.parametrize(
    ("at", "variables", "said"),
    [
        ("open", {"RAY_AUTH_MODE": "token"}, "the cluster knows no tokens, and RAY_AUTH_MODE=token asks it for one"),
        ("asks", {"RAY_AUTH_MODE": "disabled"}, "the cluster asks for a token, and RAY_AUTH_MODE=disabled shows none"),
        ("asks", {"RAY_AUTH_TOKEN": OTHER}, "the cluster takes another token than RAY_AUTH_TOKEN"),
        ("asks", {"RAY_AUTH_TOKEN": TOKEN}, "answered token"),
        ("asks", {"RAY_AUTH_MODE": "token"}, "answered token"),
        ("open", {"http_proxy": "http://127.0.0.1:9", "no_proxy": ""}, "answered disabled"),
    ],
)
def test_the_environment_says(
    heads: dict[str, str], tmp_path: Path, at: str, variables: dict[str, str], said: str
) -> None:
    found = use(tmp_path, heads[at], token=TOKEN, **variables)
    assert said in found[0]
    assert found[1] == f"then {variables.get('RAY_AUTH_MODE')}"
    assert not any(token in line for line in found for token in (TOKEN, OTHER))


def test_a_head_that_is_too_busy_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.delenv(tokens.MODE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match="does not say whether it asks"):
        tokens.take_token_mode_of(f"127.0.0.1:{server.getsockname()[1]}", "--address")
    assert tokens.MODE not in os.environ

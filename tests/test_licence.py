"""The licence of the model card: from the settings, the base model's folder, the Hub or its cache, or none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_stand_in import HubStandIn, take_for_hub

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.hub import licence as licences
from raycontrolnet.hub.licence import Licence, find_licence

TOKEN = "hf_TheRightToken"
UNKNOWN = Licence()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as hub:
        hub.cards["someone/base"] = {"license": "openrail++", "tags": ["x"]}
        take_for_hub(hub.url, monkeypatch)
        yield hub


def config(base: str | Path = "someone/base", **settings: Any) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path=str(base), train_data_dir="data", **settings)


def licence_of(settings: TrainConfig) -> Licence:
    """Find the licence for the card of a run with these settings."""
    return find_licence(settings.license, settings, TOKEN)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# Title\n", Licence(("mit",), "base")),
        ("---\r\nlicense:\r\n- mit\r\n- openrail++\r\n---\r\n", Licence(("mit", "openrail++"), "base")),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/l?a=b\n---\n",
            Licence(("other",), "base", "mine", "https://example.org/l?a=b"),
        ),
        ("---\nlicense: other\nlicense_link: LICENSE.md\n---\n", Licence(("other",), "base")),
        ("---\nlicense: other\nlicense_link: https://x.org/](y)\n---\n", Licence(("other",), "base")),
        ("---\nlicense: other\nlicense_link: 'javascript:alert(1)'\n---\n", Licence(("other",), "base")),
        ("---\ntags: [a]\n---\n", UNKNOWN),
        ("---\nlicense:\n---\n", UNKNOWN),
        ("---\nlicense: []\n---\n", UNKNOWN),
        ("# license: mit\n", UNKNOWN),
        ("", UNKNOWN),
        (None, UNKNOWN),
    ],
)
def test_of_a_folder(
    card: str | None, expected: Licence, tmp_path: Path, hub: HubStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(config(tmp_path)) == expected
    assert licence_of(config(tmp_path / "gone")) == UNKNOWN
    assert not hub.calls
    names_none = "names no licence: the model card leaves it out; --license names one"
    folders = [tmp_path] * (expected == UNKNOWN) + [tmp_path / "gone"]
    assert caplog.messages == [f"{folder} {names_none}" for folder in folders]


@pytest.mark.parametrize("card", [b"---\na: [mit\n---\n", b"---\n- mit\n---\n", b"---\na: \xff\n---\n", None])
def test_of_a_folder_whose_card_cannot_be_read(
    card: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "README.md"
    if card is None:
        path.mkdir()
    else:
        path.write_bytes(card)
    assert licence_of(config(tmp_path)) == UNKNOWN
    message, _ = caplog.messages
    assert message.startswith(f"{path}: no licence can be read from it (")


def test_of_the_hub(hub: HubStandIn) -> None:
    assert licence_of(config(license="mit")) == Licence(("mit",), "settings")
    assert not hub.calls
    assert licence_of(config()) == Licence(("openrail++",), "base")
    hub.cards["someone/base"] = {"license": "other", "license_name": "mine", "license_link": "texts/LICENSE.md"}
    files = "https://huggingface.co/someone/base/blob"
    assert licence_of(config()) == Licence(("other",), "base", "mine", f"{files}/main/texts/LICENSE.md")
    assert licence_of(config(revision="v2")).link == f"{files}/v2/texts/LICENSE.md"
    hub.cards["someone/base"] = {"license": "other", "license_link": "../../../elsewhere"}
    assert licence_of(config()) == Licence(("other",), "base")
    hub.cards["someone/base"] = {}
    assert licence_of(config()) == UNKNOWN
    paths = [request.path.partition("?")[0] for request in hub.calls]
    assert paths == [f"/api/models/someone/base{end}" for end in ("", "", "/revision/v2", "", "")]
    assert {request.headers["authorization"] for request in hub.calls} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("failure", [401, 403, 404, 500, "cut"])
def test_of_a_hub_that_does_not_tell(failure: Any, hub: HubStandIn, caplog: pytest.LogCaptureFixture) -> None:
    hub.failures["/api/models/"] = failure
    assert licence_of(config()) == UNKNOWN
    assert len(hub.calls) == 1
    message, _ = [record.getMessage() for record in caplog.records if record.name.startswith("raycontrolnet")]
    assert message.startswith("the Hub does not tell the licence of someone/base (")
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"], ids=["no", "slow"])
def test_of_a_hub_that_takes_its_time(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that never answers, and one that answers byte by byte, so that no single read is too slow."""
    monkeypatch.setattr(licences, "ANSWER_TIMEOUT_S", 0.5)
    over = threading.Event()

    def serve() -> None:
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.sendall(answer)
            while not over.wait(0.05):
                if answer:
                    connection.sendall(b" ")

    with socket.create_server(("127.0.0.1", 0)) as server:
        take_for_hub(f"http://127.0.0.1:{server.getsockname()[1]}", monkeypatch)
        serving = threading.Thread(target=serve)
        serving.start()
        try:
            start = time.monotonic()
            assert licence_of(config()) == UNKNOWN
            assert 0.4 < time.monotonic() - start < 5
        finally:
            over.set()
            serving.join()
    for thread in threading.enumerate():
        if thread.name == "licence":
            thread.join()


def test_of_the_cache(tmp_path: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, what `hf download` left is asked."""
    model, commit = tmp_path / "models--someone--base", "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert licence_of(config(cache_dir=str(tmp_path))) == Licence(("mit",), "base")
    assert licence_of(config(cache_dir=str(tmp_path), revision="v2")) == UNKNOWN
    assert licence_of(config(cache_dir=str(tmp_path / "gone"))) == UNKNOWN
    assert not hub.calls

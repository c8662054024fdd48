"""Stores that go away for good: exit code 1 if they had answered before, and 2, bad input, if they never did."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import when
from s3_server import BUCKET, S3Server, proxy_that_goes_away, s3, use_s3

from raycontrolnet import cli
from raycontrolnet.latents.cache import _reader
from raycontrolnet.latents.encoder import LatentEncoder
from raycontrolnet.storage import folder as folder_module
from raycontrolnet.storage.uri import open_uri

__all__ = ["s3", "use_s3"]  # fixtures

PLACE = "--latents_cache_dir=s3://bucket/"


@pytest.fixture
def away(use_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let S3 be found by a proxy that answers nothing while this event is set, and be waited for briefly."""
    monkeypatch.setattr(folder_module, "RUN_WAITS_S", (0.01,) * 2)
    with proxy_that_goes_away(use_s3.endpoint) as (address, event):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        open_uri.cache_clear()
        _reader.cache_clear()
        yield event


def flags(settings: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def of_prepare(settings: dict[str, Any], cache: str) -> list[str]:
    names = ("pretrained_model_name_or_path", "train_data_dir", "resolution", "num_workers", "use_gpu")
    return flags({name: settings[name] for name in names} | {"latents_cache_dir": f"s3://{BUCKET}/{cache}"})


def goes_while_it_encodes(away: threading.Event, patch: pytest.MonkeyPatch) -> None:
    encode = LatentEncoder.encode

    def then_gone(self: LatentEncoder, *images: Any) -> Any:
        encoded = encode(self, *images)
        away.set()
        return encoded

    patch.setattr(LatentEncoder, "encode", then_gone)


def test_prepare(run_settings: dict[str, Any], away: threading.Event, capsys: pytest.CaptureFixture[str]) -> None:
    """It answered before: what is cached stands, and the same command goes on. It never answered: bad input."""
    command = ["prepare", *of_prepare(run_settings, "prepared")]
    away.set()
    assert cli.main(command) == 2
    assert f"{PLACE}prepared: cannot be used (" in capsys.readouterr().err
    away.clear()
    with pytest.MonkeyPatch.context() as patch:
        goes_while_it_encodes(away, patch)
        assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "s3://bucket/prepared cannot be written to: http://127.0.0.1" in said
    assert "What is cached stands; the same command goes on from there." in said
    away.clear()
    assert cli.main(command) == 0


def test_the_last_look_at_what_was_written(
    run_settings: dict[str, Any], away: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes away where nothing but a listing is left to do."""
    with pytest.MonkeyPatch.context() as patch:
        write = folder_module.CacheFolder.write

        def then_gone(self: folder_module.CacheFolder, name: str, data: Any) -> None:
            write(self, name, data)
            away.set()

        patch.setattr(folder_module.CacheFolder, "write", then_gone)
        assert cli.main(["prepare", *of_prepare(run_settings, "listed")]) == 1
    said = capsys.readouterr().err
    assert f"{PLACE}listed: cannot be reached any more (http://127.0.0.1" in said
    assert "What is cached stands; once it answers, the same command goes on from there." in said


def test_the_cache_that_a_run_makes(
    tiny_settings: dict[str, Any], away: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = {"cache_latents": "on", "latents_cache_dir": f"s3://{BUCKET}/made"}
    with pytest.MonkeyPatch.context() as patch:
        goes_while_it_encodes(away, patch)
        assert cli.main(["train", *flags(tiny_settings | cache)]) == 1
    assert "s3://bucket/made cannot be written to: http://127.0.0.1" in capsys.readouterr().err


def test_the_cache_that_a_run_reads(
    tiny_settings: dict[str, Any], away: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's last checkpoint stands."""
    assert cli.main(["prepare", *of_prepare(tiny_settings, "read")]) == 0
    cache = {"cache_latents": "on", "latents_cache_dir": f"s3://{BUCKET}/read", "max_train_steps": 5000}
    checkpoint = Path(tiny_settings["output_dir"]) / "checkpoint-2" / "manifest.json"
    with when(checkpoint.exists, away.set) as done:
        assert cli.main(["train", *flags(tiny_settings | cache)]) == 1
    assert done == [True]
    said = capsys.readouterr().err
    assert "s3://bucket/read/000000-" in said
    assert ": the latent cache cannot be read now (http://127.0.0.1" in said
    assert "stands: go on with --resume_from_checkpoint latest" in said

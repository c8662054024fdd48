"""The patience of the latent cache's folder with storage that is away, on a disk and in a store."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_latents import FAULTS, cache_of, encoded_row, same

from raycontrolnet.errors import RunError, UserError
from raycontrolnet.latents import cache as cache_module
from raycontrolnet.latents.cache import read_contents, read_identities, read_row
from raycontrolnet.latents.manifest import StoredShard
from raycontrolnet.signals import Haste
from raycontrolnet.storage import folder as folder_module
from raycontrolnet.storage import store_requests
from raycontrolnet.storage.folder import CacheFolder, cache_folder

ASKED: dict[str, Callable[[CacheFolder], bool]] = {
    "list": lambda folder: folder.sizes() == {"0.arrow": folder.size("0.arrow")},
    "size": lambda folder: (folder.size("0.arrow") or 0) > 0,
    "read": lambda folder: len(folder.read("0.arrow")) == folder.size("0.arrow"),
    "row": lambda folder: same(read_row(folder, "0.arrow", 1, 1), encoded_row(1)),
    "contents": lambda folder: read_contents(folder, "0.arrow", 9)[0] == StoredShard("0.arrow", 2, 9),
    "identities": lambda folder: list(read_identities(folder, [StoredShard("0.arrow", 2, 9)])) == [
        encoded_row(row).identity for row in range(2)
    ],
}  # fmt: skip


def going_away(folder: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[list[OSError], list[float]]:
    """Return a list of errors that the storage gives before it answers again, and one of the seconds waited."""
    cache_of(folder, [0, 1])
    waited: list[float] = []
    monkeypatch.setattr(Haste, "sleep", lambda _, seconds: waited.append(seconds))
    own, faults = folder_module._open, list[OSError]()

    def away(uri: str) -> Any:
        cache_module._reader.cache_clear()
        if faults:
            raise faults.pop()
        return own(uri)

    monkeypatch.setattr(folder_module, "_open", away)
    return faults, waited


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("place", ["mock:///bucket/away", "disk"])
def test_storage_that_is_away_for_a_while_is_asked_again(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is asked for, with the folder's one patience; a run asks for a row once more, at once."""
    folder = cache_folder(str(tmp_path) if place == "disk" else place)
    faults, waited = going_away(folder, monkeypatch)
    waits = folder_module.DISK_WAITS_S if place == "disk" else store_requests.RUN_WAITS_S
    cache_module._reader.cache_clear()
    at_once = name == "row"
    faults[:] = [OSError(errno.EIO, "Input/output error")] * (len(waits) + at_once)
    assert ASKED[name](folder)
    assert waited == list(waits)
    waited.clear()
    cache_module._reader.cache_clear()
    faults[:] = [OSError(errno.EIO, "Input/output error")] * 99
    with pytest.raises((OSError, RunError), match="Input/output error"):
        ASKED[name](folder)
    assert waited == list(waits)


def test_a_store_that_is_away_is_waited_for_with_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding of hours depends on it."""
    folder = cache_folder("mock:///bucket/written")
    faults, waited = going_away(folder, monkeypatch)
    faults[:] = [FAULTS[0]] * 2
    folder.write("a", b"12345")
    assert waited == list(store_requests.RUN_WAITS_S[:2])
    assert folder.size("a") == 5
    faults[:] = [FAULTS[0]] * 99
    with pytest.raises(OSError, match="does not answer"):
        folder.write("b", b"x")


def test_what_another_try_cannot_change_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache_folder(str(tmp_path))
    faults, waited = going_away(folder, monkeypatch)
    faults[:] = [PermissionError(errno.EACCES, "Permission denied")] * 99
    with pytest.raises(UserError, match=r"cannot be used \(Permission denied\)"):
        folder.sizes()
    assert not waited


def test_a_folder_that_never_answered_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that did, and no longer does, has let a run down; so in another process, which it is sent to."""
    folder = cache_folder("mock:///bucket/never")
    faults, _ = going_away(CacheFolder(folder.uri), monkeypatch)
    for answered, kind in ((False, UserError), (True, RunError)):
        if answered:
            folder.sizes()
        for each in (folder, pickle.loads(pickle.dumps(folder))):
            faults[:] = [FAULTS[0]] * 99
            with pytest.raises(kind, match=r"^--latents_cache_dir=mock:///bucket/never: cannot be (used|reached any)"):
                each.sizes()
        faults.clear()

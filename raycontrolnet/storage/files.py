"""Files and folders that others read while they are written: whole, or as they were before."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raycontrolnet.storage.quota import full_errno
from raycontrolnet.text import file_size

PARTIAL_SUFFIX = ".partial"
"""End of the name of what is being written."""
OLD_SUFFIX = ".old"
"""End of the name of a folder that is being deleted."""

_closed: dict[Path, str] = {}
"""Folders in which this process changes nothing any more -> the reason."""


class FolderClosedError(OSError):
    """The folder, on a disk or in a store, is closed for this process: no other attempt is made."""


def close_folder(folder: Path, reason: str) -> None:
    """Change nothing in `folder` from now on, in this process: `check_open` raises OSError with the reason."""
    _closed[folder] = reason


def reopen_folder(folder: Path) -> None:
    """Let `folder` be changed again."""
    _closed.pop(folder, None)


def is_closed(path: Path) -> bool:
    """Check whether `path` is a folder that has been closed, or lies in one."""
    return any(folder == path or folder in path.parents for folder in tuple(_closed))


def check_open(path: Path) -> None:
    """Check that `path` may be changed.

    Raises:
        FolderClosedError: it is a folder that has been closed, or lies in one.
    """
    for folder, reason in tuple(_closed.items()):
        if folder == path or folder in path.parents:
            raise FolderClosedError(reason)


def user_cache() -> Path:
    """Return the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@contextmanager
def replacing(path: Path, *, sync: bool = False, many_writers: bool = False) -> Iterator[Path]:
    """Give a path to write to, beside `path`; at the end the file written there replaces `path`.

    If writing fails, as on a full disk, `path` stays as it was and nothing is left of the new file.

    Args:
        sync: see `synced`.
        many_writers: whether several processes may write the file at a time.
    """
    check_open(path)
    writer = f".{uuid.uuid4().hex}" if many_writers else ""
    partial = path.with_name(f".{path.name.lstrip('.')}{writer}{PARTIAL_SUFFIX}")
    try:
        yield partial
        if sync:
            synced(partial)
        check_open(path)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write `text` to the file `path`, in UTF-8, whole or not at all; see `replacing`."""
    with replacing(path, sync=sync) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to, beside `path`; at the end it replaces `path`. Fails as `replacing`."""
    check_open(path)
    partial, old = path.with_name(f".{path.name}{PARTIAL_SUFFIX}"), path.with_name(f".{path.name}{OLD_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        check_open(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    synced(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first: a deletion that is cut short leaves no half of it under its name."""
    check_open(path)
    old = path.with_name(f".{path.name}{OLD_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`; empty if there is none, or it is cut short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def readable_by_umask(folder: Path) -> None:
    """Give the files in `folder` the mode of new ones: safetensors writes its own for their owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_mode != mode:
            with suppress(OSError):  # of a file system without modes
                file.chmod(mode)


def sha256_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> SHA-256 of files in `folder`, read side by side."""

    def digest(name: str) -> str:
        found = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest()

    names = list(names)
    with ThreadPoolExecutor(4, thread_name_prefix="sha256") as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def save_into(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` write a checkpoint's files into `folder`.

    Raises:
        OSError: on a full disk, or with a used-up quota, whatever the libraries call that.
    """
    try:
        save(folder)
    except Exception as error:
        if (number := full_errno(folder, error)) is None:
            raise
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        quota = number == errno.EDQUOT
        left = "your quota there is used up" if quota else f"{file_size(shutil.disk_usage(folder).free)} are free"
        state = f"{file_size(written)} of the checkpoint were written, {left}"
        raise OSError(number, f"{os.strerror(number)}: {folder.parent}: {state}") from error


def synced(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut cannot keep later writes and lose this one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove `folder`, and those above it, at the end if they were created inside and are empty."""
    new = [each for each in (folder, *folder.parents) if not os.path.exists(each)]  # noqa: PTH110 (does not raise)
    try:
        yield
    finally:
        with suppress(OSError):  # it has files
            for each in new:
                each.rmdir()

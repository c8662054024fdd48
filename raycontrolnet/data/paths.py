"""Images as a data set's cells name them: paths, or the bytes themselves as base64."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from raycontrolnet.data.records import EncodedImage
from raycontrolnet.data.remote_path import AnyPath, RemotePath, joined
from raycontrolnet.data.threads import in_threads
from raycontrolnet.errors import DataError
from raycontrolnet.text import SHOWN_PROBLEMS, shorten

Root = str | RemotePath
"""Folder in which the relative paths in a data set's cells begin."""

ARCHIVES = frozenset((".zip", ".gz", ".tgz", ".7z", ".rar"))
_BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
"""First letters of a PNG, JPEG, WebP and GIF file in base64."""
_BASE64_LETTERS = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SHORTEST_BASE64 = 64
_LONGEST_SHOWN = 120
_MISSING = "no such file"
_LINKS_AT_A_TIME = 16


def embedded_image(text: str) -> bytes | None:
    """Return the image that `text` holds: a `data:` URI, or an image file in base64; None if it is a path.

    Raises:
        ValueError: if it is a `data:` URI that cannot be decoded.
    """
    if not is_embedded(text):
        return None
    head, comma, data = text.partition(",")
    if not text.startswith("data:"):
        data = text
    elif not (comma and head.endswith(";base64")):
        raise ValueError("is a data: URI, but not in base64")
    try:
        image = base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:  # binascii's, or of letters that are not ASCII
        raise ValueError(f"holds base64 that cannot be decoded ({error})") from None
    if not image:
        raise ValueError("is a data: URI that holds nothing")
    return image


def is_embedded(text: str) -> bool:
    """Check whether `text` is an image in base64, not a path; does not decode it."""
    if text.startswith("data:"):
        return True
    long = len(text) >= _SHORTEST_BASE64 and text.startswith(_BASE64_HEADS)
    return long and _BASE64_LETTERS.fullmatch(text) is not None


def shown_path(path: str) -> str:
    """Return `path` for a message, cut in the middle if it is long."""
    half = _LONGEST_SHOWN // 2
    return path if len(path) <= _LONGEST_SHOWN else f"{path[:half]}...{path[-half:]}"


def kind_of_file(mode: int) -> str:
    """Return what a path leads to, by its `st_mode`, where it is no regular file."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "a device")


def missing_files(root: Root, paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield (index, path) of the `paths`, relative to `root` or absolute, that do not exist, or are no files.

    "" and embedded images are no paths and pass. Lists each folder once: a system call per file takes minutes for a
    million files on a network disk. Links alone are followed, several at a time.
    """
    listings: dict[str, Mapping[str, bool | None]] = {}
    links: list[tuple[int, str]] = []
    for index, path in enumerate(paths):
        if not path or is_embedded(path):
            continue
        cut = path.rfind("/") + 1
        folder, name = path[:cut], path[cut:]
        if folder not in listings:
            listings[folder] = _files_in(joined(root, folder))
        # names are listed as they were made; file systems that ignore case or Unicode forms may find others too
        exists = name in listings[folder] or (listings[folder] and _exists(joined(root, path)))
        is_file = listings[folder].get(name, True)
        if is_file is None:
            links.append((index, path))
        elif not (exists and is_file):
            yield index, path
    reached = in_threads(lambda link: _is_file(joined(root, link[1])), links, _LINKS_AT_A_TIME, 2 * _LINKS_AT_A_TIME)
    yield from (link for link, is_file in zip(links, reached, strict=True) if not is_file)


def _files_in(folder: AnyPath) -> Mapping[str, bool | None]:
    """Return name -> True for a file, None for a link, of all in a folder; empty if it cannot be listed."""
    if isinstance(folder, RemotePath):
        return {name: stat.S_ISREG(entry.st_mode) for name, entry in folder.entries().items()}
    try:
        with os.scandir(folder) as entries:
            return {entry.name: None if entry.is_symlink() else entry.is_file() for entry in entries}
    except (OSError, ValueError):
        return {}


def missing_reason(root: Root, path: str) -> str:
    """Return that a path, relative to `root` or absolute, leads to no file, and what it seems to be instead."""
    if target := _dead_link(joined(root, path)):
        return f"is a link to {shown_path(target)}, where there is no file; fetch that, or name another file"
    here, archive = Path(path), joined(root, f"{Path(path).parts[0]}.zip")
    with suppress(OSError, ValueError):
        return f"is {kind_of_file(joined(root, path).stat().st_mode)}, not an image file"
    if len(path) >= _SHORTEST_BASE64 and path.startswith(_BASE64_HEADS):
        return "neither a file nor base64 that can be decoded"
    if re.match(r"[A-Za-z]:[\\/]", path):
        return "no such file: it is a path of Windows, of another machine; write it relative to the metadata file"
    if "\\" in path and _exists(joined(root, path.replace("\\", "/"))):
        return "no such file: it is there with / in place of \\; write it so"
    if _exists(archive):
        return f"no such file: unzip {archive} there"
    if not here.is_absolute() and _exists(here):
        return f"no such file: paths begin at {root}, and this one at the working directory"
    return _MISSING


def missing_problems(root: Root, columns: Mapping[str, Iterable[str]], place: Callable[[int], str]) -> Iterator[str]:
    """Yield a line for each of the first paths that lead nowhere, by rows, and their number.

    Args:
        columns: name -> paths, relative to `root` or absolute.
        place: returns where a row stands.
    """
    missing = sorted((row, name, path) for name, paths in columns.items() for row, path in missing_files(root, paths))
    first = [
        (f"{place(row)}: {name} {shown_path(path)}", path, missing_reason(root, path))
        for row, name, path in missing[: SHOWN_PROBLEMS + 1]
    ]
    reasons = [f"{where}: {reason}" for where, _, reason in first]
    yield from shorten(reasons, "files are missing", len(missing))
    nowhere = any(why == _MISSING and not Path(path).is_absolute() for _, path, why in first)
    if nowhere and root and isinstance(root, str) and not any("unzip" in why for _, _, why in first):
        files = sorted(name for name, is_file in _files_in(Path(root)).items() if is_file is not False)
        archives = [name for name in files if Path(name).suffix.lower() in ARCHIVES]
        yield from (f"{joined(root, name)} is an archive that may hold them: unpack it there" for name in archives[:1])


def path_or_image(root: Root, text: str, place: str) -> EncodedImage:
    """Return the path that `text` is, relative to `root` or absolute, or the image that it holds.

    Raises:
        DataError: `place: reason`, if it holds one that cannot be decoded.
    """
    try:
        embedded = embedded_image(text)
    except ValueError as error:
        raise DataError(f"{place} {error}") from None
    if embedded is not None:
        return embedded
    path = joined(root, text)
    return path if isinstance(path, RemotePath) else str(path)


def file_identity(root: Root, text: str) -> tuple[str, int | None]:
    """Return (path, bytes) of the file `text`, relative to `root` or absolute; for an embedded image its hash."""
    if is_embedded(text):
        return hashlib.sha256(text.encode()).hexdigest()[:32], len(text)
    return text, file_bytes(root, text)


def file_bytes(root: Root, path: str) -> int | None:
    """Return the size of the file `path`, relative to `root` or absolute; None if it cannot be seen."""
    try:
        return joined(root, path).stat().st_size
    except (OSError, ValueError):
        return None


def _is_file(path: AnyPath) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _dead_link(path: AnyPath) -> str | None:
    """Return where a link leads in vain, as git-annex's before its file is fetched; None if `path` is no such link."""
    with suppress(OSError, ValueError):
        if isinstance(path, Path) and path.is_symlink() and not path.exists():
            return str(path.readlink())
    return None


def _exists(path: AnyPath) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False

"""Data sets in parquet and other tables in an object store: copied once to every machine, as `datasets` reads files."""

from __future__ import annotations

import hashlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from raycontrolnet.data.remote_path import RemotePath
from raycontrolnet.errors import DataError
from raycontrolnet.storage.files import replacing, user_cache
from raycontrolnet.text import counted, error_message, file_size

logger = logging.getLogger(__name__)

_COPIED = ("*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")
_COPIED_NAMES = ("state.json", "dataset_info.json", "dataset_dict.json", "README.md")
"""Files beside the tables that say how `datasets` is to read them, also one folder below."""
_FILES_AT_A_TIME = 4
_BLOCK_BYTES = 16 * 2**20


class CopiedFile(NamedTuple):
    """A file, as it was when the run was started."""

    path: str
    """Below the data set's folder."""
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class RemoteCopy:
    """The files of a data set in an object store, and their copies on this machine."""

    root: RemotePath
    """The data set: a folder or a file."""
    files: tuple[CopiedFile, ...]
    is_file: bool

    @staticmethod
    def of(root: RemotePath) -> RemoteCopy:
        """List the files of a data set."""
        if root.is_file():
            paths = [root]
        else:
            paths = [path for pattern in _COPIED for path in root.glob(pattern)]
            paths += [path for name in _COPIED_NAMES for pattern in (name, f"*/{name}") for path in root.glob(pattern)]
        states = [(path, path.stat()) for path in sorted(paths)]
        files = tuple(CopiedFile(path.relative, found.st_size, found.st_mtime_ns) for path, found in states)
        return RemoteCopy(root, files, root.is_file())

    def fetched(self, cache_dir: str | None) -> Path:
        """Return the local folder or file with the same content, copied unless an earlier run or process has done so.

        Args:
            cache_dir: as the setting says; by default the user's cache folder.

        Raises:
            DataError: if it cannot be copied.
        """
        from filelock import FileLock

        folder = self._folder(cache_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if missing := [file for file in self.files if not self._is_there(file, folder)]:
                    size = file_size(sum(file.num_bytes for file in missing))
                    logger.info("%s: copying %s (%s) to %s", self.root, counted(len(missing), "file"), size, folder)
                    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
                        list(pool.map(partial(self._fetch, folder=folder), missing))
        except OSError as error:
            raise DataError(
                f"{self.root}: cannot be copied to {folder} ({error_message(error)}); --cache_dir names another folder"
            ) from None
        return folder / self.root.name if self.is_file else folder

    def _folder(self, cache_dir: str | None) -> Path:
        key = hashlib.blake2b(repr((self.root.root, self.files)).encode(), digest_size=8).hexdigest()
        place = Path(cache_dir).expanduser() if cache_dir else user_cache()
        return place / "raycontrolnet" / "datasets" / f"{self.root.name[:60]}-{key}"

    def _local(self, file: CopiedFile, folder: Path) -> Path:
        return folder / (self.root.name if self.is_file else file.path)

    def _is_there(self, file: CopiedFile, folder: Path) -> bool:
        path = self._local(file, folder)
        return path.is_file() and path.stat().st_size == file.num_bytes

    def _fetch(self, file: CopiedFile, folder: Path) -> None:
        source = RemotePath(self.root.root, file.path)
        opened, path = source.open_file(), self._local(file, folder)
        if opened.version() != (file.num_bytes, file.modified_ns):
            raise DataError(f"{source}: has changed since the run was started")
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path) as partial_path,
            source.open("rb", _BLOCK_BYTES) as stream,
            partial_path.open("wb") as copy,
        ):
            shutil.copyfileobj(stream, copy, _BLOCK_BYTES)

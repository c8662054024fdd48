"""A folder of whole files, on a local disk or in an object store, for the latent cache."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from raycontrolnet.errors import RunError, UserError
from raycontrolnet.storage.files import PARTIAL_SUFFIX, replacing
from raycontrolnet.storage.left_requests import LeftError, unless_left
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.store_requests import RUN_WAITS_S, is_lasting, reason, tried_again
from raycontrolnet.storage.uri import UNUSABLE, as_path, check_bucket, open_uri, shown_uri, unusable

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import fs

T = TypeVar("T")

LEFTOVER_AGE_S = 3600.0
DISK_WAITS_S = (1.0, 5.0)
"""Seconds to wait before a disk that fails, as one over a network, is asked again; for stores see `RUN_WAITS_S`."""


@dataclass(frozen=True)
class CacheFolder:
    """Files that are whole or absent, whoever else writes. Pickles small."""

    uri: str
    """An absolute path, or a URI that pyarrow's file systems know, such as s3://bucket/folder."""
    _answered: set[bool] = field(default_factory=set, compare=False, repr=False)
    """Not empty once the storage has answered."""

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def name(self) -> str:
        """The folder's name in messages."""
        return shown_uri(self.uri)

    def path(self, name: str) -> str:
        """Return the name of the file `name` in messages."""
        return f"{self.name}/{name}"

    def reached(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` gets from the folder, tried again while its storage fails: all that reads waits here.

        Raises:
            OSError: the storage still fails; for a store with the reason in one bounded line, without keys.
        """
        request = attempt if self.is_local else partial(unless_left, attempt)
        waits_s = DISK_WAITS_S if self.is_local else RUN_WAITS_S
        try:
            found = tried_again(request, waits_s, self._is_final, f"{self.name} cannot be reached")
        except FileNotFoundError:
            self._answered.add(True)
            raise
        except LeftError:
            raise
        except OSError as error:
            if self.is_local or not self.is_unreachable(error):
                raise
            raise OSError(reason(error)) from None
        self._answered.add(True)
        return found

    def _is_final(self, error: OSError) -> bool:
        return is_lasting(error) or not self.is_unreachable(error)

    def failure(self, error: Exception) -> UserError | RunError:
        """Return the error for a folder that cannot be reached: bad input, or a failed run if it answered before."""
        if not self._answered:
            return unreachable(self.uri, error)
        return RunError(
            f"--latents_cache_dir={self.name}: cannot be reached any more ({reason(error, 160)}). What is cached "
            "stands; once it answers, the same command goes on from there."
        )

    def sizes(self) -> dict[str, int]:
        """Return name -> bytes of every file; empty if the folder does not exist.

        Raises:
            UserError, RunError: if the folder cannot be reached.
        """
        from pyarrow import fs

        def list_() -> list[fs.FileInfo]:
            system, folder = _open(self.uri)
            return list(system.get_file_info(fs.FileSelector(folder, allow_not_found=True)))

        try:
            found = self.reached(list_)
        except UNUSABLE as error:
            raise self.failure(error) from None
        files = (info for info in found if info.type == fs.FileType.File)
        return {info.base_name: info.size for info in files if not info.base_name.endswith(PARTIAL_SUFFIX)}

    def size(self, name: str) -> int | None:
        """Return the bytes of the file `name`; None if there is none."""
        from pyarrow import fs

        def look() -> fs.FileInfo:
            system, folder = _open(self.uri)
            return system.get_file_info(f"{folder}/{name}")

        info = self.reached(look)
        return info.size if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes:
        """Return the content of the file `name`.

        Raises:
            FileNotFoundError: if there is none.
        """

        def read() -> bytes:
            with self.open(name) as file:
                return file.read()

        return self.reached(read)

    def open(self, name: str) -> pa.NativeFile:
        """Open the file `name` for random access: mapped into memory on a local disk, else read by ranges.

        It is tried once: who reads from the file as well does both in `reached`.
        """
        import pyarrow as pa

        system, folder = _open(self.uri)
        path = f"{folder}/{name}"
        return pa.memory_map(path) if self.is_local else system.open_input_file(path)

    def is_unreachable(self, error: Exception) -> bool:
        """Check whether `error`, of a read, says that the storage failed, not that the file is gone or cut short."""
        if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
            return False
        cut_short = str(error).startswith("Expected to")  # Arrow's word, without an errno
        return error.errno is not None or not (self.is_local or cut_short)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write the file `name`. An open reader of the file that it replaces is not disturbed.

        Raises:
            OSError: if it cannot be written, as on a full disk; nothing is left of it then.
        """
        if not self.is_local:
            self.reached(partial(self._send, name, data))
            return
        Path(self.uri).mkdir(parents=True, exist_ok=True)
        with replacing(Path(self.uri, name), sync=True, many_writers=True) as unfinished:
            unfinished.write_bytes(data)

    def check_writable(self) -> None:
        """Check that files can be written, before anything is encoded for them.

        Raises:
            UserError: if not.
        """
        try:
            if self.is_local:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.uri).close()
            else:
                system, folder = _open(self.uri)
                system.create_dir(folder)
                ObjectStore(self.uri).check_writable()
        except OSError as error:
            raise UserError(
                f"--latents_cache_dir={self.name}: cannot be written to ({reason(error, 160)}); "
                f"name {'another folder' if self.is_local else 'a folder in a bucket to which your keys may write'}"
            ) from None

    def _send(self, name: str, data: bytes | pa.Buffer) -> None:
        system, folder = _open(self.uri)
        system.create_dir(folder)
        with system.open_output_stream(f"{folder}/{name}") as stream:  # the object appears when it closes without error
            stream.write(data)

    def remove_leftovers(self) -> None:
        """Delete what killed processes left unfinished; young files may belong to a process at work."""
        if self.is_local:
            for path in Path(self.uri).glob(f".*{PARTIAL_SUFFIX}"):
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
                        path.unlink()

    def free_bytes(self) -> int | None:
        """Return how many bytes can still be written; None if that cannot be known."""
        if not self.is_local:
            return None
        there = next(path for path in (Path(self.uri), *Path(self.uri).parents) if path.exists())
        return shutil.disk_usage(there).free


@contextmanager
def writing_to(name: str) -> Iterator[None]:
    """Name the folder that cannot be written to, if what is done inside fails so.

    Raises:
        RunError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{name} cannot be written to: {error.strerror or error}") from error


def cache_folder(name: str) -> CacheFolder:
    """Return the folder that a path or URI names, made if need be.

    Raises:
        UserError: if it is a file, or of a kind of store that pyarrow does not know.
    """
    name = as_path(name)
    if "://" not in name:
        path = Path(name).expanduser().resolve()
        if path.exists() and not path.is_dir():
            raise UserError(f"--latents_cache_dir={name}: is a file; name a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unreachable(name, error) from None
        return CacheFolder(str(path))
    try:
        check_bucket(name)
    except UNUSABLE as error:
        raise unreachable(name, error) from None
    return CacheFolder(name)


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    from pyarrow import fs

    return open_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)


def unreachable(uri: str, error: Exception) -> UserError:
    """Return the error for a folder that cannot be used."""
    return UserError(f"--latents_cache_dir={shown_uri(uri)}: {unusable(error)}")

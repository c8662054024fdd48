"""A folder of an object store: objects that are whole or absent, over a network that fails now and then."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raycontrolnet.storage.files import FolderClosedError, replacing
from raycontrolnet.storage.left_requests import made_here
from raycontrolnet.storage.store_requests import RUN_WAITS_S, reached
from raycontrolnet.storage.uri import check_bucket, open_uri, shown_uri

if TYPE_CHECKING:
    from pyarrow import fs

AT_A_TIME = 4
"""Files that are sent or fetched side by side."""
BLOCK_BYTES = 16 * 2**20
WRITE_TEST = ".raycontrolnet-write-test"


class Stored(NamedTuple):
    """An object, as a listing shows it; another one has another size or time."""

    size: int
    modified_ns: int


@dataclass(frozen=True)
class ObjectStore:
    """The objects whose names begin with the path of `uri`. Methods raise OSError for a store that fails.

    All operations are repeated, as they have the same result the second time.
    """

    uri: str
    _closed: list[str] = field(default_factory=list, compare=False, repr=False)

    def close(self, reason: str) -> None:
        """Begin no write or deletion from now on, in this process: each attempt raises OSError with the reason."""
        self._closed.append(reason)

    @property
    def is_closed(self) -> bool:
        return bool(self._closed)

    def _change(self, change: Callable[[], None], tries: int | None = None) -> None:
        def attempt() -> None:
            if self._closed:  # perhaps while an earlier attempt failed
                raise FolderClosedError(self._closed[0])
            change()

        reached(attempt, _waits(tries))

    @property
    def shown(self) -> str:
        """The folder's name in messages."""
        return shown_uri(self.uri)

    def list(self, prefix: str = "") -> dict[str, Stored]:
        """Return name -> object, of all objects in the folder `prefix` and its folders."""
        from pyarrow import fs

        def list_() -> dict[str, Stored]:
            system, root = open_uri(self.uri)
            where = f"{root}/{prefix}".rstrip("/")
            found = system.get_file_info(fs.FileSelector(where, recursive=True, allow_not_found=True))
            if not found:  # which a bucket that is gone looks like, too
                check_bucket(self.uri)
            return _objects(found, root)

        return reached(list_, RUN_WAITS_S)

    def find(self, names: Iterable[str]) -> dict[str, Stored]:
        """Return name -> object, of those of `names` that there are."""

        def find() -> dict[str, Stored]:
            system, root = open_uri(self.uri)
            return _objects(system.get_file_info([f"{root}/{name}" for name in names]), root)

        return reached(find, RUN_WAITS_S)

    def read(self, name: str, tries: int | None = None) -> bytes:
        """Return the content of `name`.

        Raises:
            FileNotFoundError: if there is none.
        """

        def read() -> bytes:
            system, root = open_uri(self.uri)
            with system.open_input_file(f"{root}/{name}") as file:
                return bytes(file.read())

        return reached(read, _waits(tries))

    def write(
        self, name: str, content: bytes, tries: int | None = None, then: Callable[[], None] = lambda: None
    ) -> None:
        """Write the object `name`.

        Args:
            then: called once it is there, also if nobody waits for that any more; may make requests.
        """

        def write() -> None:
            system, root = open_uri(self.uri)
            with system.open_output_stream(f"{root}/{name}") as file:
                file.write(content)
            with made_here():
                then()

        self._change(write, tries)

    def upload(self, file: Path, name: str, tries: int | None = None) -> None:
        """Write the object `name` with the content of `file`."""

        def upload() -> None:
            system, root = open_uri(self.uri)
            with file.open("rb") as read, system.open_output_stream(f"{root}/{name}") as written:
                shutil.copyfileobj(read, written, BLOCK_BYTES)

        self._change(upload, tries)

    def download(self, name: str, file: Path) -> None:
        """Write the content of `name` to `file`, whole or not at all.

        Raises:
            FileNotFoundError: if there is none.
        """

        def download() -> None:
            system, root = open_uri(self.uri)
            with (
                replacing(file, many_writers=True) as partial,
                system.open_input_file(f"{root}/{name}") as read,
                partial.open("wb") as written,
            ):
                shutil.copyfileobj(read, written, BLOCK_BYTES)

        file.parent.mkdir(parents=True, exist_ok=True)
        reached(download, RUN_WAITS_S)

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in the order of `names`; those that are not there are passed over."""

        def delete(name: str) -> None:
            system, root = open_uri(self.uri)
            with suppress(FileNotFoundError):
                system.delete_file(f"{root}/{name}")

        for name in names:
            self._change(lambda name=name: delete(name))  # type: ignore[misc]

    def delete_folder(self, name: str) -> None:
        """Delete all objects in the folder `name`."""

        def delete() -> None:
            system, root = open_uri(self.uri)
            with suppress(FileNotFoundError):
                system.delete_dir(f"{root}/{name}".rstrip("/"))

        self._change(delete)

    def check_writable(self) -> None:
        """Check that objects can be written, by one that is deleted again."""
        self.write(WRITE_TEST, b"-")
        with suppress(OSError):  # where nothing may be deleted, it stays, one for all checks
            self.delete([WRITE_TEST])

    def delete_if_empty(self) -> None:
        """Delete the mark of a folder without objects, which stores that know no folders keep."""
        if not self.list():
            self.delete_folder("")


def _objects(found: Iterable[fs.FileInfo], root: str) -> dict[str, Stored]:
    files = (info for info in found if info.is_file)
    return {info.path.removeprefix(f"{root}/"): Stored(info.size, info.mtime_ns or 0) for info in files}


def side_by_side(work: Callable[[str], object], names: Iterable[str]) -> None:
    """Call `work` with each of `names`, a few at a time; at the first error, begin no more."""
    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="store") as pool:
        try:
            for done in [pool.submit(work, name) for name in names]:
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _waits(tries: int | None) -> Sequence[float]:
    return RUN_WAITS_S if tries is None else RUN_WAITS_S[: tries - 1]

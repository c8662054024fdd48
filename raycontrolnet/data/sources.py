"""Sources of rows. A source is opened once, checked, and sent to the loading tasks, which read single rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.folder_source import METADATA_FILES, has_metadata, open_folder
from raycontrolnet.data.hub_source import open_dataset
from raycontrolnet.data.records import ImageRow
from raycontrolnet.errors import DataError

_DATASETS_FILES = ("*.parquet", "*/*.parquet", "*.arrow", "state.json", "dataset_dict.json")
"""Files of a folder that `datasets` reads, other than a metadata file."""
_SHOWN_ENTRIES = 5


class Source(Protocol):
    """Rows that can be read in any order, on any machine that sees the same files. Pickles small, or without a copy."""

    def __len__(self) -> int:
        """Return the number of rows; opens nothing."""

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len, its images still encoded; the same on every call and machine.

        Raises:
            DataError: naming the row, if it cannot be used.
        """

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine, as far as can be seen without opening images."""

    def fingerprint(self) -> str:
        """Return a short hash of the data, not of its place, for the checkpoints' manifests."""

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield a line of text per row by which the latent cache notices changes: file names, bytes and captions.

        Reads no images: an image that was replaced by one of exactly its size is not noticed.
        """


def open_source(
    data: DataConfig, *, cache_dir: str | None = None, token: str | None = None, skip_bad: bool = False
) -> Source:
    """Open the source that `data` asks for, and check it with `Source.problems`.

    A local folder with a metadata file is read in the same way whichever flag names it; `datasets` reads the rest.

    Args:
        token: for private data sets on the Hub, if this machine is not logged in.
        skip_bad: whether rows that cannot be read are allowed.

    Raises:
        DataError: with all problems that can be seen without opening images, one per line.
    """
    source = _open(data, cache_dir, token)
    if not (skip_bad and len(source)) and (problems := list(source.problems())):
        if len(source):
            problems.append("fix the data, or skip such rows with --on_bad_sample skip")
        raise DataError("\n".join(problems))
    return source


def _open(data: DataConfig, cache_dir: str | None, token: str | None) -> Source:
    if data.train_data_dir is not None:
        folder, shown = data.train_data_dir, f"--train_data_dir={data.train_data_dir}"
        if not Path(folder).is_dir():
            is_file = Path(folder).exists()
            raise DataError(f"{shown}: {'is a file; name the folder that it is in' if is_file else 'no such folder'}")
        if has_metadata(folder):
            return open_folder(folder, data)
        if not any(any(Path(folder).glob(pattern)) for pattern in _DATASETS_FILES):
            raise DataError(f"{shown}: {_what_is_expected(folder)}")
        return open_dataset(shown, folder, data, cache_dir, token)
    if data.dataset_name is None:
        raise DataError("--train_data_dir, --dataset_name: give one of them")
    if data.dataset_config_name is None and has_metadata(data.dataset_name):
        return open_folder(data.dataset_name, data)
    return open_dataset(f"--dataset_name={data.dataset_name}", data.dataset_name, data, cache_dir, token)


def _what_is_expected(folder: str) -> str:
    entries = sorted(Path(folder).iterdir())
    inner = next((entry for entry in entries if has_metadata(str(entry))), None)
    if inner is not None:
        return f"has no {METADATA_FILES[0]}; perhaps you meant --train_data_dir={inner}"
    holds = ", ".join(entry.name for entry in entries[:_SHOWN_ENTRIES]) or "nothing"
    more = f" and {len(entries) - _SHOWN_ENTRIES:,} more" if len(entries) > _SHOWN_ENTRIES else ""
    return (
        f"has no {METADATA_FILES[0]}, one line per image such as "
        '{"image": "images/1.png", "conditioning_image": "edges/1.png", "text": "a caption"}; '
        f"also read are {', '.join(METADATA_FILES[1:])} and data sets in parquet. It holds: {holds}{more}"
    )

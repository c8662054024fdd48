"""Sources that the `datasets` library reads: a Hub id, a local folder or file, or a folder of `save_to_disk`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.data_sources import SourceConfig
from raycontrolnet.data.columns import Columns, find_columns, read_captions
from raycontrolnet.data.image_columns import holds_images, image_identity, paths_in, value_type
from raycontrolnet.data.paths import Root, missing_problems, path_or_image
from raycontrolnet.data.records import EncodedImage, ImageRow
from raycontrolnet.data.remote_copy import RemoteCopy
from raycontrolnet.data.remote_path import AnyPath, RemotePath
from raycontrolnet.errors import DataError
from raycontrolnet.quiet import no_messages
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    import datasets

_FILE_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}
_SAVED_MARKS = ("state.json", "dataset_dict.json")
_NO_FORMAT = re.compile("doesn't contain any data files|infer the same data file format")
"""Words of datasets for folders without data, or with files of several kinds."""
_FINGERPRINT_ROWS = 16
_OPENING = Lock()


@dataclass(frozen=True)
class Location:
    """Arguments of `datasets.load_dataset`."""

    name: str
    """A Hub id, or an absolute path: workers have another working directory. With `copy` a URI."""
    shown: str
    """`--dataset_name=...` as the user gave it, for messages."""
    config_name: str | None = None
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)
    """Only if the user gave one and the data set is on the Hub; otherwise each machine uses its own login."""
    copy: RemoteCopy | None = None
    """The data set's files, if it is in an object store."""

    @property
    def is_local(self) -> bool:
        """True if the data set is not on the Hub, and its images may be files."""
        return self.copy is not None or Path(self.name).is_absolute()

    @property
    def folder(self) -> Root:
        """Folder in which the relative paths of a data set that is not on the Hub begin."""
        if self.copy is not None:
            return self.copy.root / ".." if self.copy.is_file else self.copy.root
        return self.name if Path(self.name).is_dir() else str(Path(self.name).parent)


@dataclass(frozen=True)
class HubSource:
    """Rows of a `datasets.Dataset`. Pickled as the arguments that open it; each process opens it once."""

    location: Location
    columns: Columns
    num_rows: int

    @property
    def remote(self) -> bool:
        return self.location.copy is not None  # its images may be files

    def __len__(self) -> int:
        return self.num_rows

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len; reads only its part of the Arrow file.

        Raises:
            DataError: if the row lacks an image or a caption, or if the data set cannot be opened on this machine.
        """
        values = self._dataset()[row]
        place = f"{self.location.shown}, row {row}"
        try:
            captions = read_captions(values[self.columns.caption])
        except ValueError as error:
            raise DataError(f"{place}: {self.columns.caption} {error}") from None
        return ImageRow(
            image=self._encoded(values[self.columns.image], f"{place}: {self.columns.image}"),
            conditioning_image=self._encoded(
                values[self.columns.conditioning_image], f"{place}: {self.columns.conditioning_image}"
            ),
            captions=captions,
            place=place,
        )

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine: no rows, empty cells, missing files."""
        dataset = self._dataset()
        if not len(dataset):
            yield f"{self.location.shown}: has no rows"
        if getattr(dataset, "_indices", None) is not None:  # a saved selection: the table below has other rows as well
            return
        table = dataset.data
        for column in (self.columns.image, self.columns.conditioning_image, self.columns.caption):
            if empty := table.column(column).null_count:
                yield f"{self.location.shown}: {column} is null in {empty:,} of {len(dataset):,} rows"
        names = (self.columns.image, self.columns.conditioning_image)
        columns = {name: paths_in(table.column(name)) for name in names}
        yield from missing_problems(self.location.folder, columns, lambda row: f"{self.location.shown}, row {row}")

    def files(self, row: int) -> tuple[str, ...]:
        """Return the path of a local data set, and of the row's images if it holds paths; none of one on the Hub."""
        if not self.location.is_local:
            return ()
        images: tuple[object, ...] = ()
        with suppress(DataError):
            loaded = self.read(row)
            images = loaded.image, loaded.conditioning_image
        return (self.location.name, *(image for image in images if isinstance(image, str)))

    def fingerprint(self) -> str:
        """Return a hash of the name (of a Hub data set; a local one may move), size and columns, and of a few rows."""
        dataset = self._dataset()
        name = None if self.location.is_local else (self.location.name, self.location.config_name)
        columns = [self.columns.image, self.columns.conditioning_image, self.columns.caption]
        identity = (name, self.num_rows, [(column, str(dataset.features[column])) for column in columns])
        digest = hashlib.sha256(repr(identity).encode())
        for row in range(0, self.num_rows, max(1, self.num_rows // _FINGERPRINT_ROWS)):
            try:
                values = self.read(row)
            except DataError as error:  # a bad sample, which may be skipped
                digest.update(str(error).encode())
                continue
            for value in (values.image, values.conditioning_image):  # paths in a cache differ between machines
                digest.update(value if isinstance(value, bytes) else PurePath(str(value)).name.encode())
            digest.update(repr(values.captions).encode())
        return digest.hexdigest()[:16]

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """See `Source.identities`. Embedded images are not read, only Arrow's table of their lengths."""
        table = self._dataset().with_format("arrow")[list(rows)]
        names = (self.columns.image, self.columns.conditioning_image)
        for place in range(len(rows)):
            images = [(name, *image_identity(table[name][place], self.location.folder)) for name in names]
            yield json.dumps([*images, table[self.columns.caption][place].as_py()])

    def _dataset(self) -> datasets.Dataset:
        with _OPENING:  # by one thread, not by all that read
            dataset = _open(self.location, self.columns)
        if len(dataset) != self.num_rows:
            raise DataError(
                f"{self.location.shown}: has {len(dataset):,} rows on this machine and {self.num_rows:,} where the run "
                "was started; bring both to one version of the data set"
            )
        return dataset

    def _encoded(self, value: Any, place: str) -> EncodedImage:
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, str) and value:
            return path_or_image(self.location.folder, value, place)
        if isinstance(value, bytes):
            return value
        raise DataError(f"{place} is empty")


def open_dataset(
    shown: str, name: str | RemotePath, data: SourceConfig, cache_dir: str | None, token: str | None
) -> HubSource:
    """Open the split `train` of the data set `name`, and download it if need be; `shown` is its name in messages.

    Raises:
        DataError: if it cannot be opened, or with all problems of its columns.
    """
    copy = RemoteCopy.of(name) if isinstance(name, RemotePath) else None
    name = str(name)
    is_local = copy is None and Path(name).exists()
    if not (copy or is_local) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"{shown}: no such file or folder")
    location = Location(
        name=str(Path(name).absolute()) if is_local else name,
        shown=shown,
        config_name=data.dataset_config_name,
        cache_dir=str(Path(cache_dir).absolute()) if cache_dir else None,
        token=None if copy or is_local else token,
        copy=copy,
    )
    _open.cache_clear()  # what was opened for an earlier run may have changed since
    dataset = _load(location)
    columns = find_columns(data, dataset.column_names, shown)
    if problems := list(_type_problems(dataset.features, columns, location)):
        raise DataError("\n".join(problems))
    return HubSource(location, columns, len(dataset))


@lru_cache(maxsize=8)
def _open(location: Location, columns: Columns) -> datasets.Dataset:
    """Open the three columns that are read, with images left encoded for the transforms."""
    import datasets

    names = [columns.image, columns.conditioning_image, columns.caption]
    dataset = _load(location).with_format(None).select_columns(list(dict.fromkeys(names)))
    for name in names[:2]:
        if isinstance(dataset.features[name], datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _load(location: Location) -> datasets.Dataset:
    import warnings

    import datasets

    name, options = location.name, {"cache_dir": location.cache_dir, "split": "train"}
    if location.copy is not None:
        name = str(location.copy.fetched(location.cache_dir))
    try:
        with warnings.catch_warnings(), no_messages("datasets"):
            warnings.simplefilter("ignore", ResourceWarning)  # datasets leaves metadata files to the garbage collector
            if location.is_local and Path(name).is_file():
                builder = _FILE_BUILDERS.get(Path(name).suffix)
                if builder is None:
                    raise DataError(f"{location.shown}: is a file, but none of {', '.join(_FILE_BUILDERS)}")
                return datasets.load_dataset(builder, data_files=name, **options)
            if location.is_local and any(Path(name, mark).exists() for mark in _SAVED_MARKS):
                saved = datasets.load_from_disk(name)
                if isinstance(saved, datasets.Dataset):
                    return saved
                if "train" not in saved:
                    raise DataError(f"{location.shown}: has no split train, only: {', '.join(map(str, saved))}")
                return saved["train"]
            return datasets.load_dataset(name, location.config_name, token=location.token, **options)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - datasets raises some twenty kinds, among them bare ValueErrors
        reason = _reason(error, location)
        raise DataError(f"{location.shown}: {reason.replace(name, location.name)}") from None


def is_remote_table(path: AnyPath) -> bool:
    """Check for a file in an object store that is a data set by itself."""
    return isinstance(path, RemotePath) and path.suffix in _FILE_BUILDERS and path.is_file()


def _reason(error: Exception, location: Location) -> str:
    """Return one line that says what is wrong and what to do."""
    import datasets

    cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
    text = error_message(cause or error)
    if location.token:
        text = text.replace(location.token, "***")
    if "Unknown split" in text:
        return f"has no split train ({text.split('. ')[-1].replace('Should be one of', 'it has').rstrip('.')})"
    if "corresponds to no data" in text:
        return "has no rows"
    if "BuilderConfig" in text or "Config name is missing" in text:
        return f"choose a configuration with --dataset_config_name ({text})"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return (
            f"the Hub cannot be reached ({text}); check the network and HF_HUB_OFFLINE, or download the data set "
            f"elsewhere (hf download --repo-type dataset {location.name} --local-dir DIR) and pass --dataset_name=DIR"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return f"not found ({text}); check the spelling, and if it is private or gated log in with: hf auth login"
    if "Dataset scripts" in text:
        return f"needs code to be read, which datasets no longer runs ({text}); use a copy in parquet"
    of_one_format = "; name a file, or a folder whose files have one format, such as parquet"
    return f"cannot be read ({text}){of_one_format if location.is_local and _NO_FORMAT.search(text) else ''}"


def _type_problems(features: datasets.Features, columns: Columns, location: Location) -> Iterator[str]:
    for column in (columns.image, columns.conditioning_image):
        kind = value_type(features[column])
        if not holds_images(features[column]) and kind not in ("string", "binary"):
            yield f"{location.shown}: {column} must hold images or paths of images, is {features[column]}"
        elif kind == "string" and not location.is_local:
            yield (
                f"{location.shown}: {column} holds paths, which can be followed in local data sets only; download it "
                f"(hf download --repo-type dataset {location.name} --local-dir DIR) and pass --dataset_name=DIR"
            )
    feature = features[columns.caption]
    item = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)
    if value_type(item) != "string":
        yield f"{location.shown}: {columns.caption} must hold a text or a list of texts, is {feature}"

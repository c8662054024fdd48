"""The sizes of a data set's images, from the headers of their files, read once: a later run finds them stored."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.buckets import Buckets, Sizes, bucket_sizes
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import EncodedImage, Size
from raycontrolnet.data.remote_path import RemotePath
from raycontrolnet.data.source import Source
from raycontrolnet.data.stream import REMOTE_READS, THREADS
from raycontrolnet.data.threads import in_threads
from raycontrolnet.data.transforms import IMAGE_BACKGROUND, IMAGE_FORMATS, decode_rgb
from raycontrolnet.errors import DataError
from raycontrolnet.storage.files import replacing, user_cache
from raycontrolnet.text import shorten

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised when the sizes that are read change: stored ones are then read anew."""
ROWS_AT_A_TIME = 64
HEADER_BYTES = 64 * 1024
"""Bytes of a file in an object store that are fetched at a time; most headers are shorter."""
MANY = 10_000
"""Rows of which the log says that their headers are read."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF's orientations that turn an image by a quarter."""
UNKNOWN = (1, 1)
"""Size of an image that cannot be read, where such rows are skipped: that of any square."""


def image_sizes(source: Source, rows: Iterable[int], *, skip_bad: bool = False) -> Sizes:
    """Return the size of the image of every row of `source`, 0 x 0 for rows that are not asked for.

    Sizes are stored in the user's cache under a hash of the rows' identities, and read anew if that changes.

    Args:
        rows: rows to look at.
        skip_bad: whether rows that cannot be read count as square, for they will be left out.

    Raises:
        DataError: naming the rows that cannot be read.
    """
    asked = sorted(rows)
    sizes = np.zeros((len(source), 2), np.int32)
    store = _store(source, asked)
    with suppress(OSError, ValueError):
        found = np.load(store)
        if found.shape == (len(asked), 2) and found.dtype == np.int32:
            sizes[asked] = found
            return sizes
    if len(asked) >= MANY:
        logger.info("reading the headers of %s images for --aspect_buckets", f"{len(asked):,}")
    parts = [asked[start : start + ROWS_AT_A_TIME] for start in range(0, len(asked), ROWS_AT_A_TIME)]
    threads = REMOTE_READS if source.remote else THREADS
    problems: list[str] = []
    for part, read in zip(parts, in_threads(partial(_sizes_of, source), parts, threads, 2 * threads), strict=True):
        for row, size in zip(part, read, strict=True):
            if isinstance(size, DataError):
                problems.append(str(size))
            sizes[row] = UNKNOWN if isinstance(size, DataError) else size
    if problems and not skip_bad:
        lines = shorten(problems, "images cannot be read")
        raise DataError("\n".join([*lines, "fix the data, or skip such rows with --on_bad_sample skip"]))
    if not problems:
        with suppress(OSError):  # a full disk, or a home that cannot be written to
            store.parent.mkdir(parents=True, exist_ok=True)
            with replacing(store, many_writers=True) as partial_file, partial_file.open("wb") as file:
                np.save(file, sizes[asked])
    return sizes


def find_buckets(config: TrainConfig, source: Source, multiple: int = 8) -> Buckets | None:
    """Return the buckets of a run's rows, of which the headers are read; None without `aspect_buckets`.

    Args:
        config: the run's settings; without a seed, the held-out rows are those of seed 0.
        multiple: as for `bucket_sizes`.

    Raises:
        DataError: as `image_sizes`.
    """
    if not config.aspect_buckets:
        return None
    num_rows = len(source)
    order = SampleOrder(num_rows, config.seed or 0, config.max_train_samples, (), config.num_held_out(num_rows))
    trained = np.arange(num_rows) if order.rows is None else order.rows
    used = np.concatenate([trained, order.held_out]).tolist()
    sizes = image_sizes(source, used, skip_bad=config.on_bad_sample == "skip")
    candidates = bucket_sizes(config.resolution, multiple)
    return Buckets.of(sizes, trained, order.held_out, config.train_batch_size, candidates)


def header_size(image: EncodedImage) -> Size:
    """Return height and width of an image, upright as its EXIF data says, from its file's header.

    Raises:
        Exception: of many kinds, if the header is not one.
    """
    with _opened(image) as file, Image.open(file, formats=IMAGE_FORMATS) as opened:
        # Not PNG's own, which decodes the whole image in search of EXIF data that nearly always stands before it.
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation)
        is_turned = orientation in SIDEWAYS and opened.format != "TIFF"  # of which Pillow tells the size upright
        return (opened.width, opened.height) if is_turned else (opened.height, opened.width)


def _opened(image: EncodedImage) -> BinaryIO:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    return image.open(buffering=HEADER_BYTES) if isinstance(image, RemotePath) else Path(image).open("rb")


def _sizes_of(source: Source, rows: Sequence[int]) -> list[Size | DataError]:
    return list(_each_size(source, rows))


def _each_size(source: Source, rows: Sequence[int]) -> Iterator[Size | DataError]:
    for row in rows:
        try:
            loaded = source.read(row)
            try:
                if isinstance(loaded.image, str) and not Path(loaded.image).is_file():  # opening a named pipe waits
                    raise FileNotFoundError(loaded.image)
                yield header_size(loaded.image)
            except Exception:  # noqa: BLE001 - as in `decode_rgb`, which tells what is wrong
                decoded = decode_rgb(loaded.image, background=IMAGE_BACKGROUND, place=f"{loaded.place}, image")
                yield decoded.height, decoded.width
        except DataError as error:
            yield error


def _store(source: Source, rows: Sequence[int]) -> Path:
    """Return the file for the sizes of `rows`, in the user's cache."""
    digest = hashlib.blake2b(repr(VERSION).encode(), digest_size=16)
    for row, identity in zip(rows, source.identities(rows), strict=True):
        digest.update(f"{row} {identity}\n".encode())
    return user_cache() / "raycontrolnet" / "sizes" / f"{digest.hexdigest()}.npy"

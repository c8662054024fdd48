"""The pictures in a folder, and their captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycontrolnet.conditions.folder import CONDITIONING, ConditionFolder
from raycontrolnet.config.condition_config import PicturesConfig
from raycontrolnet.data.columns import find_column, read_captions
from raycontrolnet.data.metadata_file import CONDITION_JOURNAL, METADATA_FILES, metadata_rows, read_path
from raycontrolnet.errors import DataError
from raycontrolnet.text import NOT_UTF8, is_unicode, shorten

SUFFIXES = frozenset(
    {
        ".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
        ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
"""Endings of pictures, in either case. Formats that Pillow cannot read by itself (HEIC) are here too, so that such
pictures are reported instead of ignored."""

Text = str | list[str]


@dataclass(frozen=True)
class PictureRow:
    """A row of the new data set."""

    path: str
    """Absolute path of the picture."""
    text: Text
    """Its caption, or a list of captions, as found."""


@dataclass
class _Metadata:
    """Content of a metadata file, if there is one."""

    path: Path
    rows: list[tuple[str, Text | None]] = field(default_factory=list)
    """(absolute path, caption) in the file's order."""
    conditioning: set[str] = field(default_factory=set)
    """Absolute paths of conditioning images, which do not count as pictures."""
    no_captions: str | None = None
    """Reason why it has no captions."""


def find_rows(config: PicturesConfig, out: Path) -> list[PictureRow]:
    """Find the pictures in `config.folder` and their captions: those in its metadata file first, then others by name.

    A caption comes from the metadata file, or else from a text file beside the picture (`a.txt` for `a.jpg`; one
    caption per line), or else it is `config.caption`.

    Args:
        config: its folder and columns, and the caption of pictures that have no other.
        out: folder whose conditioning images do not count as pictures. Neither do those in other folders that
            `raycontrolnet condition` wrote; metadata files that it wrote are not read.

    Raises:
        DataError: with all problems of the metadata file, or the pictures without a caption, or if there are no
            pictures.
    """
    folder = config.folder
    try:
        _check_unicode(config.caption or "")
    except ValueError as error:
        raise DataError(f"--caption: {error}") from None
    paths = (folder / name for name in METADATA_FILES)
    found = next((path for path in paths if path.is_file() and not ConditionFolder(folder).wrote(path)), None)
    metadata = _read_metadata(found, config) if found else _Metadata(folder / METADATA_FILES[0])
    seen = {path for path, _ in metadata.rows} | metadata.conditioning
    others = sorted(path for path in _search(folder, out / CONDITIONING) if path not in seen)
    everything = [*metadata.rows, *((path, None) for path in others)]
    if not everything:
        kinds = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise DataError(f"--images={folder}: holds no pictures (files that end in {kinds})")
    return list(_with_captions(everything, config, metadata))


def _search(folder: Path, left_out: Path) -> Iterator[str]:
    """Yield absolute paths of the pictures below `folder`, also behind links; skip hidden files and folders."""

    def stop(error: OSError) -> None:
        raise DataError(f"--images={folder}: {error.filename} cannot be read ({error.strerror})")

    been = set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        if (real := os.path.realpath(place)) in been:  # a circle of links
            folders.clear()
            continue
        been.add(real)
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and Path(place, name) != left_out
            and not (name == CONDITIONING and CONDITION_JOURNAL in files)
        ]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122 (fast)
                yield os.path.join(place, name)  # noqa: PTH118


def _read_metadata(path: Path, config: PicturesConfig) -> _Metadata:
    """Read a metadata file, which may lack the conditioning column and the captions."""
    found, problems, columns = _Metadata(path), list[str](), dict[str, str]()
    try:
        for number, row in metadata_rows(path):
            try:
                if isinstance(row, ValueError):
                    raise row
                columns = columns or _columns(found, list(row), config)
                caption = row.get(columns["caption"]) if "caption" in columns else None
                found.rows.append((_absolute(path, read_path(row, columns["image"])), _text(caption)))
                conditioning = row.get(columns.get("conditioning", ""))
                if isinstance(conditioning, str) and conditioning:
                    found.conditioning.add(_absolute(path, conditioning))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if problems:
        raise DataError("\n".join(shorten(problems, "lines cannot be used")))
    return found


def _columns(found: _Metadata, available: Sequence[str], config: PicturesConfig) -> dict[str, str]:
    columns, where = {}, str(found.path)
    try:
        columns["image"] = find_column("image_column", config.image_column, available, where)
    except ValueError as problem:
        raise DataError(str(problem)) from None
    try:
        columns["caption"] = find_column("caption_column", config.caption_column, available, where)
    except ValueError as problem:
        found.no_captions = str(problem)
    for name in ("conditioning_image", "conditioning_image_file_name", "source"):
        if name in available:
            columns.setdefault("conditioning", name)
    return columns


def _absolute(metadata: Path, path: str) -> str:
    return os.path.normpath(metadata.parent / path)


def _text(value: Any) -> Text | None:
    """Return the caption or captions of a metadata row; None if it has none.

    Raises:
        ValueError: if `value` is something else.
    """
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    for caption in read_captions(value):
        _check_unicode(caption)
    return value


def _with_captions(
    rows: Sequence[tuple[str, Text | None]], config: PicturesConfig, metadata: _Metadata
) -> Iterator[PictureRow]:
    folder, missing, problems = config.folder, list[str](), list[str]()
    for path, given in rows:
        try:
            text = _text_beside(path) if given is None else given
        except ValueError as error:
            problems.append(str(error))
            continue
        text = config.caption if text is None else text
        if text is None:
            missing.append(os.path.relpath(path, folder))
        else:
            yield PictureRow(path, text)
    if missing:
        first = Path(missing[0])
        problems += shorten([f"{folder / name}: has no caption" for name in missing], "pictures have no caption")
        if metadata.no_captions:
            problems.append(metadata.no_captions)
        problems.append(
            f"write a text file for each ({first.with_suffix('.txt')} for {first}) or a row in {metadata.path}, or "
            'give one caption for all that have none: --caption "a photo"'
        )
    if problems:
        raise DataError("\n".join(problems))


def _text_beside(path: str) -> Text | None:
    """Read the captions, one a line, in the text file of the picture's name; None if there is no such file."""
    file = Path(path).with_suffix(".txt")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{file}: {NOT_UTF8}") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error})") from None
    captions = [line for line in lines if line]
    return captions if len(captions) > 1 else next(iter(captions), None)


def _check_unicode(text: str) -> None:
    if not is_unicode(text):
        raise ValueError("the caption is not valid Unicode")

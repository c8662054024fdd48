"""A folder without a metadata file, whose files pair by name, as other trainers lay them out.

images/1.png    conditioning_images/1.png    images/1.txt (or 1.txt): the caption
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from raycontrolnet.data.folder_source import FolderSource, rows_table
from raycontrolnet.errors import DataError
from raycontrolnet.text import error_message, shorten

IMAGES = "images"
CONDITIONING_FOLDERS = ("conditioning_images", "conditioning_image", "conditioning")
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))


def conditioning_folder(folder: str) -> Path | None:
    """Return the folder of the conditioning images, if `folder` has this layout."""
    if not Path(folder, IMAGES).is_dir():
        return None
    return next((path for name in CONDITIONING_FOLDERS if (path := Path(folder, name)).is_dir()), None)


def open_pairs(folder: str) -> FolderSource:
    """Read names and captions of a folder of this layout, by name; opens no image.

    Raises:
        DataError: with the images that lack a conditioning image or a caption.
    """
    conditioning = conditioning_folder(folder)
    assert conditioning is not None
    partners = {path.stem: path for path in _images_in(conditioning)}
    rows, problems = [], []
    for image in _images_in(Path(folder, IMAGES)):
        partner = partners.get(image.stem)
        if partner is None:
            problems.append(f"{image}: {conditioning.name} has no image of that name")
            continue
        try:
            caption = _caption(image, Path(folder))
        except ValueError as error:
            problems.append(f"{image}: {error}")
            continue
        rows.append((f"{IMAGES}/{image.name}", f"{conditioning.name}/{partner.name}", (caption,), 0))
    if problems:
        raise DataError("\n".join(shorten(problems, "images have no partner or caption")))
    digest = hashlib.sha256(repr(("pairs", rows)).encode()).hexdigest()[:16]
    return FolderSource(str(Path(folder).absolute()), folder, rows_table(rows), digest)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _caption(image: Path, folder: Path) -> str:
    places = (image.with_suffix(".txt"), folder / f"{image.stem}.txt")
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        raise ValueError(f"has no caption; write {places[0]}")
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError(f"its caption {file} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"its caption {file} cannot be read ({error_message(error)})") from None

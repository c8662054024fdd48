"""A folder without a metadata file, whose files pair by name, as other trainers lay them out.

images/1.png    conditioning_images/1.png    images/1.txt (or 1.txt): the caption
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from pathlib import Path

from raycontrolnet.data.folder_source import FolderSource, rows_table
from raycontrolnet.text import error_message

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

    `FolderSource.problems` names images that lack a conditioning image or a caption.
    """
    conditioning = conditioning_folder(folder)
    assert conditioning is not None
    partners = defaultdict(list)
    for path in _images_in(conditioning):
        partners[path.stem].append(path.name)
    images = _images_in(Path(folder, IMAGES))
    stems = Counter(image.stem for image in images)
    rows, bad_rows = [], {}
    for row, image in enumerate(images):
        names, partner, caption = partners[image.stem], "", ""
        try:
            if len(names) != 1 or stems[image.stem] > 1:
                raise ValueError(f"pairs with {len(names)} images in {conditioning.name}, by its name; must with one")
            partner, caption = f"{conditioning.name}/{names[0]}", _caption(image, Path(folder))
        except ValueError as error:
            bad_rows[row] = str(error)
        rows.append((f"{IMAGES}/{image.name}", partner, (caption,), 0))
    digest = hashlib.sha256(repr(("pairs", rows)).encode()).hexdigest()[:16]
    return FolderSource(str(Path(folder).absolute()), folder, rows_table(rows), digest, bad_rows)


def _images_in(folder: Path) -> list[Path]:
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))  # as macOS's ._1.png
    return sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)


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

"""A folder without a metadata file, whose files pair by name, as other trainers lay them out.

images/1.png    conditioning_images/1.png    images/1.txt (or 1.txt): the caption
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from raycontrolnet.data.folder_source import FolderSource, folder_source, rows_table
from raycontrolnet.data.remote_path import AnyPath, RemotePath, listed
from raycontrolnet.storage.store_requests import REQUESTS
from raycontrolnet.text import NOT_UTF8, error_message

IMAGES = "images"
CONDITIONING_FOLDERS = ("conditioning_images", "conditioning_image", "conditioning")
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"))


def conditioning_folder(folder: AnyPath) -> AnyPath | None:
    """Return the folder of the conditioning images, if `folder` has this layout."""
    if not (folder / IMAGES).is_dir():
        return None
    return next((path for name in CONDITIONING_FOLDERS if (path := folder / name).is_dir()), None)


def open_pairs(folder: AnyPath) -> FolderSource:
    """Read names and captions of a folder of this layout, by name; opens no image.

    `FolderSource.problems` names images that lack a conditioning image or a caption.
    """
    conditioning = conditioning_folder(folder)
    assert conditioning is not None
    partners = defaultdict(list)
    for path in _images_in(conditioning):
        partners[path.stem].append(path.name)
    images = _images_in(folder / IMAGES)
    stems = Counter(image.stem for image in images)
    with ThreadPoolExecutor(REQUESTS if isinstance(folder, RemotePath) else 1) as pool:
        captions = list(pool.map(partial(_caption, folder=folder), images))
    rows, bad_rows = [], {}
    for row, (image, (caption, fault)) in enumerate(zip(images, captions, strict=True)):
        names = partners[image.stem]
        if len(names) != 1 or stems[image.stem] > 1:
            fault = f"pairs with {len(names)} images in {conditioning.name}, by its name; must with one"
        if fault:
            bad_rows[row] = fault
        partner, text = ("", "") if fault else (f"{conditioning.name}/{names[0]}", caption)
        rows.append((f"{IMAGES}/{image.name}", partner, (text,), 0))
    digest = hashlib.sha256(repr(("pairs", rows)).encode()).hexdigest()[:16]
    return folder_source(folder, str(folder), rows_table(rows), digest, bad_rows)


def _images_in(folder: AnyPath) -> list[AnyPath]:
    paths = (path for path in listed(folder) if not path.name.startswith("."))  # as macOS's ._1.png
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def _caption(image: AnyPath, folder: AnyPath) -> tuple[str, str]:
    """Return the caption of an image, and why it has none; one of them is empty."""
    places = (image.with_suffix(".txt"), folder / f"{image.stem}.txt")
    file = next((path for path in places if path.is_file()), None)
    if file is None:
        return "", f"has no caption; write {places[0]}"
    try:
        return file.read_text(encoding="utf-8-sig").strip(), ""
    except UnicodeDecodeError:
        return "", f"its caption {file} {NOT_UTF8}"
    except OSError as error:
        return "", f"its caption {file} cannot be read ({error_message(error)})"

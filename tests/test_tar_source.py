"""Tars of samples give exactly the rows that were packed; and what is wrong with one is said by tar and key."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import Settings, equal, flags, losses, metadata, run, weights

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data import byte_ranges, tar_source
from raycontrolnet.data.folder_source import FolderSource
from raycontrolnet.data.records import EncodedImage
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.tar_index import split_name
from raycontrolnet.data.tar_source import TarSource
from raycontrolnet.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SKIP = "fix the data, or skip such rows with --on_bad_sample skip"
LONG = "a-long-folder-name/" * 8
FILES = {
    "0001.jpg": b"image 1", "0001.conditioning_image.png": b"map 1", "0001.txt": b"text 1\n",
    "0002.jpg": b"image 2, longer", "0002.conditioning_image.png": b"map 2", "0002.txt": "täxt 2".encode(),
}  # fmt: skip
"""Two samples; nothing of what is read here decodes the images."""


def write_tar(path: Path, files: Mapping[str, bytes] = FILES, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def tar_of(folder: Path, path: Path, rows: slice = slice(None)) -> Path:
    """Write the rows of a folder with metadata.jsonl as a tar."""
    files = {}
    for number, row in list(enumerate(metadata(folder)))[rows]:
        image, conditioning = (folder / row[name] for name in ("image", "conditioning_image"))
        files[f"{number:04}{image.suffix}"] = image.read_bytes()
        files[f"{number:04}.conditioning_image{conditioning.suffix}"] = conditioning.read_bytes()
        files[f"{number:04}.json"] = json.dumps({"text": row["text"]}).encode()
    return write_tar(path, files)


def opened(folder: Path, *, skip_bad: bool = False, **settings: Any) -> TarSource:
    source = open_source(DataConfig(train_data_dir=str(folder), **settings), skip_bad=skip_bad)
    assert isinstance(source, TarSource)
    return source


def contents(source: Source, row: int) -> tuple[EncodedImage, EncodedImage, tuple[str, ...]]:
    values = source.read(row)
    return values.image, values.conditioning_image, values.captions


def problems_of(folder: Path, **settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(train_data_dir=str(folder), **settings))
    return str(caught.value).split("\n")


# --- what is read ---


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_row_has_exactly_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, flag: str) -> None:
    """Names of more than 100 letters, and of more than ASCII, are written in another way by each format."""
    rng = np.random.default_rng(0)
    expected, names = [], ("häuser", LONG[:-1], "short")
    for shard, folder in enumerate(names):
        files = {}
        for number in range(20):
            image, conditioning = (rng.bytes(int(rng.integers(1, 3000))) for _ in range(2))
            files[f"./{folder}/{number}.png"] = image
            files[f"./{folder}/{number}.control.webp"] = conditioning
            files[f"./{folder}/{number}.txt"] = b"text %d of %d" % (number, shard)
            expected.append((image, conditioning, (f"text {number} of {shard}",)))
        write_tar(tmp_path / "data" / f"{shard}.tar", files, FORMATS[form])
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {flag: "data"}
    source = open_source(DataConfig(**settings))
    monkeypatch.chdir("/")
    byte_ranges.close_files()
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 60
    assert list(source.problems()) == []
    for row in rng.permutation(60):
        assert contents(source, int(row)) == expected[row]
    assert source.read(41).place == "data/2.tar:short/1"
    assert source.read(21).place.startswith("data/1.tar:a-long-folder-name/")


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_a_tar_by_itself_and_tars_in_train(tmp_path: Path, flag: str) -> None:
    shard = write_tar(tmp_path / "train" / "0001.tar")
    for path in (shard, shard.parent, tmp_path):
        settings: dict[str, Any] = {flag: str(path)}
        source = open_source(DataConfig(**settings))
        assert [contents(source, row) for row in range(2)] == [
            (b"image 1", b"map 1", ("text 1",)),
            (b"image 2, longer", b"map 2", ("täxt 2",)),
        ]
        assert source.read(1).place == f"{shard}:0002"


def test_rows_come_by_tar_and_then_as_they_are_in_it(tmp_path: Path) -> None:
    """Files of a sample need not stand together."""
    for name, keys in (("b", "31"), ("a", "792")):
        files = [(f"{key}.{extension}", key) for extension in ("txt", "png", "hint.png") for key in keys]
        write_tar(tmp_path / f"{name}.tar", {name: key.encode() for name, key in files})
    source = opened(tmp_path)
    assert [source.read(row).captions[0] for row in range(5)] == list("79231")


def test_names_are_split_as_webdataset_does() -> None:
    from datasets.packaged_modules.webdataset.webdataset import base_plus_ext  # WebDataset's own function

    for name in ("a/0001.jpg", "a.b/0001.control.png", "0001.tar.gz", "a/b/0001.x/0002.txt", "1..jpg"):
        assert split_name(name) == base_plus_ext(name)
    for name in ("0001", "a.b/0001", ".0001.jpg"):
        assert split_name(name) is None
        assert base_plus_ext(name) == (None, None)
    assert split_name("./a/.//0001.PNG") == ("a/0001", "png")
    for name in ("a/._0001.jpg", ".git/0001.jpg", "a/.b/0001.jpg", "../0001.jpg", "0001."):
        assert split_name(name) is None


CHOICES: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "formats": ({"1.JPEG": b"i", "1.conditioning.TIFF": b"c", "1.TXT": b"x"}, {}),
    "named by role": ({"1.image.png": b"i", "1.control.png": b"c", "1.caption": b"x"}, {}),
    "original ControlNet": ({"1.target.png": b"i", "1.source.png": b"c", "1.json": b'{"prompt": "x"}'}, {}),
    "hint": ({"1.webp": b"i", "1.hint.webp": b"c", "1.json": b'{"caption": "x"}'}, {}),
    "text before json": ({"1.png": b"i", "1.control.png": b"c", "1.json": b"{}", "1.txt": b"x"}, {}),
    "other files": ({"1.png": b"i", "1.cls": b"7", "1.depth.npy": b"-", "1.control.png": b"c", "1.txt": b"x"}, {}),
    "as in datasets": (
        {"1.jpg": b"i", "1.png": b"-", "1.control.png": b"c", "1.canny.png": b"-", "1.txt": b"x"},
        {"image_column": "jpg", "conditioning_image_column": "control.png", "caption_column": "txt"},
    ),
    "without formats": (
        {"1.photo.jpg": b"i", "1.png": b"-", "1.canny.png": b"c", "1.control.png": b"-", "1.blip.txt": b"x"},
        {"image_column": "photo", "conditioning_image_column": "canny", "caption_column": "blip"},
    ),
    "case and a dot before it": (
        {"1.Photo.jpg": b"i", "1.canny.png": b"c", "1.txt": b"x"},
        {"image_column": ".PHOTO.jpg", "conditioning_image_column": "Canny"},
    ),
    "no image's format": (
        {"1.rgb": b"i", "1.edge": b"c", "1.txt": b"x"},
        {"image_column": "rgb", "conditioning_image_column": "edge"},
    ),
    "a column of the json": (
        {"1.png": b"i", "1.control.png": b"c", "1.txt": b"-", "1.json": b'{"text": "-", "Words": "x"}'},
        {"caption_column": "Words"},
    ),
    "the json itself": (
        {"1.png": b"i", "1.control.png": b"c", "1.txt": b"-", "1.json": b'\xef\xbb\xbf{"text": "x"}'},
        {"caption_column": "json"},
    ),
    "another json": (
        {"1.png": b"i", "1.control.png": b"c", "1.json": b"{}", "1.meta.json": b'{"text": "x"}'},
        {"caption_column": "meta.json"},
    ),
    "swapped": (
        {"1.png": b"c", "1.control.png": b"i", "1.txt": b"\xef\xbb\xbf x\n"},
        {"image_column": "control", "conditioning_image_column": "png"},
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_file_is_what(tmp_path: Path, case: str) -> None:
    files, settings = CHOICES[case]
    write_tar(tmp_path / "0.tar", files)
    assert contents(opened(tmp_path, **settings), 0) == (b"i", b"c", ("x",))


def test_several_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"1.png": b"i", "1.control.png": b"c", "1.json": b'{"text": ["a", "b"]}'})
    assert opened(tmp_path).read(0).captions == ("a", "b")


def test_hidden_files_folders_and_notes_are_no_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", FILES | {"._0003.jpg": b"-", "a/.hidden/4.jpg": b"-", "README.txt": b"-"})
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("0005.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    write_tar(tmp_path / "._0.tar", {"x": b"-"})
    (tmp_path / "1.tar").mkdir()
    assert len(opened(tmp_path)) == 2


def test_many_rows_stay_small_and_travel_without_a_copy(tmp_path: Path) -> None:
    count = 20_000
    files = {f"{row}.{extension}": b"x" for row in range(count) for extension in ("png", "control.png", "txt")}
    write_tar(tmp_path / "0.tar", files, tarfile.USTAR_FORMAT)
    source = opened(tmp_path)
    source.read(0)
    assert source.table.nbytes < 100 * count
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5_000
    copy: TarSource = pickle.loads(data, buffers=buffers)
    assert copy.read(count - 1) == source.read(count - 1)
    addresses = [column.chunk(0).buffers()[1].address for column in (copy.table["shard"], source.table["shard"])]
    assert addresses[0] == addresses[1]


def test_headers_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files between the headers are 50 MB."""
    write_tar(
        tmp_path / "0.tar", {name: bytes(10**7) if name.endswith("g") else b"x" for name in FILES} | {"3.png": b""}
    )
    read, seen = io.BufferedReader.read, []

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            data = read(self, size)
            seen.append(len(data))
            return data

    monkeypatch.setattr(tarfile, "bltn_open", lambda name, mode: Counted(io.FileIO(name, mode)))
    assert len(opened(tmp_path, skip_bad=True)) == 3
    assert 7 * 512 <= sum(seen) < 30_000


def test_threads_share_more_tars_than_are_kept_open(tmp_path: Path) -> None:
    count = byte_ranges.OPEN_FILES + 20
    for row in range(count):
        write_tar(
            tmp_path / f"{row:03}.tar", {"1.png": b"%d" % row, "1.control.png": b"%d" % row, "1.txt": b"%d" % row}
        )
    source = opened(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    rows = [int(row) for row in np.random.default_rng(0).integers(0, count, 3000)]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, rows))
    assert [values.image for values in read] == [b"%d" % row for row in rows]
    assert [values.captions for values in read] == [(str(row),) for row in rows]
    assert len(os.listdir("/proc/self/fd")) <= before + byte_ranges.OPEN_FILES  # noqa: PTH208
    byte_ranges.close_files()
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


def test_the_fingerprint_and_the_identities_are_the_datas(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "0.tar")
    first, second = dict(list(FILES.items())[:3]), dict(list(FILES.items())[3:])
    write_tar(tmp_path / "b" / "x-0.tar", first, tarfile.GNU_FORMAT)
    write_tar(tmp_path / "b" / "x-1.tar", second)
    write_tar(tmp_path / "c" / "0.tar", FILES | {"0002.txt": b"other 2 "})
    a, b, c = (opened(tmp_path / name) for name in "abc")
    assert a.fingerprint() == b.fingerprint() == pickle.loads(pickle.dumps(a)).fingerprint() != c.fingerprint()
    assert len(a.fingerprint()) == 16
    same, before = list(a.identities([1, 0])), list(c.identities([1, 0]))
    assert list(b.identities([1, 0])) == same
    assert [one == other for one, other in zip(same, before, strict=True)] == [False, True]
    swapped = opened(tmp_path / "a", image_column="conditioning_image", conditioning_image_column="jpg")
    assert swapped.fingerprint() != a.fingerprint()


def test_a_tar_that_is_written_anew_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a loading task that has the earlier one open."""
    monkeypatch.setattr(tar_source, "close_files", lambda: None)
    path = write_tar(tmp_path / "0.tar")
    source = opened(tmp_path)
    assert source.read(0).image == b"image 1"
    write_tar(tmp_path / "new", FILES | {"0001.jpg": b"other 1"}).rename(path)
    assert opened(tmp_path).read(0).image == b"other 1"
    write_tar(path, dict(list(FILES.items())[:3]))
    num_bytes = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1024])
    byte_ranges.close_files()
    assert list(source.problems()) == [
        f"{path}: has 1,024 bytes on this machine and {num_bytes:,} where the run was started"
    ]
    place = f"{path}:0001"
    with pytest.raises(DataError, match=f"^{place}: cannot be read .the file ends before it: it has changed"):
        source.read(0)
    path.unlink()
    byte_ranges.close_files()
    assert list(source.problems()) == [f"{path}: cannot be read (No such file or directory)"]
    with pytest.raises(DataError, match=f"^{place}: cannot be read .No such file"):
        source.read(0)
    assert list(source.identities([0])) == ['["0001", 7, 5, null]']


# --- what is not ---


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def spoil(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))


def offset_of(name: str, path: Path) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


BAD_TARS: dict[str, tuple[Callable[[Path], Any], int, list[str]]] = {
    "cut off within a file": (
        lambda path: cut(path, offset_of("0002.conditioning_image.png", path) + 512 + 3),
        2,
        [
            ":0002: its conditioning_image.png is cut off with the tar",
            ": is cut off, at byte 4,611: 4 files can be read; copy or write it again",
        ],
    ),
    "cut off between files": (
        lambda path: cut(path, offset_of("0002.txt", path)),
        2,
        [
            ":0002: has no caption, as KEY.txt; it has: jpg, conditioning_image.png",
            ": is cut off, at byte 5,120: 5 files can be read; copy or write it again",
        ],
    ),
    "cut off within a header": (
        lambda path: cut(path, offset_of("0002.jpg", path) + 100),
        1,
        [": is damaged or cut off at byte 3,072 of 3,172: 3 files can be read; copy or write it again"],
    ),
    "without an end": (
        lambda path: cut(path, offset_of("0002.txt", path) + 1024),
        2,
        [": is cut off, at byte 6,144: 6 files can be read; copy or write it again"],
    ),
    "damaged": (
        lambda path: spoil(path, offset_of("0002.jpg", path)),
        1,
        [": is damaged or cut off at byte 3,072 of 10,240: 3 files can be read; copy or write it again"],
    ),
    "no tar": (lambda path: path.write_bytes(b"PK\x03\x04" * 500), 0, [": is not a tar file; copy or write it again"]),
    "a page of the web": (lambda path: path.write_text("<html>"), 0, [": is not a tar file; copy or write it again"]),
    "of no bytes": (lambda path: path.write_bytes(b""), 0, [": is empty (0 bytes); copy it again"]),
    "compressed in secret": (
        lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
        0,
        [": is compressed (with gzip), which allows no random access; decompress it to a .tar"],
    ),
    "two in one": (
        lambda path: append(path, path.read_bytes()),
        2,
        [
            (
                ": goes on for 14,336 bytes after its end at byte 6,144 (6 files): several tars in one, or a copy "
                "that is not whole; write each into its own file, or copy it again"
            )
        ],
    ),
    "a download that only has its length": (
        lambda path: os.truncate(path, 10**8),
        2,
        [
            (
                ": goes on for 99,993,856 bytes after its end at byte 6,144 (6 files): several tars in one, or a copy "
                "that is not whole; write each into its own file, or copy it again"
            )
        ],
    ),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_bad_tars(tmp_path: Path, case: str) -> None:
    """All that is whole can be read; the rest of a tar counts as one bad sample."""
    spoil_it, num_rows, expected = BAD_TARS[case]
    path = write_tar(tmp_path / "0001.tar", form=tarfile.USTAR_FORMAT)
    spoil_it(path)
    write_tar(tmp_path / "0002.tar", {name.replace("000", "001"): content for name, content in FILES.items()})
    problems = problems_of(tmp_path)
    assert problems == [*(f"{path}{problem}" for problem in expected), SKIP]
    assert max(map(len, problems)) <= 250 + len(str(path))
    source = opened(tmp_path, skip_bad=True)
    assert len(source) == num_rows + 1 + 2
    assert len(source.bad_rows) == len(expected)
    for row in range(len(source)):
        if row in source.bad_rows:
            with pytest.raises(DataError, match=f"^{path}"):
                source.read(row)
        else:
            assert source.read(row).image in (b"image 1", b"image 2, longer")
    assert len(list(source.identities(range(len(source))))) == len(source)
    assert len(source.fingerprint()) == 16


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_tars(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"0002{suffix}"
    path.write_bytes(gzip.compress(b"x") if "z" in suffix[-2:] and suffix != ".tar.zst" else b"\x28\xb5\x2f\xfd 123456")
    program = "zstd" if suffix == ".tar.zst" else "gzip"
    expected = [
        f"{path}: is compressed (with {program}), which allows no random access; decompress it to a .tar",
        SKIP,
    ]
    assert problems_of(path) == expected
    write_tar(tmp_path / "0001.tar")
    assert problems_of(tmp_path) == expected


def test_tars_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "0.tar")
    monkeypatch.setattr(
        tarfile, "bltn_open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert problems_of(tmp_path) == [f"{path}: cannot be read (Permission denied)", SKIP]


def test_empty_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "0.tar", {})
    assert problems_of(path) == [f"{path}: has no samples"]
    write_tar(tmp_path / "1.tar")
    caplog.clear()
    assert len(opened(tmp_path)) == 2
    assert caplog.messages == [f"{path}: holds no samples"]


SAMPLE = {"7.png": b"i", "7.control.png": b"c", "7.txt": b"x"}
BAD_SAMPLES: dict[str, tuple[dict[str, bytes], dict[str, Any], str]] = {
    "no image": ({"7.png": b""}, {}, "has no image, as KEY.jpg; it has: control.png, txt"),
    "no conditioning image": (
        {"7.control.png": b""},
        {},
        "has no conditioning image, as KEY.conditioning_image.png; it has: png, txt",
    ),
    "no caption": ({"7.txt": b""}, {}, "has no caption, as KEY.txt; it has: png, control.png"),
    "none of the user's": (
        {"7.control.png": b""},
        {"conditioning_image_column": "control"},
        "has no conditioning image, as KEY.control.png; it has: png, txt",
    ),
    "several images": (
        {"7.jpg": b"j"},
        {},
        "has several files for its image, png, jpg; name one with --image_column",
    ),
    "several conditioning images": (
        {"7.hint.png": b"j"},
        {},
        (
            "has several files for its conditioning image, control.png, hint.png; name one with "
            "--conditioning_image_column"
        ),
    ),
    "bytes that are no text": ({"7.txt": b"caf\xe9"}, {}, "its txt is not UTF-8 text; save it as UTF-8"),
    "broken JSON": (
        {"7.json": b'{"text" 1}'},
        {"caption_column": "json"},
        "its json is not valid JSON (Expecting ':' delimiter, column 9)",
    ),
    "JSON of another kind": (
        {"7.json": b'["x"]'},
        {"caption_column": "json"},
        "its json must be a JSON object, is a list",
    ),
    "no text in JSON": (
        {"7.json": b'{"text": 5}'},
        {"caption_column": "json"},
        "its json: text must be a text or a list of texts, is a number",
    ),
    "half a surrogate pair": (
        {"7.json": b'{"text": "\\ud83d"}'},
        {"caption_column": "json"},
        "its json holds a text that is not valid Unicode",
    ),
    "another column in JSON": (
        {"7.json": b'{"words": "x"}'},
        {"caption_column": "json"},
        "--caption_column=text: no such column in its json, which has: words; name one of them with --caption_column",
    ),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_bad_samples(tmp_path: Path, case: str) -> None:
    """Named by tar and key, before training if the headers show it; the others can be read."""
    changed, settings, reason = BAD_SAMPLES[case]
    good = {name.replace("7", "1", 1): content for name, content in SAMPLE.items()} | {"1.json": b'{"text": "x"}'}
    bad = {name: content for name, content in (SAMPLE | changed).items() if content}
    path = write_tar(tmp_path / "0.tar", good | bad)
    source = opened(tmp_path, skip_bad=True, **settings)
    assert contents(source, 0) == (b"i", b"c", ("x",))
    with pytest.raises(DataError) as caught:
        source.read(1)
    assert str(caught.value) == f"{path}:7: {reason}"
    if source.bad_rows:
        assert problems_of(tmp_path, **settings) == [f"{path}:7: {reason}", SKIP]
    assert list(source.identities([1])) == [json.dumps([*json.loads(next(source.identities([1])))[:3], None])]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (special("0003.jpg", tarfile.SYMTYPE, "/etc/passwd"), "its jpg is a link, which is not followed"),
        (special("0003.jpg", tarfile.LNKTYPE, "0001.jpg"), "its jpg is a link, which is not followed"),
        (special("0003.jpg", tarfile.CHRTYPE), "its jpg is a device or a pipe"),
        (special("0003.jpg", tarfile.GNUTYPE_SPARSE), "its jpg is stored as a sparse file"),
        (special("0003.jpg", tarfile.FIFOTYPE), "its jpg is a device or a pipe"),
    ],
)
def test_what_is_no_file_is_not_followed(tmp_path: Path, entry: tarfile.TarInfo, reason: str) -> None:
    path = write_tar(tmp_path / "0.tar", FILES | {"0003.conditioning_image.png": b"c", "0003.txt": b"x"})
    with tarfile.open(path, "a") as tar:
        tar.addfile(entry)
    assert problems_of(tmp_path) == [f"{path}:0003: {reason}", SKIP]


def test_a_file_that_comes_twice(tmp_path: Path) -> None:
    """As `tar --append` leaves a changed one; which of them is meant is not guessed."""
    path = write_tar(tmp_path / "0.tar")
    for name, words in (("0001.txt", "caption"), ("0002.conditioning_image.png", "conditioning image")):
        with tarfile.open(path, "a") as tar:
            tar.addfile(tarfile.TarInfo(name))
        key, _, extension = name.partition(".")
        problem = f"{path}:{key}: has several files for its {words}, {extension}, {extension}; leave one of them"
        assert problem in problems_of(tmp_path)


def test_a_file_that_is_no_image_by_its_size(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("1.png")
    entry.size = 3 * 10**9
    path = write_tar(tmp_path / "0.tar", {"1.control.png": b"c", "1.txt": b"x"})
    start = offset_of("1.txt", path) + 1024
    with path.open("r+b") as file:
        file.seek(start)
        file.write(entry.tobuf())
        file.truncate(start + 512 + -(-entry.size // 512) * 512 + 1024)
    assert problems_of(tmp_path) == [
        f"{path}:1: its png has 3 GB, more than the 1 GB that an image may have",
        SKIP,
    ]


def test_headers_that_lie(tmp_path: Path) -> None:
    """A size that leads back or far beyond the end ends the reading, not the process."""
    for size in (b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True), b"\x80" + b"\xff" * 11):
        path = write_tar(tmp_path / "0.tar", form=tarfile.USTAR_FORMAT)
        data = bytearray(path.read_bytes())
        start = offset_of("0002.jpg", path)
        data[start + 124 : start + 136] = size
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        path.write_bytes(bytes(data))
        problems = problems_of(tmp_path)
        assert re.search(r"is (damaged or )?cut off,? at byte .*: 3 files can be read", problems[-2]), problems


def test_names_in_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for extension in ("png", "control.png"):
            tar.addfile(tarfile.TarInfo(f"caf\xe9\n1.{extension}"))
    write_tar(tmp_path / "1.tar")
    assert problems_of(tmp_path) == [f"{path}:caf\\xe9 1: has no caption, as KEY.txt; it has: png, control.png", SKIP]


def test_extensions_that_no_file_has(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"1.jpg": b"i", "1.canny.png": b"c", "1.prompt": b"x", "2.jpg": b"i"})
    there = "there are: jpg, canny.png, prompt"
    assert problems_of(tmp_path) == [
        (
            f"--conditioning_image_column=conditioning_image: no file in {tmp_path} has such an extension, as "
            f"KEY.conditioning_image.png; {there}; name one with --conditioning_image_column"
        ),
        (
            f"--caption_column=text: no file in {tmp_path} has such an extension, as KEY.txt; {there}; name one with "
            "--caption_column"
        ),
    ]
    settings: dict[str, Any] = {
        "image_column": "jpeg",
        "conditioning_image_column": "cany.png",
        "caption_column": "prompt",
    }
    assert problems_of(tmp_path, **settings) == [
        (
            f"--image_column=jpeg: no file in {tmp_path} has such an extension, as KEY.jpeg; {there}; perhaps "
            "you meant jpg"
        ),
        (
            f"--conditioning_image_column=cany.png: no file in {tmp_path} has such an extension, as KEY.cany.png; "
            f"{there}; perhaps you meant canny.png"
        ),
    ]
    cut(tmp_path / "0.tar", 1000)
    assert problems_of(tmp_path)[-1].startswith(f"{tmp_path}/0.tar: is cut off, at byte 1,000: 1 file can be read")


def test_a_column_that_the_json_lacks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"1.png": b"i", "1.control.png": b"c", "1.json": b'{"caption": "x"}'})
    assert problems_of(tmp_path, caption_column="captions") == [
        (
            f"--caption_column=captions: no such column in the JSON of {path}:1, which has: caption; perhaps you meant "
            "caption"
        )
    ]


def test_an_archive_of_a_data_folder(tmp_path: Path, circles: Path) -> None:
    shutil.make_archive(str(tmp_path / "data"), "tar", circles)
    assert problems_of(tmp_path) == [
        f"{tmp_path}/data.tar: holds ./metadata.jsonl, so it is an archive of a data folder: unpack it there"
    ]


def test_a_key_in_two_tars_is_two_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar")
    write_tar(
        tmp_path / "b.tar", FILES | {"0002.jpg": b"other"} | {f"9.{name}": b"9" for name in ("jpg", "hint.png", "txt")}
    )
    source = opened(tmp_path)
    assert [source.read(row).image for row in range(5)] == [b"image 1", b"image 2, longer", b"image 1", b"other", b"9"]
    assert len({source.read(row).place for row in range(5)}) == 5
    assert caplog.messages == [
        f"{tmp_path}: 2 samples have the key of one in another tar, as 0001; each is a row of its own"
    ]


def test_other_layouts_win_over_tars(tmp_path: Path, circles: Path) -> None:
    folder = Path(shutil.copytree(circles, tmp_path / "data"))
    write_tar(folder / "0.tar")
    assert isinstance(open_source(DataConfig(train_data_dir=str(folder))), FolderSource)
    write_tar(tmp_path / "0.tar")
    assert len(open_source(DataConfig(train_data_dir=str(tmp_path)))) == 13


def test_tars_of_other_splits_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-0", "val-0", "x_test_1", "contest-0"):
        write_tar(tmp_path / f"{name}.tar", {name.replace("-", "_") + key: content for key, content in FILES.items()})
    source = opened(tmp_path)
    assert [Path(str(shard.path)).name for shard in source.shards] == ["contest-0.tar", "train-0.tar"]
    assert caplog.messages == [f"{tmp_path}: val-0.tar and x_test_1.tar are not trained on, by their names"]
    (tmp_path / "only").mkdir()
    (tmp_path / "val-0.tar").rename(tmp_path / "only" / "val-0.tar")
    assert len(opened(tmp_path / "only")) == 2


# --- runs ---


@pytest.fixture
def tars(circles: Path, tmp_path: Path) -> Path:
    """Write the rows of `circles` into two tars."""
    tar_of(circles, tmp_path / "tars" / "0001.tar", slice(8))
    tar_of(circles, tmp_path / "tars" / "0002.tar", slice(8, None))
    return tmp_path / "tars"


@pytest.mark.parametrize("cache_latents", ["off", "on"])
def test_a_run_learns_exactly_what_it_does_from_a_folder(
    tiny_settings: Settings, tars: Path, tmp_path: Path, cache_latents: str
) -> None:
    folder, packed = (
        run(
            tiny_settings,
            tmp_path / f"from-{Path(data).name}",
            train_data_dir=str(data),
            cache_latents=cache_latents,
            latents_cache_dir=str(tmp_path / f"latents-{Path(data).name}"),
        )
        for data in (tiny_settings["train_data_dir"], tars)
    )
    assert len(set(losses(folder))) == 4
    assert losses(packed) == losses(folder)
    assert equal(weights(packed), weights(folder))


def test_what_is_prepared_is_used_and_completed(tiny_settings: Settings, tars: Path, tmp_path: Path) -> None:
    settings = tiny_settings | {"train_data_dir": str(tars), "latents_cache_dir": str(tmp_path / "latents")}
    assert prepare(TrainConfig(**settings), stream=io.StringIO()).num_encoded == 13
    again = prepare(TrainConfig(**settings), stream=io.StringIO())
    assert (again.num_samples, again.num_encoded) == (13, 0)
    changed = tmp_path / "changed"
    tar_of(Path(tiny_settings["train_data_dir"]), changed / "1.tar", slice(12))
    shown = io.StringIO()
    prepare(TrainConfig(**settings | {"train_data_dir": str(changed)}), stream=shown)
    assert "the data changed since (12 rows, 13 in the cache" in shown.getvalue()


def test_bad_samples_are_skipped(tiny_settings: Settings, tars: Path, tmp_path: Path) -> None:
    """A sample without a conditioning image, one with a broken image, and a tar that is cut off."""
    broken = {"a.png": b"no image", "a.control.png": b"none", "a.txt": b"x", "b.png": b"-", "b.txt": b"x"}
    path = write_tar(tars / "0003.tar", broken, tarfile.USTAR_FORMAT)
    cut(path, offset_of("b.txt", path))
    settings = tiny_settings | {"train_data_dir": str(tars), "latents_cache_dir": str(tmp_path / "latents")}
    settings |= {"cache_latents": "auto", "on_bad_sample": "skip", "max_bad_fraction": 0.2}
    result = prepare(TrainConfig(**settings), stream=io.StringIO())
    assert result.num_samples == 13
    assert [sample.reason.removeprefix(str(path)).partition(" (")[0] for sample in result.bad_samples] == [
        ":a, image: image of 8 bytes is not an image in a format that is read",
        ":b: has no conditioning image, as KEY.conditioning_image.png; it has: png",
        ": is cut off, at byte 4,096: 4 files can be read; copy or write it again",
    ]
    with pytest.raises(DataError, match=r"3 of 16 samples cannot be used: more than --max_bad_fraction=0.1 allows"):
        prepare(TrainConfig(**settings | {"max_bad_fraction": 0.1}), stream=io.StringIO())


def test_the_command_line_says_it_in_a_line(
    tiny_settings: Settings, tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(tars / "0002.tar", 1000)
    assert main(["train", *flags(tiny_settings, train_data_dir=tars)]) == 2
    error = capsys.readouterr().err
    assert f"{tars}/0002.tar: is cut off, at byte 1,000: 1 file can be read; copy or write it again\n" in error
    assert "Traceback" not in error

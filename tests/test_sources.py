"""Every kind of data set, written here, gives the same rows; and what is wrong with one is said by name and line."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.folder_source import FolderSource
from raycontrolnet.data.metadata_file import parse_json
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.transforms import decode_rgb
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import DataError

COUNT = 3
CAPTIONS = [("a cat",), ("a dog, “quoted”",), ("one", "two")]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def colour(row: int, conditioning: bool) -> tuple[int, int, int]:
    return (40 * row, 200 if conditioning else 0, 7)


def png_bytes(row: int, conditioning: bool) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour(row, conditioning)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, first: str = "images", second: str = "edges") -> None:
    for name, conditioning in ((first, False), (second, True)):
        (folder / name).mkdir(parents=True)
        for row in range(COUNT):
            (folder / name / f"{row}.png").write_bytes(png_bytes(row, conditioning))


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_with(image: str, conditioning_image: str, caption: str, captions: list[Any] | None = None) -> list[Any]:
    captions = captions or [item[0] if len(item) == 1 else list(item) for item in CAPTIONS]
    return [
        {caption: text, conditioning_image: f"edges/{row}.png", image: f"images/{row}.png"}
        for row, text in enumerate(captions)
    ]


def check_rows(source: Source, captions: list[tuple[str, ...]] = CAPTIONS) -> None:
    assert len(source) == COUNT
    assert list(source.problems()) == []
    for row in (2, 0, 1):
        values = source.read(row)
        assert values == source.read(row)
        assert values.captions == captions[row]
        for data, conditioning in ((values.image, False), (values.conditioning_image, True)):
            image = decode_rgb(data, background=(0, 0, 0))
            assert image.getpixel((0, 0)) == colour(row, conditioning)
    assert len({source.read(row).place for row in range(COUNT)}) == COUNT


def check_travels(source: Source, monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
    """Check that it reads the same after a pickle, in another folder, in a process that has opened nothing."""
    from raycontrolnet.data import hub_source

    data = pickle.dumps(source, protocol=5)
    hub_source._open.cache_clear()
    monkeypatch.chdir(elsewhere)
    copy: Source = pickle.loads(data)
    check_rows(copy)
    assert copy.fingerprint() == source.fingerprint()
    assert len(source.fingerprint()) == 16


# --- folders with a metadata file ---


LAYOUTS: dict[str, tuple[str, tuple[str, str, str], dict[str, str]]] = {
    "named columns": ("metadata.jsonl", ("image", "conditioning_image", "text"), {}),
    "image folder": ("metadata.jsonl", ("file_name", "conditioning_image_file_name", "text"), {}),
    "suffixes": ("metadata.jsonl", ("image_file_name", "conditioning_image_file_name", "text"), {}),
    "own names": (
        "metadata.jsonl",
        ("a", "b_file_name", "c"),
        {"image_column": "a", "conditioning_image_column": "b", "caption_column": "c"},
    ),
    "original ControlNet": ("prompt.json", ("target", "source", "prompt"), {}),
    "fill50k repository": ("train.jsonl", ("image", "conditioning_image", "text"), {}),
    "split": ("train/metadata.jsonl", ("file_name", "conditioning_image_file_name", "text"), {}),
}


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, layout: str) -> None:
    name, columns, flags = LAYOUTS[layout]
    folder = tmp_path / "data"
    write_images((folder / name).parent)
    write_lines(folder / name, rows_with(*columns))
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {flag: "data", **flags}
    source = open_source(DataConfig(**settings))
    assert isinstance(source, FolderSource)
    check_rows(source)
    assert source.read(1).place == str(Path("data", name)) + ":2"
    check_travels(source, monkeypatch, tmp_path.parent)


@pytest.mark.parametrize("folder", [".", "train"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_in_other_forms(tmp_path: Path, kind: str, folder: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_images(tmp_path / folder)
    path = tmp_path / folder / f"metadata.{kind}"
    rows = rows_with("file_name", "conditioning_image_file_name", "text", list(TEXTS if kind == "csv" else LISTS))
    if kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    check_rows(source, FIRST_OF_EACH if kind == "csv" else CAPTIONS)
    assert source.read(1).place == f"{path}:{3 if kind == 'csv' else 2}"


def test_absolute_paths_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = rows_with("image", "conditioning_image", "text")
    rows[1]["image"] = str(tmp_path / "images" / "1.png")
    lines = "\n\n".join(json.dumps(row) for row in rows)  # without a newline at the end
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + lines + "\n \n", encoding="utf-8")
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    check_rows(source)
    assert [source.read(row).place.rpartition(":")[2] for row in range(COUNT)] == ["1", "3", "5"]


def test_a_folder_travels_without_a_copy_and_many_rows_stay_small(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", rows_with("image", "conditioning_image", "text") * 30_000)
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    assert isinstance(source, FolderSource)
    assert [source.table[column].num_chunks for column in source.table.column_names] == [1] * 4
    assert source.table.nbytes < 100 * len(source)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 5_000
    copy: FolderSource = pickle.loads(data, buffers=buffers)
    assert copy.read(89_999) == source.read(89_999)
    assert copy.read(89_999).place == f"{tmp_path}/metadata.jsonl:90000"
    addresses = [column.chunk(0).buffers()[-1].address for column in (copy.table["image"], source.table["image"])]
    assert addresses[0] == addresses[1]


def test_the_fingerprint_is_the_datas(tmp_path: Path) -> None:
    fingerprints = set()
    for name, texts in (("a", ["x", "y", "z"]), ("b", ["x", "y", "z"]), ("c", ["x", "y", "other"])):
        folder = tmp_path / name
        write_images(folder)
        write_lines(folder / "metadata.jsonl", rows_with("image", "conditioning_image", "text", texts))
        fingerprints.add(open_source(DataConfig(train_data_dir=str(folder))).fingerprint())
    assert len(fingerprints) == 2  # moving a data set does not make it another
    swapped = DataConfig(
        train_data_dir=str(folder), image_column="conditioning_image", conditioning_image_column="image"
    )
    assert open_source(swapped).fingerprint() not in fingerprints


def problems_of(**settings: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(**settings))
    return str(caught.value).split("\n")


HAS = "no such column in {file}, which has: img, text, depth"
BAD_FILES: dict[str, tuple[str, str | bytes, dict[str, str], list[str]]] = {
    "missing columns": (
        "metadata.jsonl",
        '{"img": "a.png", "text": "x", "depth": "b.png"}\n',
        {"caption_column": "texts"},
        [
            f"--image_column=image: {HAS}; perhaps you meant img",
            f"--conditioning_image_column=conditioning_image: {HAS}; name one of them with --conditioning_image_column",
            f"--caption_column=texts: {HAS}; perhaps you meant text",
        ],
    ),
    "a column of the user's is not replaced by a customary one": (
        "prompt.json",
        '{"target": "a.png", "source": "b.png", "prompt": "x"}\n',
        {"image_column": "targt"},
        ["--image_column=targt: no such column in {file}, which has: target, source, prompt; perhaps you meant target"],
    ),
    "half a surrogate pair": (
        "metadata.jsonl",
        "".join(
            f'{{"image": "a.png", "conditioning_image": "b.png", "text": "{text}"}}\n' for text in ("x", "\\ud83d", "y")
        ),
        {},
        ["{file}:2: holds a text that is not valid Unicode"],
    ),
    "a bad first line": (
        "metadata.jsonl",
        "image,text\n",
        {},
        ["{file}:1: is not valid JSON (Expecting value, column 1)"],
    ),
    "bad lines of CSV": (
        "metadata.csv",
        "image,conditioning_image,text\na.png,b.png\n,b.png,x\na.png,b.png,x,y\n",
        {},
        [
            "{file}:2: has 2 values for the 3 columns of the first line",
            "{file}:3: image must be the path of an image, is empty",
            "{file}:4: has 4 values for the 3 columns of the first line; a text with a comma stands in double quotes",
        ],
    ),
    "a quote too many swallows lines": (
        "metadata.csv",
        'image,conditioning_image,text\na.png,b.png,"a house\na.png,b.png,x\na.png,b.png,"y"\na.png,b.png,z\n',
        {},
        [
            "{file}:2: is not valid CSV (',' expected after '\"', read up to line 4); is a double quote too many?",
            "{file}:3: was taken for a part of the row in line 2",
            "{file}:4: was taken for a part of the row in line 2",
        ],
    ),
    "a quote that is never closed": (
        "metadata.csv",
        'image,conditioning_image,text\na.png,b.png,x\na.png,b.png,"a house\na.png,b.png,y\n',
        {},
        [
            "{file}:3: is not valid CSV (unexpected end of data, read up to line 4); is a double quote too many?",
            "{file}:4: was taken for a part of the row in line 3",
        ],
    ),
    "two quotes that make one text of two rows": (
        "metadata.csv",
        'image,conditioning_image,text\na.png,b.png,"a house\na.png,b.png,a tall one"\na.png,b.png,z\n',
        {},
        [
            (
                '{file}:2: goes over 2 lines, and "a.png,b.png,a tall one" in it looks like a row of its own: is there '
                "a double quote too many? A text of several lines that is right can be written in one"
            ),
            "{file}:3: was taken for a part of the row in line 2",
        ],
    ),
    "semicolons": (
        "metadata.csv",
        "image;conditioning_image;text\na.png;b.png;x\n",
        {},
        [
            (
                "{file}:1: its columns are separated by semicolons; separate them by commas, and put texts with a "
                "comma in double quotes"
            )
        ],
    ),
    "tabs": (
        "metadata.csv",
        "image\tconditioning_image\ttext\na.png\tb.png\tx\n",
        {},
        [
            (
                "{file}:1: its columns are separated by tabs; separate them by commas, and put texts with a comma in "
                "double quotes"
            )
        ],
    ),
    "two columns of one name": (
        "metadata.csv",
        "image,conditioning_image,text,text\na.png,b.png,x,y\n",
        {},
        ["{file}:1: has several columns of the name 'text'"],
    ),
    "a comma after each object": (
        "metadata.jsonl",
        '{"image": "a.png", "conditioning_image": "b.png", "text": "x"},\n',
        {},
        [
            (
                "{file}:1: is not valid JSON (Extra data, column 63); the file holds one object per line, without a "
                "comma after it"
            )
        ],
    ),
    "single quotes": (
        "metadata.jsonl",
        "{'image': 'a.png'}\n",
        {},
        [
            (
                "{file}:1: is not valid JSON (Expecting property name enclosed in double quotes, column 2); JSON's "
                "texts stand in double quotes"
            )
        ],
    ),
    "objects over several lines": (
        "prompt.json",
        '{\n "image": "a.png"\n}\n',
        {},
        ["{file}: its objects go over several lines; write each in one line, or an array of them"],
    ),
    "an array that breaks off": (
        "prompt.json",
        '[\n {"source": "a.png"},\n',
        {},
        ["{file}: begins as a JSON array, but is not valid JSON (Expecting value, line 2, column 22)"],
    ),
    "nested without end": (
        "metadata.jsonl",
        '{"image":' * 100_000 + "\n",
        {},
        ["{file}:1: is nested too deeply"],
    ),
    "CSV that is no text": (
        "metadata.csv",
        b"image,conditioning_image,text\na.png,b.png,\xff\n",
        {},
        ["{file}:2: is not UTF-8 text; save it as UTF-8"],
    ),
    "CSV without rows": ("metadata.csv", "image,text\n", {}, ["{file}: has no rows"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    name, content, settings, problems = BAD_FILES[case]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    expected = [problem.format(file=file) for problem in problems]
    found = problems_of(train_data_dir=str(tmp_path), **settings)
    assert [problem for problem in found if not problem.endswith((": no such file", SKIP))] == expected


SKIP = "fix the data, or skip such rows with --on_bad_sample skip"


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "metadata.parquet").write_text("image,text\n")
    (problem,) = problems_of(train_data_dir=str(tmp_path))
    assert problem.startswith(f"{tmp_path}/metadata.parquet: is not valid parquet (Parquet")


BAD_LINES = [
    (b'{"image" "a.png"}\n', "is not valid JSON (Expecting ':' delimiter, column 10)"),
    (b"[1, 2]\n", "must be a JSON object, is a list; the file holds one object per line"),
    (b'{"image": "\xff"}\n', "is not UTF-8 text; save it as UTF-8"),
    (b'{"image": "a.png", "text": "x"}\n', "has no conditioning_image, only: image, text"),
    (b'{"image": "a.png", "conditioning_image": "a.png"}\n', "has no text, only: image, conditioning_image"),
    (b'{"image": 5, "conditioning_image": "a.png", "text": "x"}\n', "image must be the path of an image, is a number"),
    (b'{"image": "", "conditioning_image": "a.png", "text": "x"}\n', "image must be the path of an image, is empty"),
    (b'{"image": "a", "conditioning_image": "a", "text": null}\n', "text must be a text or a list of texts, is null"),
    (
        b'{"image": "a", "conditioning_image": "a", "text": {}}\n',
        "text must be a text or a list of texts, is an object",
    ),
    (
        b'{"image": "a", "conditioning_image": "a", "text": ["x", true]}\n',
        "text must be a text or a list of texts, is a list with true or false in it",
    ),
    (
        b'{"image": "a", "conditioning_image": "a", "text": []}\n',
        "text must hold at least one caption, is an empty list",
    ),
]


def test_all_bad_lines_are_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "metadata.jsonl"
    write_lines(path, rows_with("image", "conditioning_image", "text"))
    with path.open("ab") as file:
        file.writelines(line for line, _ in BAD_LINES)
    expected = [f"{path}:{COUNT + 1 + index}: {reason}" for index, (_, reason) in enumerate(BAD_LINES)]
    assert len(expected) == 11
    assert problems_of(train_data_dir=str(tmp_path)) == [*expected[:10], "... 11 lines cannot be used in all", SKIP]


BROKEN_LINES = {
    "metadata.jsonl": ('{"image": "images/0.png", "conditioning_image"', "is not valid JSON"),
    "metadata.csv": ("images/0.png,edges/0.png", "has 2 values for the 3 columns"),
    "prompt.json": ('{"image": "images/0.png", "conditioning_image": "edges/0.png", "text": null}', "is null"),
}


@pytest.mark.parametrize("name", BROKEN_LINES)
def test_bad_lines_can_be_skipped(tmp_path: Path, name: str) -> None:
    write_images(tmp_path)
    line, reason = BROKEN_LINES[name]
    rows = rows_with("image", "conditioning_image", "text", TEXTS)
    lines = [json.dumps(row) for row in rows]
    if name.endswith("csv"):
        columns = ("image", "conditioning_image", "text")
        lines = [
            ",".join(columns),
            *(",".join(json.dumps(row[name], ensure_ascii=False) for name in columns) for row in rows),
        ]
        lines = [line.replace('\\"', '""') for line in lines]
    (tmp_path / name).write_text("\n".join([*lines[:-1], line, lines[-1]]), encoding="utf-8")
    source = open_source(DataConfig(train_data_dir=str(tmp_path)), skip_bad=True)
    assert len(source) == COUNT + 1
    place = f"{tmp_path / name}:{len(lines)}: "
    with pytest.raises(DataError, match=f"^{re.escape(place)}.*{reason}"):
        source.read(COUNT - 1)
    assert source.read(COUNT).image == str(tmp_path / "images" / f"{COUNT - 1}.png")
    assert len(list(source.identities(range(len(source))))) == len(source)


@pytest.mark.parametrize("spoilt", [b'a.png,b.png,"a house\n', b"a.png,b.png,caf\xe9\n"])
def test_a_broken_line_of_csv_takes_no_others_along(tmp_path: Path, spoilt: bytes) -> None:
    """All rows that it makes unreadable count among the bad ones."""
    lines = [b"image,conditioning_image,text\n", *([b"a.png,b.png,x\n"] * 5000)]
    lines[1000] = spoilt
    (tmp_path / "metadata.csv").write_bytes(b"".join(lines))
    source = open_source(DataConfig(train_data_dir=str(tmp_path)), skip_bad=True)
    assert isinstance(source, FolderSource)
    assert len(source) == 5000
    assert len(source.bad_rows) == (1 if b"caf" in spoilt else 4001)


def test_long_values_of_csv(tmp_path: Path) -> None:
    image = base64.b64encode(png_bytes(0, False) + bytes(200_000)).decode()
    (tmp_path / "metadata.csv").write_text(f"image,conditioning_image,text\n{image},{image},x\n")
    assert open_source(DataConfig(train_data_dir=str(tmp_path))).read(0).image == base64.b64decode(image)


def test_a_damaged_jpeg_in_base64_is_named(tmp_path: Path) -> None:
    text = "/9j/" + "A" * 101
    write_lines(tmp_path / "metadata.jsonl", [{"image": text, "conditioning_image": text, "text": "x"}])
    with pytest.raises(DataError, match=r"metadata\.jsonl:1: image holds base64 that cannot be decoded"):
        open_source(DataConfig(train_data_dir=str(tmp_path))).read(0)


def test_csv_forgives_spaces(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = "".join(f'images/{i}.png, edges/{i}.png, "a house, by the sea"\n' for i in range(COUNT))
    (tmp_path / "metadata.csv").write_text(f"image, conditioning_image , text\n{rows}")
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    assert [source.read(row).captions for row in range(COUNT)] == [("a house, by the sea",)] * COUNT


def test_csv_texts_of_several_lines(tmp_path: Path) -> None:
    write_images(tmp_path)
    text = 'a house, "old",\nby the sea, at night'
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("image", "conditioning_image", "text"),
                ("images/0.png", "edges/0.png", text),
                ("images/1.png",) * 2 + ("x",),
            ]
        )
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    assert [source.read(row).captions[0] for row in range(2)] == [text, "x"]
    assert source.read(1).place == f"{tmp_path}/metadata.csv:4"


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, indent: int | None) -> None:
    write_images(tmp_path)
    (tmp_path / "prompt.json").write_text(json.dumps(rows_with("target", "source", "prompt"), indent=indent))
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    check_rows(source)
    assert source.read(1).place == f"{tmp_path}/prompt.json:2"


@pytest.mark.parametrize("form", ["data:image/png;base64,{}", "{}"])
def test_images_in_base64(tmp_path: Path, form: str) -> None:
    lines = [
        {name: form.format(base64.b64encode(png_bytes(row, name == "b")).decode()) for name in ("a", "b")}
        | {"text": "x"}
        for row in range(COUNT)
    ]
    columns = {"image_column": "a", "conditioning_image_column": "b"}
    write_lines(tmp_path / "metadata.jsonl", lines)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "rows.parquet")
    for data in ({"train_data_dir": str(tmp_path)}, {"dataset_name": str(tmp_path / "rows.parquet")}):
        settings: dict[str, Any] = columns | data
        source = open_source(DataConfig(**settings))
        assert [source.read(row).image for row in range(COUNT)] == [png_bytes(row, False) for row in range(COUNT)]
        assert source.read(2).conditioning_image == png_bytes(2, True)
        assert max(map(len, source.identities([0, 1]))) < 200


def test_base64_that_is_broken(tmp_path: Path) -> None:
    for text, reason in (
        ("data:image/png;base64,iVBOR", "holds base64 that cannot be decoded"),
        ("data:image/png;base64,@@@", "holds base64 that cannot be decoded"),
        ("data:image/png;base64,\u00e9", "holds base64 that cannot be decoded"),
        ("data:image/png;base64, ", "is a data: URI that holds nothing"),
        ("data:image/png,xyz", "is a data: URI, but not in base64"),
    ):
        write_lines(tmp_path / "metadata.jsonl", [{"image": text, "conditioning_image": text, "text": "x"}])
        with pytest.raises(DataError, match=f"^{tmp_path}/metadata.jsonl:1: image {reason}"):
            open_source(DataConfig(train_data_dir=str(tmp_path))).read(0)


def test_missing_files_are_listed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path)
    path = tmp_path / "metadata.jsonl"
    good = {"image": "images/0.png", "conditioning_image": "edges/0.png", "text": "x"}
    write_lines(path, [good, good | {"image": "images/9.png", "conditioning_image": "nowhere/0.png"}, good])
    assert problems_of(train_data_dir=str(tmp_path)) == [
        f"{path}:2: conditioning_image nowhere/0.png: no such file",
        f"{path}:2: image images/9.png: no such file",
        "fix the data, or skip such rows with --on_bad_sample skip",
    ]
    write_lines(path, [good] + [good | {"image": f"nowhere/{row}.png"} for row in range(5000)])
    listed = []
    scandir = os.scandir

    def spy(folder: Any) -> Any:
        listed.append(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", spy)
    problems = problems_of(train_data_dir=str(tmp_path))
    assert problems[0] == f"{path}:2: image nowhere/0.png: no such file"
    assert len(problems) == 12
    assert problems[10] == "... 5,000 files are missing in all"
    assert len(listed) == 4  # a listing per folder, not a call per file, and one to look for an archive


def test_links_that_lead_nowhere_are_missing_files(tmp_path: Path) -> None:
    """As those of git-annex, before a file is fetched; links that lead to files are followed."""
    write_images(tmp_path)
    for name, target in (("good", "0.png"), ("dead", "../.git/annex/0.png"), ("folder", "../edges")):
        (tmp_path / "images" / f"{name}.png").symlink_to(target)
    path = tmp_path / "metadata.jsonl"
    good = {"conditioning_image": "edges/0.png", "text": "x"}
    write_lines(path, [good | {"image": f"images/{name}.png"} for name in ("good", "dead", "folder")])
    reason = "is a link to ../.git/annex/0.png, where there is no file; fetch that, or name another file"
    assert problems_of(train_data_dir=str(tmp_path)) == [
        f"{path}:2: image images/dead.png: {reason}",
        f"{path}:3: image images/folder.png: is a folder, not an image file",
        "fix the data, or skip such rows with --on_bad_sample skip",
    ]
    dead = tmp_path / "images" / "dead.png"
    with pytest.raises(DataError, match=f"^{dead}: {reason}$"):
        decode_rgb(str(dead), background=(0, 0, 0))


def test_paths_of_another_kind_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    write_images(folder)
    (folder / "zipped.zip").touch()
    monkeypatch.chdir(tmp_path)
    reasons = {
        "images\\1.png": ": it is there with / in place of \\; write it so",
        "C:\\data\\1.png": ": it is a path of Windows, of another machine; write it relative to the metadata file",
        "data/images/1.png": f": paths begin at {folder}, and this one at the working directory",
        "zipped/1.png": f": unzip {folder}/zipped.zip there",
        "x" * 5000: "",
        "a/" * 3000 + "x\0": "",
    }
    good = {"image": "images/0.png", "conditioning_image": "edges/0.png", "text": "x"}
    write_lines(folder / "metadata.jsonl", [good | {"image": path} for path in reasons])
    found = problems_of(train_data_dir="data")
    assert [problem.partition("no such file")[2] for problem in found[:-1]] == list(reasons.values())
    assert max(map(len, found)) < 300


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{"a": 1, "b": 2,}', "; no comma stands before }"),
        ('{"a": ["x", ]}', "; no comma stands before ]"),
        ('{"a": ,}', ""),
        ('{"a": "x,\t}"}', ""),
        ('{"a": 1},}', ""),
    ],
)
def test_advice_on_commas(text: str, advice: str) -> None:
    """The same for every Python, whose words differ."""
    with pytest.raises(ValueError, match=r"^is not valid JSON \(") as error:
        parse_json(text.encode())
    assert str(error.value).rpartition(")")[2] == advice


def test_an_archive_beside_the_rows_is_named_once(tmp_path: Path) -> None:
    rows = [{"image": f"photos/{row}.png", "conditioning_image": f"edges/{row}.png", "text": "x"} for row in range(2)]
    write_lines(tmp_path / "metadata.jsonl", rows)
    (tmp_path / "all-images.zip").touch()
    (tmp_path / "a-folder.zip").mkdir()
    found = problems_of(train_data_dir=str(tmp_path))
    assert len(found) == 6
    assert found[4] == f"{tmp_path}/all-images.zip is an archive that may hold them: unpack it there"


def test_paths_that_lead_out_of_the_folder_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_images(tmp_path)
    rows = rows_with("image", "conditioning_image", "text")
    for row in rows:
        row["image"] = f"../{row['image']}"
        row["conditioning_image"] = str(tmp_path / row["conditioning_image"])
    write_lines(folder / "metadata.jsonl", rows)
    open_source(DataConfig(train_data_dir=str(folder)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}/metadata.jsonl: 6 of its images lie outside of its folder, as ../images/0.png; they are read there"
    ]
    caplog.clear()
    inside = [{"image": "a/../a.png", "conditioning_image": str(folder / "a.png"), "text": "x"}]
    write_lines(folder / "metadata.jsonl", inside)
    (folder / "a.png").touch()
    (folder / "a").mkdir()
    open_source(DataConfig(train_data_dir=str(folder)))
    assert not caplog.records


def test_a_folder_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name)
        write_lines(tmp_path / name / "metadata.jsonl", rows_with("image", "conditioning_image", "text"))
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    assert len(source) == 2 * COUNT
    parts = [open_source(DataConfig(train_data_dir=str(tmp_path / name))) for name in ("a", "b")]
    rows = [part.read(row) for part in parts for row in range(COUNT)]
    assert [source.read(row) for row in range(2 * COUNT)] == rows
    order = [4, 0, 1, 5, 3]
    identities = [identity for part in parts for identity in part.identities(range(COUNT))]
    assert list(source.identities(order)) == [identities[row] for row in order]
    assert pickle.loads(pickle.dumps(source)).read(4) == rows[4]
    before = source.fingerprint()
    held_back = tmp_path / "validation"
    write_images(held_back)
    write_lines(held_back / "metadata.jsonl", rows_with("image", "conditioning_image", "text"))
    assert len(open_source(DataConfig(train_data_dir=str(tmp_path)))) == 2 * COUNT
    assert caplog.messages == [f"{tmp_path}: validation is not trained on, by its name"]
    (tmp_path / "b" / "images" / "1.png").unlink()
    assert list(source.problems()) == [f"{tmp_path}/b/metadata.jsonl:2: image images/1.png: no such file"]
    write_lines(tmp_path / "b" / "metadata.jsonl", rows_with("image", "conditioning_image", "text")[::-1])
    assert open_source(DataConfig(train_data_dir=str(tmp_path)), skip_bad=True).fingerprint() != before


@pytest.mark.parametrize("captions", ["images", "."])
def test_images_that_pair_by_name(tmp_path: Path, captions: str) -> None:
    write_images(tmp_path)
    (tmp_path / "edges").rename(tmp_path / "conditioning_images")
    for index in range(COUNT):
        (tmp_path / captions / f"{index}.txt").write_text(f"text {index}\n")
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    row = source.read(1)
    assert (row.image, row.captions) == (str(tmp_path / "images" / "1.png"), ("text 1",))
    assert row.conditioning_image == str(tmp_path / "conditioning_images" / "1.png")
    assert row.place == f"{tmp_path}/images/1.png"
    (tmp_path / "conditioning_images" / "0.png").unlink()
    (tmp_path / captions / "2.txt").unlink()
    assert problems_of(train_data_dir=str(tmp_path)) == [
        f"{tmp_path}/images/0.png: pairs with 0 images in conditioning_images, by its name; must with one",
        f"{tmp_path}/images/2.png: has no caption; write {tmp_path}/images/2.txt",
        SKIP,
    ]
    (tmp_path / "images" / "._1.png").touch()  # of macOS
    (tmp_path / "images" / "1.jpg").touch()
    source = open_source(DataConfig(train_data_dir=str(tmp_path)), skip_bad=True)
    assert len(source) == COUNT + 1
    for index in range(len(source)):
        with pytest.raises(DataError, match=r"pairs with|has no caption"):
            source.read(index)


def test_files_that_vanish_are_seen_on_the_machine_that_reads(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_lines(tmp_path / "metadata.jsonl", rows_with("image", "conditioning_image", "text"))
    source = open_source(DataConfig(train_data_dir=str(tmp_path)))
    (tmp_path / "images" / "1.png").unlink()
    assert list(source.problems()) == [f"{tmp_path}/metadata.jsonl:2: image images/1.png: no such file"]


def test_folders_that_hold_no_data(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert problems_of(train_data_dir=str(tmp_path / "nope")) == [
        f"--train_data_dir={tmp_path}/nope: no such folder",
    ]
    (problem,) = problems_of(train_data_dir=str(empty))
    assert problem == (
        f"--train_data_dir={empty}: has no metadata.jsonl, one line per image such as "
        '{"image": "images/1.png", "conditioning_image": "edges/1.png", "text": "a caption"}; '
        "also read are metadata.csv, metadata.parquet, prompt.json, train.jsonl, data sets in parquet, WebDataset "
        "tars, and images/ and conditioning_images/ whose files pair by name, with captions in images/NAME.txt. "
        "It holds: nothing"
    )
    (empty / "metadata.jsonl").write_text("\n\n")
    assert problems_of(train_data_dir=str(empty)) == [f"{empty}/metadata.jsonl: has no rows"]
    (tmp_path / "shards").mkdir()
    for name in ("images.zip", "images.7z", "images.rar", "metadata.jsonl.gz"):
        (tmp_path / "shards" / name).touch()
        (problem,) = problems_of(train_data_dir=str(tmp_path / "shards"))
        assert problem.endswith(f"{name}. {name} is an archive: unpack it there")
        (tmp_path / "shards" / name).unlink()
    assert problems_of(train_data_dir=str(empty / "metadata.jsonl")) == [
        f"--train_data_dir={empty}/metadata.jsonl: is a file; name the folder that it is in"
    ]


# --- what the datasets library reads ---


def images_table(captions: list[Any]) -> dict[str, list[Any]]:
    return {
        "extra": list(range(COUNT)),
        "image": [{"bytes": png_bytes(row, False), "path": None} for row in range(COUNT)],
        "conditioning_image": [{"bytes": png_bytes(row, True), "path": None} for row in range(COUNT)],
        "text": captions,
    }


LISTS: list[Any] = [list(captions) for captions in CAPTIONS]
TEXTS: list[Any] = [captions[0] for captions in CAPTIONS]
FIRST_OF_EACH: list[tuple[str, ...]] = [(text,) for text in TEXTS]


def image_dataset(captions: list[Any]) -> Any:
    import datasets

    text = datasets.Value("string")
    features = datasets.Features(
        {
            "extra": datasets.Value("int64"),
            "image": datasets.Image(),
            "conditioning_image": datasets.Image(),
            "text": datasets.List(text) if isinstance(captions[0], list) else text,
        }
    )
    return datasets.Dataset.from_dict(images_table(captions), features=features)


def write_parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    image_dataset(LISTS).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def write_bare_parquet_file(folder: Path) -> Path:
    """Images as bytes in one column and as fields in another, with nothing that says that they are images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    table = images_table(LISTS)
    table["image"] = [image["bytes"] for image in table["image"]]
    pq.write_table(pa.table(table), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved(folder: Path) -> Path:
    image_dataset(LISTS).save_to_disk(folder)
    return folder


def write_saved_splits(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"train": image_dataset(LISTS)}).save_to_disk(folder)
    return folder


def write_json_lines(folder: Path) -> Path:
    write_images(folder)
    captions: list[Any] = LISTS
    write_lines(folder / "rows.jsonl", rows_with("image", "conditioning_image", "text", captions))
    return folder / "rows.jsonl"


WRITERS: list[tuple[Callable[[Path], Path], str]] = [
    (write_parquet, "dataset_name"),
    (write_parquet, "train_data_dir"),
    (write_bare_parquet_file, "dataset_name"),
    (write_saved, "dataset_name"),
    (write_saved, "train_data_dir"),
    (write_saved_splits, "dataset_name"),
    (write_json_lines, "dataset_name"),
]


@pytest.mark.parametrize(("write", "flag"), WRITERS, ids=lambda value: getattr(value, "__name__", None))
def test_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path], flag: str) -> None:
    path = write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    shown = str(path.relative_to(tmp_path))
    settings: dict[str, Any] = {flag: shown}
    source = open_source(DataConfig(**settings), cache_dir="cache", token="hf_secret")
    check_rows(source)
    assert source.read(1).place == f"--{flag}={shown}, row 1"
    assert len(pickle.dumps(source)) < 1_000  # its arguments, not its rows
    assert b"hf_secret" not in pickle.dumps(source)
    check_travels(source, monkeypatch, tmp_path.parent)


def test_a_saved_selection_keeps_its_order(tmp_path: Path) -> None:
    import datasets

    both = datasets.concatenate_datasets([image_dataset(LISTS), image_dataset(LISTS)])
    both.select([5, 1, 3, 2]).select([2, 1, 3]).save_to_disk(tmp_path / "data")
    source = open_source(DataConfig(dataset_name=str(tmp_path / "data")))
    assert [source.read(row).captions for row in range(3)] == [CAPTIONS[0], CAPTIONS[1], CAPTIONS[2]]


def test_a_data_sets_fingerprint_is_the_datas(tmp_path: Path) -> None:
    names = []
    for name, captions in (("a", TEXTS), ("b", TEXTS), ("c", [*TEXTS[:2], "other"])):
        image_dataset(captions).save_to_disk(tmp_path / name)
        names.append(str(tmp_path / name))
    a, b, c = (open_source(DataConfig(dataset_name=name)).fingerprint() for name in names)
    assert a == b != c


def test_reading_a_row_does_not_decode_it_or_load_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    source = open_source(DataConfig(dataset_name=str(write_saved(tmp_path / "data"))))
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(datasets.Dataset, "to_table", None, raising=False)
    assert source.read(2).image == png_bytes(2, False)


def test_a_changed_data_set_is_noticed(tmp_path: Path) -> None:
    import shutil

    from raycontrolnet.data import hub_source

    path = write_saved(tmp_path / "data")
    source = open_source(DataConfig(dataset_name=str(path)))
    shutil.rmtree(path)
    image_dataset(TEXTS).select([0, 1]).save_to_disk(path)
    hub_source._open.cache_clear()
    with pytest.raises(DataError, match=r"has 2 rows on this machine and 3 where the run was started"):
        source.read(0)
    assert len(open_source(DataConfig(dataset_name=str(path)))) == 2


def test_wrong_types_and_columns(tmp_path: Path) -> None:
    name = str(write_saved(tmp_path / "data"))
    shown = f"--dataset_name={name}"
    has = f"no such column in {shown}, which has: extra, image, conditioning_image, text"
    assert problems_of(dataset_name=name, image_column="imag") == [
        f"--image_column=imag: {has}; perhaps you meant image"
    ]
    problems = problems_of(dataset_name=name, conditioning_image_column="extra", caption_column="image")
    assert [problem.partition("(")[0] for problem in problems] == [
        f"{shown}: extra must hold images or paths of images, is Value",
        f"{shown}: image must hold a text or a list of texts, is Image",
    ]


def test_empty_cells_and_missing_files(tmp_path: Path) -> None:
    dataset = image_dataset([TEXTS[0], None, None])
    dataset.save_to_disk(tmp_path / "null")
    name = str(tmp_path / "null")
    assert problems_of(dataset_name=name) == [
        f"--dataset_name={name}: text is null in 2 of 3 rows",
        "fix the data, or skip such rows with --on_bad_sample skip",
    ]
    dataset.select([]).to_parquet(tmp_path / "none.parquet")
    assert problems_of(dataset_name=f"{tmp_path}/none.parquet") == [
        f"--dataset_name={tmp_path}/none.parquet: has no rows"
    ]
    lines = write_json_lines(tmp_path / "lines")
    (lines.parent / "edges" / "2.png").unlink()
    assert problems_of(dataset_name=str(lines)) == [
        f"--dataset_name={lines}, row 2: conditioning_image edges/2.png: no such file",
        "fix the data, or skip such rows with --on_bad_sample skip",
    ]


def test_files_that_an_image_column_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    write_images(tmp_path)
    columns = {
        "image": [str(tmp_path / f"images/{row}.png") for row in range(COUNT)],
        "conditioning_image": [str(tmp_path / f"edges/{row}.png") for row in range(COUNT)],
        "text": TEXTS,
    }
    dataset = datasets.Dataset.from_dict(columns, features=image_dataset(TEXTS).select_columns(list(columns)).features)
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(dataset))
    source = open_source(DataConfig(dataset_name="owner/files"))
    check_rows(source, FIRST_OF_EACH)
    (tmp_path / "images" / "1.png").unlink()
    assert list(source.problems()) == [
        f"--dataset_name=owner/files, row 1: image {tmp_path}/images/1.png: no such file"
    ]


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = images_table([["x"], [], ["y"]])
    table["image"][2] = {"bytes": None, "path": None}
    pq.write_table(pa.table(table), tmp_path / "data.parquet")
    source = open_source(DataConfig(dataset_name=f"{tmp_path}/data.parquet"))
    source.read(0)
    with pytest.raises(
        DataError, match=r"data\.parquet, row 1: text must hold at least one caption, is an empty list$"
    ):
        source.read(1)
    with pytest.raises(DataError, match=r"data\.parquet, row 2: image is empty$"):
        source.read(2)


def test_data_sets_that_cannot_be_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    def problem(name: str, **settings: Any) -> str:
        (only,) = problems_of(dataset_name=name, **settings)
        return only.removeprefix(f"--dataset_name={name}: ")

    assert problem("./nope") == "no such file or folder"
    assert problem(f"{tmp_path}/nope") == "no such file or folder"
    assert problem("owner/offline-name") == (
        "the Hub cannot be reached (Couldn't reach 'owner/offline-name' on the Hub (OfflineModeIsEnabled)); check the "
        "network and HF_HUB_OFFLINE, or download the data set elsewhere (hf download --repo-type dataset "
        "owner/offline-name --local-dir DIR) and pass --dataset_name=DIR"
    )
    datasets.DatasetDict({"test": image_dataset(TEXTS)}).save_to_disk(tmp_path / "splits")
    assert problem(str(tmp_path / "splits")) == "has no split train, only: test"
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "test.jsonl").write_text('{"a": 1}\n')
    assert problem(str(tmp_path / "jsonl")) == "has no split train (it has ['test'])"
    assert problem(str(tmp_path / "jsonl"), dataset_config_name="big") == (
        "choose a configuration with --dataset_config_name (BuilderConfig 'big' not found. Available: ['default'])"
    )
    (tmp_path / "empty").mkdir()
    assert problem(str(tmp_path / "empty")).endswith(
        "data files); name a file, or a folder whose files have one format, such as parquet"
    )
    (tmp_path / "broken.parquet").write_text("PAR1")
    caplog.clear()
    assert problem(f"{tmp_path}/broken.parquet").startswith("cannot be read (Parquet ")
    assert not caplog.records, "datasets' own words come on top"
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("")
    assert problem(str(tmp_path / "script")).startswith("needs code to be read, which datasets no longer runs")
    (tmp_path / "notes.txt").write_text("x")
    assert problem(f"{tmp_path}/notes.txt") == "is a file, but none of .parquet, .json, .jsonl, .csv, .arrow"


class FakeHub:
    """Stand-in for `datasets.load_dataset` of a Hub id."""

    def __init__(self, result: Any):
        self.result = result
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_the_hub_gets_its_arguments_and_the_token_stays_out_of_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    hub = FakeHub(image_dataset(LISTS))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = DataConfig(dataset_name="owner/name", dataset_config_name="small")
    source = open_source(data, cache_dir=str(tmp_path), token="hf_secret")
    check_rows(source)
    options = {"token": "hf_secret", "cache_dir": str(tmp_path), "split": "train"}
    assert all(call == (("owner/name", "small"), options) for call in hub.calls)
    assert len(hub.calls) == 2  # to look at it, and for all reads of this process
    assert "hf_secret" not in repr(source)
    check_travels(source, monkeypatch, tmp_path)
    assert hub.calls[-1][1]["token"] == "hf_secret"
    other = open_source(DataConfig(dataset_name="owner/other", dataset_config_name="small"))
    assert other.fingerprint() != source.fingerprint()


def test_what_the_hub_says_is_passed_on_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    refused = datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\nor hf_secret is bad.")
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(refused))
    with pytest.raises(DataError) as caught:
        open_source(DataConfig(dataset_name="owner/name"), token="hf_secret")
    assert str(caught.value) == (
        "--dataset_name=owner/name: not found (Dataset 'owner/name' doesn't exist or *** is bad.); "
        "check the spelling, and if it is private or gated log in with: hf auth login"
    )
    assert caught.value.__cause__ is None
    paths = datasets.Dataset.from_dict({"image": ["a"], "conditioning_image": ["b"], "text": ["c"]})
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(paths))
    problems = problems_of(dataset_name="owner/name")
    assert [
        problem.partition(" holds paths, which can be followed in local data sets only")[0] for problem in problems
    ] == [
        "--dataset_name=owner/name: image",
        "--dataset_name=owner/name: conditioning_image",
    ]


def test_settings_without_data_are_refused() -> None:
    with pytest.raises(DataError, match="--train_data_dir, --dataset_name: give one of them"):
        open_source(DataConfig())


def test_rows_read_at_random_are_those_read_in_order(circles: Path) -> None:
    source = open_source(DataConfig(train_data_dir=str(circles)))
    in_order = [source.read(row) for row in range(len(source))]
    order = np.random.default_rng(0).permutation(len(source))
    assert all(source.read(int(row)) == in_order[row] for row in order)


def test_images_that_are_no_files_are_found_at_once(tmp_path: Path) -> None:
    """Not at their turn in the training: folders, pipes, and base64 that was cut short."""
    data = write_shapes(tmp_path / "data", 4, resolution=16)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[2]["image"] = "iVBORw0KGgo" + "A" * 60 + "!!"
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row, make in ((0, Path.mkdir), (1, os.mkfifo)):
        (data / rows[row]["image"]).unlink()
        make(data / rows[row]["image"])
    with pytest.raises(DataError) as error:
        open_source(DataConfig(train_data_dir=str(data)))
    assert [line.rpartition(": ")[2] for line in str(error.value).splitlines()[:3]] == [
        "is a folder, not an image file",
        "is a named pipe, not an image file",
        "neither a file nor base64 that can be decoded",
    ]


def test_a_metadata_file_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match=r"It holds: metadata.jsonl. metadata.jsonl is a named pipe, not a file$"):
        open_source(DataConfig(train_data_dir=str(tmp_path)))

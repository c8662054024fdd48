"""The manifest: shards are named by what decides their content, and changes are told in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.latents.manifest import (
    MANIFEST_FILE,
    SHARD_ROWS,
    BadSample,
    Encoding,
    Manifest,
    Shard,
    StoredShard,
    plan_shards,
)
from raycontrolnet.latents.plan import data_changes
from raycontrolnet.storage.folder import cache_folder

ENCODING = Encoding(vae="0" * 16, resolution=32, dtype="float16")
NUM_ROWS = 2 * SHARD_ROWS + 6


@pytest.fixture(scope="module")
def _many_circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("many"), NUM_ROWS, resolution=16)


@pytest.fixture
def data(_many_circles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_many_circles, tmp_path / "data"))


def source_of(data: Path) -> Source:
    return open_source(DataConfig(train_data_dir=str(data)))


def shards_of(data: Path, encoding: Encoding = ENCODING) -> list[Shard]:
    source = source_of(data)
    return list(plan_shards(source, range(len(source)), encoding))


def test_what_came_later_leaves_earlier_caches_valid(data: Path) -> None:
    """The interpolation decides the names only where it is not bilinear, as it always was."""
    text = f"Encoding(vae={'0' * 16!r}, resolution=32, dtype='float16', subset=None, transforms=1, format=1)"
    assert repr(ENCODING) == text
    lanczos = dataclasses.replace(ENCODING, interpolation="lanczos")
    assert repr(lanczos) == f"{text[:-1]}, interpolation='lanczos')"
    assert not {shard.name for shard in shards_of(data)} & {shard.name for shard in shards_of(data, lanczos)}
    folder = cache_folder(str(data / "cache"))
    manifest_of(data).write(folder)
    stored = json.loads(folder.read(MANIFEST_FILE))
    del stored["encoding"]["interpolation"]
    folder.write(MANIFEST_FILE, json.dumps(stored).encode())
    assert Manifest.read(folder) == manifest_of(data)
    assert ENCODING.differences(lanczos) == ["interpolation: bilinear, not lanczos"]


def rewrite(data: Path, row: int, **values: Any) -> None:
    path = data / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[row] = json.dumps(json.loads(lines[row]) | values)
    path.write_text("\n".join(lines) + "\n")


def manifest_of(data: Path, bad: tuple[BadSample, ...] = ()) -> Manifest:
    rows = {sample.row for sample in bad}
    stored = [StoredShard(shard.name, len(set(shard.rows) - rows), 1) for shard in shards_of(data)]
    return Manifest(ENCODING, tuple(stored), bad, {})


def test_every_row_is_in_one_shard_and_a_moved_folder_gives_the_same_names(data: Path, tmp_path: Path) -> None:
    shards = shards_of(data)
    assert [row for shard in shards for row in shard.rows] == list(range(NUM_ROWS))
    assert [len(shard.rows) for shard in shards] == [SHARD_ROWS, SHARD_ROWS, 6]
    assert shards_of(Path(shutil.move(data, tmp_path / "moved"))) == shards


def test_a_change_touches_the_shard_of_its_row_alone(data: Path) -> None:
    before = shards_of(data)
    rewrite(data, SHARD_ROWS, text="another caption")
    caption = shards_of(data)
    assert [a == b for a, b in zip(before, caption, strict=True)] == [True, False, True]
    first = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])
    with (data / first["conditioning_image"]).open("ab") as file:
        file.write(b"\n")
    assert [a == b for a, b in zip(caption, shards_of(data), strict=True)] == [False, True, True]
    with (data / "metadata.jsonl").open("a") as file:
        file.write(json.dumps(first) + "\n")
    assert len(shards_of(data)) == 3
    assert shards_of(data)[1] == caption[1]


@pytest.mark.parametrize(
    "change", [{"vae": "1" * 16}, {"resolution": 64}, {"dtype": "float32"}, {"subset": (0, 5)}, {"transforms": 0}]
)
def test_the_encoding_is_in_the_names_and_its_differences_are_told(data: Path, change: dict[str, Any]) -> None:
    other = dataclasses.replace(ENCODING, **change)
    assert not {shard.name for shard in shards_of(data)} & {shard.name for shard in shards_of(data, other)}
    (name, value), (difference,) = *change.items(), ENCODING.differences(other)
    own_words = {"vae": "encoded by another VAE", "subset": "of all rows, not of 5 rows drawn by --seed 0"}
    assert difference == own_words.get(name, f"{name}: {getattr(ENCODING, name)}, not {value}")
    assert ENCODING.differences(ENCODING) == []


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = cache_folder(str(tmp_path))
    assert Manifest.read(folder) is None
    encoding = dataclasses.replace(ENCODING, subset=(3, 10))
    manifest = Manifest(encoding, (StoredShard("a.arrow", 9, 123),), (BadSample(4, "x.png: broken"),), {"torch": "2"})
    manifest.write(folder)
    assert Manifest.read(folder) == manifest
    assert (manifest.num_rows, manifest.num_bytes) == (9, 123)
    for broken in ('{"format": 0}', "[]", "{", ""):
        (tmp_path / MANIFEST_FILE).write_text(broken)
        assert Manifest.read(folder) is None


def changes(manifest: Manifest, before: list[str], data: Path) -> str | None:
    source, shards = source_of(data), shards_of(data)
    now = (identity for shard in shards for identity in source.identities(shard.rows))
    return data_changes(manifest, shards, iter(before), now)


def test_changes_are_told_with_the_first_row_that_differs(data: Path) -> None:
    manifest = manifest_of(data)
    before = list(source_of(data).identities(range(NUM_ROWS)))
    assert changes(manifest, before, data) is None
    rewrite(data, 40, text="another caption")
    told = changes(manifest, before, data)
    assert told is not None
    assert told.startswith("1 of 3 parts of 32 rows are others; row 40 is [")
    assert '["another caption"]] now, was [' in told
    with (data / "metadata.jsonl").open("a") as file:
        file.write((data / "metadata.jsonl").read_text().splitlines()[0] + "\n")
    told = changes(manifest, before, data)
    assert told is not None
    assert told.startswith(f"{NUM_ROWS + 1} rows, {NUM_ROWS} in the cache; 2 of 3 parts")


def test_changes_are_found_beside_bad_samples(data: Path) -> None:
    manifest = manifest_of(data, (BadSample(3, "broken"),))
    before = [text for row, text in enumerate(source_of(data).identities(range(NUM_ROWS))) if row != 3]
    rewrite(data, 5, text="another caption")
    told = changes(manifest, before, data)
    assert told is not None
    assert "row 5 is" in told


def test_rows_of_a_saved_selection_and_of_embedded_images_are_told_apart(data: Path, tmp_path: Path) -> None:
    import datasets

    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()[:6]]
    columns = {
        name: [{"bytes": (data / row[name]).read_bytes(), "path": row[name]} for row in rows]
        for name in ("image", "conditioning_image")
    }
    columns["text"] = [row["text"] for row in rows]
    features = datasets.Features(
        {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
    )
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(tmp_path / "whole")
    whole.select([4, 1]).save_to_disk(tmp_path / "selection")
    whole.to_parquet(tmp_path / "parquet" / "train.parquet")
    sources = [open_source(DataConfig(dataset_name=str(tmp_path / name))) for name in ("whole", "parquet", "selection")]
    identities = [list(source.identities(range(len(source)))) for source in sources]
    assert len(set(identities[0])) == 6
    assert identities[1] == identities[0]
    assert identities[2] == [identities[0][4], identities[0][1]]
    first = json.loads(identities[0][0])
    assert first[0] == ["image", Path(rows[0]["image"]).name, len(columns["image"][0]["bytes"])]

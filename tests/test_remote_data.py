"""Data sets in an object store give exactly the rows, and the losses, of a local copy; a server for S3 has them."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import Settings, losses, metadata, run
from s3_server import BUCKET, S3Server, s3, use_s3
from test_tar_source import tar_of

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data import byte_ranges, remote_path, store_requests
from raycontrolnet.data.sources import Source, open_source
from raycontrolnet.storage.uri import open_uri

__all__ = ["s3", "use_s3"]

KINDS = ("metadata", "csv", "pairs", "folders", "tars", "parquet", "saved")


@pytest.fixture(scope="module")
def local(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the rows of `circles` in every form that is read: kind -> folder."""
    import datasets

    root = tmp_path_factory.mktemp("local")
    rows = metadata(circles)
    for kind in KINDS:
        (root / kind).mkdir()
    shutil.copytree(circles, root / "metadata", dirs_exist_ok=True)
    shutil.copytree(circles, root / "csv", dirs_exist_ok=True)
    (root / "csv" / "metadata.jsonl").unlink()
    lines = [f'{row["image"]},{row["conditioning_image"]},"{row["text"]}"' for row in rows]
    (root / "csv" / "metadata.csv").write_text("\n".join(["image,conditioning_image,text", *lines]))
    for part in ("a", "b"):
        shutil.copytree(circles, root / "folders" / part)
    for row in rows:
        for name, folder in (("image", "images"), ("conditioning_image", "conditioning")):
            target = root / "pairs" / folder / Path(row["image"]).name
            target.parent.mkdir(exist_ok=True)
            shutil.copy(circles / row[name], target)
        target.parent.with_name("images").joinpath(target.name).with_suffix(".txt").write_text(row["text"])
    tar_of(circles, root / "tars" / "0.tar", slice(0, 7))
    tar_of(circles, root / "tars" / "1.tar", slice(7, None))
    columns: dict[str, list[Any]] = {"text": [row["text"] for row in rows]}
    for name in ("image", "conditioning_image"):
        columns[name] = [{"bytes": (circles / row[name]).read_bytes(), "path": None} for row in rows]
    features = {"text": datasets.Value("string"), "image": datasets.Image(), "conditioning_image": datasets.Image()}
    table = datasets.Dataset.from_dict(columns, datasets.Features(features))
    (root / "parquet" / "data").mkdir()
    for shard in range(2):
        table.shard(2, shard).to_parquet(root / "parquet" / "data" / f"train-0000{shard}-of-00002.parquet")
    table.save_to_disk(str(root / "saved"))
    return {kind: root / kind for kind in KINDS}


def upload(server: S3Server, folder: Path, name: str) -> str:
    """Copy a folder to the server; return its URI."""
    for path in folder.rglob("*"):
        if path.is_file():
            server.write(f"{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{BUCKET}/{name}"


@pytest.fixture(scope="module")
def remote(s3: S3Server, local: dict[str, Path]) -> dict[str, str]:
    """Upload them: kind -> URI."""
    return {kind: upload(s3, folder, f"of all/{kind}").replace(" ", "%20") for kind, folder in local.items()}


@pytest.fixture(autouse=True)
def surroundings(use_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store_requests, "WAITS_S", (0.0, 0.0))


def data_of(place: str | Path, **settings: Any) -> DataConfig:
    return DataConfig(train_data_dir=str(place), **settings)


def of_process(source: Source) -> Source:
    """Return the source as another process gets it."""
    source = pickle.loads(pickle.dumps(source))
    byte_ranges.close_files()
    remote_path.forget_listings()
    open_uri.cache_clear()
    return source


def content(image: Any) -> bytes:
    return image if isinstance(image, bytes) else (Path(image) if isinstance(image, str) else image).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_a_local_copy(kind: str, local: dict[str, Path], remote: dict[str, str]) -> None:
    there, here = open_source(data_of(remote[kind])), open_source(data_of(local[kind]))
    assert len(there) == len(here) in (13, 26)
    assert there.remote
    assert not here.remote
    there = of_process(there)
    assert there.fingerprint() == here.fingerprint()
    assert list(there.identities(range(len(here)))) == list(here.identities(range(len(here))))
    for row in (12, 0, 7):
        ours, theirs = there.read(row), here.read(row)
        assert ours.captions == theirs.captions
        assert content(ours.image) == content(theirs.image)
        assert content(ours.conditioning_image) == content(theirs.conditioning_image)
        assert ours.place == theirs.place.replace(str(local[kind]), remote[kind])


@pytest.mark.parametrize("kind", ["metadata", "tars", "parquet"])
def test_losses_are_those_of_a_local_copy(
    kind: str, local: dict[str, Path], remote: dict[str, str], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings | {"num_workers": "0", "max_train_steps": 2}
    here = run(settings, tmp_path / "here", train_data_dir=str(local[kind]))
    there = run(settings, tmp_path / "there", train_data_dir=remote[kind])
    assert losses(there) == losses(here)
    assert len(losses(there)) == 2

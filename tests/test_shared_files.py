"""Files that a node must see: those of every form of data, and the message of a node that does not see them."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_tar_source import write_tar

from raycontrolnet.cluster import shared_files as shared
from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.cluster.versions import difference
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.sample_rows import PixelRows
from raycontrolnet.data.sources import LOOKED_AT_ROWS, open_source, shared_files
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import UserError


@pytest.fixture
def data(circles: Path, tmp_path: Path) -> Path:
    return shutil.copytree(circles, tmp_path / "data")


def tars(data: Path) -> dict[str, Any]:
    shutil.rmtree(data)
    data.mkdir()
    write_tar(data / "one.tar")
    write_tar(data / "two.tar")
    return {"train_data_dir": str(data)}


def folder(data: Path) -> dict[str, Any]:
    return {"train_data_dir": str(data)}


def folders(data: Path) -> dict[str, Any]:
    shutil.copytree(data, data.parent / "whole" / "one")
    data.rename(data.parent / "whole" / "two")
    (data.parent / "whole").rename(data)
    return {"train_data_dir": str(data)}


def by_datasets(data: Path) -> dict[str, Any]:
    (data / "metadata.jsonl").rename(data / "rows.jsonl")
    return {"dataset_name": str(data / "rows.jsonl")}


def embedded(data: Path) -> dict[str, Any]:
    image = "data:image/png;base64," + base64.b64encode((data / "images" / "00000.png").read_bytes()).decode()
    (data / "metadata.jsonl").write_text(json.dumps({"image": image, "conditioning_image": image, "text": "a"}))
    return {"train_data_dir": str(data)}


FORMS: dict[Callable[[Path], dict[str, Any]], list[str]] = {
    tars: ["one.tar", "two.tar"],
    folder: ["images/00007.png", "conditioning/00007.png"],
    folders: ["one/images/00007.png", "two/conditioning/00007.png"],
    by_datasets: ["rows.jsonl", "images/00007.png"],
    embedded: [],
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_every_form_of_data(form: Callable[[Path], dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """On a node without one of them, `check_here` names it; with all of them it says nothing."""
    config = DataConfig(**form(data))
    source = open_source(config, cache_dir=str(tmp_path / "cache"))
    files = shared_files(source, config)
    assert {str(data / name) for name in FORMS[form]} <= set(files.paths)
    assert all(Path(path).exists() for path in files.paths)
    files.check_here()
    assert bool(files.paths) == bool(FORMS[form]), "the metadata file travels with the source"


@pytest.mark.parametrize("lost", ["images/00007.png", "conditioning", "."])
def test_a_node_that_does_not_see_them(lost: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are not bad: even where bad ones are skipped, the run ends."""
    monkeypatch.setattr(shared, "APPEARS_WITHIN_S", 0.0)
    config = DataConfig(train_data_dir=str(data))
    source = open_source(config, skip_bad=True)
    files = shared_files(source, config)
    loader = pickle.loads(
        pickle.dumps(BatchLoader(PixelRows(source, 32), SampleOrder(len(source), 0), 2, 0.0, source, files))
    )
    if (data / lost).is_dir():
        shutil.rmtree(data / lost)
    else:
        (data / lost).unlink()
    with pytest.raises(UserError) as error:
        loader.batch(0)
    assert type(error.value) is UserError, "no DataError, which would be a bad sample"
    assert str(error.value).startswith(f"--train_data_dir={data}: the node {socket.gethostname()} does not see {data}")
    assert str(error.value).endswith("; name a folder on storage that all nodes share")


def test_what_the_driver_does_not_see_is_not_asked_for(data: Path) -> None:
    """Bad rows that are left out."""
    (data / "images" / "00003.png").unlink()
    config = DataConfig(train_data_dir=str(data))
    files = shared_files(open_source(config, skip_bad=True), config)
    assert str(data / "images" / "00003.png") not in files.paths
    assert str(data / "conditioning" / "00003.png") in files.paths
    files.check_here()


def test_few_files_of_many_rows(tmp_path: Path) -> None:
    config = DataConfig(train_data_dir=str(write_shapes(tmp_path / "many", 5 * LOOKED_AT_ROWS, resolution=8)))
    files = shared_files(open_source(config), config)
    assert len(files.paths) == 1 + 2 * LOOKED_AT_ROWS


def test_many_nodes_are_not_all_named() -> None:
    names = [f"node-{number}" for number in range(100)]
    message = SharedFiles("--x=y", ("/y",)).problem("/y", names)
    assert message.startswith("--x=y: the nodes node-0, node-1, node-2, ... do not see /y; name")


def test_a_file_that_appears_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system."""
    monkeypatch.setattr("time.sleep", lambda _: (tmp_path / "late").touch())
    SharedFiles("--x=y", (str(tmp_path / "late"),)).check_here()


DRIVER = {"raycontrolnet": "0.2.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({}, None),
        ({"torch": "2.13.2+cu126"}, None),
        ({"diffusers": "0.42.0"}, None),
        (
            {"torch": "2.1.0"},
            "torch: the node n has torch 2.1.0, this process has 2.13.0+cpu; run pip install torch==2.13.0",
        ),
        (
            {"diffusers": "0.41.1"},
            "diffusers: the node n has diffusers 0.41.1, this process has 0.42.1; run pip install",
        ),
        (
            {"raycontrolnet": "0.2.1"},
            "raycontrolnet: the node n has raycontrolnet 0.2.1, this process has 0.2.0; run pip",
        ),
        ({"raycontrolnet": None}, "raycontrolnet: the node n has no raycontrolnet, this process has 0.2.0; run pip"),
    ],
)
def test_versions_that_suit(there: dict[str, str | None], message: str | None) -> None:
    found = difference(DRIVER, {**DRIVER, **there}, "n")
    assert (found is None) if message is None else (found is not None and found.startswith(message))
    assert found is None or len(found) < 250

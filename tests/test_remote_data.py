"""Data sets in an object store give exactly the rows, and the losses, of a local copy; a server for S3 has them."""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket_data import write_pictures
from PIL import Image
from runs import Settings, contents, flags, losses, metadata, run
from s3_server import BUCKET, KEYS, S3Server, flaky_proxy, s3, serving, use_s3
from test_tar_source import tar_of, write_tar

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main
from raycontrolnet.config.checks import absolute
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.data import byte_ranges, remote_copy, remote_path
from raycontrolnet.data.image_sizes import HEADER_BYTES, image_sizes
from raycontrolnet.data.remote_copy import RemoteCopy
from raycontrolnet.data.remote_path import RemotePath
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source, shared_files
from raycontrolnet.data.transforms import prepare_images
from raycontrolnet.errors import ConfigError, DataError
from raycontrolnet.hub.model_card import write_model_card
from raycontrolnet.storage import store_requests
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
    monkeypatch.setattr(store_requests, "READ_WAITS_S", (0.0, 0.0))


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


def test_places_of_both_kinds_are_one_source(local: dict[str, Path], remote: dict[str, str]) -> None:
    data = DataConfig(train_data_dir=(remote["tars"], str(local["metadata"])), dataset_name=remote["parquet"])
    source = of_process(open_source(data))
    assert source.remote
    assert len(source) == 39
    for row in (5, 18, 31):
        assert content(source.read(row).image) == content(open_source(data_of(local["metadata"])).read(5).image)
    files = shared_files(source, data).paths
    assert str(local["metadata"]) in files
    assert all(path.startswith(str(local["metadata"])) for path in files), "nodes fetch the others by themselves"
    secret = f"s3://user:secret@{BUCKET}/data"
    with pytest.raises(ConfigError, match="--train_data_dir: leave keys and tokens out of the URI"):
        TrainConfig(pretrained_model_name_or_path="base", train_data_dir=(str(local["metadata"]), secret))


@pytest.mark.parametrize("kind", ["metadata", "tars", "parquet"])
def test_losses_are_those_of_a_local_copy(
    kind: str, local: dict[str, Path], remote: dict[str, str], tiny_settings: Settings, tmp_path: Path
) -> None:
    settings = tiny_settings | {"num_workers": "0", "max_train_steps": 2}
    here = run(settings, tmp_path / "here", train_data_dir=str(local[kind]))
    there = run(settings, tmp_path / "there", train_data_dir=remote[kind])
    assert losses(there) == losses(here)
    assert len(losses(there)) == 2


def test_a_cache_of_the_local_copy_fits(
    local: dict[str, Path], remote: dict[str, str], tiny_settings: Settings, tmp_path: Path
) -> None:
    for kind in ("metadata", "tars"):
        settings = tiny_settings | {"cache_latents": "on", "latents_cache_dir": str(tmp_path / kind)}
        made = prepare(TrainConfig(**settings | {"train_data_dir": str(local[kind])}), stream=io.StringIO())
        found = prepare(TrainConfig(**settings | {"train_data_dir": remote[kind]}), stream=io.StringIO())
        assert (made.num_encoded, found.num_encoded) == (13, 0)


def test_the_default_cache_has_the_name_of_the_folder(
    s3: S3Server, local: dict[str, Path], tiny_settings: Settings
) -> None:
    uri = f"{upload(s3, local['metadata'], 'shapes')}?endpoint_override={s3.endpoint.partition('://')[2]}&scheme=http"
    config = TrainConfig(**tiny_settings | {"cache_latents": "on", "train_data_dir": uri})
    assert Path(prepare(config, stream=io.StringIO()).folder).name.startswith("shapes-32px-")


def test_one_file_by_itself(s3: S3Server, local: dict[str, Path], remote: dict[str, str]) -> None:
    assert len(open_source(data_of(f"{remote['tars']}/1.tar"))) == 6
    for flag in ("train_data_dir", "dataset_name"):
        settings: dict[str, Any] = {flag: f"{remote['parquet']}/data/train-00001-of-00002.parquet"}
        assert len(of_process(open_source(DataConfig(**settings)))) == 6


def test_a_file_uri_is_a_path(local: dict[str, Path], tiny_settings: Settings, tmp_path: Path) -> None:
    for flag in ("train_data_dir", "dataset_name"):
        settings: dict[str, Any] = {flag: f"file://{local['tars']}"}
        assert not open_source(DataConfig(**settings)).remote
    out = run(tiny_settings, tmp_path / "out", train_data_dir=f"file://{local['metadata']}", max_train_steps=1)
    assert f"train_data_dir: {local['metadata']}\n" in (out / "config.yaml").read_text()


def test_paths_and_uris_in_the_settings(local: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(local["tars"].parent)
    for name in ("train_data_dir", "dataset_name"):
        for uri in ("s3://bucket/a//b", "gs://bucket/a?x=y", "hf://datasets/a/b"):
            assert absolute(name, uri) == uri
        for path in ("tars", f"file://{local['tars']}", f"{local['tars']}/"):
            assert absolute(name, path) == str(local["tars"])
    assert absolute("dataset_name", "owner/name") == "owner/name"
    assert absolute("output_dir", "tars") == str(local["tars"])


def test_a_sweep_over_data_sets() -> None:
    train = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="s3://bucket/a", cache_latents="off")
    space = {"train_data_dir": {"choice": ["s3://bucket/a", "s3://id:pass@bucket/b"]}}
    with pytest.raises(ConfigError) as caught:
        SweepConfig(train=train, space=space)
    problem = "a URI: --train_data_dir: leave keys and tokens out of the URI; put them into the machines' environment"
    assert caught.value.problems == (f"--space: train_data_dir: {problem.replace('--train_data_dir: ', '')}",)


def test_the_model_card_names_no_bucket(tmp_path: Path) -> None:
    for name in ("train_data_dir", "dataset_name"):
        settings = {"pretrained_model_name_or_path": "owner/base", name: "s3://bucket/a/faces?endpoint_override=h:1"}
        text = write_model_card(tmp_path, settings, {}).read_text()
        assert "trained with raycontrolnet on `faces`" in text
        assert f'`{name}`: `"faces"`' in text
        assert "bucket" not in text


def test_pictures_are_local(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["condition", *flags(images="s3://bucket/photos", condition="canny")]) == 2
    problem = "must be a local or mounted folder; copy the pictures to this machine"
    assert capsys.readouterr().err == f"error: --images=s3://bucket/photos: {problem}\n"


# --- requests ---


def test_the_sizes_of_images_are_read_from_their_headers(s3: S3Server, tmp_path: Path) -> None:
    """They are those of a local copy; large files are not fetched whole."""
    folder = write_pictures(tmp_path / "pictures", 7)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (400, 300, 3), dtype=np.uint8)).save(folder / "images" / "0.png")
    source = open_source(data_of(upload(s3, folder, "of-shapes")))
    fetched = []
    read = remote_path.RemoteFile.read

    def recorded(self: remote_path.RemoteFile, size: int, offset: int) -> bytes:
        fetched.append(size)
        return read(self, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_path.RemoteFile, "read", recorded)
        found = image_sizes(of_process(source), range(7))
    assert found.tolist() == image_sizes(open_source(data_of(folder)), range(7)).tolist()
    assert found[:3].tolist() == [[400, 300], [50, 30], [30, 50]]
    assert 7 <= len(fetched) <= 14
    assert max(fetched) <= HEADER_BYTES < (folder / "images" / "0.png").stat().st_size


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record what is read: (path, bytes) of every range, and (path, 0) of every listing."""
    read, listing, seen = remote_path.RemoteFile.read, remote_path._listing.__wrapped__, []

    def recorded(self: remote_path.RemoteFile, size: int, offset: int) -> bytes:
        content = read(self, size, offset)
        seen.append((str(self.path), len(content)))
        return content

    def listed(root: str, folder: str) -> Any:
        seen.append((folder, 0))
        return listing(root, folder)

    monkeypatch.setattr(remote_path.RemoteFile, "read", recorded)
    monkeypatch.setattr(remote_path, "_listing", lru_cache(listed))
    return seen


def test_of_tars_the_headers_are_read(s3: S3Server, tmp_path: Path, requests: list[tuple[str, int]]) -> None:
    """The files between the headers are 6 MB."""
    files = {f"{row}{name}": bytes(10**6) for row in range(3) for name in (".png", ".control.png")}
    write_tar(tmp_path / "tars" / "0.tar", files | {f"{row}.txt": b"text" for row in range(3)})
    source = open_source(data_of(upload(s3, tmp_path / "tars", "large")))
    assert sum(size for _, size in requests) < 1_000_000
    requests.clear()
    of_process(source).read(1)
    assert sorted(size for _, size in requests) == [4, 10**6, 10**6]


def test_files_that_lie_together_are_read_at_once(remote: dict[str, str], requests: list[tuple[str, int]]) -> None:
    source = open_source(data_of(remote["tars"]))
    requests.clear()
    source.read(3)
    assert len(requests) == 1


def test_folders_are_listed_once(remote: dict[str, str], requests: list[tuple[str, int]]) -> None:
    source = open_source(data_of(remote["metadata"]))
    list(source.identities(range(13)))
    listed = [path for path, size in requests if size == 0]
    assert len(listed) == len(set(listed)) <= 4
    requests.clear()
    source = of_process(source)
    list(source.identities(range(13)))
    source.read(0)
    assert requests == []


def test_reads_that_fail_twice(remote: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, failed = remote_path.RemoteFile._open, dict[int, int]()

    def failing(self: remote_path.RemoteFile) -> Any:
        failed[id(self)] = failed.get(id(self), 0) + 1
        if failed[id(self)] % 3:
            raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached")
        return opened(self)

    monkeypatch.setattr(remote_path.RemoteFile, "_open", failing)
    for kind in ("metadata", "tars", "pairs", "parquet"):
        source = open_source(data_of(remote[kind]))
        assert [content(of_process(source).read(row).image)[:4] for row in (0, 12)] == [b"\x89PNG"] * 2
    assert max(failed.values()) >= 3


def test_a_run_from_a_store_that_fails_now_and_then(
    s3: S3Server,
    remote: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_settings: Settings,
    tmp_path: Path,
) -> None:
    with flaky_proxy(s3.endpoint, every=4) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        open_uri.cache_clear()
        there = run(tiny_settings, tmp_path / "there", train_data_dir=remote["tars"], max_train_steps=1)
    assert len(losses(there)) == 1


# --- what changes or is gone ---


def test_a_tar_that_changes_while_a_run_goes_on(s3: S3Server, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tars" / "0.tar")
    source = open_source(data_of(upload(s3, path.parent, "changing")))
    place = r"s3://bucket/changing/0.tar:0001: cannot be read \("
    write_tar(path, {"0001.jpg": b"another"})
    s3.write("changing/0.tar", path.read_bytes() + bytes(10240))
    with pytest.raises(DataError, match=place + r"it has changed since the run was started\)$"):
        of_process(source).read(0)
    s3.client.delete_object(Bucket=BUCKET, Key="changing/0.tar")
    with pytest.raises(DataError, match=place + ".*not exist"):
        of_process(source).read(0)


def test_an_image_that_goes_while_a_run_goes_on(s3: S3Server, local: dict[str, Path]) -> None:
    source = open_source(data_of(upload(s3, local["metadata"], "going")))
    s3.client.delete_object(Bucket=BUCKET, Key="going/images/00000.png")
    with pytest.raises(DataError, match=r"going/metadata.jsonl:1, image: s3://bucket/going/images/00000.png: no such"):
        prepare_images(of_process(source).read(0), 32)


def test_tables_are_copied_once_and_whole(
    s3: S3Server,
    local: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One process ends within the second file; eight others copy that one at a time, which only one does."""
    uri, copyfileobj, copied = upload(s3, local["parquet"], "copied"), shutil.copyfileobj, list[str]()

    def cut_off(stream: Any, file: Any, size: int) -> None:
        copied.append(file.name)
        if len(copied) > 1:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        copyfileobj(stream, file, size)

    def fetched(_: int = 0) -> Path:
        return RemoteCopy.of(RemotePath(uri)).fetched(str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(remote_copy, "_FILES_AT_A_TIME", 1)
        patch.setattr(shutil, "copyfileobj", cut_off)
        with pytest.raises(DataError) as caught:
            fetched()
    (folder,) = (tmp_path / "raycontrolnet" / "datasets").glob("copied-*")
    problem = "cannot be copied to {} (No space left on device); --cache_dir names another folder"
    assert str(caught.value) == f"{uri}: {problem.format(folder)}"
    assert list(contents(folder)) == ["data/train-00000-of-00002.parquet"]
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetched, range(8))) == {folder}
    assert contents(folder) == contents(local["parquet"])
    assert [message.partition(" (")[0] for message in caplog.messages] == [f"{uri}: copying 1 file"]
    s3.write("copied/data/train-00001-of-00002.parquet", b"another")
    remote_path.forget_listings()
    assert fetched() != folder


def test_tables_that_change_before_they_are_copied(s3: S3Server, local: dict[str, Path], tmp_path: Path) -> None:
    copy = RemoteCopy.of(RemotePath(upload(s3, local["parquet"], "changed")))
    s3.write("changed/data/train-00001-of-00002.parquet", b"another")
    with pytest.raises(DataError, match=r"changed/data/train-00001.*: has changed since the run was started$"):
        copy.fetched(str(tmp_path))


# --- what is said ---


@contextmanager
def refusing_server(code: bytes) -> Iterator[str]:
    """Serve the error 403 with the reason `code`, and the key that was sent, to every request."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            text = f"<Message>of {KEYS['AWS_ACCESS_KEY_ID']}</Message>".encode()
            body = b"<Error><Code>%s</Code>%s</Error>" % (code, text)
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

    with serving(Handler) as address:
        yield address


CHECK = "; check the URI, and keys and address in the environment"
REFUSED: dict[str, str] = {
    "s3://gone/x": "--{}=s3://gone/x: cannot be read (there is no bucket gone, or it is not yours)" + CHECK,
    "s3://bucket/none": "--{}=s3://bucket/none: no such folder",
    "s3://bucket/none?scheme=http": "--{}=s3://bucket/none: no such folder",
    "s3://": "--{}=s3://: cannot be read (it names no bucket)" + CHECK,
    "s3://bucket/a/x.txt": "--{}=s3://bucket/a/x.txt: is a file; name the folder that it is in",
    "ftp://x/y": "--{}=ftp://x/y: cannot be read (Unrecognized filesystem type in URI: ftp://x/y)" + CHECK,
    "s33://x/y": "--{}=s33://x/y: cannot be read (Unrecognized filesystem type in URI: s33://x/y; perhaps you meant s3)"
    + CHECK,
    "s3://bucket/x?endpoint=h": "--{}=s3://bucket/x: cannot be read (Unexpected query parameter in S3 URI: "
    "'endpoint')" + CHECK,
    "s3://id:pass@bucket/x": "--{}: leave keys and tokens out of the URI; put them into the machines' environment",
    "s3://bucket/x?token=id": "--{}: leave keys and tokens out of the URI; put them into the machines' environment",
    "s3://bucket/a/empty": "--{}=s3://bucket/a/empty: has no metadata.jsonl, one line per image such as ",
}


@pytest.fixture
def said(tiny_settings: Settings, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return said(flag, uri): what `raycontrolnet train` says of it, with exit code 2."""

    def said(flag: str, uri: str) -> str:
        settings = {name: value for name, value in tiny_settings.items() if name != "train_data_dir"}
        capsys.readouterr()
        assert main(["train", *flags(settings, **{flag: uri})]) == 2
        error = capsys.readouterr().err
        assert not [key for key in (*KEYS.values(), "pass", "=id") if key in error]
        return error.removeprefix("error: ").removesuffix("\n")

    return said


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("uri", REFUSED)
def test_what_is_refused(s3: S3Server, said: Any, flag: str, uri: str) -> None:
    s3.write("a/x.txt", b"x")
    s3.write("a/empty/", b"")
    error, expected = said(flag, uri), REFUSED[uri].format(flag)
    if expected.endswith("such as "):
        assert error.startswith(expected)
        assert error.endswith("It holds: nothing")
    else:
        assert error == expected
        assert len(error) <= 250


@pytest.mark.parametrize("code", [b"AccessDenied", b"InvalidAccessKeyId", b"SignatureDoesNotMatch"])
def test_wrong_keys(said: Any, monkeypatch: pytest.MonkeyPatch, code: bytes) -> None:
    with refusing_server(code) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        open_uri.cache_clear()
        error = said("train_data_dir", "s3://bucket/data")
    assert error.startswith("--train_data_dir=s3://bucket/data: cannot be read (AWS Error ")
    assert error.endswith(CHECK)
    assert len(error) <= 250


def test_a_metadata_file_that_may_not_be_read(
    s3: S3Server, local: dict[str, Path], said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(s3, local["metadata"], "locked")

    def denied(*_: Any) -> Any:
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(RemotePath, "open", denied)
    path, reason = f"{uri}/metadata.jsonl", "AWS Error ACCESS_DENIED during HeadObject operation"
    assert said("train_data_dir", uri) == f"{path}: cannot be read ({reason}){CHECK}"


def test_an_address_where_nobody_answers(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    open_uri.cache_clear()
    error = said("dataset_name", "s3://bucket/data")
    assert error.startswith("--dataset_name=s3://bucket/data: cannot be read (http://127.0.0.1:1 does not answer: ")
    assert len(error) <= 250


def test_files_that_are_missing(s3: S3Server, local: dict[str, Path], said: Any) -> None:
    uri = upload(s3, local["metadata"], "missing")
    s3.client.delete_object(Bucket=BUCKET, Key="missing/images/00000.png")
    s3.client.delete_object(Bucket=BUCKET, Key="missing/conditioning/00002.png")
    s3.write("missing/images/00001.png/x", b"")
    s3.client.delete_object(Bucket=BUCKET, Key="missing/images/00001.png")
    assert said("train_data_dir", uri).split("\n") == [
        f"{uri}/metadata.jsonl:1: image images/00000.png: no such file",
        f"{uri}/metadata.jsonl:2: image images/00001.png: is a folder, not an image file",
        f"{uri}/metadata.jsonl:3: conditioning_image conditioning/00002.png: no such file",
        "fix the data, or skip such rows with --on_bad_sample skip",
    ]


def test_paths_that_lead_out_of_the_folder(s3: S3Server, local: dict[str, Path]) -> None:
    """They are read in the bucket; absolute ones are this machine's."""
    for name in ("images", "conditioning"):
        upload(s3, local["metadata"] / name, f"apart/{name}")
    here = local["metadata"] / "conditioning" / "00000.png"
    row = f'{{"image": "../images/00000.png", "conditioning_image": "{here}", "text": "x"}}\n'
    s3.write("apart/text/metadata.jsonl", row.encode())
    values = open_source(data_of("s3://bucket/apart/text")).read(0)
    assert values.conditioning_image == str(here)
    assert content(values.image) == (local["metadata"] / "images" / "00000.png").read_bytes()


def test_a_remote_path_is_like_a_path(s3: S3Server, tmp_path: Path) -> None:
    names = ["a.parquet", "b.txt", "c/d.parquet", "c/e/f.parquet", ".hidden.parquet", "c/g h%20ü.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"one\r\ntwo")
    there = RemotePath(upload(s3, tmp_path, "like"))
    for pattern in ("*.parquet", "*/*.parquet", "b.txt", "*/nothing"):
        expected = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(pattern) if path.name[0] != ".")
        assert sorted(path.relative for path in there.glob(pattern)) == expected
    for name in (*names, "c", "c/none", "none/none"):
        one, other = there / name, tmp_path / name
        assert (one.is_file(), one.is_dir(), one.exists()) == (other.is_file(), other.is_dir(), other.exists())
        assert (one.name, one.stem, one.suffix, one.parent.name) == (
            other.name, other.stem, other.suffix, other.parent.name if "/" in name else "like",
        )  # fmt: skip
    one, other = there / "c" / "g h%20ü.txt", tmp_path / "c" / "g h%20ü.txt"
    assert one.read_text("utf-8") == other.read_text("utf-8") == "one\ntwo"
    assert stat.S_ISREG(one.stat().st_mode)
    assert one.stat().st_size == 8
    with one.open("rb", 2) as file:
        file.seek(-3, 2)
        assert file.read() == b"two"
    assert str(one.with_suffix(".x")) == "s3://bucket/like/c/g h%20ü.x"

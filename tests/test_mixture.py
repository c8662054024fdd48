"""Several sources as one: their rows, names, columns and weights, the cache of their latents, and whole runs."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from runs import Settings, check_resume_is_exact, flags, losses, metadata, run, train

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main, parse
from raycontrolnet.config.data_sources import SourceConfig, sources_of
from raycontrolnet.data.buckets import Buckets, bucket_sizes
from raycontrolnet.data.mixture import arrangement, in_words, labels_of
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source, shared_files
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, DataError
from raycontrolnet.latents.manifest import SHARD_ROWS
from raycontrolnet.latents.plan import LatentPlan, prepare_command
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION


def config_of(*folders: Path, **others: Any) -> TrainConfig:
    given: Settings = {"pretrained_model_name_or_path": "base", "train_data_dir": tuple(map(str, folders))}
    return TrainConfig(**given | others)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write 9 rows and 4 others."""
    place = tmp_path_factory.mktemp("sources")
    return write_shapes(place / "many", 9, resolution=32), write_shapes(place / "few", 4, resolution=32, seed=1)


@pytest.fixture
def source(folders: tuple[Path, Path]) -> Source:
    return open_source(config_of(*folders))


# --- the settings ---


def test_a_source_of_each_name() -> None:
    config = config_of(
        Path("a"), Path("b"), dataset_name="owner/c", image_column="picture", caption_column=("x", "y", "z"),
        dataset_config_name="small",
    )  # fmt: skip
    first, second, third = sources_of(config)
    assert first == SourceConfig(train_data_dir="a", image_column="picture", caption_column="x")
    assert (second.shown, second.caption_column) == ("--train_data_dir=b", "y")
    assert (third.shown, third.caption_column, third.image_column) == ("--dataset_name=owner/c", "z", "picture")
    assert [each.dataset_config_name for each in sources_of(config)] == [None, None, "small"]


def test_one_name_is_what_it_was(tmp_path: Path) -> None:
    """Also in a list, as on the command line."""
    for given in ("data", ["data"], ("data",), Path("data")):
        assert TrainConfig(pretrained_model_name_or_path="base", train_data_dir=given).train_data_dir == "data"  # type: ignore[arg-type]
    command = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "a", "b", "--data_weights", "2", "0.5"]
    config = parse("train", command)
    assert (config.train_data_dir, config.data_weights) == (("a", "b"), (2.0, 0.5))
    with pytest.raises(ConfigError, match=r"--image_column=\(\): must name at least one"):
        TrainConfig(pretrained_model_name_or_path="base", train_data_dir="a", image_column=())
    (tmp_path / "train.yaml").write_text("train_data_dir: [a, b]\ndata_weights: [2, 1e-1]\ncaption_column: [x, y]\n")
    config = parse("train", [*command[:2], "--config", str(tmp_path / "train.yaml")])
    assert (config.train_data_dir, config.data_weights, config.caption_column) == (("a", "b"), (2, 0.1), ("x", "y"))
    assert (
        parse("train", [*command[:2], "--config", str(tmp_path / "train.yaml"), "--caption_column", "z"]).caption_column
        == "z"
    )


def test_the_command_for_prepare_names_all() -> None:
    config = config_of(Path("a b"), Path("c"), dataset_name="d", caption_column=("x", "y", "z"))
    command = prepare_command(config)
    assert "--train_data_dir 'a b' c" in command
    assert "--caption_column x y z" in command
    assert "--data_weights" not in prepare_command(dataclasses.replace(config, data_weights=(1, 2, 3)))


# --- rows ---


def test_rows_come_one_source_after_the_other(folders: tuple[Path, Path], source: Source) -> None:
    parts = [open_source(config_of(folder)) for folder in folders]
    assert len(source) == 13
    expected = [part.read(row) for part in parts for row in range(len(part))]
    assert [source.read(row) for row in range(13)] == expected
    assert list(source.identities(range(13))) == [line for part in parts for line in part.identities(range(len(part)))]
    assert source.read(9).place == f"{folders[1]}/metadata.jsonl:1"
    assert source.files(9) == parts[1].files(0)
    other_way = open_source(config_of(*reversed(folders)))
    assert len({each.fingerprint() for each in (source, other_way, *parts)}) == 4
    assert pickle.loads(pickle.dumps(source)).read(12) == expected[12]


def test_folders_and_data_sets_mix(folders: tuple[Path, Path], tmp_path: Path) -> None:
    rows = metadata(folders[1])
    table: dict[str, list[Any]] = {
        "target": [(folders[1] / row["image"]).read_bytes() for row in rows],
        "hint": [(folders[1] / row["conditioning_image"]).read_bytes() for row in rows],
        "text": [row["text"] for row in rows],
    }
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "few.parquet")
    columns = {"image_column": ("image", "target"), "conditioning_image_column": ("conditioning_image", "hint")}
    config = config_of(folders[0], dataset_name=str(tmp_path / "few.parquet"), **columns)
    mixed, plain = open_source(config), open_source(config_of(*folders))
    assert [mixed.read(row).captions for row in range(13)] == [plain.read(row).captions for row in range(13)]
    assert mixed.read(10).image == Path(str(plain.read(10).image)).read_bytes()
    assert mixed.read(10).place == f"--dataset_name={tmp_path}/few.parquet, row 1"
    files = shared_files(mixed, config)
    assert files.setting == f"--train_data_dir={folders[0]} --dataset_name={tmp_path}/few.parquet"
    assert {str(folders[0]), str(tmp_path / "few.parquet"), plain.files(0)[0]} <= set(files.paths)


def rename_captions(folder: Path, name: str) -> None:
    rows = [{name if key == "text" else key: value for key, value in row.items()} for row in metadata(folder)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_columns_are_refused_with_both_names(
    folders: tuple[Path, Path], tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = Path(shutil.copytree(folders[1], tmp_path / "few"))
    rename_captions(few, "words")
    given = {"pretrained_model_name_or_path": tiny_base, "train_data_dir": (folders[0], few), "num_workers": 0}
    for command in ("train", "check", "prepare"):
        assert main([command, *flags(given, output_dir=tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("--caption_column=") == 1
        assert f"--caption_column=text: no such column in {few}/metadata.jsonl, which has: " in said
        assert "; give one for each source, such as --caption_column text words\n" in said
    assert len(open_source(config_of(folders[0], few, caption_column=("text", "words")))) == 13


def test_customary_columns_are_found_in_each_source(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """At the default value, given or not; a column of another name must be there."""
    few = Path(shutil.copytree(folders[1], tmp_path / "few"))
    rename_captions(few, "prompt")
    for given in ({}, {"caption_column": "text"}, {"caption_column": ("text", "text")}):
        assert len(open_source(config_of(folders[0], few, **given))) == 13
    with pytest.raises(DataError, match=r"--caption_column=caption: no such column in .*/many/"):
        open_source(config_of(folders[0], few, caption_column="caption"))


def test_a_line_for_each_column_that_sources_lack(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The example names what is nearest in the source, or else what no other setting names."""
    for name, columns in {"one": ["picture", "sketch", "words"], "two": ["texts", "image", "edges", "x"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps(dict.fromkeys(columns, "a.png")) + "\n")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for file in ("1.jpg", "1.canny.png", "1.txt"):
            tar.addfile(tarfile.TarInfo(file))
    sources = (tmp_path / "one", folders[0], tmp_path / "two", tmp_path / "0.tar")
    with pytest.raises(DataError) as error:
        open_source(config_of(*sources))
    one, two = (f"no such column in {tmp_path}/{name}/metadata.jsonl, which has: " for name in ("one", "two"))
    tars = f"no file in {tmp_path}/0.tar has such an extension, as KEY.conditioning_image.png; there are: "
    each, conditioning = "give one for each source, such as ", "conditioning_image"
    assert str(error.value).splitlines() == [
        f"--image_column=image: {one}picture, sketch, words; {each}--image_column picture image image image",
        (
            f"--{conditioning}_column={conditioning}: {one}picture, sketch, words; {two}texts, image, edges, x; "
            f"{tars}jpg, canny.png, txt; {each}--{conditioning}_column sketch {conditioning} edges canny.png"
        ),
        (
            f"--caption_column=text: {one}picture, sketch, words; {two}texts, image, edges, x; "
            f"{each}--caption_column words text texts text"
        ),
    ]
    given = config_of(tmp_path / "one", folders[0], image_column="picture", caption_column=("words", "nothing"))
    with pytest.raises(DataError, match=r"--caption_column=nothing: no such column .*--caption_column words \w+"):
        open_source(given)


def test_every_source_that_cannot_be_opened_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folders[1], tmp_path / "few"))
    (broken / metadata(broken)[2]["image"]).unlink()
    with pytest.raises(DataError) as error:
        open_source(config_of(tmp_path / "nowhere", folders[0], broken))
    assert f"--train_data_dir={tmp_path}/nowhere: no such folder" in str(error.value)
    assert f"{broken}/metadata.jsonl:3" in str(error.value)
    assert "different columns" not in str(error.value)


# --- weights ---


def order_of(source: Source, *data_weights: float, seed: int = 0, **others: Any) -> SampleOrder:
    return SampleOrder(len(source), seed, arrange=arrangement(source, data_weights or None, seed), **others)


def test_without_weights_the_order_is_that_of_all_rows(source: Source) -> None:
    plain = SampleOrder(13, 0)
    assert [order_of(source).row(k) for k in range(60)] == [plain.row(k) for k in range(60)]


@pytest.mark.parametrize("data_weights", [(2, 1), (1, 1), (0.1, 0.7), (1, 1000), (9, 4)])
def test_samples_are_in_the_shares_of_the_weights(source: Source, data_weights: tuple[float, float]) -> None:
    """Within an epoch to a sample; and each source uses its own rows evenly."""
    order, number = order_of(source, *data_weights), 13 * 40
    rows = [order.row(k) for k in range(number)]
    assert [order.row(k) for k in reversed(range(number))] == rows[::-1]
    assert [pickle.loads(pickle.dumps(order)).row(k) for k in range(20, 50)] == rows[20:50]
    share = Fraction(str(data_weights[0])) / sum(Fraction(str(weight)) for weight in data_weights)
    for end in range(13, number + 1, 13):
        assert abs(sum(row < 9 for row in rows[:end]) - share * end) <= 2
    for part in (range(9), range(9, 13)):
        uses = Counter(row for row in rows if row in part)
        assert max(uses.values(), default=0) - min(uses[row] for row in part) <= 1
    assert [order_of(source, *data_weights, seed=1).row(k) for k in range(number)] != rows


def test_weights_of_rows_that_are_held_out_or_left_out(source: Source) -> None:
    order = order_of(source, 1, 1, num_held_out=3, without=[0, 10])
    plain = SampleOrder(13, 0, num_held_out=3, without=[0, 10])
    assert order.held_out.tolist() == plain.held_out.tolist()
    rows = [order.row(k) for k in range(20 * order.num_samples)]
    assert set(rows) == set(range(13)) - {0, 10, *order.held_out.tolist()}
    assert np.mean([row < 9 for row in rows]) == pytest.approx(0.5, abs=0.02)
    alone = order_of(source, 1, 1, without=range(9, 13))
    expected = SampleOrder(13, 0, without=range(9, 13))
    assert [alone.row(k) for k in range(50)] == [expected.row(k) for k in range(50)], "a source without rows is none"


def test_weighted_sources_are_mixed_in_each_bucket(source: Source) -> None:
    """Batches of one aspect bucket; the weights hold over all, and each source still uses its own rows evenly."""
    shapes = np.array([(32, 32) if row % 3 else (16, 64) for row in range(13)])
    none = np.array([], np.int64)
    buckets = Buckets.of(shapes, np.arange(13), none, 2, bucket_sizes(32))
    order = SampleOrder(13, 0, arrange=arrangement(source, (1, 1), 0, buckets, 2))
    rows = [order.row(k) for k in range(13 * 120)]
    assert all(buckets.of_row[one] == buckets.of_row[two] for one, two in zip(rows[::2], rows[1::2], strict=True))
    assert len(buckets.sizes) == 2
    assert np.mean([row < 9 for row in rows]) == pytest.approx(0.5, abs=0.01)
    uses = Counter(rows)
    for part in (range(9), range(9, 13)):
        assert max(uses[row] for row in part) - min(uses[row] for row in part) <= 2


def test_labels_and_words(folders: tuple[Path, Path], source: Source) -> None:
    assert labels_of(source).tolist() == [0] * 9 + [1] * 4
    said = in_words(source, config_of(*folders, data_weights=(3, 1)))
    assert said == (
        f"--train_data_dir={folders[0]} has 9 rows, 0.75 of the samples; "
        f"--train_data_dir={folders[1]} has 4 rows, 0.25 of the samples"
    )
    assert in_words(open_source(config_of(folders[0])), config_of(folders[0])) is None


# --- the cache ---


@pytest.fixture
def settings(run_settings: Settings, folders: tuple[Path, Path], tmp_path: Path) -> Settings:
    return run_settings | {
        "train_data_dir": tuple(map(str, folders)),
        "latents_cache_dir": str(tmp_path / "cache"),
        "cache_latents": "on",
        "max_train_steps": 6,
    }


def test_another_source_leaves_the_shards_of_the_first(settings: Settings) -> None:
    """Only what is new is encoded; a source that is put first moves the rows, and all are."""
    both = settings["train_data_dir"]
    first = prepare(TrainConfig(**settings | {"train_data_dir": both[0]}), stream=io.StringIO())
    added = prepare(TrainConfig(**settings), stream=io.StringIO())
    assert (first.num_encoded, added.num_encoded, added.num_samples) == (9, 4, 13)
    assert prepare(TrainConfig(**settings), stream=io.StringIO()).num_encoded == 0
    back = prepare(TrainConfig(**settings | {"train_data_dir": both[0]}), stream=io.StringIO())
    assert back.num_encoded == 0
    turned = prepare(TrainConfig(**settings | {"train_data_dir": both[::-1]}), stream=io.StringIO())
    assert turned.num_encoded == 13


def test_shards_of_folders_in_a_folder_stay_as_they_were(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    """Caches of earlier versions have shards that reach over their ends."""
    for name in ("a", "b"):
        shutil.copytree(folders[0], tmp_path / name)
    config = config_of(tmp_path)
    assert len(open_source(config)) == 18 < SHARD_ROWS
    plan_of = [list(each) for each in _rows_of_shards(config)]
    assert plan_of == [list(range(18))]
    assert _rows_of_shards(config_of(tmp_path / "a", tmp_path / "b")) == [tuple(range(9)), tuple(range(9, 18))]


def _rows_of_shards(config: TrainConfig) -> list[tuple[int, ...]]:
    from raycontrolnet.latents.manifest import Encoding, plan_shards

    source = open_source(config)
    return [shard.rows for shard in plan_shards(source, range(len(source)), Encoding("0", 32, "float16"))]


def test_folders_by_default_are_named_after_all(settings: Settings, source: Source) -> None:
    config = TrainConfig(**settings | {"latents_cache_dir": None})
    assert Path(LatentPlan.of(config, source, STABLE_DIFFUSION, None).folder.uri).name.startswith("many+few-32px-")


# --- whole runs ---


def test_a_run_names_all_data(settings: Settings, folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = train(settings | {"data_weights": (1, 3), "output_dir": str(tmp_path / "out"), "cache_latents": "off"})
    assert f"data: --train_data_dir={folders[0]} has 9 rows, 0.25 of the samples; " in found.shown
    card = (found.folder / "README.md").read_text()
    assert "on `many` and `few`." in card
    assert "`data_weights`: `[1.0, 3.0]`" in card
    assert '`["many", "few"]`' in card
    status = json.loads((found.folder / "run.json").read_text())
    assert status["data"] == [
        {"source": f"--train_data_dir={folders[0]}", "rows": 9}, {"source": f"--train_data_dir={folders[1]}", "rows": 4}
    ]  # fmt: skip
    again = parse("train", ["--config", str(found.folder / "config.yaml")])
    assert (again.train_data_dir, again.data_weights) == (tuple(map(str, folders)), (1.0, 3.0))


@pytest.mark.parametrize("cache_latents", ["off", "on"])
def test_resume_is_exact(settings: Settings, tmp_path: Path, cache_latents: str) -> None:
    changed = {"data_weights": (1, 2), "cache_latents": cache_latents, "random_flip": True, "checkpointing_steps": 2}
    check_resume_is_exact(settings, tmp_path, **changed)


def test_going_on_with_other_weights_is_told(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = run(settings, tmp_path / "out", max_train_steps=2)
    run(settings, out, resume_from_checkpoint="latest", max_train_steps=3)
    assert "other --data_weights" not in caplog.text
    run(settings, out, resume_from_checkpoint="latest", data_weights=(1, 2), max_train_steps=4)
    assert "was made with other --data_weights: the order of samples changes" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_losses_do_not_depend_on_the_number_of_workers(settings: Settings, tmp_path: Path) -> None:
    changed = {"data_weights": (1, 2), "cache_latents": "off", "cpus_per_worker": 0.5, "max_train_steps": 4}
    here = losses(run(settings, tmp_path / "here", **changed))
    one = losses(run(settings, tmp_path / "one", **changed, num_workers="1"))
    two = losses(run(settings, tmp_path / "two", **changed, num_workers="2", train_batch_size=2))
    assert one == pytest.approx(here, rel=1e-5)
    assert two == pytest.approx(here, rel=1e-5)


def test_weights_that_cannot_be(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="--data_weights 1 0: must be finite numbers above 0"):
        TrainConfig(**settings | {"data_weights": (1, 0)})

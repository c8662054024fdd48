"""`raycontrolnet condition`: the conditions, the data set that it makes, what it makes again and never overwrites."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import kill_9
from runs import contents, flags, metadata, states

from raycontrolnet import ConditionConfig, ConditionResult, TrainConfig, condition, fit
from raycontrolnet.cli import main, parse
from raycontrolnet.cluster import shared_files, versions
from raycontrolnet.cluster.blocks import from_block, to_block
from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.conditions import condition as condition_images
from raycontrolnet.conditions import recipes as conditions
from raycontrolnet.conditions.folder import ConditionFolder, png_name
from raycontrolnet.conditions.make import Outcome, ToMake, _make, make
from raycontrolnet.conditions.recipes import Recipe
from raycontrolnet.config.condition_config import CONDITIONS
from raycontrolnet.data.folder_source import FolderSource
from raycontrolnet.data.metadata_file import CONDITION_JOURNAL
from raycontrolnet.data.records import ImageRow, UInt8Image
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.transforms import prepare_images
from raycontrolnet.demo.shapes import draw_row
from raycontrolnet.errors import ConfigError, DataError, RunError, UserError

Make = Callable[..., ConditionResult]
RESOLUTION = 32


# --- the conditions ---


def square() -> UInt8Image:
    """White on black: rows and columns 8 to 23 of 32."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 255
    return image


def test_every_condition_has_its_settings_and_keeps_the_shape() -> None:
    assert tuple(conditions.CONDITIONS) == CONDITIONS
    image = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    for name in CONDITIONS:
        options = ConditionConfig(images=".", condition=name, resolution=64).options
        made = conditions.CONDITIONS[name](image.copy(), **dict(options))
        assert (made.dtype, made.shape) == (image.dtype, image.shape)


def test_canny_draws_the_outline_of_a_square() -> None:
    edges = conditions.canny(square(), low_threshold=100, high_threshold=200)
    assert set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    drawn = edges[..., 0] > 0
    near = np.zeros((32, 32), bool)
    near[7:25, 7:25] = True
    near[10:22, 10:22] = False
    assert not (drawn & ~near).any()
    assert drawn[10:22].any(axis=1).all()
    assert drawn[16].sum() == drawn[:, 16].sum() == 2  # one pixel for each side


def test_canny_goes_by_its_thresholds_and_sees_colours_of_one_lightness() -> None:
    faint = square() // 16
    assert not conditions.canny(faint, low_threshold=100, high_threshold=200).any()
    assert conditions.canny(faint, low_threshold=10, high_threshold=20).any()
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:, :16], colours[:, 16:] = (200, 0, 0), (0, 102, 0)
    assert np.ptp(conditions.grey(colours)) <= 1
    assert conditions.canny(colours, low_threshold=100, high_threshold=200).any()


def test_blur_keeps_the_mean_and_spreads_by_its_radius() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for radius in (1.0, 8.0, 64.0):
        blurred = conditions.blur(noise, radius=radius)
        assert np.abs(blurred.mean(axis=(0, 1)) - noise.mean(axis=(0, 1))).max() < 1
    step = np.zeros((16, 64, 3), np.uint8)
    step[:, 32:] = 255
    blurred = conditions.blur(step, radius=4.0)
    assert (blurred[..., :1] == blurred).all()
    # a standard deviation beyond the step, 84% of it is passed
    assert blurred[8, 32 + 3 : 32 + 5, 0].mean() / 255 == pytest.approx(0.841, abs=0.01)
    assert conditions.blur(np.full((9, 9, 3), 77, np.uint8), radius=3.0).tolist() == np.full((9, 9, 3), 77).tolist()


def test_grey_is_the_luma_three_times() -> None:
    colours = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]], np.uint8)
    assert conditions.grey(colours).tolist() == [[[value] * 3 for value in (76, 150, 29, 255, 0)]]


def test_the_same_recipe_is_equal_and_settings_of_others_do_not_count() -> None:
    settings: dict[str, Any] = {"images": ".", "condition": "blur", "resolution": 512}
    assert ConditionConfig(**settings).options == ConditionConfig(**settings, canny_low_threshold=1).options
    assert ConditionConfig(**settings).options == (("radius", 8.0),)
    assert ConditionConfig(**settings | {"resolution": 64}).options == (("radius", 1.0),)
    assert ConditionConfig(**settings, blur_radius=3).options == (("radius", 3.0),)


# --- a folder of pictures ---


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures of different kinds, each with a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    wide = Image.new("RGB", (96, 64), "navy")
    wide.paste(draw_row(0, 64, 0).image, (20, 0))
    wide.save(folder / "wide.JPG", quality=95)
    clear = draw_row(1, 64, 0).image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.resize((72, 48)).save(folder / "more" / "turned.jpeg", exif=exif)
    deep = np.asarray(draw_row(3, 64, 0).image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "more" / "deep.png")
    for name in ("wide", "clear", "more/turned", "more/deep"):
        (folder / f"{name}.txt").write_text(f"a picture, {name}\n", encoding="utf-8")
    return folder


NAMES = ["clear.png", "more/deep.png", "more/turned.jpeg", "wide.JPG"]


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run(photos: Path, shown: io.StringIO) -> Make:
    def run(**changed: Any) -> ConditionResult:
        settings: dict[str, Any] = {"images": str(photos), "condition": "canny", "resolution": RESOLUTION}
        return condition(ConditionConfig(**settings | changed), stream=shown)

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the images in this process, where Ray's part is not tested."""

    def make_here(items: Sequence[ToMake], recipe: Recipe, folder: str, _: object) -> Iterator[list[Outcome]]:
        yield [make(item, recipe, folder) for item in items]

    monkeypatch.setattr(condition_images, "make_on_ray", make_here)
    monkeypatch.setattr(condition_images, "ray_session", lambda address: nullcontext())


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def fail(*_: object) -> None:
        raise AssertionError("nothing should be made, and Ray not be asked")

    def forbid() -> None:
        monkeypatch.setattr(condition_images, "make_on_ray", fail)
        monkeypatch.setattr(condition_images, "ray_session", fail)

    return forbid


def source_of(folder: Path) -> FolderSource:
    source = open_source(TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(folder)))
    assert isinstance(source, FolderSource)
    return source


def but_the_log(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {name: state for name, state in states(folder).items() if not name.endswith(".log")}


@pytest.mark.usefixtures("_local_ray")
def test_the_command_makes_a_data_set_that_trains(
    photos: Path, tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = but_the_log(photos)
    assert main(["condition", *flags(images=photos, condition="grey", resolution=RESOLUTION)]) == 0
    out = photos.with_name("photos-grey")
    said = capsys.readouterr().err
    assert f"grey of 4 pictures in {photos}, short side 32 px; 0 exist already" in said
    assert "grey: 4/4 images | " in said
    assert f"4 rows in {out / 'metadata.jsonl'}, 4 conditioning images made now" in said
    assert f"raycontrolnet train --train_data_dir {out} --resolution 32 ..." in said
    assert but_the_log(photos) == before
    assert metadata(out) == [
        {
            "image": f"../photos/{name}",
            "conditioning_image": f"conditioning/{name}.png",
            "text": f"a picture, {name.rpartition('.')[0]}",
        }
        for name in NAMES
    ]
    source = source_of(out)
    for index, name in enumerate(NAMES):
        row = source.read(index)
        assert isinstance(row.image, str)
        assert Path(row.image).samefile(photos / name)
        images = prepare_images(row, RESOLUTION)
        assert np.array_equal(images.conditioning_image, conditions.grey(images.image)), name  # the same pixels of both
        assert np.ptp(images.image) > 30
    settings = tiny_settings | {"train_data_dir": str(out), "resolution": RESOLUTION, "max_train_steps": 1}
    assert fit(TrainConfig(**settings), stream=io.StringIO()).step == 1


@pytest.mark.usefixtures("_local_ray")
def test_a_second_time_does_nothing_and_changes_are_made_again(
    run: Make, photos: Path, nothing_made: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run()
    assert (result.num_rows, result.num_made, result.bad_pictures) == (4, 4, ())
    assert result.folder == photos.with_name("photos-canny")
    before = but_the_log(result.folder)
    assert len(before) == 6  # with metadata.jsonl and the journal
    nothing_made()
    assert run().num_made == 0
    assert but_the_log(result.folder) == before
    assert run(blur_radius=3).num_made == 0  # canny does not ask for it
    monkeypatch.undo()

    Image.new("RGB", (64, 64), "red").save(photos / "clear.png")
    assert run().num_made == 1
    after = but_the_log(result.folder)
    changed = {name for name in before if before[name] != after[name]} - {CONDITION_JOURNAL}
    assert changed == {"conditioning/clear.png.png", "metadata.jsonl"}  # which was away meanwhile
    assert after["metadata.jsonl"][0] == before["metadata.jsonl"][0]
    Path(result.folder, "conditioning", "wide.JPG.png").unlink()
    assert run().num_made == 1
    assert run(canny_low_threshold=10, canny_high_threshold=20).num_made == 4
    assert run(canny_low_threshold=10, canny_high_threshold=20).num_made == 0
    assert run().num_made == 4  # back again: what is there is of the other thresholds
    for name, content in contents(result.folder / "conditioning").items():
        assert after[f"conditioning/{name}"][0] == content
    assert run(resolution=64).num_made == 4


@pytest.mark.usefixtures("_local_ray")
def test_pictures_that_cannot_be_used_fail_at_the_end_or_are_left_out(
    run: Make, photos: Path, shown: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "wide.JPG").write_bytes(b"no picture")
    (photos / "more" / "deep.png").write_bytes(b"")
    out = photos.with_name("photos-canny")
    assert main(["condition", *flags(images=photos, condition="canny", resolution=RESOLUTION)]) == 2
    message = capsys.readouterr().err
    assert f"error: {photos / 'more' / 'deep.png'} is empty\n" in message
    assert f"{photos / 'wide.JPG'} is not an image in a format that is read (PNG, " in message
    assert message.endswith(
        "2 of 4 pictures cannot be used: repair or remove them, or leave them out with --on_bad_sample skip. "
        "The conditioning images of the others are made\n"
    )
    assert "Traceback" not in message
    bad_pictures = out / "condition.bad_pictures.txt"
    assert len(bad_pictures.read_text().splitlines()) == 2
    assert not (out / "metadata.jsonl").exists()
    assert set(contents(out / "conditioning")) == {"clear.png.png", "more/turned.jpeg.png"}
    with pytest.raises(DataError, match=r"2 of 4 pictures cannot be used: more than --max_bad_fraction=0\.01 allows"):
        run(on_bad_sample="skip")
    result = run(on_bad_sample="skip", max_bad_fraction=0.5)
    assert result.num_made == 0
    assert [picture.path for picture in result.bad_pictures] == [
        str(photos / "more" / "deep.png"), str(photos / "wide.JPG")
    ]  # fmt: skip
    assert "2 rows in " in shown.getvalue()
    assert ", 2 bad ones skipped (condition.bad_pictures.txt)\n" in shown.getvalue()
    assert [row["image"] for row in metadata(out)] == ["../photos/clear.png", "../photos/more/turned.jpeg"]
    Image.new("RGB", (64, 64), "red").save(photos / "wide.JPG", "JPEG")
    assert run(on_bad_sample="skip", max_bad_fraction=0.25).num_rows == 3
    assert "deep.png" in bad_pictures.read_text()
    Image.new("RGB", (64, 64), "red").save(photos / "more" / "deep.png")
    assert run().num_rows == 4
    assert not bad_pictures.exists()


@pytest.mark.usefixtures("here")
def test_none_that_can_be_used_is_no_data_set(run: Make, photos: Path) -> None:
    for name in NAMES:
        (photos / name).write_bytes(b"x")
    with pytest.raises(DataError, match="4 of 4 pictures cannot be used"):
        run(on_bad_sample="skip", max_bad_fraction=1)


@pytest.mark.usefixtures("_local_ray")
def test_a_folder_that_cannot_be_written_is_the_failure(run: Make, photos: Path) -> None:
    out = photos.with_name("photos-canny")
    out.mkdir()
    (out / "conditioning").write_text("a file in the way")
    with pytest.raises(RunError) as caught:
        run()
    assert str(caught.value).startswith(f"{out / 'conditioning'} cannot be written to: ")
    assert "\n0 of 4 conditioning images are made and stand in " in str(caught.value)
    assert f"Details: {out / 'condition.log'}" in str(caught.value)


# --- captions ---


@pytest.mark.usefixtures("here")
def test_captions_of_a_metadata_file_of_text_files_and_of_the_flag(run: Make, photos: Path) -> None:
    (photos / "more" / "deep.txt").write_text("first\n\n  second \n")
    (photos / "clear.txt").unlink()
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "wide.JPG", "text": ["one", "two"]}\n'
        '{"file_name": "more/turned.jpeg", "text": "  "}\n'
        '{"file_name": "./wide.JPG", "text": "Größe"}\n'
    )
    rows = metadata(run(caption="any").folder)
    assert [(row["image"].removeprefix("../photos/"), row["text"]) for row in rows] == [
        ("wide.JPG", ["one", "two"]),
        ("more/turned.jpeg", "a picture, more/turned"),
        ("wide.JPG", "Größe"),
        ("clear.png", "any"),
        ("more/deep.png", ["first", "second"]),
    ]


OTHER_COLUMNS = {"image_column": "photo", "caption_column": "words"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("metadata.csv", "image,caption\nclear.png,from the file\n", {}),
        ("metadata.jsonl", '{"photo": "clear.png", "words": "from the file"}', OTHER_COLUMNS),
        ("prompt.json", '{"target": "clear.png", "source": "more/deep.png", "prompt": "from the file"}', {}),
    ],
)  # fmt: skip
def test_forms_of_metadata(run: Make, photos: Path, name: str, content: str, settings: dict[str, Any]) -> None:
    (photos / name).write_text(content)
    rows = metadata(run(**settings).folder)
    assert rows[0]["image"] == "../photos/clear.png"
    assert rows[0]["text"] == "from the file"
    assert len(rows) == (3 if name == "prompt.json" else 4)  # a conditioning image is no picture


def test_missing_captions_are_listed_with_the_ways_out(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "clear.txt").unlink()
    (photos / "more" / "deep.txt").write_text(" \n")
    (photos / "metadata.csv").write_text("file_name,label\nwide.JPG,3\n")
    assert main(["condition", *flags(images=photos, condition="canny")]) == 2
    assert capsys.readouterr().err == (
        f"error: {photos / 'clear.png'}: has no caption\n"
        f"{photos / 'more' / 'deep.png'}: has no caption\n"
        f"--caption_column=text: no such column in {photos / 'metadata.csv'}, which has: file_name, label; name one of "
        "them with --caption_column\n"
        f"write a text file for each (clear.txt for clear.png) or a row in {photos / 'metadata.csv'}, or give one "
        'caption for all that have none: --caption "a photo"\n'
    )
    assert not photos.with_name("photos-canny").exists()


def test_lines_that_cannot_be_used_are_listed(run: Make, photos: Path) -> None:
    file = photos / "metadata.jsonl"
    file.write_text('nothing\n{"file_name": "wide.JPG", "text": 3}\n{"text": "a"}\n')
    with pytest.raises(DataError) as caught:
        run()
    assert str(caught.value).splitlines() == [
        f"{file}:1: is not valid JSON (Expecting value, column 1)",
        f"{file}:2: must be a text or a list of texts, is a number",
        f"{file}:3: has no file_name, only: text",
    ]
    file.write_text('{"photo": "wide.JPG", "text": "a"}\n')
    with pytest.raises(
        DataError, match=r"--image_column=image: no such column in .* name one of them with --image_col"
    ):
        run()
    file.unlink()
    (photos / "clear.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=rf"{photos / 'clear.txt'}: is not UTF-8 text"):
        run()


@pytest.mark.usefixtures("here")
def test_rows_of_pictures_that_are_not_there_and_elsewhere(run: Make, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "outside.png")
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "gone.png", "text": "gone"}\n{"file_name": "../outside.png", "text": "outside"}\n'
    )
    with pytest.raises(DataError, match=rf"{photos / 'gone.png'}: no such file\n1 of 6 pictures cannot be used"):
        run()
    result = run(on_bad_sample="skip", max_bad_fraction=0.2)
    row = metadata(result.folder)[0]
    assert row["image"] == "../outside.png"
    assert row["conditioning_image"].startswith("conditioning/elsewhere/")
    assert len(source_of(result.folder)) == 5


# --- which pictures, and whose files ---


@pytest.mark.usefixtures("here")
def test_names_that_differ_in_the_suffix_do_not_meet(run: Make, photos: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(photos / "clear.jpg")
    folder = run(condition="grey").folder
    assert len(contents(folder / "conditioning")) == 5
    rows = {row["image"]: folder / row["conditioning_image"] for row in metadata(folder)}
    red, clear = (np.asarray(Image.open(rows[f"../photos/clear.{kind}"])) for kind in ("jpg", "png"))
    assert np.ptp(red) <= 1
    assert np.ptp(clear) > 50
    assert png_name("/a/b/c.jpg", Path("/a")) == "b/c.jpg.png"


@pytest.mark.usefixtures("here")
def test_hidden_files_and_what_is_no_picture_are_passed_by(run: Make, photos: Path) -> None:
    (photos / ".thumbnails").mkdir()
    for name in (".hidden.png", ".thumbnails/a.png", "notes.md", "film.mp4"):
        (photos / name).write_bytes(b"x")
    (photos / "circle").symlink_to(photos, target_is_directory=True)
    assert [row["image"].removeprefix("../photos/") for row in metadata(run().folder)] == NAMES


def test_a_folder_without_pictures(run: Make, photos: Path) -> None:
    empty = photos / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=rf"--images={empty}: holds no pictures \(files that end in avif, bmp, "):
        run(images=str(empty))


@pytest.mark.usefixtures("here")
def test_beside_the_pictures_and_below_them(run: Make, photos: Path, nothing_made: Callable[[], None]) -> None:
    """Conditioning images are no pictures, whichever run made them."""
    assert run(out=str(photos)).num_rows == 4
    assert [row["image"] for row in metadata(photos)] == NAMES
    assert len(source_of(photos)) == 4
    below = photos / "blurred"
    assert run(out=str(below), condition="blur").num_rows == 4
    assert {row["image"] for row in metadata(below)} == {f"../{name}" for name in NAMES}
    assert run(condition="grey").num_rows == 4
    nothing_made()
    for settings in ({"out": str(photos)}, {"out": str(below), "condition": "blur"}, {"condition": "grey"}):
        assert run(**settings).num_made == 0
    with pytest.raises(ConfigError, match="its folder conditioning holds the pictures; name another folder"):
        run(images=str(photos / "conditioning"), out=str(photos), caption="x")


@pytest.mark.usefixtures("here")
def test_files_of_others_are_not_overwritten(run: Make, photos: Path) -> None:
    file = photos / "metadata.jsonl"
    file.write_text("".join(f'{{"file_name": "{name}", "text": "own"}}\n' for name in NAMES))
    before = but_the_log(photos)
    with pytest.raises(ConfigError) as caught:
        run(out=str(photos))
    assert str(caught.value) == (
        f"{file} exists\n--out={photos}: these files were not written by `raycontrolnet condition`, or were "
        "changed since, and would be overwritten; name another folder"
    )
    assert but_the_log(photos) == before
    out = run().folder  # but beside it there is no harm
    assert [row["text"] for row in metadata(out)] == ["own"] * 4
    file.write_text(file.read_text().replace("own", "new"))
    assert [row["text"] for row in metadata(run().folder)] == ["new"] * 4

    (out / "metadata.jsonl").write_text((out / "metadata.jsonl").read_text().replace("new", "edited"))
    with pytest.raises(ConfigError, match=rf"{out / 'metadata.jsonl'} exists\n.*were changed since"):
        run()
    own = photos.with_name("photos-grey") / "conditioning" / "wide.JPG.png"
    own.parent.mkdir(parents=True)
    own.write_text("drawn by hand")
    with pytest.raises(ConfigError, match=f"{own} exists"):
        run(condition="grey")
    assert own.read_text() == "drawn by hand"


@pytest.mark.usefixtures("here")
def test_an_edited_conditioning_image_stays(run: Make, photos: Path, nothing_made: Callable[[], None]) -> None:
    edited = run().folder / "conditioning" / "wide.JPG.png"
    edited.write_bytes(b"retouched")
    with pytest.raises(ConfigError, match=rf"{edited} exists\n.* or were changed since, and would be overwritten"):
        run(canny_low_threshold=50)
    nothing_made()
    assert run().num_made == 0
    assert edited.read_bytes() == b"retouched"


@pytest.mark.usefixtures("here")
def test_an_edited_metadata_file_gives_its_captions_to_another_folder(run: Make, photos: Path) -> None:
    run(out=str(photos))
    text = (photos / "metadata.jsonl").read_text()
    (photos / "metadata.jsonl").write_text(text.replace("a picture, wide", "a wide picture"))
    rows = {row["image"]: row["text"] for row in metadata(run().folder)}
    assert len(rows) == 4
    assert rows["../photos/wide.JPG"] == "a wide picture"


# --- an early end ---


@pytest.mark.usefixtures("here")
def test_pictures_outside_of_the_data_set_are_no_news(
    run: Make, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The command names them where they are; paths that a user has put there are said still."""
    out = tmp_path / "edges"
    run(out=str(out))
    assert len(source_of(out).paths_outside()) == len(NAMES)
    assert "lie outside" not in caplog.text
    more = json.dumps({"image": "../photos/wide.JPG", "conditioning_image": "conditioning/clear.png.png", "text": "x"})
    file = out / "metadata.jsonl"
    whole = file.read_text()
    file.write_text(f"{whole}{more}\n")
    source_of(out)
    assert f"{len(NAMES) + 1} of its images lie outside of its folder, as ../photos/" in caplog.text
    caplog.clear()
    (out / CONDITION_JOURNAL).unlink()
    file.write_text(whole)
    source_of(out)
    assert f"{len(NAMES)} of its images lie outside" in caplog.text
    caplog.clear()
    run(out=str(photos))
    assert not source_of(photos).paths_outside()
    assert not caplog.text


@pytest.mark.usefixtures("here")
def test_half_a_line_of_the_journal_does_no_harm(run: Make) -> None:
    folder = run().folder
    journal = folder / CONDITION_JOURNAL
    *whole, last = journal.read_text().strip().splitlines()
    assert "metadata" in last
    journal.write_text("\n".join([*whole, last[:10]]))
    (folder / "metadata.jsonl").unlink()
    assert run().num_made == 0
    assert ConditionFolder(folder).wrote(folder / "metadata.jsonl")
    assert run().num_made == 0


@contextmanager
def ends_after_one_image(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def make_one(items: Sequence[ToMake], recipe: Recipe, folder: str, _: object) -> Iterator[list[Outcome]]:
        yield [make(items[0], recipe, folder)]
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(condition_images, "make_on_ray", make_one)
        yield


@pytest.mark.usefixtures("_local_ray")
def test_an_interruption_says_what_stands(
    run: Make, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ends_after_one_image(KeyboardInterrupt(), monkeypatch):
        command = ["condition", *flags(images=photos, condition="canny", resolution=RESOLUTION)]
        assert main(command) == 130
    out = photos.with_name("photos-canny")
    assert capsys.readouterr().err.endswith(
        f"Interrupted. 1 of 4 conditioning images are made and stand in {out / 'conditioning'}; the same command goes "
        "on from there.\n"
    )
    assert not (out / "metadata.jsonl").exists()
    assert run().num_made == 3


@pytest.mark.usefixtures("here")
def test_no_data_set_is_half_of_one_kind_and_half_of_another(
    run: Make, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings, ended half way: the folder is no data set until the command is run again."""
    out = run().folder
    before = metadata(out)
    fire = RuntimeError("the machine is on fire")
    with ends_after_one_image(fire, monkeypatch), pytest.raises(RunError, match="the machine is on fire"):
        run(canny_low_threshold=10, canny_high_threshold=20)
    assert not (out / "metadata.jsonl").exists()
    assert run(canny_low_threshold=10, canny_high_threshold=20).num_made == 3
    assert metadata(out) == before


def num_recorded(out: Path) -> int:
    """Count the images that the journal knows to be complete."""
    return sum(made.key != "" for made in ConditionFolder(out).made.values())


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_killed_in_the_middle_it_goes_on(tmp_path: Path) -> None:
    """Kill -9 the driver and its Ray, and run it again: the result is that of a run that was not killed."""
    photos, num_photos = tmp_path / "many", 640
    photos.mkdir()
    for index in range(num_photos):
        draw_row(index, 16, 0)[0].save(photos / f"{index:03}.png")
    settings: dict[str, Any] = {"images": str(photos), "condition": "canny", "caption": "a circle", "resolution": 64}
    out = tmp_path / "many-canny"
    command = [sys.executable, "-m", "raycontrolnet", "condition", *flags(settings)]
    kill_9(command, lambda: num_recorded(out) >= num_photos // 10)
    before = num_recorded(out)
    assert 0 < before < num_photos
    assert not (out / "metadata.jsonl").exists()
    for path in out.glob("conditioning/*.png"):  # what is there is whole
        with Image.open(path) as image:
            image.load()
    result, fresh = (
        condition(ConditionConfig(**settings, out=str(folder)), stream=io.StringIO())
        for folder in (out, tmp_path / "fresh")
    )
    assert (result.num_rows, result.num_made) == (num_photos, num_photos - before)
    visible = {
        name: content for name, content in contents(out / "conditioning").items() if not Path(name).name.startswith(".")
    }
    assert visible == contents(fresh.folder / "conditioning")
    assert metadata(out) == metadata(fresh.folder)


# --- settings ---


def test_problems_of_the_settings_come_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert main(["condition"]) == 2
    assert capsys.readouterr().err == (
        "error: --images: required; the folder with the pictures\n--condition: required; one of canny, blur, grey\n"
    )
    settings = {
        "images": gone, "condition": "cany", "resolution": 500, "canny_low_threshold": 300, "blur_radius": 0,
        "on_bad_sample": "leave", "max_bad_fraction": 2,
    }  # fmt: skip
    assert main(["condition", *flags(**settings)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: --images={gone}: no such folder",
        "--on_bad_sample=leave: must be one of fail, skip",
        "--max_bad_fraction=2.0: must be in [0, 1]",
        "--condition=cany: must be one of canny, blur, grey; perhaps you meant canny",
        "--resolution=500: must be divisible by 8; use 496 or 504",
        "--canny_high_threshold=200: must be at least --canny_low_threshold, which is 300",
        "--blur_radius=0.0: must be above 0, and at most --resolution, 500",
    ]
    gone.write_text("")
    with pytest.raises(UserError, match="is a file; name the folder that it is in"):
        ConditionConfig(images=str(gone), condition="canny")
    with pytest.raises(UserError, match=rf"--out={gone}: is a file; name a folder"):
        ConditionConfig(images=str(tmp_path), condition="canny", out=str(gone))


def test_the_flags_are_the_settings_of_python(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"images": str(tmp_path), "condition": "blur", "blur_radius": 2.0, "caption": ""}
    assert parse("condition", flags(settings)) == ConditionConfig(**settings)


def test_a_conditioning_image_of_another_shape_than_square_fits_its_picture(tmp_path: Path) -> None:
    """Training at the resolution of the command crops both alike, to the pixel, whatever the proportions."""
    rng = np.random.default_rng(0)
    for width, height in ((75, 50), (50, 75), (33, 97), (64, 64), (20, 31)):
        path = tmp_path / f"{width}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        made = conditions.Recipe("grey", RESOLUTION, ()).make(str(path))
        assert min(made.shape[:2]) == RESOLUTION
        Image.fromarray(made).save(tmp_path / "made.png")
        row = ImageRow(str(path), str(tmp_path / "made.png"), ("",), "here")
        images = prepare_images(row, RESOLUTION)
        assert np.array_equal(images.conditioning_image, conditions.grey(images.image))


def test_a_node_that_does_not_see_the_pictures(run: Make, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not bad pictures, which would be left out."""
    monkeypatch.setattr(condition_images, "ray_session", lambda address: nullcontext())
    monkeypatch.setattr(versions, "on_each_node", lambda *_, **__: [])
    monkeypatch.setattr(
        shared_files, "on_each_node", lambda *_, **__: [("one", None), ("two", str(photos / "clear.png"))]
    )
    with pytest.raises(ConfigError) as error:
        run(on_bad_sample="skip", caption="a photo")
    assert str(error.value) == (
        f"--images={photos}: the node two does not see {photos / 'clear.png'}; name a folder on storage that all nodes "
        "share"
    )


def test_a_node_that_joins_late_and_does_not_see_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_files, "APPEARS_WITHIN_S", 0.0)
    pictures = SharedFiles("--images=/photos", ("/photos/1.png",))
    items = to_block([ToMake("/photos/1.png", "1.png")])
    found = from_block(_make(items, Recipe("canny", RESOLUTION, ()), "/out", pictures))
    assert isinstance(found, UserError)
    assert "does not see /photos/1.png; name a folder" in str(found)

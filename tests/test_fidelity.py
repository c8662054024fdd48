"""Control fidelity: the measures against known answers, and the scores of a run's validation images."""

from __future__ import annotations

import io
import json
import math
import re
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFilter
from runs import Run, metadata, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import raycontrolnet
from raycontrolnet import control_fidelity
from raycontrolnet.conditions import recipes as conditions
from raycontrolnet.config.output_settings import FIDELITY_MEASURES
from raycontrolnet.data.records import UInt8Image
from raycontrolnet.demo.shapes import COLOURS, draw_row
from raycontrolnet.report.page import REPORT_FILE
from raycontrolnet.report.progress import Progress, progress
from raycontrolnet.sampling import fidelity, scores
from raycontrolnet.sampling.fidelity import Measure, asked_shape, edge_f_measure, found_shape, iou
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.training import metrics, validation

Settings = dict[str, Any]
SIZE = 128
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def disc(x: float, y: float, radius: float, size: int = SIZE) -> npt.NDArray[np.bool_]:
    rows, columns = np.mgrid[:size, :size]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def painted(mask: npt.NDArray[np.bool_], colour: Any, background: Any) -> UInt8Image:
    return np.where(mask[..., None], colour, background).astype(np.uint8)


def outline(mask: npt.NDArray[np.bool_]) -> UInt8Image:
    """Draw the pixels of a region beside one outside it; the picture's border is not outside."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return painted(mask & ~inside, WHITE, BLACK)


def noise(std: float, size: int = SIZE) -> UInt8Image:
    values = np.random.default_rng(0).normal(128, std, (size, size, 3))
    return np.clip(values, 0, 255).astype(np.uint8)


# --- shapes ---


@pytest.mark.parametrize("radius", [20, 33])
def test_a_shifted_circle_has_the_overlap_of_the_formula(radius: int) -> None:
    control_image = outline(disc(43, 60, radius))
    for shift in (0, 1, 5, 20, 40, 70):
        d, r = min(shift, 2 * radius), radius
        image = painted(disc(43 + shift, 60, radius), COLOURS["red"], COLOURS["teal"])
        lens = 2 * r**2 * math.acos(d / (2 * r)) - d / 2 * math.sqrt(4 * r**2 - d**2)
        measured = control_fidelity(control_image, image, "shape")
        assert measured == pytest.approx(lens / (2 * math.pi * r**2 - lens), abs=0.015)
        assert shift or measured > 0.99
        assert shift <= 2 * radius or measured == 0


@pytest.mark.parametrize("place", [(20, 64), (5, 64), (64, 20), (127, 127), (20, 20)])
def test_a_shape_may_touch_the_border_or_be_cut_off_by_it(place: tuple[int, int]) -> None:
    mask = disc(*place, 20)
    np.testing.assert_array_equal(asked_shape(outline(mask)), mask)
    found = found_shape(painted(mask, COLOURS["red"], COLOURS["white"]))
    assert iou(mask, found) > 0.99


def test_every_pair_of_colours_is_told_apart() -> None:
    mask, told = disc(60, 60, 30), 0
    for colour, background in permutations(COLOURS.values(), 2):
        smooth = Image.fromarray(painted(mask, colour, background)).filter(ImageFilter.GaussianBlur(1))
        assert iou(mask, found_shape(np.asarray(smooth))) > 0.95, (colour, background)
        told += 1
    assert told == 16 * 15


@pytest.mark.parametrize("resolution", [32, 64, 256])
def test_the_demos_own_pictures_have_nearly_all(resolution: int) -> None:
    found = []
    for index in range(40):
        image, control_image, _ = draw_row(index, resolution, 0)
        found.append(control_fidelity(np.asarray(control_image), np.asarray(image), "shape"))
    assert min(found) > (0.93 if resolution == 32 else 0.97)
    assert np.mean(found) > 0.98


def test_blur_and_noise_cost_little() -> None:
    mask = disc(50, 70, 30)
    image = Image.fromarray(painted(mask, COLOURS["black"], COLOURS["navy"]))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(3)))
    assert control_fidelity(outline(mask), blurred, "shape") > 0.93
    noisy = np.asarray(image).astype(float) + np.random.default_rng(0).normal(0, 8, (SIZE, SIZE, 3))
    assert control_fidelity(outline(mask), np.clip(noisy, 0, 255).astype(np.uint8), "shape") > 0.93


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_noise_is_no_shape(size: int) -> None:
    control_image = outline(disc(size / 2, size / 2, size / 4, size))
    for std in (0, 3, 8, 16, 32, 64):
        assert control_fidelity(control_image, noise(std, size), "shape") < 0.05
        uniform = np.random.default_rng(std).integers(0, 256, (size, size, 3), np.uint8)
        assert control_fidelity(control_image, uniform, "shape") < 0.05


def test_a_plain_picture_or_control_image() -> None:
    plain, circle = np.full((SIZE, SIZE, 3), 90, np.uint8), disc(64, 64, 30)
    black, picture = np.zeros_like(plain), painted(circle, COLOURS["red"], COLOURS["teal"])
    assert not found_shape(plain).any()
    assert not asked_shape(black).any()
    assert control_fidelity(outline(circle), plain, "shape") == 0
    assert control_fidelity(black, picture, "shape") == 0
    assert control_fidelity(black, plain, "shape") == 1


def test_a_ring_is_no_disc() -> None:
    """It is found as it is: an outline that was copied is not the shape that was asked for."""
    ring = disc(64, 64, 40) & ~disc(64, 64, 36)
    found = found_shape(painted(ring, COLOURS["red"], COLOURS["white"]))
    assert iou(ring, found) > 0.95
    assert control_fidelity(outline(disc(64, 64, 40)), painted(ring, WHITE, BLACK), "shape") < 0.25


def test_the_largest_of_several_counts() -> None:
    picture = painted(disc(40, 40, 25) | disc(100, 100, 12), COLOURS["red"], COLOURS["white"])
    assert iou(disc(40, 40, 25), found_shape(picture)) > 0.99


def test_a_white_region_is_its_own_outline() -> None:
    mask = disc(64, 64, 30)
    np.testing.assert_array_equal(asked_shape(painted(mask, WHITE, BLACK)), mask)


def test_thin_smooth_lines_have_no_gaps() -> None:
    """A line between two pixels leaves each half white, or less."""
    big = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(big).ellipse((98, 98, 402, 402), outline=255, width=4)
    grey = np.asarray(big.reduce(4))
    assert grey[grey > 0].min() < 64
    mask = disc(62, 62, 38)
    assert iou(mask, asked_shape(np.repeat(grey[..., None], 3, axis=2))) > 0.96


# --- edges ---


def edges_of(image: UInt8Image) -> UInt8Image:
    """Make edges as `raycontrolnet condition` does by default."""
    return conditions.canny(image, low_threshold=100, high_threshold=200)


@pytest.fixture
def scene() -> UInt8Image:
    """Draw a few shapes, some way apart."""
    image = Image.new("RGB", (SIZE, SIZE), COLOURS["white"])
    pen = ImageDraw.Draw(image)
    pen.rectangle((10, 10, 50, 45), fill=COLOURS["navy"])
    pen.ellipse((70, 20, 110, 60), fill=COLOURS["red"])
    pen.polygon(((30, 110), (60, 70), (95, 115)), fill=COLOURS["black"])
    return np.asarray(image)


def test_a_picture_has_its_own_edges(scene: UInt8Image) -> None:
    for image in (scene, *(np.asarray(draw_row(index, 64, 0).image) for index in range(40))):
        assert control_fidelity(edges_of(image), image, "canny") == 1


def test_edges_within_the_tolerance_are_the_same(scene: UInt8Image) -> None:
    """0.0075 of the diagonal: 1.36 pixels here, 5.4 at 512."""
    edges = edges_of(scene)
    assert control_fidelity(np.roll(edges, 1, axis=1), scene, "canny") == 1
    assert control_fidelity(np.roll(edges, 5, axis=(0, 1)), scene, "canny") < 0.35
    large = np.asarray(Image.fromarray(scene).resize((512, 512)))
    assert control_fidelity(np.roll(edges_of(large), 5, axis=1), large, "canny") > 0.99
    assert control_fidelity(np.roll(edges_of(large), 12, axis=(0, 1)), large, "canny") < 0.5


def test_edges_of_something_else(scene: UInt8Image) -> None:
    assert control_fidelity(edges_of(scene), noise(60), "canny") < 0.35
    plain = np.full_like(scene, 200)
    assert control_fidelity(edges_of(scene), plain, "canny") == 0
    assert control_fidelity(np.zeros_like(scene), scene, "canny") == 0
    assert control_fidelity(np.zeros_like(scene), plain, "canny") == 1


def test_the_f_measure_by_hand() -> None:
    """Ten asked, nine of them found, and four of twelve found that nobody asked for: precision 2/3, recall 0.9."""
    asked, found = np.zeros((64, 64), np.bool_), np.zeros((64, 64), np.bool_)
    asked[10, 10:20] = True
    found[10, 11:18] = True  # 10 and 18 are within a pixel
    found[10, 10] = found[40, 40] = found[50, 50] = found[60, 60] = found[30, 5] = True
    asked[10, 19], asked[20, 60] = False, True
    precision, recall = 8 / 12, 9 / 10
    assert edge_f_measure(asked, found) == pytest.approx(2 * precision * recall / (precision + recall))
    elsewhere = np.zeros_like(asked)
    elsewhere[50, 30:40] = True
    assert edge_f_measure(asked, elsewhere) == 0


# --- what is refused ---


def test_bad_arguments() -> None:
    image = np.zeros((32, 48, 3), np.uint8)
    for arguments, message in (
        ((image, image / 2, "shape"), r"image: must be uint8 \[H, W, 3\], not float64 \[32, 48, 3\]"),
        ((image[..., 0], image, "shape"), r"control_image: must be uint8 \[H, W, 3\], not uint8 \[32, 48\]"),
        ((image, image[:16], "shape"), "control_image and image must be of one size, not 48 x 32 and 48 x 16"),
        ((image, image, "depth"), "measure='depth': must be shape or canny"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            control_fidelity(*arguments)
    assert get_args(Measure) == FIDELITY_MEASURES
    assert raycontrolnet.control_fidelity is fidelity.control_fidelity


# --- averages and words ---


def test_averages_and_words() -> None:
    assert scores.average([]) is None
    one = scores.average([0.5])
    assert one is not None
    assert (one.mean, math.isnan(one.error)) == (0.5, True)
    values = [0.1, 0.4, 0.7, 0.9]
    found = scores.average(iter(values))
    assert found == pytest.approx((np.mean(values), np.std(values, ddof=1) / 2))
    assert scores.in_words(Fidelity(0.81234, 0.0234)) == "control fidelity 0.812 ± 0.05 (2 standard errors)"
    assert scores.in_words(Fidelity(1.0, math.nan)) == "control fidelity 1.000"


# --- in a run ---


@pytest.fixture
def settings(validated_settings: Settings, tmp_path: Path) -> Settings:
    return validated_settings | {"output_dir": str(tmp_path / "run")}


def measured_again(folder: Path, measure: Measure) -> list[float]:
    """Measure the images in `folder` from their files alone."""

    def pixels(name: str) -> UInt8Image:
        with Image.open(folder / name) as image:
            return np.asarray(image)

    return [
        control_fidelity(pixels(line["conditioning_image_file_name"]), pixels(line["file_name"]), measure)
        for line in metadata(folder)
    ]


def test_what_a_run_leaves(validated_run: Run) -> None:
    out, result, shown = validated_run
    means = {}
    for step in (2, 4):
        folder = validation.step_folder(out, step)
        found = [line["control_fidelity"] for line in metadata(folder)]
        assert found == measured_again(folder, "shape")
        assert len(found) == 4
        means[step] = float(np.mean(found))
    assert any(means.values()), "or anything would be equal"
    assert {step: found.mean for step, found in validation.fidelity_by_step(out).items()} == pytest.approx(means)
    assert list(validation.fidelity_by_step(out, last_step=3)) == [2]
    status = json.loads((out / "run.json").read_text())
    assert status["control_fidelity"] == result.control_fidelity == pytest.approx(means[4])
    for step, mean in means.items():
        assert (
            len(
                re.findall(
                    rf"^step {step}: control fidelity {mean:.3f}( ± \S+ \(2 standard errors\))?$", shown, re.MULTILINE
                )
            )
            == 1
        )
    events = EventAccumulator(str(out / "logs" / "train_controlnet")).Reload()
    tracked = {event.step: event.value for event in events.Scalars("control_fidelity")}
    assert tracked == pytest.approx(means, rel=1e-6)
    card = (out / "README.md").read_text()
    assert re.search(rf"^- control fidelity of the images drawn last \(.*\): `{means[4]:.4g}`$", card, re.MULTILINE)
    assert '- `control_fidelity`: `"shape"`' in card


def test_the_report_has_the_curve_and_the_last_value(validated_run: Run) -> None:
    out, result, _ = validated_run
    page = (out / REPORT_FILE).read_text()
    assert "<h3>Control fidelity</h3>" in page
    assert 'aria-label="control fidelity over the steps"' in page
    assert f"<dt>control fidelity</dt><dd><b>{result.control_fidelity:.3g}</b>" in page
    assert re.search(r"<small>± \S+ \(2 standard errors\), at step 4</small>", page)


def test_scores_change_nothing_else(validated_run: Run, settings: Settings) -> None:
    with_scores = validated_run.folder
    without, result, shown = train(settings | {"control_fidelity": None})
    losses = [[line["loss"] for line in metrics.read(out / metrics.METRICS_FILE)] for out in (with_scores, without)]
    assert losses[0] == losses[1]
    pictures = [
        {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("validation/*/*.png")}
        for out in (with_scores, without)
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 2 * 2 * (2 + 2)
    plain = [{k: v for k, v in line.items() if k != "control_fidelity"} for line in metadata_of(with_scores)]
    assert plain == metadata_of(without)
    assert result.control_fidelity is None
    assert "control_fidelity" not in json.loads((without / "run.json").read_text())
    for text in (shown, (without / "README.md").read_text(), (without / REPORT_FILE).read_text()):
        assert "ontrol fidelity" not in text


def metadata_of(out: Path) -> list[dict[str, Any]]:
    return [line for step in (2, 4) for line in metadata(validation.step_folder(out, step))]


def out_of_order(*_: Any) -> float:
    raise RuntimeError("OpenCV is out of order")


def test_no_score_costs_a_run_or_a_picture(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "control_fidelity", out_of_order)
    out, result, shown = train(settings | {"max_train_steps": 1, "report_to": "none"})
    assert result.control_fidelity is None
    assert len(metadata(validation.step_folder(out, 1))) == 4
    assert "control fidelity" not in shown
    assert "no control fidelity (RuntimeError: OpenCV is out of order)" in (out / "run.log").read_text()


def test_one_image_has_no_error(settings: Settings, tmp_path: Path) -> None:
    control = tmp_path / "control.png"
    Image.fromarray(outline(disc(16, 16, 9, size=32))).save(control)
    one = {"validation_prompt": "red circle", "validation_image": str(control), "num_validation_images": 1}
    out, _, shown = train(settings | one | {"control_fidelity": "canny", "report_to": "none"})
    (score,) = measured_again(validation.step_folder(out, 4), "canny")
    assert f"step 4: control fidelity {score:.3f}\n" in shown
    page = (out / REPORT_FILE).read_text()
    assert "<h3>Control fidelity</h3>" in page
    assert f"<dt>control fidelity</dt><dd><b>{score:.3g}</b><br><small>at step 4</small>" in page


def test_earlier_scores_are_not_shown_as_new(validated_run: Run) -> None:
    stream = io.StringIO()
    with progress(Progress(validated_run.folder, 8, 2, stream, scored=True)):
        pass
    assert "control fidelity" not in stream.getvalue()

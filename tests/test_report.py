"""The report of a run: its words in every state of the run, its size, and its look in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from html import escape, unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from raycontrolnet.config.train_config import TrainConfig, public_settings
from raycontrolnet.demo.shapes import draw_row
from raycontrolnet.report import live_report, run_report
from raycontrolnet.report.page import OVERDUE_MINUTES
from raycontrolnet.report.progress import Progress
from raycontrolnet.report.run_report import write_report
from raycontrolnet.sampling.images import ImageItem, finish
from raycontrolnet.sampling.pipeline import DrawOptions
from raycontrolnet.training import validation

CHROMIUM = shutil.which("chromium")
EVIL = 'a <script>alert("1")</script> & \'b\' <img src="http://example.com/x.png">'
STARTED = 1_795_357_408.0
TIMINGS = {
    "start_s": 7.6,
    "model_s": 9.4,
    "first_batch_s": 6.4,
    "data_wait_s": 20.5,
    "step_s": 3310.0,
    "validation_s": 95.25,
    "validation_images_s": 160.0,
    "checkpoint_s": 12.1,
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_updates(folder: Path, count: int) -> None:
    """Write a noisy loss that falls from 1.2 to 0.4, at 6 images per second."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, count + 1)
    losses = (0.4 + 0.8 * np.exp(-6 * steps / count)) * rng.lognormal(0, 0.25, count)
    rates = 6 * rng.lognormal(0, 0.05, count)
    columns = zip(steps.tolist(), losses.tolist(), rates.tolist(), strict=True)
    write_lines(
        folder / "metrics.jsonl",
        [
            {
                "step": step,
                "loss": loss,
                "lr": 1e-5 * min(1.0, step / 100),
                "grad_norm": 0.3,
                "samples": 4 * step,
                "images_per_second": rate,
                "time": STARTED + 30 + step * 4 / 6,
            }
            for step, loss, rate in columns
        ],
    )


def write_held_out(folder: Path, steps: range) -> None:
    """Write measurements in which control appears half way."""
    records = []
    for step in steps:
        gap = 0.05 if 2 * step > steps[-1] else 0.0004
        loss = 0.4 + 0.6 * 0.99**step
        measured = {"val_loss": loss, "val_loss_shuffled": loss + gap, "control_gap": gap, "control_gap_error": 0.002}
        records.append({"step": step, **measured, "seconds": 4.2, "time": STARTED + step})
    write_lines(folder / "validation.jsonl", records)


def write_images(folder: Path, steps: range, prompts: list[str], *, images: int = 2, resolution: int = 64) -> None:
    """Write images that come closer to the control image's circle with the steps."""
    for step in steps:
        place = validation.step_folder(folder, step)
        place.mkdir(parents=True)
        items = []
        for pair, prompt in enumerate(prompts):
            picture, control, _ = draw_row(pair, resolution, 0)
            control.save(folder / "control.png")
            content = (folder / "control.png").read_bytes()
            for image in range(images):
                items.append(ImageItem(pair, image, prompt, f"control-{pair}.png", image, content))
                noise = Image.effect_noise(picture.size, 90).convert("RGB")
                Image.blend(noise, picture, step / steps[-1]).save(place / items[-1].file_name)
        (folder / "control.png").unlink()
        assert len(finish(place, items, DrawOptions(resolution), step=step)) == len(prompts)


def write_status(folder: Path, status: str, **more: Any) -> None:
    facts = {"status": status, "started": STARTED, "versions": {"ray": "2.60.0", "torch": "2.13.0"}, "seconds": 3700.0}
    (folder / "run.json").write_text(json.dumps(facts | more))


def write_config(folder: Path, **settings: Any) -> None:
    config = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data", output_dir="out", **settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(public_settings(config), sort_keys=False))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Write a finished run of 200 updates."""
    folder = tmp_path / "circles-run"
    folder.mkdir()
    write_updates(folder, 200)
    write_held_out(folder, range(20, 201, 20))
    write_images(folder, range(20, 201, 20), ["red circle", EVIL])
    write_config(folder, max_train_steps=200, seed=3)
    write_status(folder, "finished", step=200, samples=800, loss=0.41, timings=TIMINGS, checkpoint="checkpoint-200")
    return folder


class Page(HTMLParser):
    """A report as a reader sees it."""

    def __init__(self, path: Path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._in_style = False
        self.feed(self.html.replace("<wbr>", ""))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.words.append(data)
        self._in_style = False

    def all(self, tag: str) -> list[dict[str, str]]:
        """Return the attributes of all elements of a kind."""
        return [attributes for found, attributes in self.elements if found == tag]


def check_it_is_closed(page: Page, links_at_least: int) -> None:
    """Check that nothing in the page is code or leads outside."""
    assert not page.all("script")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    places = ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "style")
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in places]
    assert len(links) > links_at_least
    assert [link for link in links if not link.startswith(("data:", "#")) and "//" in link] == []
    assert [link for link in re.findall(r"url\(([^)]*)", page.html) if not link.startswith("#")] == []


def check_rewriting(module: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the same folder gives the same report, and that a failure leaves the former one."""
    monkeypatch.setattr(time, "time", lambda: STARTED)
    once = module.write_report(folder).read_bytes()
    assert module.write_report(folder).read_bytes() == once
    monkeypatch.setattr(module, "_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.write_report(folder)
    assert (folder / "report.html").read_bytes() == once


def test_finished(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: STARTED + 3760)
    assert write_report(finished) == finished / "report.html"
    page = Page(finished / "report.html")
    for words in (
        "circles-run finished",
        "200 of 200 updates (100%) in 1:01:40. Written 2026-11-22 15:26 UTC .",
        "Control has appeared at step 120.",
        "loss 0.4065 at first 1.169",
        "held-out loss 0.4804 at first 0.8907",
        "control gap 0.05 ± 0.004 (2 standard errors), at step 200",
        "images/s 5.99 in the last 30 s, without validations",
        "training (smoothed; pale: single updates) held-out rows",
        "how much worse the held-out loss is with wrong control images; band: ± 2 standard errors; dashed:",
        "dashed: control appears at step 120",
        "red circle control image step 200 step 180",
        "data wait 20.5 s · 1% step 55:10 · 89% validation: held-out loss 1:35 · 3%",
        "validation: images 2:40 · 4% checkpoint 12.1 s · 0%",
        "everything else 1:19 · 2%",
        "ray 2.60.0, torch 2.13.0",
    ):
        assert words in page.text
    assert len(page.all("svg")) == 4
    pictures = page.all("img")
    assert len(pictures) == 2 * (1 + 8)
    assert [picture["alt"] for picture in pictures[:3]] == [
        "control image of: red circle",
        "step 200: red circle",
        "step 180: red circle",
    ]
    assert pictures[8]["alt"] == "step 20: red circle"
    assert [path.name for path in finished.iterdir() if "report" in path.name] == ["report.html"]
    assert len(page.html) < 500_000


def test_settings(finished: Path) -> None:
    append(finished / "config.yaml", "of_a_later_version: <b>\nhub_token: hf_secret\n")
    page = Page(write_report(finished))
    changed, every = page.text.split("Those that differ from their defaults: ")[1].split(" All ")
    assert "train_data_dir data" in changed
    assert "max_train_steps 200" in changed
    assert "of_a_later_version <b>" in changed
    assert "learning_rate" not in changed
    assert "learning_rate 5e-6" in every
    known = len((finished / "config.yaml").read_text().splitlines()) - 1  # less the token
    assert every.startswith(f"{known} settings ")
    assert "hf_secret" not in page.html


def test_running(finished: Path) -> None:
    write_config(finished, max_train_steps=5000)
    write_status(finished, "running", seconds=0.1)
    timings = {"step_s": 30.0, "validation_beside_s": 70.0, "data_wait_s": 10.0, "some_new_phase_s": 60.0}
    timings["checkpoint_beside_s"] = 5.0
    (finished / ".timings.json").write_text(json.dumps({"num_workers": 1, "timings": timings}))
    page = Page(write_report(finished))
    assert "circles-run running" in page.text
    assert "200 of 5,000 updates (4%) in 2:43, about 53:20 left. Written" in page.text
    phases = "data wait 10 s · 10% step 30 s · 30% some new phase 1:00 · 60% beside the training: images 1:10"
    assert f"{phases} beside the training: checkpoints 5 s" in page.text
    assert page.all("progress") == [{"class": "running", "value": "200", "max": "5000"}]


def test_failed(finished: Path) -> None:
    (finished / "validation.jsonl").unlink()
    shutil.rmtree(finished / "validation")
    write_status(finished, "failed", cause=f"The loss is nan at update 201.\n{EVIL}", timings={})
    page = Page(write_report(finished))
    assert "circles-run failed" in page.text
    assert f"The loss is nan at update 201. {EVIL}" in page.text
    assert "Control gap: not measured." in page.text
    assert "No validation images: --validation_prompt and --validation_image were not given." in page.text
    assert "Time by phase" not in page.text
    assert len(page.all("svg")) == 3


@pytest.mark.parametrize(
    ("status", "more", "words"),
    [
        ("running", {}, "No validation images yet: they are drawn every 100 steps. Speed"),
        ("interrupted", {}, "No validation images: the run ended before any were drawn. Speed"),
        ("running", {"held_out": 0}, "Control gap: not measured, as no rows are held out (--validation_split). loss"),
        ("running", {"held_out": 16}, "Control gap: not measured yet. loss"),
    ],
)
def test_what_is_missing_says_why(status: str, more: dict[str, Any], words: str, finished: Path) -> None:
    shutil.rmtree(finished / "validation")
    (finished / "validation.jsonl").unlink()
    (finished / "a.png").touch()
    pairs = {"validation_prompt": ["red"], "validation_image": [str(finished / "a.png")]}
    write_config(finished, **pairs)
    write_status(finished, status, **more)
    assert words in Page(write_report(finished)).text


@pytest.mark.parametrize(
    ("gap", "shown"), [(0.0, "0"), (1e-8, "<5e-7"), (-3e-9, "<5e-7"), (4e-7, "<5e-7"), (4e-5, "4e-5")]
)
def test_a_gap_that_may_be_rounding(gap: float, shown: str, finished: Path) -> None:
    measured = {"val_loss": 0.5, "val_loss_shuffled": 0.5 + gap, "control_gap": gap, "control_gap_error": 1e-8}
    write_lines(finished / "validation.jsonl", [{"step": step, **measured} for step in (100, 200)])
    page = Page(write_report(finished))
    assert f"control gap {shown} ± <1e-6 (2 standard errors), at step 200" in page.text
    chart = page.html.split('aria-label="control gap over the steps"')[1].split("</svg>")[0]
    assert re.findall(r">([^<>]*e-[^<>]*)</text>", chart) == []
    assert ">0.003</text>" in chart


def test_the_rate_is_that_of_the_terminal(finished: Path) -> None:
    """Slow updates take most of the time: the median would be 8 images/s, and validations count nowhere."""
    updates, now = [], STARTED
    for step in range(1, 201):
        rate = 0.5 if step % 4 == 0 else 8.0
        now += 4 / rate + 1000 * (step % 20 == 1)
        figures = {"loss": 0.5, "lr": 1e-5, "samples": 4 * step, "images_per_second": rate, "time": now}
        updates.append({"step": step, **figures})
    progress = Progress(finished, 200, 0, StringIO())
    write_lines(finished / "metrics.jsonl", updates)
    progress.update()
    page = Page(write_report(finished))
    found = re.search(r"images/s (\S+) in the last 30 s", page.text)
    assert found is not None
    assert f"{found[1]} images/s" in progress.line()
    assert 1 < float(found[1]) < 2


def test_interrupted_before_control(finished: Path) -> None:
    write_held_out(finished, range(20, 61, 20))
    lines = (finished / "validation.jsonl").read_text().splitlines(keepends=True)
    (finished / "validation.jsonl").write_text(lines[0])
    write_status(finished, "interrupted", cause="Interrupted. There was no checkpoint yet.")
    page = Page(write_report(finished))
    assert "circles-run interrupted" in page.text
    assert "No control yet: " in page.text
    assert len(page.all("svg")) == 4


@pytest.mark.parametrize(
    "status", [None, "", "{", "[]", '{"status": "running", "started": 1795357408.0, "seconds": 0.1}']
)
def test_hardly_begun(status: str | None, tmp_path: Path) -> None:
    if status is not None:
        for name in ("metrics.jsonl", "validation.jsonl", "config.yaml"):
            (tmp_path / name).touch()
        (tmp_path / "run.json").write_text(status)
    page = Page(write_report(tmp_path))
    assert "0 updates" in page.text
    assert "No update is done yet." in page.text
    assert ("running" if status and "running" in status else "unknown") in page.text
    assert page.all("svg") == []


def test_first_update(finished: Path) -> None:
    write_updates(finished, 1)
    page = Page(write_report(finished))
    assert len(page.all("svg")) == 4


def test_half_written(finished: Path) -> None:
    """A killed machine leaves lines cut short, zeros, and images without an end."""
    for name in ("metrics.jsonl", "validation.jsonl"):
        with (finished / name).open("ab") as file:
            file.write(b'\x00\x00\n[1]\n{"step": "x"}\n{"step": 300, "loss": null, "lr": NaN}\n{"step": 301, "lo')
    (finished / "config.yaml").write_bytes(b"seed: [1\n\xff")
    (finished / "run.json").write_bytes(b'{"status": "fin')
    last, before, earlier = (validation.step_folder(finished, step) for step in (200, 180, 160))
    (last / "metadata.jsonl").write_text('{"pair": 0}\n')
    (before / "pair-00-image-00.png").write_bytes((before / "pair-00-image-00.png").read_bytes()[:300])
    (before / "pair-00-image-01.png").unlink()
    (before / "pair-00-control.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (earlier / "pair-01-image-01.png").unlink()
    page = Page(write_report(finished))
    assert "unknown" in page.text
    assert "300 updates" in page.text
    assert "Control has appeared at step 120." in page.text
    captions = re.findall(r"<small>([^<]*)</small></figcaption>", page.html)
    assert captions[:2] == ["step 160", "step 140"]  # of the first pair, whose control image is broken
    assert captions.count("control image") == 1
    assert captions.count("step 180") == 1


def test_of_a_restarted_run_what_counts_is_shown(finished: Path) -> None:
    write_updates(finished, 100)
    append(finished / "metrics.jsonl", '{"step": 100, "loss": 77.0}\n')
    write_status(finished, "running")
    page = Page(write_report(finished))
    assert "100 of 200 updates" in page.text
    assert "step 100:" in page.html
    assert "step 120:" not in page.html


def test_no_outside_links_and_no_markup_from_files(finished: Path) -> None:
    write_status(finished, EVIL, cause=EVIL, versions={EVIL: EVIL}, timings={EVIL: 3.0})
    (finished / "config.yaml").write_text(yaml.safe_dump({EVIL: EVIL, "max_train_steps": EVIL}))
    folder = finished.rename(finished.with_name("a <b>&'run'"))
    page = Page(write_report(folder))
    assert page.text.count(EVIL) >= 5
    assert f"step 200: {EVIL}" in [picture["alt"] for picture in page.all("img")]
    check_it_is_closed(page, 20)
    assert "<title>a &lt;b&gt;&amp;&#39;run&#39;: a &lt;script" in page.html


def test_texts_that_are_no_unicode(finished: Path) -> None:
    write_status(finished, "failed", cause="\udcff in a file's name")
    assert "? in a file's name" in Page(write_report(finished)).text


def test_ids_are_unique_and_there(finished: Path) -> None:
    html = write_report(finished).read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    used = re.findall(r"url\(#([^)]+)\)", html) + re.findall(r'href="#([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 20
    assert len(used) > 4
    assert set(used) <= set(ids)


def test_written_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rewriting(run_report, finished, monkeypatch)


def test_written_now_and_then(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without news too, also when a report is dear, and however the run ends."""
    monkeypatch.setattr(live_report, "INTERVAL_S", 0.01)
    monkeypatch.setattr(live_report, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    written: list[float] = []

    def write(_: Path) -> None:
        end = time.thread_time() + 0.02  # times COST_FACTOR: 1 s
        while time.thread_time() < end:
            pass
        written.append(time.monotonic())

    with live_report.live_report(finished, write):
        deadline = time.monotonic() + 20
        while len(written) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(written) >= 5


def test_a_running_page_is_overdue_only_if_it_should_have_been_written() -> None:
    longest_s = live_report.LONGEST_PAUSE_S + live_report.INTERVAL_S
    assert longest_s <= 180
    assert longest_s * 3 < 60 * OVERDUE_MINUTES


def test_many_updates(finished: Path) -> None:
    write_updates(finished, 200_000)
    write_held_out(finished, range(100, 200_001, 100))
    write_status(finished, "running")
    write_report(finished)  # matplotlib is loaded
    start = time.process_time()  # of the CPU: machines are shared
    html = write_report(finished).read_text()
    assert time.process_time() - start < 10, "it takes 2 s by itself"
    assert len(html) < 1_000_000
    assert "200,000 of 200 updates" in Page(finished / "report.html").text


def test_many_and_large_images(finished: Path) -> None:
    shutil.rmtree(finished / "validation")
    write_images(finished, range(20, 201, 20), ["a photograph"], images=4, resolution=512)
    assert sum(path.stat().st_size for path in finished.rglob("*image-*.png")) > 10_000_000
    page = Page(write_report(finished))
    assert len(page.all("img")) == 9
    assert len(page.html) < 700_000


# In a real browser ---------------------------------------------------------------------------------------------------

LOOK = """
<script>
addEventListener("load", () => {
  const size = element => { const box = element.getBoundingClientRect(); return [box.width, box.height]; };
  const all = selector => [...document.querySelectorAll(selector)];
  const found = {
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth,
    images: all("img").map(image => [image.naturalWidth, ...size(image)]),
    svgs: all("svg").map(size),
    curves: all("svg [clip-path]").map(size),
    texts: all("svg text").map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a),
    colours: all("svg path").map(path => getComputedStyle(path).stroke),
  };
  const pre = parent.document.createElement("pre");
  pre.id = "found";
  pre.textContent = JSON.stringify(found);
  parent.document.body.append(pre);
  console.log("looked at it");
});
</script>
"""


def look(page: Path, width: int, profile: Path) -> tuple[dict[str, Any], list[str]]:
    """Return what the page measures in Chromium at `width` CSS pixels, and the lines of the console.

    The page is in a frame, because Chromium's own windows are not as narrow as a phone.
    """
    assert CHROMIUM is not None
    html = page.read_text(encoding="utf-8")
    policy = "style-src 'unsafe-inline'"
    assert html.count(policy) == 1
    content = html.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</body>", LOOK + "</body>")
    frame = page.with_name("frame.html")
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">'
        f'<iframe width="{width}" height="844" style="border: 0" srcdoc="{escape(content)}"></iframe>',
        encoding="utf-8",
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    logging = ["--enable-logging=stderr", "--v=0"]
    done = subprocess.run(
        [CHROMIUM, *options, *logging, f"--user-data-dir={profile}", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def check_in_browser(page: Path, width: int, profile: Path, *, charts: int, texts: int, colours: int) -> dict[str, Any]:
    """Check that the page fits `width`, is readable and coloured, and loads nothing; return what it measures."""
    found, console = look(page, width, profile)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert len(found["svgs"]) == charts
    for shown_width, shown_height in found["svgs"]:
        assert 250 <= shown_width <= width
        assert shown_height >= 150
    assert len(found["texts"]) > texts
    assert min(found["texts"]) >= 10  # CSS pixels
    assert max(found["texts"]) - min(found["texts"]) < 0.5, "one size in all charts"
    assert len(set(found["colours"])) >= colours  # the style sheet's variables reach the curves
    assert len(console) == 1, console
    assert "looked at it" in console[0]
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width: int, finished: Path, tmp_path: Path) -> None:
    append(finished / "config.yaml", f"a_long_path: /{'a' * 200}/{'b-' * 100}\n")
    page = write_report(finished)
    found = check_in_browser(page, width, tmp_path / "profile", charts=4, texts=20, colours=5)
    assert len(found["images"]) == 18
    assert min(min(image) for image in found["images"]) >= 64
    assert min(min(shown) for _, *shown in found["images"]) >= 100
    assert len([size for size in found["curves"] if min(size) > 50]) >= 4


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize(
    ("state", "minutes", "words"),
    [("running", 3, "3 minutes ago"), ("running", 200, "3 hours ago"), ("finished", 200, "")],
)
def test_the_age_of_the_page(
    state: str, minutes: float, words: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's own policy allows its script; without scripts the time of writing is there, and no more."""
    write_status(finished, state)
    written = time.time() - 60 * minutes - 1
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: written)
        path = write_report(finished)
    assert " ago" not in Page(path).text.split("Control")[0]
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'p'}"]
    command = [CHROMIUM, *options, "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.findall(r"</time><span>, ([^<]*)</span>", shown) == ([words] if words else [])
    overdue = re.findall(r'<p class="warning overdue"([^>]*)>', shown)
    assert ["hidden" in found for found in overdue] == ([minutes < 10] if words else [])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
def test_the_console_would_tell(tmp_path: Path) -> None:
    """The page's policy refuses outside images, and the console says so: the test above relies on it."""
    page = write_report(tmp_path)
    page.write_text(page.read_text().replace("<body>", '<body><img src="http://127.0.0.1:9/x.png">'))
    found, console = look(page, 390, tmp_path / "profile")
    assert found["images"][0][0] == 0
    assert len(console) > 1

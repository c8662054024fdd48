"""The report of a sweep: its words in every state of the sweep and of its trials, and its look in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import CHROMIUM, EVIL, Page, check_in_browser, check_it_is_closed, check_rewriting, write_lines

from raycontrolnet.tune.records import read_trials
from raycontrolnet.tune.report import history, sweep_report
from raycontrolnet.tune.report.sweep_report import write_report

STARTED = 1_795_357_408.0
SPACE = {
    "learning_rate": {"loguniform": [2e-6, 1e-4]},
    "lr_scheduler": {"choice": ["constant", "cosine", "linear"]},
    "proportion_empty_prompts": {"uniform": [0.0, 0.5]},
}
SWEEP: dict[str, Any] = {
    "status": "finished",
    "name": "circles-sweep",
    "objective": "val_loss",
    "mode": "min",
    "space": SPACE,
    "searcher": "random",
    "scheduler": "asha",
    "grace_period": 250,
    "reduction_factor": 4,
    "num_trials": 16,
    "total_updates": 2000,
    "validation_steps": 125,
    "concurrency": 4,
    "reason": "4 GPUs, one for each trial",
    "seed": 0,
    "started": STARTED,
    "seconds": 4980.0,
    "settings": {"train_batch_size": 8, "seed": 0, "max_train_steps": 2000},
    "versions": {"ray": "2.60.0", "torch": "2.13.0"},
}


def write_trial(sweep_dir: Path, index: int, *, steps: int = 2000, appears: int = 700, **record: Any) -> Path:
    """Write a trial of `steps` updates; its loss depends on its learning rate, and its control appears at a step."""
    folder = sweep_dir / "trials" / f"{index:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(index)
    settings = record.get("settings", {})
    rate = settings.get("learning_rate", 1e-5)
    floor = 0.2 + 0.04 * math.log(rate / 2e-5) ** 2
    updates, measured = [], []
    for step in range(5, steps + 1, 5):
        loss = floor + 0.4 * math.exp(-step / 400)
        updates.append({"step": step, "loss": loss * rng.lognormal(0, 0.1), "images_per_second": 30.0, "lr": rate})
        if step % 125 == 0:
            gap = 0.03 + step / 60000 if step >= appears else 0.0003
            val_loss = loss - gap / 3 + rng.normal(0, 0.004)
            measured.append(
                {"step": step, "val_loss": val_loss, "val_loss_shuffled": val_loss + gap, "control_gap": gap,
                 "control_gap_error": 0.002}
            )  # fmt: skip
    write_lines(folder / "metrics.jsonl", updates)
    write_lines(folder / "validation.jsonl", measured)
    facts = {"index": index, "settings": {}, "state": "finished", "seconds": 0.6 * steps, "started": STARTED}
    (folder / "trial.json").write_text(json.dumps(facts | record))
    (folder / "report.html").write_text("a run's")
    return folder


def write_sweep(sweep_dir: Path, trials: int, **more: Any) -> Path:
    """Write a sweep of four trials at a time; most were stopped at the rungs, one failed."""
    sweep_dir.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    free = [0.0] * 4
    for index in range(trials):
        rate = float(2e-6 * 50 ** rng.random())
        settings = {
            "learning_rate": rate,
            "lr_scheduler": ["constant", "cosine", "linear"][index % 3],
            "proportion_empty_prompts": float(rng.random() / 2),
        }
        behind = abs(math.log(rate / 2e-5))
        steps = 2000 if behind < 0.45 else 1000 if behind < 0.8 else 250
        record: dict[str, Any] = {"state": "finished"} if steps == 2000 else {"state": "stopped", "stopped_at": steps}
        if index == 5:
            record = {"state": "failed", "cause": "The loss is nan at update 613.", "attempts": 1}
            steps = 612
        place = free.index(min(free))
        started, seconds = STARTED + free[place] + 20, 0.6 * steps
        free[place] += seconds + 40
        write_trial(sweep_dir, index, steps=steps, settings=settings, started=started, seconds=seconds, **record)
    facts = SWEEP | {"num_trials": trials, "seconds": max(free), "machine_seconds": sum(free)} | more
    (sweep_dir / "sweep.json").write_text(json.dumps(facts))
    return sweep_dir


def alter(sweep_dir: Path, index: int, **changes: Any) -> None:
    """Change entries of a trial's trial.json."""
    file = sweep_dir / "trials" / f"{index:04d}" / "trial.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def alter_sweep(sweep_dir: Path, **changes: Any) -> None:
    """Change entries of sweep.json; None removes one."""
    facts = json.loads((sweep_dir / "sweep.json").read_text()) | changes
    (sweep_dir / "sweep.json").write_text(json.dumps({name: fact for name, fact in facts.items() if fact is not None}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_five(tmp_path / "sweep")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Return the page of five trials with best/; one has no report."""
    folder = write_five(tmp_path_factory.mktemp("finished") / "sweep")
    (folder / "best").mkdir()
    (folder / "trials" / "0003" / "report.html").unlink()
    assert write_report(folder) == folder / "report.html"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "report.html", "sweep.json", "trials"]
    return Page(folder / "report.html")


def write_five(folder: Path) -> Path:
    """Write five trials: two finished, two stopped, one failed."""
    write_sweep(folder, 0, num_trials=5, machine_seconds=None, seconds=3000.0)

    def settings(rate: float, scheduler: str, share: float) -> dict[str, Any]:
        return {"learning_rate": rate, "lr_scheduler": scheduler, "proportion_empty_prompts": share}

    write_trial(folder, 0, settings=settings(2e-6, "cosine", 0.1), state="stopped", stopped_at=250, steps=250)
    write_trial(folder, 1, settings=settings(2e-5, "linear", 0.2))
    write_trial(folder, 2, settings=settings(5e-5, "cosine", 0.3), started=STARTED + 150)
    write_trial(folder, 3, settings=settings(9e-5, "constant", 0.4), state="stopped", stopped_at=1000, steps=1000)
    failed: dict[str, Any] = {"state": "failed", "cause": "The loss is nan at update 613.", "steps": 610}
    write_trial(folder, 4, settings=settings(1e-4, "constant", 0.5), **failed)
    return folder


def rows(page: Page) -> list[list[str]]:
    """Return the table of trials, cell by cell."""
    table = page.html[page.html.index('<table class="trials">') :].split("</table>")[0].replace("<wbr>", "")
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    return [[" ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in row] for row in found]


def test_finished(finished: Page) -> None:
    for words in (
        "circles-sweep finished",
        "5 trials: 2 finished, 2 stopped early, 1 failed; in 50:00. Ranked by their last val_loss , the smallest",
        "No trial had shown control by step 250, where the first were stopped: their order then says little about",
        "where control appears (it comes suddenly, arXiv:2302.05543 section 4). A longer --grace_period is safer.",
        "with control 3 of 5 trials, at their last measurement",
        "time of all trials 58:36 one after another",
        "spared by stopping 28% 2,750 updates",
        "★ Best trial: 0001 Held-out loss 0.1858 at step 2,000. learning_rate 2e-5 lr_scheduler linear",
        "Control has appeared at step 750. Its weights: best/",
        "Dashed: where trials that are behind are stopped (steps 250, 1,000).",
        "0 5:00 10:00 15:00 20:00 0000 stopped at 250 0001 finished 0003 stopped at 1,000",
        "0004 failed after 500 0002 finished Trials",
        "reason 4 GPUs, one for each trial",
        "learning_rate loguniform: 2e-6, 0.0001",
        "Settings that the trials share Those that differ from their defaults: train_batch_size 8",
        "ray 2.60.0, torch 2.13.0",
    ):
        assert words in finished.text
    assert finished.all("progress") == [{"class": "finished", "value": "5", "max": "5"}]
    assert [found["aria-label"] for found in finished.all("svg")] == [
        "val_loss of all trials over the steps",
        "control_gap of all trials over the steps",
        "val_loss against learning_rate",
        "val_loss against lr_scheduler",
        "val_loss against proportion_empty_prompts",
        "settings and val_loss of all trials",
    ]


def test_table(finished: Page) -> None:
    heading, *found = rows(finished)
    assert heading == [
        "#", "trial", "held-out loss", "control gap", "learning_rate", "lr_scheduler", "proportion_empty_prompts",
        "state", "loss", "images/s", "steps", "time",
    ]  # fmt: skip
    assert [[*row[:2], row[7]] for row in found] == [
        ["1", "0001 ★", "finished"],
        ["2", "0002", "finished"],
        ["3", "0003", "stopped at 1,000"],
        ["4", "0000", "stopped at 250"],
        ["5", "0004", "failed The loss is nan at update 613."],
    ]
    assert found[0][2:7] == ["0.1858", "0.063 ± 0.004", "2e-5", "linear", "0.2"]
    assert found[0][9:] == ["30", "2,000", "20:00"]
    assert found[4][10:] == ["500", "6:06"]


def test_what_links_lead_to_is_there(finished: Page) -> None:
    links = {found["href"] for found in finished.all("a")}
    rows = {f"#trial-{index:04d}" for index in range(5)}
    assert links == {*rows, *(f"trials/{index:04d}/report.html" for index in (0, 1, 2, 4)), "best/"}
    every = re.findall(r'\bid="([^"]+)"', finished.html)
    assert len(every) == len(set(every)) > 50
    assert {f"#{name}" for name in every} >= rows


def test_marks_of_the_trials(finished: Page) -> None:
    """Each chart links all trials and draws the best last."""
    charts = [chart.split("</svg>")[0] for chart in finished.html.split("<svg ")[1:]]
    assert len(charts) == 6
    for chart in charts:
        named = re.findall(r'<a href="#trial-(\d+)"><title>', chart)
        assert set(named) == {"0000", "0001", "0002", "0003", "0004"}
        assert named[-1] == "0001"
        assert chart.count("var(--best)") >= 1
    tip = "0003 stopped; val_loss 0.3"
    assert tip in charts[0]
    assert "learning_rate 9e-5; lr_scheduler constant" in charts[0]
    for chart in charts[:5]:  # in the last, trials are lines without marks
        marks = re.findall(r'<use [^>]*style="fill: var\(--([\w-]+)\); stroke: var\(--([\w-]+)\)', chart)
        assert sorted(marks) == [
            ("best", "card"),
            ("card", "rank-2"),  # stopped: hollow
            ("card", "rank-3"),
            ("ink", "card"),  # failed
            ("rank-1", "card"),  # finished: filled
        ]
    assert [chart.count("stroke-dasharray") for chart in charts] == [2, 2, 0, 0, 0, 0]
    assert "2e-6" in charts[2]
    for category in ("constant", "cosine", "linear"):
        assert f">{category}</text>" in charts[3]
        assert f">{category}</text>" in charts[5]


def test_running(sweep: Path) -> None:
    alter_sweep(sweep, status="running", num_trials=9, best=None)
    alter(sweep, 2, state="running", seconds=0.0)
    write_trial(sweep, 5, settings={"learning_rate": 1e-5}, state="waiting", steps=0, started=None, seconds=0)
    page = Page(write_report(sweep))
    assert "9 trials: 1 finished, 2 stopped early, 1 failed, 1 running, 4 to come; 50:00 so far." in page.text
    assert "★ Best trial so far: 0001" in page.text
    assert 'href="best/"' not in page.html
    assert page.all("progress") == [{"class": "running", "value": "4", "max": "9"}]
    bars = re.findall(r'<i class="(\w+)" style="left: ([\d.]+)%; width: ([\d.]+)%"', page.html)
    assert [bar[0] for bar in bars] == ["stopped", "finished", "stopped", "failed", "running"]
    assert float(bars[4][1]) + float(bars[4][2]) == pytest.approx(100, abs=0.02)  # till now
    assert ["5", "0005", "–", "–", "1e-5", "–", "–", "waiting", "–", "–", "–", "–"] in rows(page)


def test_interrupted(sweep: Path) -> None:
    alter_sweep(sweep, status="interrupted", cause="Ctrl-C")
    alter(sweep, 2, state="interrupted")
    text = Page(write_report(sweep)).text
    for words in (
        "circles-sweep interrupted",
        "Ctrl-C",
        "1 finished, 2 stopped early, 1 failed, 1 interrupted; in 50:00.",
        "interrupted at 2,000",
    ):
        assert words in text


def test_pauses_are_cut_out(sweep: Path) -> None:
    alter(sweep, 2, started=STARTED + 500_000)
    page = Page(write_report(sweep))
    assert "Pauses of the sweep are cut out: 138:33:20 in which no trial ran." in page.text
    bars = re.findall(r'style="left: ([\d.]+)%; width: ([\d.]+)%"', page.html)
    assert bars[-1] == ("50.00", "50.00")


def test_all_failed(sweep: Path) -> None:
    for index in range(5):
        alter(sweep, index, state="failed", cause="CUDA out of memory", stopped_at=None)
        for name in ("metrics.jsonl", "validation.jsonl"):
            (sweep / "trials" / f"{index:04d}" / name).unlink()
    alter_sweep(sweep, status="failed", cause="No trial could be trained.")
    page = Page(write_report(sweep))
    assert "5 trials: 5 failed" in page.text
    assert "No trial could be trained." in page.text
    assert "No trial has been measured yet." in page.text
    assert "Best trial" not in page.text
    assert page.all("svg") == []
    assert rows(page)[1][:2] == ["1", "0000"]
    assert "failed CUDA out of memory" in rows(page)[1]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", '{"status": "running", "name": "young"}'])
def test_hardly_begun(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    page = Page(write_report(tmp_path))
    assert "No trial has begun yet" in page.text
    assert ("young running" if content and "running" in content else f"{tmp_path.name} unknown") in page.text
    assert page.all("svg") == []


def test_one_trial(tmp_path: Path) -> None:
    write_sweep(tmp_path, 0, num_trials=1, space={"learning_rate": {"grid": [1e-5]}})
    write_trial(tmp_path, 0, settings={"learning_rate": 1e-5}, steps=125)
    page = Page(write_report(tmp_path))
    assert "1 trial: 1 finished" in page.text
    assert "★ Best trial: 0000" in page.text
    assert "No control yet." in page.text
    assert "No trial had shown control" not in page.text  # none was stopped
    assert len(page.all("svg")) == 4


def test_half_written(sweep: Path) -> None:
    """A full disk leaves files that end anywhere."""
    trials = sweep / "trials"
    (trials / "0001" / "trial.json").write_text('{"index": 1, "sett')
    (trials / "0002" / "validation.jsonl").write_bytes(b'\x00\xff{"step": 125')
    (trials / "0003" / "metrics.jsonl").unlink()
    for index, wrong in enumerate(({"index": 77, "settings": {}}, {"index": True}, {"index": 7}, []), 5):
        (trials / f"{index:04d}").mkdir()
        (trials / f"{index:04d}" / "trial.json").write_text(json.dumps(wrong))
    damaged: dict[str, Any] = {"seconds": "x", "started": math.nan, "stopped_at": "y", "state": "?", "more": 1}
    write_trial(sweep, 9, settings={"seed": 1}, **damaged)
    page = Page(write_report(sweep))
    table = rows(page)
    assert [row[1].split()[0] for row in table[1:]] == ["0002", "0009", "0003", "0000", "0004"]
    names = table[0]
    assert table[1][2] == "–"  # val_loss of 0002
    assert table[2][names.index("state")] == "interrupted"
    assert table[3][names.index("loss")] == "–"  # of 0003
    assert "★ Best trial: 0009 , interrupted" in page.text


@pytest.mark.parametrize("missing", [*SWEEP, "all"])
def test_any_entry_may_be_missing(missing: str, sweep: Path) -> None:
    alter_sweep(sweep, **(dict.fromkeys(SWEEP) if missing == "all" else {missing: None}))
    page = Page(write_report(sweep))
    assert "★ Best trial: 0001" in page.text
    assert rows(page)[1][:8] == ["1", "0001 ★", "0.1858", "0.063 ± 0.004", "2e-5", "linear", "0.2", "finished"]
    assert len(page.all("svg")) == 6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, True, "x", [], {}, EVIL])
def test_any_entry_may_be_anything(value: Any, sweep: Path) -> None:
    alter_sweep(sweep, **dict.fromkeys(SWEEP, value), best=value, cause=value, machine_seconds=value)
    for name in ("state", "cause", "stopped_at", "seconds", "started", "attempts"):
        alter(sweep, 2, **{name: value})
    alter(sweep, 3, settings={"learning_rate": value, "lr_scheduler": value, "proportion_empty_prompts": value})
    page = Page(write_report(sweep))
    assert "★ Best trial: 0001" in page.text
    assert not page.all("script")


def test_what_differs_little_is_seen(sweep: Path) -> None:
    """Two nearly equal trials do not make a third, which is hardly worse, an outlier."""
    values = {0: 0.218674, 1: 0.218736, 2: 0.218676, 3: 0.222363, 4: 0.21868}
    for index, value in values.items():
        losses = {"val_loss": value, "val_loss_shuffled": value, "control_gap": 0.0, "control_gap_error": 1.0}
        write_lines(sweep / "trials" / f"{index:04d}" / "validation.jsonl", [{"step": 125, **losses}])
    page = Page(write_report(sweep))
    assert "drawn at the edge" not in page.text


@pytest.mark.parametrize("step", [0.004, 1e-7, 3e-7])
def test_close_values_are_told_apart(step: float, sweep: Path) -> None:
    """On the axes of all charts and in the table, with settings and with objectives."""
    for index in range(5):
        value = 0.228 + index * step
        losses = {"val_loss": value, "val_loss_shuffled": value, "control_gap": 1e-8, "control_gap_error": 1e-8}
        write_lines(sweep / "trials" / f"{index:04d}" / "validation.jsonl", [{"step": 125, **losses}])
        alter(sweep, index, settings={"learning_rate": 1e-5 * (1 + value), "guidance_scale": value})
    alter_sweep(sweep, space=None)
    page = Page(write_report(sweep))
    parallel = page.html.split("<svg ")[-1].split("</svg>")[0]
    texts = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", parallel) if text[0].isdigit()]
    assert len(texts) == 3 + 3 + 2
    for ends in (texts[:3], texts[3:6], texts[6:]):
        assert len(set(ends)) == len(ends), ends
    found = rows(page)[1:]
    assert len({row[2] for row in found}) == 5
    assert {row[3] for row in found} == {"<2e-7 ± <5e-7"}


def test_the_rate_is_the_images_over_their_time(sweep: Path) -> None:
    """The median would be 8; the first update waits for its data."""
    rates = [0.001, 8.0, 8.0, 8.0, 0.5]
    updates = [{"step": step, "loss": 0.1, "images_per_second": rate} for step, rate in enumerate(rates, 1)]
    write_lines(sweep / "trials" / "0001" / "metrics.jsonl", updates)
    (sweep / "trials" / "0001" / "validation.jsonl").unlink()
    trial = next(trial for trial in read_trials(sweep, 5) if trial.record.index == 1)
    assert trial.value("images_per_second") == pytest.approx(4 / (3 / 8 + 1 / 0.5))


def test_numbers_are_short_and_words_have_no_quotes(sweep: Path) -> None:
    long = 0.000653051167505463
    alter(sweep, 1, settings={"learning_rate": long, "lr_scheduler": "linear", "sizes": [long, 2, "a", None, True]})
    alter_sweep(sweep, settings={"learning_rate": long, "report_to": "none", "nested": [[1, 2]], "cut": ""})
    page = Page(write_report(sweep))
    for words in ("learning_rate 0.0006531 lr_scheduler linear sizes 0.0006531, 2, a, null, true", "report_to none",
                  "nested [[1, 2]]", "cut (empty)"):  # fmt: skip
        assert words in page.text
    assert str(long) not in page.text
    assert f'title="{long}"' in page.html


def test_the_legend_has_only_what_occurs(sweep: Path) -> None:
    legend = Page(write_report(sweep)).text.split("Learning ")[1]
    assert legend.startswith("★ best ● finished ○ stopped ✖ failed rank: first last")
    for index in (0, 3, 4):
        shutil.rmtree(sweep / "trials" / f"{index:04d}")
    alter(sweep, 2, state="running")
    assert "Learning ★ best ● finished ▷ running rank: first" in Page(write_report(sweep)).text


SEEN_BY = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}
"""Matrices on linear RGB (Machado et al. 2009, severity 1)."""


@pytest.mark.parametrize("eyes", SEEN_BY)
def test_best_and_failed_differ_for_all_eyes(eyes: str, finished: Page) -> None:
    def seen(colour: str) -> Any:
        colour = "".join(2 * letter for letter in colour) if len(colour) == 3 else colour
        return np.array(SEEN_BY[eyes]) @ (np.array([*bytes.fromhex(colour)]) / 255) ** 2.2

    inks, bests = (re.findall(rf"--{name}: #(\w+)", finished.html) for name in ("ink", "best"))
    assert len(inks) == len(bests) == 2  # light and dark
    for ink, best in zip(inks, bests, strict=True):
        assert np.linalg.norm(seen(ink) - seen(best)) > 0.3


def test_values_that_are_no_numbers(sweep: Path) -> None:
    """One trial diverged, and the objective of another was never measured."""
    (sweep / "trials" / "0002" / "validation.jsonl").unlink()
    broken = [{"step": 125, "val_loss": math.nan}, {"step": 250, "val_loss": math.inf, "loss": -math.inf}]
    write_lines(sweep / "trials" / "0003" / "validation.jsonl", broken)
    far = {"val_loss": 1e9, "val_loss_shuffled": 1e9, "control_gap": 0.0, "control_gap_error": 1.0}
    for index in (5, 6, 7, 8):
        write_trial(sweep, index, settings={"learning_rate": 1e-5, "lr_scheduler": "linear"})
    write_lines(sweep / "trials" / "0000" / "validation.jsonl", [{"step": 125, **far}])
    page = Page(write_report(sweep))
    assert "1 far from the others is drawn at the edge." in page.text
    by_trial = {row[1].split()[0]: row for row in rows(page)}
    assert by_trial["0002"][2:4] == ["–", "–"]
    assert by_trial["0003"][2] == "–"
    assert by_trial["0000"][2] == "1B"
    chart = page.html.split("<svg ")[3].split("</svg>")[0]
    assert set(re.findall("#trial-(....)", chart)) == {"0000", "0001", "0004", "0005", "0006", "0007", "0008"}
    assert "M</text>" not in chart


def test_the_largest_is_best(sweep: Path) -> None:
    alter_sweep(sweep, objective="control_gap", mode="max")
    page = Page(write_report(sweep))
    assert "Ranked by their last control_gap , the largest first; stopped" in page.text
    assert page.all("svg")[0]["aria-label"] == "control_gap of all trials over the steps"
    assert len([1 for chart in page.all("svg") if "over the steps" in chart["aria-label"]]) == 2


def test_the_named_best_counts(sweep: Path) -> None:
    alter_sweep(sweep, best="0002")
    page = Page(write_report(sweep))
    assert "★ Best trial: 0002" in page.text
    alter_sweep(sweep, best="0099")
    assert "★ Best trial: 0001" in Page(write_report(sweep)).text


def test_another_space_than_before(sweep: Path) -> None:
    """After a sweep was continued with a changed space, values that only trials have are shown too."""
    space = {"lr_scheduler": {"choice": ["polynomial"]}, "learning_rate": {"loguniform": [1e-5, 3e-5]}}
    alter_sweep(sweep, space=space)
    page = Page(write_report(sweep))
    assert rows(page)[0][4:6] == ["lr_scheduler", "learning_rate"]
    chart = page.html.split("<svg ")[3]
    for category in ("polynomial", "constant", "cosine", "linear"):
        assert f">{category}</text>" in chart
    alter_sweep(sweep, space=None)
    assert "2e-6" in page.html  # learning rates that differ by 50 do not tell of a logarithm, the space does


def test_no_outside_links_and_no_markup_from_files(sweep: Path) -> None:
    space = {EVIL: {"choice": [EVIL, "$x", "日本語"]}, "learning_rate": {EVIL: [EVIL]}}
    evil = dict.fromkeys(("status", "cause", "name", "reason", "searcher", "best", "scheduler"), EVIL)
    alter_sweep(sweep, **evil, space=space, versions={EVIL: EVIL}, settings={EVIL: EVIL, "hub_token": "hf_secret"})
    for index in range(5):
        settings = {EVIL: [EVIL, "$x", "日本語 $x^2$ \\frac", "\n", "$"][index], "learning_rate": 1e-5}
        alter(sweep, index, settings=settings, cause=EVIL)
    page = Page(write_report(sweep))
    assert page.text.count(EVIL) >= 9
    assert not page.all("img")
    assert "hf_secret" not in page.html
    check_it_is_closed(page, 50)


def test_many_trials(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "sweep", 64)
    for index in range(64):
        settings = {f"setting_{i}": index / 64 + i for i in range(5)}
        alter(folder, index, settings=settings, cause=EVIL * 50)
    alter_sweep(folder, space={f"setting_{i}": {"uniform": [i, i + 1]} for i in range(5)})
    page = Page(write_report(folder))
    assert len(rows(page)) == 65
    assert len(page.html) < 1_000_000
    assert len(set(re.findall(r"var\(--(rank-\d)\)", page.html))) == history.SHADES


def test_written_again(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_rewriting(sweep_report, sweep, monkeypatch)


# Worth of the order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "grace_period", "factor", "total_updates", "rungs"),
    [
        ("asha", 250, 4, 5000, [250, 1000, 4000]),
        ("asha", 250, 4, 4000, [250, 1000]),  # the last is the end
        ("asha", 250, 1, 4000, []),
        ("asha", 0, 4, 4000, []),
        ("median", 250, 4, 4000, []),
    ],
)
def test_rungs(scheduler: str, grace_period: int, factor: int, total_updates: int, rungs: list[int]) -> None:
    facts = {"grace_period": grace_period, "reduction_factor": factor, "total_updates": total_updates}
    assert history.SweepHistory({"scheduler": scheduler, **facts}, ()).rungs == rungs


def test_too_early(sweep: Path) -> None:
    trials = read_trials(sweep, 125)
    assert [trial.control_since for trial in trials] == [None, 750, 750, 750, None]
    words = history.too_early(trials, "asha", "val_loss")
    assert words is not None
    assert words.startswith("No trial had shown control by step 250, where the first were stopped: ")
    assert words.endswith(" A longer --grace_period is safer.")
    assert history.too_early(trials, "median", "control_gap") == words
    assert history.too_early(trials, "none", "val_loss") is None
    assert history.too_early(trials, "asha", "images_per_second") is None
    assert history.too_early(trials[1:3], "asha", "val_loss") is None  # none was stopped
    assert history.too_early(trials[1:], "asha", "val_loss") is None  # control had appeared by step 1000
    write_trial(sweep, 5, appears=200)  # one had control
    assert history.too_early(read_trials(sweep, 125), "asha", "val_loss") is None
    assert "No trial had shown control" not in Page(write_report(sweep)).text
    for file in sweep.glob("trials/*/validation.jsonl"):
        file.unlink()
    assert history.too_early(read_trials(sweep, 125), "asha", "loss") is None


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(width: int, sweep: Path, tmp_path: Path) -> None:
    alter(sweep, 4, cause="a_long_cause" * 50)
    check_in_browser(write_report(sweep), width, tmp_path / "profile", charts=6, texts=40, colours=8)

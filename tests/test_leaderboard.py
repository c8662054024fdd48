"""leaderboard.csv, and TensorBoard's HPARAMS tab as TensorBoard's own code fills it."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from sweep_trials import STARTED, write_checkpoint, write_trial

from raycontrolnet.errors import ConfigError
from raycontrolnet.tune import leaderboard
from raycontrolnet.tune.hparams import write_hparams
from raycontrolnet.tune.leaderboard import write_leaderboard
from raycontrolnet.tune.records import Trial, ranked, read_records, read_trials
from raycontrolnet.tune.table import repeated

RATE = 0.1 + 0.2e-17 + 1e-5 / 3


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def some_trials(sweep_dir: Path) -> list[Trial]:
    return [
        write_trial(sweep_dir, 0, {"learning_rate": RATE, "seed": 3}, losses=(0.3, 0.2)),
        write_trial(sweep_dir, 1, {"learning_rate": 1e-6, "seed": None}, losses=(0.3, 1 / 7), gap=0.02),
        write_trial(sweep_dir, 2, {"learning_rate": 1e-3}, "stopped", (0.1,), stopped_at=100, cause="behind"),
        write_trial(sweep_dir, 3, {"learning_rate": 1e-4, "flip": True}, "waiting", seconds=0.0),
        write_trial(sweep_dir, 4, {"learning_rate": 1e-2}, "failed", cause='=1+1,\n"quoted" ü圆'),
    ]


def test_leaderboard(tmp_path: Path) -> None:
    some_trials(tmp_path)
    write_checkpoint(tmp_path / "trials" / "0001", 100)
    last = write_checkpoint(tmp_path / "trials" / "0001", 200)
    unfinished = write_checkpoint(tmp_path / "trials" / "0001", 300)
    (unfinished / "weights").write_bytes(b"1")
    trials = read_trials(tmp_path, 100)
    path = write_leaderboard(tmp_path, trials, "val_loss")
    assert path == tmp_path / "leaderboard.csv"
    rows = read(path)
    assert list(rows[0]) == [
        *("rank", "trial", "state", "stopped_at", "step", "val_loss", "val_loss_shuffled", "control_gap"),
        *("control_appeared_at_step", "control_fidelity", "loss", "images_per_second", "seconds", "checkpoint"),
        *("setting:learning_rate", "setting:seed", "setting:flip", "cause"),
    ]
    assert [row["trial"] for row in rows] == [trial.record.name for trial in ranked(trials, "val_loss")]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    best = rows[0]
    assert float(best.pop("images_per_second")) == pytest.approx(12.5)
    assert best == {
        "rank": "1", "trial": "0001", "state": "finished", "stopped_at": "", "step": "200", "val_loss": str(1 / 7),
        "val_loss_shuffled": str(1 / 7 + 0.02), "control_gap": "0.02", "control_appeared_at_step": "200",
        "control_fidelity": "", "loss": "0.5", "seconds": "130.0",
        "checkpoint": "trials/0001/checkpoint-200", "setting:learning_rate": "1e-06", "setting:seed": "null",
        "setting:flip": "", "cause": "",
    }  # fmt: skip
    assert (tmp_path / best["checkpoint"]).samefile(last)
    stored = json.loads((tmp_path / "trials/0000/trial.json").read_text())
    assert float(rows[1]["setting:learning_rate"]) == stored["settings"]["learning_rate"] == RATE
    assert [(row["state"], row["stopped_at"], row["step"]) for row in rows[2:]] == [
        ("stopped", "100", "100"),
        ("waiting", "", ""),
        ("failed", "", ""),
    ]
    assert rows[3]["setting:flip"] == "true"
    assert rows[4]["cause"] == '\'=1+1, "quoted" ü圆'
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["leaderboard.csv"]


def test_the_objective_comes_first_and_decides(tmp_path: Path) -> None:
    some_trials(tmp_path)
    rows = read(write_leaderboard(tmp_path, read_trials(tmp_path, 100), "control_gap"))
    assert list(rows[0])[5:8] == ["control_gap", "val_loss", "val_loss_shuffled"]
    assert list(rows[0]).count("control_gap") == 1
    assert [row["trial"] for row in rows] == ["0001", "0000", "0002", "0003", "0004"]
    rows = read(write_leaderboard(tmp_path, read_trials(tmp_path, 100), "control_fidelity"))
    assert {row["control_fidelity"] for row in rows} == {""}


FORMULAS: list[tuple[Any, str]] = [
    *((text, f"'{text}") for text in ("=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "  =1", "\t=1", "＝1")),
    *((text, text) for text in ("a=1", 'a, "b"\nc', "")),
    ("\udc80", "\\udc80"), (-1, "-1"), (-1e-5, "-1e-05"), (["=1", 2], '["=1", 2]'), (False, "false"),
]  # fmt: skip


def test_texts_are_no_formulas(tmp_path: Path) -> None:
    trials = [write_trial(tmp_path, index, {"=some": value}) for index, (value, _) in enumerate(FORMULAS)]
    found = {row["trial"]: row["setting:=some"] for row in read(write_leaderboard(tmp_path, trials, "loss"))}
    assert found == {f"{index:04d}": written for index, (_, written) in enumerate(FORMULAS)}


def test_an_earlier_leaderboard_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = some_trials(tmp_path)
    before = write_leaderboard(tmp_path, trials, "val_loss").read_text()

    def fail(_: object, trial: Trial) -> str:
        if trial.record.index == 0:
            raise RuntimeError("in the middle")
        return ""

    monkeypatch.setattr(leaderboard, "_checkpoint", fail)
    with pytest.raises(RuntimeError):
        write_leaderboard(tmp_path, trials, "val_loss")
    assert (tmp_path / "leaderboard.csv").read_text() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"index": 0, "sett', "Unterminated string starting at"),
        ("[]", "it does not hold the settings of trial 0000"),
        ('{"index": 1, "settings": {}}', "it does not hold the settings of trial 0000"),
    ],
)
def test_a_damaged_record(tmp_path: Path, content: str, reason: str) -> None:
    some_trials(tmp_path)
    file = tmp_path / "trials" / "0000" / "trial.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_records(tmp_path)
    assert str(error.value).startswith(f"{file}: is damaged ({reason}")
    assert str(error.value).endswith("; remove its folder, and that trial is trained anew")
    assert len(read_records(tmp_path, skip_damaged=True)) == 4


def test_a_record_that_cannot_be_read_is_not_damaged(tmp_path: Path) -> None:
    """It may be storage that fails for a moment: no advice to remove anything."""
    some_trials(tmp_path)
    file = tmp_path / "trials" / "0000" / "trial.json"
    file.unlink()
    file.mkdir()  # root may read every file
    with pytest.raises(IsADirectoryError):
        read_records(tmp_path)
    assert len(read_records(tmp_path, skip_damaged=True)) == 4


def test_no_trials(tmp_path: Path) -> None:
    assert read(write_leaderboard(tmp_path, [], "val_loss")) == []
    assert (tmp_path / "leaderboard.csv").read_text().startswith("rank,trial,state,")


class Tab:
    """The answers that TensorBoard's HPARAMS tab gets for a folder."""

    def __init__(self, folder: Path):
        from tensorboard import context  # type: ignore[import-untyped]
        from tensorboard.backend.event_processing import data_provider  # type: ignore[import-untyped]
        from tensorboard.backend.event_processing import plugin_event_multiplexer as multiplexer
        from tensorboard.plugins import base_plugin  # type: ignore[import-untyped]
        from tensorboard.plugins.hparams import (  # type: ignore[import-untyped]
            api_pb2,
            backend_context,
            get_experiment,
            list_session_groups,
        )

        runs = multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
        provider = data_provider.MultiplexerDataProvider(runs, str(folder))
        backend = backend_context.Context(base_plugin.TBContext(data_provider=provider, logdir=str(folder)))
        request_context = context.RequestContext()
        request = api_pb2.GetExperimentRequest(include_metrics=True)
        experiment = get_experiment.Handler(request_context, backend, "", request).run()
        self.columns = {info.name: info for info in experiment.hparam_infos}
        self.metrics = [info.name.tag for info in experiment.metric_infos]
        request = api_pb2.ListSessionGroupsRequest(
            slice_size=100, allowed_statuses=list(api_pb2.Status.values()), include_metrics=True
        )
        groups = list_session_groups.Handler(request_context, backend, "", request).run().session_groups
        self.settings = {group.name: {k: _value(v) for k, v in group.hparams.items()} for group in groups}
        self.figures = {g.name: {v.name.tag: (v.training_step, v.value) for v in g.metric_values} for g in groups}
        sessions = {group.name: group.sessions[0] for group in groups}
        self.states = {name: api_pb2.Status.Name(session.status) for name, session in sessions.items()}
        self.times = {name: (session.start_time_secs, session.end_time_secs) for name, session in sessions.items()}


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("kind"))


def test_hparams(tmp_path: Path) -> None:
    trials = some_trials(tmp_path)
    trials.append(write_trial(tmp_path, 5, {"learning_rate": 1e-4, "seed": 7, "prompt": "ü", "ids": [1]}, "running"))
    for trial in reversed(trials):  # the first that is read has no figures and other settings
        write_hparams(tmp_path / "logs", trial, "val_loss")
    tab = Tab(tmp_path / "logs")
    assert tab.settings == {
        "0000": {"learning_rate": RATE, "seed": 3},
        "0001": {"learning_rate": 1e-6},
        "0002": {"learning_rate": 1e-3},
        "0003": {"learning_rate": 1e-4, "flip": True},
        "0004": {"learning_rate": 1e-2},
        "0005": {"learning_rate": 1e-4, "seed": 7, "prompt": "ü", "ids": "[1]"},
    }
    assert set(tab.columns) == {"learning_rate", "seed", "flip", "prompt", "ids"}
    assert tab.columns["learning_rate"].differs
    assert tab.columns["learning_rate"].domain_interval.max_value == RATE
    figures = ("control_gap", "control_gap_error", "images_per_second", "loss", "objective/val_loss", "val_loss")
    assert set(tab.metrics) == {*figures, "val_loss_shuffled"}
    assert {step for step, _ in tab.figures["0001"].values()} == {200}
    assert {name: value for name, (_, value) in tab.figures["0001"].items()} == pytest.approx(
        {"control_gap": 0.02, "control_gap_error": 0.001, "images_per_second": 12.5, "loss": 0.5,
         "objective/val_loss": 1 / 7, "val_loss": 1 / 7, "val_loss_shuffled": 1 / 7 + 0.02},
        rel=1e-5,
    )  # fmt: skip
    assert tab.figures["0003"] == {}
    success, failure, unknown = "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_UNKNOWN"
    assert list(map(tab.states.get, sorted(tab.states))) == [success, success, success, unknown, failure, unknown]
    assert tab.times["0001"] == (STARTED, STARTED + 130)


def test_the_curves_and_the_session_in_the_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.plugins.hparams import metadata

    nan = {"step": 300.0, "val_loss": math.nan, "loss": 0.25}
    trial = some_trials(tmp_path)[0]
    trial = Trial(trial.record, trial.folder, [*trial.reports, nan])
    write_hparams(tmp_path / "logs", trial, "val_loss")
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs/0000")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("val_loss")]
    assert curve == [(100, pytest.approx(0.3)), (200, pytest.approx(0.2))]
    assert [event.step for event in events.Scalars("loss")] == [100, 200, 300]
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    assert metadata.parse_session_start_info_plugin_data(content).hparams["learning_rate"].number_value == RATE
    content = events.summary_metadata[metadata.SESSION_END_INFO_TAG].plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).end_time_secs == STARTED + 65
    assert metadata.EXPERIMENT_TAG not in events.summary_metadata


def test_written_again_it_replaces_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    logs = tmp_path / "logs"

    def write(state: str, *losses: float) -> Trial:
        trial = write_trial(tmp_path, 0, {"seed": 1}, state, losses)
        time.sleep(1 - time.time() % 1)  # TensorBoard reads files of one second as their numbers sort: 10 before 9
        write_hparams(logs, trial, "val_loss")
        return trial

    def curve(events: Any) -> list[tuple[int, float]]:
        return [(event.step, round(event.value, 6)) for event in events.Reload().Scalars("val_loss")]

    write("interrupted", 0.4, 0.3)
    watching = event_accumulator.EventAccumulator(str(logs / "0000"))
    assert curve(watching) == [(100, 0.4), (200, 0.3)]
    assert Tab(logs).states == {"0000": "STATUS_UNKNOWN"}
    write("running", 0.4, 0.25, 0.2)
    assert curve(watching) == [(100, 0.4), (200, 0.25), (300, 0.2)]
    trial = write("finished", 0.5, 0.25)
    assert curve(watching) == [(100, 0.5), (200, 0.25)]
    assert curve(event_accumulator.EventAccumulator(str(logs / "0000"))) == [(100, 0.5), (200, 0.25)]
    tab = Tab(logs)
    assert (tab.states, tab.settings) == ({"0000": "STATUS_SUCCESS"}, {"0000": {"seed": 1}})
    files = sorted((logs / "0000").iterdir())
    assert [path.stat().st_size > 0 for path in files] == [False, True]

    from torch.utils.tensorboard import SummaryWriter

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(OSError, match="No space"):
        write_hparams(logs, trial, "val_loss")
    assert sorted((logs / "0000").iterdir()) == files
    assert Tab(logs).figures["0000"]["val_loss"] == (200, 0.25)


def test_trials_with_the_same_settings_are_said(tmp_path: Path) -> None:
    """Optuna may propose some again."""
    for index, rate in enumerate((1e-3, 1e-4, 1e-3, 1e-3, 1e-4, 1e-5)):
        write_trial(tmp_path, index, {"learning_rate": rate, "crop": "top"})
    assert list(repeated(read_trials(tmp_path, 100)[::-1])) == [
        "trials 0001, 0004 have the same settings, and so train the same",
        "trials 0000, 0002, 0003 have the same settings, and so train the same",
    ]

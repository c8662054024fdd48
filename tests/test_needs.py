"""The needs of a run before it starts: said in a line beside Ray's start, and refused where they cannot fit."""

from __future__ import annotations

import importlib.util
import io
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bucket_data import write_pictures

from raycontrolnet import SweepConfig, TrainConfig, cli, fit
from raycontrolnet.cluster import nodes
from raycontrolnet.cluster.nodes import ClusterNodes, gpu_types
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.config.space import draw
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch import fit as launch_fit
from raycontrolnet.launch import needs_beside
from raycontrolnet.launch.check import check
from raycontrolnet.launch.needs import Needs, StepSpec, count, say_needs
from raycontrolnet.launch.needs_beside import CountedNeeds, PendingNeeds, counting, in_likely_precision
from raycontrolnet.launch.worker_memory import WorkerMemory, gpu_bytes, host_share
from raycontrolnet.predict.prediction import ERROR, GIB, RESERVED, Prediction
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.tune.heaviest import heaviest, say_heaviest
from raycontrolnet.tune.plan import SweepPlan, plan_sweep
from raycontrolnet.tune.records import TrialRecord

TRAIN = TrainConfig(
    pretrained_model_name_or_path="base", train_data_dir="data", train_batch_size=4, checkpoints_total_limit=3
)
SCHEDULE = Schedule(num_samples=10_000, num_workers=2, batch_size=4, accumulation_steps=1, total_updates=5_000)
T4 = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:T4": 1.0}
A10G = {"CPU": 8.0, "GPU": 1.0, "accelerator_type:A10G": 1.0}


def prediction(per_sample: float) -> Prediction:
    return Prediction(
        weights={"ControlNet": 10**8}, trained=10**8, frozen_bytes={"denoiser": 10**9}, moment_bytes=8,
        activations_base=1e6, activations_per_sample=per_sample, flop_per_sample=2_270_000_000_000, dispatches=1,
        latents=1,
    )  # fmt: skip


NEEDS = Needs(TRAIN, prediction(8e9), lambda **_: prediction(2e9))
NEED = 1e9 + 16e8 + 1e6 + 4 * 8e9
"""Bytes of the batch: 32.2 GiB."""


def said(memory: WorkerMemory, needs: Needs = NEEDS) -> tuple[str | None, list[str]]:
    stream = io.StringIO()
    return say_needs(needs, SCHEDULE, memory, stream), stream.getvalue().splitlines()


def test_the_line() -> None:
    """With the precision, which is decided only after the encoding where it is not given."""
    line = "needs: 32.2 GiB of each GPU at batch 4 in fp32, 2.27 TFLOP a sample, 3 checkpoints of 1.2 GB"
    half = replace(NEEDS, train=replace(TRAIN, mixed_precision="bf16"))
    assert said(WorkerMemory(None, is_gpu=True), half) == (None, [line.replace("fp32", "bf16")])
    for memory in (None, 80 * GIB):
        assert said(WorkerMemory(memory, is_gpu=True)) == (None, [line])


def test_what_cannot_fit_is_refused_and_what_may_not_fit_warned_of() -> None:
    advice = "--gradient_checkpointing brings it to 9.9 GiB"
    problem, lines = said(WorkerMemory(24 * GIB, is_gpu=True))
    assert problem == f"--train_batch_size=4: batch 4 needs 32.2 GiB, this GPU has 24.0 GiB: {advice}"
    assert len(lines) == 1
    assert said(WorkerMemory((NEED * (1 - ERROR)) - 1, is_gpu=True))[0]
    problem, lines = said(WorkerMemory(NEED * (1 - ERROR) + 1, is_gpu=True))
    assert problem is None, "the prediction may be 10% too high"
    assert lines[1].startswith("warning: it may not fit: batch 4 needs 32.2 GiB, this GPU has 29.0 GiB: --gradient")


def test_a_part_of_a_gpu() -> None:
    problem, _ = said(WorkerMemory(40 * GIB / 2, is_gpu=True, share=0.5))
    assert problem
    assert "needs 32.2 GiB, 0.5 of a GPU has 20.0 GiB: " in problem


def test_cpus_are_warned_of_alone() -> None:
    problem, lines = said(WorkerMemory(24 * GIB, is_gpu=False))
    assert problem is None
    assert lines[0].startswith("needs: 32.2 GiB of memory for each worker at batch 4 in fp32, ")
    warning = "warning: the run may be killed, or swap: batch 4 needs 32.2 GiB, this machine has 24.0 GiB: "
    assert lines[1:] == [f"{warning}--gradient_checkpointing brings it to 9.9 GiB"]
    assert host_share(2).bytes == host_share(1).bytes / 2  # type: ignore[operator]
    assert len(said(WorkerMemory(40 * GIB, is_gpu=False))[1]) == 1


def test_which_gpus_workers_may_get(monkeypatch: pytest.MonkeyPatch) -> None:
    def types(*up: dict[str, float], may_come: list[dict[str, float]] | None, **wanted: Any) -> set[str | None]:
        monkeypatch.setattr(nodes, "cluster_nodes", lambda _: ClusterNodes(list(up), may_come))
        return gpu_types(ClusterConfig(**wanted))

    cpus = {"CPU": 64.0, "accelerator_type:T4": 1.0}
    assert types(cpus, T4, may_come=[A10G]) == {"T4", "A10G"}
    assert types(T4, may_come=None) == {"T4", None}
    assert types(T4, A10G, may_come=[], accelerator_type="T4") == {"T4"}
    assert types({"GPU": 1.0}, may_come=[]) == {None}
    assert gpu_bytes({"T4", "A10G"}) == 24 * GIB, "the largest: Ray may place the worker there"
    for unknown in ({"T4", None}, {"a type of tomorrow"}, set[str | None]()):
        assert gpu_bytes(unknown) is None


@pytest.fixture
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small models be counted, and the count take its time on a busy machine."""
    monkeypatch.setattr(needs_beside, "SMALL", 0)
    monkeypatch.setattr(needs_beside, "PATIENCE_S", 300.0)


NEEDED = "bitsandbytes is not installed; run pip install 'raycontrolnet[8bit]'"


@pytest.mark.parametrize(
    ("device_gib", "installed", "expected"),
    [
        (11.0, True, "--use_8bit_adam brings it to 9.3 GiB"),
        (11.0, False, "--train_batch_size 2 --gradient_accumulation_steps 2 fits"),
        (7.0, True, "--train_batch_size 2 --gradient_accumulation_steps 2 fits with --use_8bit_adam"),
        (7.0, False, "--train_batch_size 1 --gradient_accumulation_steps 4 fits"),
        (5.1, True, "--train_batch_size 1 --gradient_accumulation_steps 4 fits with --use_8bit_adam"),
        (5.1, False, f"--train_batch_size 1 --gradient_accumulation_steps 4 fits with --use_8bit_adam ({NEEDED})"),
        (3.0, False, "no batch fits with --use_8bit_adam: take a smaller --resolution, or a device with more memory"),
    ],
)
def test_advice_that_needs_no_installation_is_preferred(
    device_gib: float, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    train = replace(TRAIN, gradient_checkpointing=True)
    assert Needs(train, prediction(2e9), lambda **_: prediction(2e9)).advice(device_gib * GIB) == expected


@pytest.mark.parametrize("asked", [8, 64])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("device_gib", [4.3, 4.6, 4.82, 6.4])
def test_smaller_batches_are_counted_where_a_sample_takes_more_in_a_larger_one(
    asked: int, checkpointing: bool, device_gib: float
) -> None:
    """With gradient checkpointing, asked for or advised."""
    counts: list[int] = []

    def counted(train_batch_size: int = asked, *, gradient_checkpointing: bool = checkpointing) -> Prediction:
        counts.append(train_batch_size)
        if not gradient_checkpointing:
            return prediction(9e9)
        base, per_sample = max(((1.2e9, 1e8), (0.0, 5e8)), key=lambda part: part[0] + part[1] * train_batch_size)
        return replace(prediction(per_sample), activations_base=base)

    train = replace(TRAIN, gradient_checkpointing=checkpointing, train_batch_size=asked, use_8bit_adam=True)
    needs = Needs(train, counted(), counted)
    device = device_gib * GIB
    parts = [part for part in range(asked, 0, -1) if asked % part == 0]
    on = {"gradient_checkpointing": True}
    expected = next((part for part in parts if counted(part, **on).fits(part, device)), 0)
    promised = next((part for part in parts if counted(asked, **on).fits(part, device)), 0)
    assert expected <= promised
    counts.clear()
    advice = needs.advice(device)
    flags = "" if checkpointing else " with --gradient_checkpointing"
    if expected:
        assert advice == f"--train_batch_size {expected} --gradient_accumulation_steps {asked // expected} fits{flags}"
    else:
        assert advice.startswith(f"no batch fits{flags}: ")
    assert len(counts) == len(set(counts)), "each takes seconds"
    assert len(counts) <= 4


@pytest.mark.parametrize("asked", [1, 2, 10, 60])
@pytest.mark.parametrize("device_gib", [11, 24])
def test_the_largest_batch_is_counted_where_a_sample_takes_more_in_a_larger_one(asked: int, device_gib: int) -> None:
    """With gradient checkpointing: of two things the larger one counts, and the smaller one grows faster."""

    def counted(train_batch_size: int = asked) -> Prediction:
        base, per_sample = max(((4e9, 1e8), (1e9, 2e8)), key=lambda part: part[0] + part[1] * train_batch_size)
        return replace(prediction(per_sample), activations_base=base)

    train = replace(TRAIN, gradient_checkpointing=True, train_batch_size=asked)
    needs = Needs(train, counted(asked), lambda **changes: counted(**changes))
    expected = max(size for size in range(1000) if counted(size).fits(size, device_gib * GIB, RESERVED))
    assert needs.largest_batch(device_gib * GIB) == expected
    assert counted(1 if device_gib > 20 else 60).largest_batch(device_gib * GIB) > expected, (
        "one count promises too much"
    )


@pytest.mark.usefixtures("_counted")
def test_a_process_counts_the_same(tiny_settings: dict[str, Any]) -> None:
    train = TrainConfig(**tiny_settings)
    with counting(StepSpec(train, cached=True)) as under_way:
        found = under_way.result()
    assert found
    assert found.needs.prediction == count(StepSpec(train, cached=True))
    checkpointed = count(StepSpec(TrainConfig(**tiny_settings | {"gradient_checkpointing": True}), cached=True))
    assert found.needs.counted(gradient_checkpointing=True) == checkpointed != found.needs.prediction


@pytest.mark.usefixtures("_counted")
def test_the_largest_bucket_counts(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Buckets of 64 x 16 pixels and 24 x 40: a run and `check` say what the larger needs."""
    data = write_pictures(tmp_path / "data", 8, ((16, 64), (40, 24)))
    train = TrainConfig(**tiny_settings | {"train_data_dir": str(data), "aspect_buckets": True})
    sizes = [(16, 64), (40, 24), (32, 32)]
    wide, high, square = (count(StepSpec(train, cached=True, sizes=[size])) for size in sizes)
    assert wide.latents == square.latents > high.latents
    assert square == count(StepSpec(train, cached=True))
    assert high.activations_per_sample < square.activations_per_sample
    assert high.flop_per_sample < square.flop_per_sample
    with counting(StepSpec(train, cached=True, sizes=[(40, 24)])) as under_way:
        found = under_way.result()
    assert found
    assert found.needs.prediction == high
    assert check(CheckConfig(train=train, device_memory=1), stream=io.StringIO()) == count(
        StepSpec(train, cached=False, sizes=[(40, 24), (16, 64)])
    )


@pytest.mark.parametrize(
    ("changed", "has_gpu", "expected"),
    [
        ({}, True, ("bf16", True)),
        ({}, False, (None, False)),
        ({"use_gpu": False}, True, (None, False)),
        ({"use_gpu": True}, False, ("bf16", True)),
        ({"mixed_precision": "no"}, True, ("no", True)),
        ({"mixed_precision": "no"}, False, ("no", False)),
        ({"mixed_precision": "fp16"}, False, ("fp16", True)),
        ({"mixed_precision": "bf16", "use_gpu": False}, True, ("bf16", False)),
    ],
)
def test_the_likely_precision(changed: dict[str, Any], has_gpu: bool, expected: tuple[str | None, bool | None]) -> None:
    train, for_gpus = in_likely_precision(replace(TRAIN, **changed), has_gpu=has_gpu)
    assert (train.mixed_precision, for_gpus) == expected


@pytest.mark.parametrize("for_gpus", [False, True])
def test_needs_of_another_device_are_not_said(for_gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default precision is another one."""
    monkeypatch.setattr(needs_beside, "say_needs", lambda *_: "refused")
    with counting(StepSpec(TRAIN, cached=True), wanted=False) as under_way:
        monkeypatch.setattr(under_way, "result", lambda: CountedNeeds(NEEDS, 80 * GIB, for_gpus))
        under_way.say(SCHEDULE, None, io.StringIO(), use_gpu=not for_gpus)
        with pytest.raises(ConfigError, match="refused"):
            under_way.say(SCHEDULE, None, io.StringIO(), use_gpu=for_gpus)


@pytest.mark.usefixtures("_counted")
def test_a_count_that_fails_stops_nothing(tiny_settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    train = TrainConfig(**tiny_settings | {"pretrained_model_name_or_path": "nowhere/here"})
    stream = io.StringIO()
    with counting(StepSpec(train, cached=True)) as under_way:
        under_way.say(SCHEDULE, None, stream, use_gpu=True)
    assert "needs could not be counted:" in caplog.text
    assert "nowhere/here: its configuration cannot be looked at" in caplog.text
    assert stream.getvalue() == ""


@pytest.mark.usefixtures("_counted")
def test_nobody_waits_long_for_a_count(
    tiny_settings: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needs_beside, "PATIENCE_S", 0.01)
    with counting(StepSpec(TrainConfig(**tiny_settings), cached=True)) as under_way:
        assert under_way.result() is None
        process = under_way._process
    assert "needs were not counted within 0.01 s" in caplog.text
    assert process
    assert process.poll() is not None, "it has ended with the run"


def test_small_models_are_not_counted(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the demo's: counting them takes longer than starting them."""
    monkeypatch.setattr(subprocess, "Popen", None)
    with counting(StepSpec(TrainConfig(**tiny_settings), cached=True)) as under_way:
        assert under_way.result() is None


@pytest.mark.usefixtures("_counted")
def test_a_run_says_its_needs_first(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycontrolnet.launch.worker_memory.host_bytes", lambda: 1000)
    stream = io.StringIO()
    fit(TrainConfig(**tiny_settings | {"num_workers": "0", "max_train_steps": 1}), stream=stream)
    lines = stream.getvalue().splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("needs: "))
    assert " MiB of memory for each worker at batch " in lines[first]
    assert "1 checkpoint of " in lines[first]
    assert lines[first + 1].startswith("warning: the run may be killed, or swap: batch ")
    assert "this machine has 1 KiB: no batch fits with --gradient_checkpointing: take " in lines[first + 1]
    assert first < next(number for number, line in enumerate(lines) if line.startswith("raycontrolnet "))


def _with_gpu(monkeypatch: pytest.MonkeyPatch, needs: Needs, gpu: float) -> None:
    monkeypatch.setattr(launch_fit, "check_device", lambda *_, **__: True)
    monkeypatch.setattr(PendingNeeds, "result", lambda _: CountedNeeds(needs, gpu, for_gpus=True))


def test_a_run_that_cannot_fit_is_refused(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_fit, "train_here", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setattr(launch_fit, "ensure_latents", lambda *_, **__: pytest.fail("it encodes"))
    _with_gpu(monkeypatch, NEEDS, 24 * GIB)
    flags = [f"--{name}={value}" for name, value in (tiny_settings | {"num_workers": "0"}).items()]
    assert cli.main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert "error: --train_batch_size=4: batch 4 needs 32.2 GiB, this GPU has 24.0 GiB: --gradient_checkp" in error
    assert "Traceback" not in error


def test_advice_that_fails_stops_no_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(**_: Any) -> Prediction:
        raise RuntimeError("no such file")

    monkeypatch.setattr(
        PendingNeeds, "result", lambda _: CountedNeeds(Needs(TRAIN, prediction(8e9), fails), 30 * GIB, for_gpus=True)
    )
    with counting(StepSpec(TRAIN, cached=True), wanted=False) as under_way:
        under_way.say(SCHEDULE, None, io.StringIO(), use_gpu=True)
    assert "needs could not be said" in caplog.text


def test_parts_of_gpus_and_types_reach_the_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PendingNeeds, "result", lambda _: CountedNeeds(NEEDS, 80 * GIB, for_gpus=True))
    with counting(StepSpec(TRAIN, cached=True), wanted=False) as under_way:
        under_way.say(SCHEDULE, None, io.StringIO(), use_gpu=True, share=0.5)
        with pytest.raises(ConfigError, match=r"0.25 of a GPU has 20.0 GiB"):
            under_way.say(SCHEDULE, None, io.StringIO(), use_gpu=True, share=0.25)
        with pytest.raises(ConfigError, match=r"this GPU has 16.0 GiB"):
            under_way.say(SCHEDULE, {"T4"}, io.StringIO(), use_gpu=True)
        for unknown in ({None}, {"T4", None}):
            under_way.say(SCHEDULE, unknown, io.StringIO(), use_gpu=True)


SPACE: dict[str, Any] = {
    "train_batch_size": {"choice": [2, 8, 4]},
    "gradient_checkpointing": {"choice": [True, False]},
    "learning_rate": {"loguniform": [1e-6, 1e-3]},
}


def planned(settings: dict[str, Any], num_samples: int, space: dict[str, Any] = SPACE, **own: Any) -> SweepPlan:
    train = TrainConfig(**settings | {"validation_split": 4})
    return plan_sweep(SweepConfig(train=train, space=space, num_samples=num_samples, **own), io.StringIO())


def test_the_heaviest_trial_that_will_run_counts(tiny_settings: dict[str, Any]) -> None:
    """Not the space's heaviest corner, which random search may never draw."""
    sizes = []
    for number in (1, 2, 12):
        plan = planned(tiny_settings, number)
        assert plan.train.seed is not None
        trials = [draw(plan.space, plan.train.seed, index) for index in range(number)]
        expected = max(
            trials, key=lambda each: each["train_batch_size"] * (0.35 if each["gradient_checkpointing"] else 1)
        )
        found = heaviest(plan)
        assert found.trial is not None
        assert trials[found.trial] | dict(found.settings) == trials[found.trial]
        config = found.run.config
        assert config.train_batch_size == expected["train_batch_size"]
        assert config.gradient_checkpointing == expected["gradient_checkpointing"]
        assert config.learning_rate == plan.train.learning_rate
        sizes.append(config.train_batch_size)
    assert sizes[0] < sizes[-1] == 8
    grid = SPACE | {"train_batch_size": {"grid": [2, 8, 4]}, "gradient_checkpointing": {"grid": [True, False]}}
    found = heaviest(planned(tiny_settings, 1, grid))
    assert found.settings == {"train_batch_size": 8, "gradient_checkpointing": False}


def test_trials_of_an_earlier_part_count_until_they_have_ended(tiny_settings: dict[str, Any]) -> None:
    plan = planned(tiny_settings, 1)
    big = {"train_batch_size": 64, "gradient_checkpointing": False, "learning_rate": 1e-3}
    for state, expected in (("interrupted", 64), ("failed", 8), ("finished", 8)):
        left = replace(plan, records=[TrialRecord(0, big, state)], num_trials=12)
        found = heaviest(left)
        assert found.run.config.train_batch_size == expected
        assert (found.trial is None) == (state == "interrupted"), "its failure must not keep the others"


def test_a_smaller_batch_may_be_the_heavier_trial(tiny_settings: dict[str, Any]) -> None:
    """Without gradient checkpointing."""
    plan = planned(tiny_settings, 1)
    earlier = [
        TrialRecord(index, {"train_batch_size": batch, "gradient_checkpointing": batch == 65}, "interrupted")
        for index, batch in enumerate((65, 64))
    ]
    assert heaviest(replace(plan, records=earlier)).run.config.train_batch_size == 64


def test_trials_with_another_base_are_not_refused_by_the_first_ones_memory(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_settings, 12)
    base = plan.space["train_batch_size"]
    (said,) = said_of_the_heaviest(replace(plan, space={**plan.space, "revision": base}), monkeypatch)
    assert said == f"warning: {TOO_BIG}; trials with another revision may need more or less, and fail alone"


BIG = replace(TRAIN, train_batch_size=8, seed=0)
TOO_BIG = "batch 8 needs 62.0 GiB, this GPU has 24.0 GiB: --gradient_checkpointing brings it to 17.3 GiB"


def said_of_the_heaviest(plan: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Say the needs of a trial of batch 8 that cannot fit, of which 2 would fit."""
    needs = Needs(BIG, prediction(8e9), lambda **_: prediction(2e9))
    monkeypatch.setattr(PendingNeeds, "result", lambda _: CountedNeeds(needs, 24 * GIB, for_gpus=True))
    stream, found = io.StringIO(), heaviest(plan)._replace(run=replace(plan.run, config=BIG))
    with counting(StepSpec(BIG, cached=True), wanted=False) as under_way:
        say_heaviest(plan, found, under_way, stream, types=None, use_gpu=True)
    first, *rest = stream.getvalue().splitlines()
    assert first.startswith("needs: 62.0 GiB of each GPU at batch 8 in fp32, ")
    return rest


def test_a_trial_that_will_run_and_cannot_fit_is_refused(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_settings, 12)
    with pytest.raises(ConfigError) as error:
        said_of_the_heaviest(plan, monkeypatch)
    own = "gradient_checkpointing False, train_batch_size 8"
    said = f"--space: trial {heaviest(plan).trial} has {own}, and cannot fit: {TOO_BIG}; a changed space needs another "
    assert str(error.value) == f"{said}--output_dir, or {plan.folder.shown} removed"


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ({"choice": [2, 8, 4]}, "train_batch_size 4 or more"),
        ({"uniform": [1, 8]}, "train_batch_size 4 or more"),
        ({"choice": [2, 8]}, "train_batch_size 8"),
        (None, ""),
    ],
)
def test_what_optuna_may_try_is_warned_of(
    batches: dict[str, Any] | None, said: str, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not said what it will: some trials may fit."""
    pytest.importorskip("optuna")
    given = {"train_batch_size": batches} if batches else {}
    space = {"gradient_checkpointing": SPACE["gradient_checkpointing"], **given}
    plan = planned(tiny_settings, 12, space, searcher="optuna")
    own = f"gradient_checkpointing False{', ' * bool(said)}{said}"
    assert said_of_the_heaviest(plan, monkeypatch) == [
        f"warning: trials with {own} cannot fit, and fail alone: {TOO_BIG}"
    ]


def test_a_sweep_of_optuna_in_which_no_trial_fits_is_refused(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    plan = planned(tiny_settings, 2, {"train_batch_size": {"choice": [8, 4]}}, searcher="optuna")
    with pytest.raises(ConfigError, match=f"^--space: no trial can fit: {TOO_BIG}; a changed space"):
        said_of_the_heaviest(plan, monkeypatch)
    plan = planned(tiny_settings, 2, {"learning_rate": SPACE["learning_rate"]}, searcher="optuna")
    with pytest.raises(ConfigError, match=f"^--train_batch_size=8: {TOO_BIG}$"):
        said_of_the_heaviest(plan, monkeypatch)


def test_the_heaviest_trial_has_the_largest_images(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Its buckets are those of its resolution: where trials differ in it, a square stands for them."""
    data = write_pictures(tmp_path / "data", 12, ((16, 64), (40, 24)))
    bucketed = {"train_data_dir": str(data), "aspect_buckets": True, "validation_split": 4, "train_batch_size": 2}
    train = TrainConfig(**tiny_settings | bucketed)
    of_one_size: dict[str, Any] = {"learning_rate": {"choice": [1e-6, 1e-3]}}
    of_several: dict[str, Any] = {"resolution": {"grid": [16, 32]}}
    for space, largest in ((of_one_size, (16, 64)), (of_several, None)):
        config = SweepConfig(train=train, space=space, num_samples=1, allow_new_caches=True)
        buckets = heaviest(plan_sweep(config, io.StringIO())).run.buckets
        assert (buckets and buckets.largest) == largest

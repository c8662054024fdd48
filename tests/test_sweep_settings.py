"""Before a sweep starts: its settings from Python, flags and files, and how many trials run at a time."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from single_files import write_single_file

from raycontrolnet import SweepConfig, TrainConfig, cli
from raycontrolnet.cluster.nodes import HEAD, ClusterNodes, nodes_that_may_come
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.config.space import read_space
from raycontrolnet.config.sweep_config import OBJECTIVES, SweepSettings
from raycontrolnet.errors import ConfigError
from raycontrolnet.tune import checks
from raycontrolnet.tune.checks import model_problems_of
from raycontrolnet.tune.concurrency import TrialSlots, trial_slots
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.plan import SweepPlan, plan_sweep
from raycontrolnet.tune.records import TrialRecord
from raycontrolnet.tune.trial import Shared

TRAIN: dict[str, Any] = {"pretrained_model_name_or_path": "base", "train_data_dir": "data"}
CPUS = {"CPU": 64}
T4 = {"CPU": 8, "GPU": 1, "accelerator_type:T4": 1}
A10G = {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}
BIG = {"CPU": 16, "GPU": 8, "accelerator_type:H100": 1}
FLAGS = [f"--{name}={value}" for name, value in TRAIN.items()]


def problems(**settings: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as error:
        SweepConfig(train=TrainConfig(**TRAIN), **settings)
    return error.value.problems


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_samples": 0}, "--num_samples=0: must be at least 1"),
        ({"num_samples": "many"}, "--num_samples='many': must be a whole number"),
        ({"max_concurrent_trials": 0}, "--max_concurrent_trials=0: must be at least 1"),
        ({"grace_period": 0}, "--grace_period=0: must be at least 1"),
        ({"reduction_factor": 1}, "--reduction_factor=1: must be at least 2"),
        ({"trial_retries": -1}, "--trial_retries=-1: must be at least 0"),
        ({"scheduler": "ahsa"}, "--scheduler=ahsa: must be one of asha, median, none; perhaps you meant asha"),
        ({"searcher": "optna"}, "--searcher=optna: must be one of random, optuna; perhaps you meant optuna"),
        ({"objective": "los"}, f"--objective=los: must be one of {', '.join(OBJECTIVES)}; perhaps you meant loss"),
        (
            {"gpus_per_trial": 0},
            "--gpus_per_trial=0.0: must be above 0 and at most 1; for several GPUs use --num_workers",
        ),
        (
            {"gpus_per_trial": 2},
            "--gpus_per_trial=2.0: must be above 0 and at most 1; for several GPUs use --num_workers",
        ),
    ],
)
def test_settings_that_cannot_be_run(settings: dict[str, Any], problem: str) -> None:
    assert problems(**settings) == (problem,)


def test_problems_of_settings_and_space_come_together() -> None:
    found = problems(num_samples=0, space={"learning_rat": {"uniform": [0, 1]}})
    assert found == (
        "--num_samples=0: must be at least 1",
        "--space: unknown setting learning_rat; perhaps you meant learning_rate",
    )


def test_flags_and_files(tmp_path: Path) -> None:
    """Flags over the file; the space inline in it, or in a file of its own."""
    file, space = tmp_path / "sweep.yaml", tmp_path / "space.yaml"
    inline = {"learning_rate": {"choice": [1e-3]}}
    file.write_text(yaml.safe_dump(TRAIN | {"num_samples": 4, "seed": 3, "scheduler": "none", "space": inline}))
    config = cli.parse("tune", ["--config", str(file), "--num_samples", "5", "--resume"])
    assert (config.num_samples, config.train.seed, config.scheduler, config.resume) == (5, 3, "none", True)
    assert config.space == inline
    space.write_text("lr_scheduler: {choice: [constant, linear]}")
    for given in (["--config", str(file), "--space", str(space)], [*FLAGS, f"--space={space}"]):
        assert list(cli.parse("tune", given).parsed_space) == ["lr_scheduler"]
    assert len(cli.parse("tune", FLAGS).parsed_space) == 3


def test_unknown_names_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(TRAIN | {"num_sample": 4}))
    assert cli.main(["tune", "--config", str(file)]) == 2
    assert f"--config={file}: unknown setting num_sample; perhaps you meant num_samples" in capsys.readouterr().err
    for name, value in (("num_samples", 4), ("space", {"learning_rate": {"choice": [1]}})):
        file.write_text(yaml.safe_dump(TRAIN | {name: value}))
        assert cli.main(["train", "--config", str(file)]) == 2
        assert f"unknown setting {name}" in capsys.readouterr().err


def test_an_unreadable_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *FLAGS, "--space", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: --space=nowhere.yaml: cannot be read (No such file or directory)\n"


# How many at a time

CPU_NODE = {"CPU": 4.0}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "accelerator_type:A100": 1.0}


def placed(nodes: list[dict[str, float]], **options: Any) -> TrialSlots:
    num_trials, may_come = options.pop("num_trials", 16), options.pop("may_come", [])
    cluster = {name: options.pop(name) for name in list(options) if name in ClusterConfig.__dataclass_fields__}
    return trial_slots(ClusterConfig(**cluster), SweepSettings(**options), ClusterNodes(nodes, may_come), num_trials)


@pytest.mark.parametrize(
    ("nodes", "options", "at_a_time", "resources"),
    [
        ([{"CPU": 3}], {}, 2, {"CPU": 1}),
        ([{"CPU": 3}], {"num_trials": 1}, 1, {"CPU": 2}),  # too few trials: more threads for each
        ([{"CPU": 3}], {"max_concurrent_trials": 1}, 1, {"CPU": 2}),
        ([{"CPU": 2}], {}, 1, {"CPU": 1}),
        ([CPU_NODE, CPU_NODE], {}, 7, {"CPU": 1}),
        ([CPU_NODE, CPU_NODE], {"cpus_per_worker": 3}, 2, {"CPU": 3}),
        ([GPU_NODE], {}, 4, {"CPU": 2, "GPU": 1}),
        ([GPU_NODE], {"gpus_per_trial": 0.5}, 8, {"CPU": 2, "GPU": 0.5}),
        ([GPU_NODE], {"gpus_per_trial": 0.4}, 8, {"CPU": 2, "GPU": 0.4}),  # no trial has parts of two GPUs
        ([GPU_NODE], {"use_gpu": False}, 15, {"CPU": 1}),
        ([{"CPU": 2, "GPU": 4}], {}, 4, {"CPU": 0.5, "GPU": 1}),
        ([CPU_NODE, GPU_NODE], {"accelerator_type": "A100"}, 4, {"CPU": 2, "GPU": 1, "accelerator_type:A100": 0.001}),
        ([GPU_NODE], {"num_workers": "2"}, 2, {"memory": 2**20}),
        ([CPU_NODE], {"num_workers": "2"}, 1, {"memory": 2**20}),
        ([{"CPU": 8}, {"CPU": 2}], {"num_workers": "2", "cpus_per_worker": 4}, 1, {"memory": 2**20}),
        ([{"CPU": 5}, {"CPU": 5}], {"num_workers": "2", "cpus_per_worker": 3, "num_trials": 3}, 1, {"memory": 2**20}),
        ([{"CPU": 0}], {"may_come": [GPU_NODE, GPU_NODE]}, 8, {"CPU": 2, "GPU": 1}),
    ],
)
def test_how_many_at_a_time(
    nodes: list[dict[str, float]], options: dict[str, Any], at_a_time: int, resources: dict[str, float]
) -> None:
    found = placed(nodes, **options)
    assert found.at_a_time == at_a_time
    assert found.resources() == resources
    assert found.reason.startswith(f"{at_a_time} at a time, each ")


def test_the_reason() -> None:
    words = "4 at a time, each 2 CPUs and 1 GPU: the cluster has 4 GPUs"
    assert placed([GPU_NODE]).reason == words
    words = "2 at a time, each 1 CPU: the cluster has 3 CPUs, of which 1 is left to Ray Data"
    assert placed([{"CPU": 3}]).reason == words
    assert placed([{"CPU": 3}], max_concurrent_trials=5).reason == f"{words}; --max_concurrent_trials=5 do not fit"
    assert placed([GPU_NODE], max_concurrent_trials=2).reason.endswith("--max_concurrent_trials; there is room for 4")
    assert placed([GPU_NODE], num_trials=3).reason.endswith("there are no more trials")


@pytest.mark.parametrize(
    ("nodes", "options", "problem"),
    [
        ([CPU_NODE], {"num_workers": "1:4"}, "--num_workers=1:4: a sweep's trials need a fixed number: elastic ones"),
        (
            [CPU_NODE],
            {"cpus_per_worker": 8},
            "--num_workers=1: no trial has room in the cluster (the cluster has 4 CPUs",
        ),
        ([CPU_NODE], {"use_gpu": True}, "--num_workers=1: no trial has room in the cluster (the cluster has 0 GPUs"),
        ([GPU_NODE], {"num_workers": "8"}, "--num_workers=8: no trial has room in the cluster (the cluster has 4 GPUs"),
        ([GPU_NODE], {"accelerator_type": "H100"}, "no trial has room in the cluster"),
    ],
)
def test_no_room(nodes: list[dict[str, float]], options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        placed(nodes, **options)
    assert problem in str(error.value)


def test_an_autoscaler_that_does_not_say_what_it_can_start() -> None:
    where = placed([{"CPU": 0}], may_come=None)
    assert (where.at_a_time, where.reason.partition(": ")[2]) == (16, "the autoscaler does not say what it can start")


def test_nodes_that_an_autoscaler_may_start(bootstrap_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, head, node = ClusterConfig(), {"CPU": 8, "GPU": 1, HEAD: 1}, {"CPU": 8, "GPU": 1}
    assert nodes_that_may_come(cluster, [head]) == []
    monkeypatch.setenv("RAY_CLUSTER_NAME", "by KubeRay")
    assert nodes_that_may_come(cluster, [head]) is None
    types = {
        "head": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 0},
        "gpu": {"resources": node, "max_workers": 3},
    }
    bootstrap_config.write_text(yaml.safe_dump({"max_workers": 8, "available_node_types": types}))
    assert nodes_that_may_come(cluster, [head]) == [node] * 3
    bootstrap_config.write_text(yaml.safe_dump({"max_workers": 2, "available_node_types": types}))
    assert nodes_that_may_come(cluster, [head]) == [node] * 2


@pytest.mark.parametrize(
    ("settings", "up", "expected"),
    [
        ({}, [], [BIG, BIG, BIG, A10G]),
        ({"accelerator_type": "T4"}, [], [T4, T4, BIG, BIG]),
        ({"accelerator_type": "T4"}, [A10G, A10G], [T4, T4]),
        ({"accelerator_type": "T4"}, [T4], [T4, BIG, BIG]),
        ({"use_gpu": False}, [], [CPUS, CPUS, CPUS, CPUS]),
        ({}, [T4, T4, BIG, BIG], []),
        ({}, [T4, {"CPU": 3.0}, BIG], [BIG]),
    ],
)
def test_of_many_types_come_those_that_serve_best(
    bootstrap_config: Path, settings: dict[str, Any], up: list[dict[str, float]], expected: list[dict[str, float]]
) -> None:
    """Four nodes may be up; the types' own limits come to more."""
    types = {
        "cpus": {"resources": CPUS},
        "a10g": {"resources": A10G, "max_workers": 2},
        "t4": {"resources": T4, "max_workers": 2},
        "big": {"resources": BIG, "max_workers": 3},
    }
    bootstrap_config.write_text(yaml.safe_dump({"max_workers": 4, "available_node_types": types}))
    assert nodes_that_may_come(ClusterConfig(**settings), [{"CPU": 4.0, HEAD: 1.0}, *up]) == expected


def test_a_configuration_of_single_files_beside_folders(
    sweep_settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    """--base_config is for the trials with the file, where it is checked, used and written down; not for the others."""
    file = write_single_file(tiny_base, tmp_path / "base.safetensors")
    shared = TrainConfig(**sweep_settings | {"latents_cache_dir": None, "base_config": str(tiny_base)})

    def planned(train: TrainConfig, *bases: Path) -> SweepPlan:
        space = {"pretrained_model_name_or_path": {"grid": [str(base) for base in bases]}}
        settings: dict[str, Any] = {"num_samples": 1, "allow_new_caches": True, "scheduler": "none"}
        return plan_sweep(SweepConfig(train=train, space=space, **settings), io.StringIO())

    for bases in ((tiny_base, file), (file, tiny_base)):
        plan = planned(shared, *bases)
        assert plan.facts()["settings"]["base_config"] == str(tiny_base)  # by which the sweep is resumed
        trials: Any = Shared(SweepLease(plan.folder, "id"), plan.runs, slots=None, retries=0)  # type: ignore[arg-type]
        for base in bases:
            record = TrialRecord(0, {"pretrained_model_name_or_path": str(base)})
            expected = str(tiny_base) if base == file else None
            assert plan.config_of(record, None).base_config == expected
            assert trials.run_of(record).config.base_config == expected
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    with pytest.raises(ConfigError) as error:
        planned(shared, tiny_base, other)
    (problem,) = error.value.problems
    assert problem == f"--base_config={tiny_base}: is for a base model that is a single file; leave it out"
    with pytest.raises(ConfigError) as error:
        planned(replace(shared, base_config=str(tmp_path / "gone")), tiny_base, file)
    assert error.value.problems == (
        f"--base_config={tmp_path / 'gone'}: no such folder, and not the form of a Hub id (owner/name)",
    )


def test_models_are_checked_with_the_variants_of_the_space(tiny_base: Path, tmp_path: Path) -> None:
    """A base model may have its weights in that variant alone."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "half"))
    for file in base.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    train = TrainConfig(pretrained_model_name_or_path=str(tiny_base), train_data_dir="data")
    for variants, refused in ((["fp16"], False), ([None, "fp16"], True)):
        space = {"pretrained_model_name_or_path": {"choice": [str(base)]}, "variant": {"choice": variants}}
        found = model_problems_of(train, read_space(space))
        assert bool(found) == refused
        assert all(str(base) in problem for problem in found)


@pytest.mark.parametrize(
    ("steps", "space", "refused"),
    [
        (None, {}, False),
        (8, {}, True),
        (8, {"max_train_steps": {"choice": [None, 10]}}, False),
        (None, {"max_train_steps": {"choice": [10]}}, True),
        (None, {"max_train_steps": {"uniform": [10, 20]}}, True),
    ],
)
def test_a_number_of_epochs_that_no_trial_has(steps: int | None, space: dict[str, Any], refused: bool) -> None:
    train = TrainConfig(**TRAIN, max_train_steps=steps)
    space = {"num_train_epochs": {"choice": [1, 2]}, **space}
    found = list(checks.problems(SweepConfig(train=train, space=space), read_space(space)))
    assert bool(found) == refused
    assert all(line.startswith("--space: num_train_epochs: has no effect with --max_train_steps") for line in found)


def test_keys_are_not_shown_with_values_that_do_not_go_together() -> None:
    space = {
        "train_data_dir": {"choice": ["s3://name:hidden@bucket/data"]},
        "caption_column": {"choice": [["one", "two"]]},
    }
    found = problems(space=space, allow_new_caches=True)
    assert len(found) == 2
    assert "hidden" not in str(found)


def warned(train: dict[str, Any], space: dict[str, Any], **settings: Any) -> list[str]:
    config = SweepConfig(train=TrainConfig(**TRAIN | train), space=space, **settings)
    return list(checks.warnings(config, config.train, config.parsed_space, 10_000))


ALONE = "trials that differ by it alone are the same"
EMA = f"ema_decay: has no effect without --use_ema; {ALONE}"


@pytest.mark.parametrize(
    ("train", "space", "found"),
    [
        ({}, {"ema_decay": {"choice": [0.9, 0.99]}}, [f"--space: {EMA}"]),
        ({"ema_decay": 0.5}, {"ema_decay": {"choice": [0.9, 0.99]}}, [f"--space: {EMA}"]),
        ({"use_ema": True}, {"ema_decay": {"choice": [0.9, 0.99]}}, []),
        ({}, {"ema_decay": {"choice": [0.9, 0.99]}, "use_ema": {"choice": [True, False]}}, []),
        ({"use_ema": True}, {"ema_decay": {"grid": [0.9, 0.99]}, "use_ema": {"grid": [False]}}, [f"--space: {EMA}"]),
        (
            {"timestep_sampling": "high_noise", "high_noise_power": 2},
            {"logit_std": {"uniform": [0.5, 2]}},
            [f"--space: logit_std: has no effect without --timestep_sampling logit_normal; {ALONE}"],
        ),
        (
            {"lr_scheduler": "polynomial"},
            {"lr_power": {"choice": [1, 2]}, "lr_num_cycles": {"choice": [1, 2]}},
            [f"--space: lr_num_cycles: has no effect without --lr_scheduler cosine_with_restarts; {ALONE}"],
        ),
        ({"huber_delta": 0.2}, {}, ["--huber_delta=0.2: has no effect without --loss huber"]),
        ({"huber_delta": 0.2}, {"loss": {"choice": ["mse", "huber"]}}, []),
    ],
)
def test_settings_without_effect_are_said(train: dict[str, Any], space: dict[str, Any], found: list[str]) -> None:
    """In the space, where no trial can have the value that they need; and among those that trials share."""
    assert warned(train, {"learning_rate": {"uniform": [0, 1]}, **space}) == found


@pytest.mark.parametrize(
    ("number", "space", "found"),
    [
        (4, {"choice": [1, 2, 3, 4]}, None),
        (5, {"choice": [1, 2, 3, 4]}, "there are 5 trials"),
        (1, {"grid": [1, 2, 3, 4]}, None),
        (16, {"grid": [1, 2, 3, 4]}, "there are 64 trials"),
        (16, {"uniform": [1, 4]}, None),
    ],
)
@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_trials_that_repeat_others_are_said(
    number: int, space: dict[str, Any], found: str | None, searcher: str
) -> None:
    if searcher == "optuna" and "grid" in space:
        return
    end = f"some trials have the same settings, and train the same; lower it to {1 if 'grid' in space else 4}"
    lines = [f"--num_samples={number}: {found}, and 4 combinations of values in the space: {end}"] if found else []
    assert warned({}, {"max_grad_norm": space}, num_samples=number, searcher=searcher) == lines


def test_the_sources_and_the_warnings_of_a_sweep(sweep_settings: dict[str, Any]) -> None:
    """Shares as `train` says them, and settings without effect."""
    rows = sweep_settings["train_data_dir"]
    shared = sweep_settings | {"train_data_dir": [rows, rows], "data_weights": [3, 1], "latents_cache_dir": None}
    config = SweepConfig(train=TrainConfig(**shared, logit_mean=1), space={"ema_decay": {"choice": [0.9]}})
    plan_sweep(config, said := io.StringIO())
    source = f"--train_data_dir={rows} has 24 rows"
    assert f"data: {source}, 0.75 of the samples; {source}, 0.25 of the samples\n" in said.getvalue()
    assert f"sweep: --space: {EMA}\n" in said.getvalue()
    assert "sweep: --logit_mean=1.0: has no effect without --timestep_sampling logit_normal\n" in said.getvalue()

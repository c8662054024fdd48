"""Optimizers by their class: what may be named, exact over a resume, counted; and what cannot be used is said."""

from __future__ import annotations

import dataclasses
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fake_rows, steps, training
from runs import Settings, equal, flags, losses, run, weights

from raycontrolnet import SweepConfig, TrainConfig
from raycontrolnet.cli import main, parse
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.named_values import as_text, read_named_values
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch.check import check
from raycontrolnet.launch.needs import Needs, StepSpec, count
from raycontrolnet.model import optimizers
from raycontrolnet.model.optim import build_optimizer
from raycontrolnet.model.optimizers import _tried as tried
from raycontrolnet.model.optimizers import copies_weights, fuses, state_bytes_per_weight, try_optimizer
from raycontrolnet.predict.count import StepCounter
from raycontrolnet.tune.checks import optimizer_problems_of

TORCHS = "torch.optim"
OWN = "own_optimizers"
GPU_FOR_CPU = torch.device("cuda")
"""In place of the CPU, which does its work."""


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data", **settings)


# --- named values ---


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("weight_decay=0.1", "weight_decay=0.1"),
        ("  betas=[0.9, 0.99]   eps=1e-8 ", "betas=[0.9, 0.99] eps=1e-08"),
        ('{"weight_decay": 0.1, "nesterov": true}', "weight_decay=0.1 nesterov=true"),
        ({"eps": ["1e-30", 1e-3], "d": None}, "eps=[1e-30, 0.001] d=null"),
        ("mode=fast", 'mode="fast"'),
        ("a=1 b", 'a="1 b"'),
        ("", ""),
    ],
)
def test_named_values_have_one_text(given: Any, text: str) -> None:
    assert as_text(given) == text
    assert as_text(text) == text
    assert as_text(read_named_values(text)) == text


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("weight_decay", "weight_decay has no value; write name=value, such as weight_decay=0.1 betas=[0.9,0.99]"),
        ("a=1 a=2", "a is there twice; give it once"),
        ("a=[1", "cannot be read; write name=value"),
        ({"a b": 1}, "a b is no name; write name=value"),
        ({"a": 2026.0, "b": float("inf")}, "must be numbers, texts, true, false, null, or lists of them"),
        ("day=2026-11-27", "must be numbers, texts"),
        ({"a": "x b=1"}, "must have no text with spaces and = in it"),
        (0.1, "must be values by name"),
    ],
)
def test_bad_named_values(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        as_text(given)


def test_flags_file_and_python_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("optimizer: torch.optim.SGD\noptimizer_args:\n  momentum: 0.9\n  weight_decay: 1e-2\n")
    minimal = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "data"]
    of_file = parse("train", ["--config", str(file), *minimal])
    given = ["--optimizer", "torch.optim.SGD", "--optimizer_args"]
    of_flags = parse("train", [*minimal, *given, "momentum=0.9", "weight_decay=0.01"])
    of_json = parse("train", [*minimal, *given, '{"momentum": 0.9, "weight_decay": 0.01}'])
    of_python = config(optimizer="torch.optim.SGD", optimizer_args={"momentum": 0.9, "weight_decay": 0.01})
    assert of_file == of_flags == of_json == of_python
    assert of_file.optimizer_args == "momentum=0.9 weight_decay=0.01"


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"optimizer": "RAdam"}, "--optimizer=RAdam: must be MODULE.CLASS, such as torch.optim.RAdam"),
        (
            {"optimizer": "torch.optim.RAdam", "use_8bit_adam": True},
            "--use_8bit_adam, --optimizer=torch.optim.RAdam: are two optimizers; leave out one",
        ),
        (
            {"optimizer": "torch.optim.RAdam", "adam_beta1": 0.8},
            "--adam_beta1=0.8: is for AdamW; give torch.optim.RAdam its arguments with --optimizer_args",
        ),
        ({"optimizer_args": "lr=1"}, "--optimizer_args=lr=1: lr: give it with --learning_rate"),
        (
            {"optimizer_args": "params=1"},
            "--optimizer_args=params=1: params: leave it out; it is the ControlNet's weights",
        ),
        ({"optimizer_args": "eps=1"}, "--optimizer_args=eps=1: eps: give it with --adam_epsilon"),
        ({"optimizer_args": "eps"}, "--optimizer_args='eps': eps has no value; write name=value"),
    ],
)
def test_settings_that_do_not_go_together(settings: Settings, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(**settings)
    (found,) = error.value.problems
    assert found.startswith(problem)


UNUSABLE = [
    ("nowhere.Adam", "", "nowhere is not installed; run pip install nowhere, or the package that has it"),
    ("torch.nowhere.Adam", "", "torch has no module torch.nowhere"),
    ("torch.optimm.RAdam", "", "torch has no module torch.optimm; perhaps you meant torch.optim"),
    ("torch.optim.adam.x.Adam", "", "torch has no module torch.optim.adam.x"),
    ("torch.optim.Adamm", "", "torch.optim has no Adamm; perhaps you meant Adam"),
    ("torch.optim.radam", "", "torch.optim has no radam; perhaps you meant RAdam"),
    (
        "torch.nn.Linear",
        "",
        "torch.nn has no optimizer of PyTorch's (torch.optim.Optimizer) called Linear; python -m p",
    ),
    ("torch.optim.LBFGS", "", "needs a closure in its step, which training here does not have; take another class"),
    (f"{OWN}.WithClosure", "", "needs a closure in its step"),
    (f"{OWN}.Switching", "", "switches the weights for every measure (eval), which training here does not do"),
    ("torch.optim.SparseAdam", "", "its update or state fails (SparseAdam does not support dense gradients, please"),
    (f"{OWN}.Unkeepable", "", "its update or state fails (Weights only load failed"),
    ("torch.optim.Muon", "", "Muon only supports 2D parameters whereas we found a parameter with size"),
    (
        "torch.optim.SGD",
        "momentumm=0.9",
        "SGD.__init__() got an unexpected keyword argument 'momentumm'; its arguments: mo",
    ),
    ("torch.optim.SGD", "nesterov=true", "Nesterov momentum requires a momentum and zero dampening; its arguments: "),
    (
        "torch.optim.RAdam",
        "betas=0.9",
        (
            "these values cannot be used ('float' object is not subscriptable); check them against the class's "
            "documentation: python -m pydoc torch.optim.RAdam"
        ),
    ),
    (
        "torch.optim.RAdam",
        'eps=1e-08 weight_decay="abc"',
        "these values cannot be used ('<=' not supported between instances of 'float' and 'str'); check them against",
    ),
    ("torch.optim.RAdam", "betas=[0.9, 2.0]", "Invalid beta parameter at index 1: 2.0; its arguments: betas, "),
    (
        "torch.optim.Adafactor",
        'beta2_decay=-0.8 d="abc"',
        "these values cannot be used ('<=' not supported between instances of 'float' and 'str'); check them against",
    ),
    (f"{OWN}.Estimating", 'momentum="abc"', "its update or state fails (mul_(): argument 'other' (position 1) must"),
    ("torch.optim.AdamW", "amsgradd=true", "AdamW.__init__() got an unexpected keyword argument 'amsgradd'; its argum"),
]


@pytest.mark.parametrize(("name", "arguments", "problem"), UNUSABLE)
def test_what_cannot_be_used(name: str, arguments: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        try_optimizer(config(optimizer=name, optimizer_args=arguments or None, use_gpu=False))
    given = f", --optimizer_args={arguments}" if arguments else ""
    assert str(error.value).startswith(f"--optimizer={name}{given}: {problem}")


def test_what_fails_on_a_cpu_alone_is_left_to_the_gpus(caplog: pytest.LogCaptureFixture) -> None:
    """The driver may have no GPU; a class of torch's fails everywhere."""
    try_optimizer(config(optimizer=f"{OWN}.Unkeepable"))
    assert f"--optimizer={OWN}.Unkeepable: its update or state fails (" in caplog.text
    assert "; the workers' GPUs decide" in caplog.text
    with pytest.raises(UserError, match="take another class"):
        try_optimizer(config(optimizer=f"{OWN}.Unkeepable"), torch.device("cpu"))
    with pytest.raises(UserError, match="take another class"):
        try_optimizer(config(optimizer="torch.optim.SparseAdam"))


@pytest.mark.parametrize("command", ["train", "check"])
def test_exit_code_2_before_anything_is_read(
    command: str, tiny_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags(tiny_settings, optimizer="torch.optim.SGD", optimizer_args="momentumm=0.9 weight_decay=0.1")
    assert main([command, *given]) == 2
    shown = capsys.readouterr().err
    assert (
        "error: --optimizer=torch.optim.SGD, --optimizer_args=momentumm=0.9 weight_decay=0.1: SGD.__init__()" in shown
    )
    assert "Traceback" not in shown


def test_fused_hides_what_the_loss_scaler_skips() -> None:
    weight = [torch.nn.Parameter(torch.zeros(2))]
    settings = config(optimizer="torch.optim.SGD", optimizer_args="fused=true", mixed_precision="fp16")
    with pytest.raises(UserError, match=r"^--optimizer_args: fused hides the updates that fp16's loss scaler skips"):
        build_optimizer(weight, settings, 1e-3, fused=False)
    assert build_optimizer(weight, settings, 1e-3).defaults["fused"] is True


# --- what it does ---


def test_adamw_by_its_name_is_the_default(tiny_settings: Settings, tmp_path: Path) -> None:
    default = run(tiny_settings, tmp_path / "default")
    named = run(tiny_settings, tmp_path / "named", optimizer="torch.optim.AdamW")
    other = run(tiny_settings, tmp_path / "other", optimizer_args="amsgrad=true maximize=true")
    assert equal(weights(default), weights(named))
    assert not equal(weights(default), weights(other))


def test_an_update_is_that_of_the_class(tiny_settings: Settings) -> None:
    changed = {"optimizer": "torch.optim.SGD", "optimizer_args": "weight_decay=0.5", "learning_rate": 1e-2}
    with training(tiny_settings | changed | {"max_grad_norm": 1e9}) as state:
        before = [value.detach().clone() for value in state.components.controlnet.parameters()]
        gradients: list[torch.Tensor] = []
        for parameter in state.components.controlnet.parameters():
            parameter.register_post_accumulate_grad_hook(lambda each: gradients.append(each.grad.clone()))
        steps(state, fake_rows(0, 1))
        assert type(state.optimizer.optimizer) is torch.optim.SGD
        moved = [old - new.detach() for old, new in zip(before, state.components.controlnet.parameters(), strict=True)]
        by_gradient = sum(float(each.square().sum()) for each in gradients)
        without_decay = [each - 1e-2 * 0.5 * old for each, old in zip(moved, before, strict=True)]
        assert sum(float(each.square().sum()) for each in without_decay) == pytest.approx(1e-4 * by_gradient, rel=1e-2)


EXACT = [
    (f"{TORCHS}.RAdam", "betas=[0.8,0.95]"),
    (f"{TORCHS}.Adafactor", None),
    (f"{TORCHS}.SGD", "momentum=0.9 nesterov=true"),
    (f"{OWN}.Estimating", "momentum=0.5"),
]


@pytest.mark.parametrize(("name", "arguments"), EXACT)
def test_exact_over_a_resume(name: str, arguments: str | None, tiny_settings: Settings, tmp_path: Path) -> None:
    settings = tiny_settings | {"optimizer": name, "optimizer_args": arguments, "lr_scheduler": "linear"}
    settings |= {"lr_warmup_steps": 1, "use_ema": True}
    straight = run(settings, tmp_path / "straight")
    stopped = run(settings, tmp_path / "stopped", resume_from_checkpoint=str(straight / "checkpoint-2"))
    assert losses(stopped) == losses(straight)[2:]
    assert equal(weights(stopped), weights(straight))
    ours, theirs = (
        torch.load(folder / "checkpoint-4" / "training_state.pt", weights_only=True) for folder in (stopped, straight)
    )
    assert (ours["optimizer_class"], ours["optimizer_package"]) == (name.rpartition(".")[2], name.partition(".")[0])
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for index, state in theirs["optimizer"]["state"].items():
        again = ours["optimizer"]["state"][index]
        assert {key: value.dtype for key, value in again.items()} == {key: value.dtype for key, value in state.items()}
        assert all(torch.equal(again[key], value) for key, value in state.items())


def test_new_arguments_on_a_resume(tiny_settings: Settings, tmp_path: Path) -> None:
    """They are those of the settings, as AdamW's; what the class itself keeps goes on."""
    settings = tiny_settings | {"optimizer": f"{OWN}.Estimating", "optimizer_args": "momentum=0.5"}
    folder = run(settings, tmp_path / "out", max_train_steps=2)
    changed = {"resume_from_checkpoint": "latest", "optimizer_args": "momentum=0.1", "learning_rate": 1e-4}
    run(settings, folder, **changed)
    saved = torch.load(folder / "checkpoint-4" / "training_state.pt", weights_only=True)
    (group,) = saved["optimizer"]["param_groups"]
    assert (group["momentum"], group["lr"], group["count"]) == (0.1, 1e-4, 4)
    assert group["estimate"] == pytest.approx(1.01**4)


@pytest.mark.parametrize("early", [True, False])
def test_another_class_is_refused(
    early: bool, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the manifest before models are read, and by the state itself."""
    folder = run(tiny_settings, tmp_path / "out", optimizer="torch.optim.RAdam", max_train_steps=2)
    if not early:
        monkeypatch.setattr("raycontrolnet.launch.resumed_run.state_problem", lambda *given: None)
    with pytest.raises(UserError) as error:
        run(tiny_settings, folder, resume_from_checkpoint="latest")
    assert str(error.value).startswith(
        "--resume_from_checkpoint=latest: checkpoint-2 holds the state of torch.optim.RAdam, and the optimizer is "
        "torch.optim.AdamW; go on with --optimizer torch.optim.RAdam, or start anew from its weights in another"
        if early
        else f"--resume_from_checkpoint: {folder / 'checkpoint-2'} does not fit these settings (it holds the state of"
    )
    run(tiny_settings, folder, resume_from_checkpoint="latest", optimizer="torch.optim.radam.RAdam")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (f"{TORCHS}.RAdam", None),
        (f"{TORCHS}.Adam", "fused=true"),
        (f"{TORCHS}.Adagrad", "fused=true"),
        (f"{TORCHS}.SGD", "fused=true momentum=0.9"),
        (f"{OWN}.OwnFused", None),
    ],
)
def test_an_update_that_is_not_finite_is_left_out(name: str, arguments: str | None, tiny_settings: Settings) -> None:
    """Weights and state wait, also in the first update, with a class that is not fused too."""
    found = []
    for spoilt in (None, 0, 1):
        with training(tiny_settings | {"optimizer": name, "optimizer_args": arguments}) as state:
            parameters = list(state.components.controlnet.parameters())
            for step in range(2 if spoilt is None else 3):
                if step == spoilt:
                    unwritten = [torch.full_like(each, 1e6) for each in parameters]
                    del unwritten  # a state that is not written has such numbers
                    handle = parameters[0].register_hook(lambda gradient: gradient * torch.inf)
                steps(state, fake_rows(0))
                if step == spoilt:
                    handle.remove()
            found.append([each.detach().clone() for each in parameters])
    straight, first, second = found
    assert all(weight.isfinite().all() for weight in straight)
    assert all(map(torch.equal, straight, first))
    assert all(map(torch.equal, straight, second))


FUSED_ON_GPUS = ["Adam", "AdamW", "SGD", "Adagrad"]


@pytest.mark.parametrize("name", [*FUSED_ON_GPUS, "RAdam"])
def test_fused_by_default_on_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take those classes of PyTorch that can be, where a user has not chosen the kernels; AdamW on CPUs too."""
    weight = [torch.nn.Parameter(torch.zeros(2))]
    settings = config(optimizer=f"{TORCHS}.{name}")
    assert bool(build_optimizer(weight, settings, 1e-3).defaults.get("fused")) == (name == "AdamW")
    monkeypatch.setattr("raycontrolnet.model.optim.fuses", lambda config, _: fuses(config, GPU_FOR_CPU))
    monkeypatch.setattr(optimizers, "_tried", lambda *given, **options: tried(*given[:2], **options))
    assert bool(build_optimizer(weight, settings, 1e-3).defaults.get("fused")) == (name in FUSED_ON_GPUS)
    assert not build_optimizer(weight, settings, 1e-3, fused=False).defaults.get("fused"), "with fp16's loss scaler"
    for chosen in ("fused=false", "foreach=false", "foreach=true"):
        if name in FUSED_ON_GPUS:
            given = config(optimizer=f"{TORCHS}.{name}", optimizer_args=chosen)
            assert not build_optimizer(weight, given, 1e-3).defaults.get("fused"), chosen


# --- memory ---


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(f"{TORCHS}.AdamW", None), (f"{TORCHS}.AdamW", "amsgrad=true"), (f"{TORCHS}.SGD", None), *EXACT],
)
def test_the_state_that_is_counted_is_there(name: str, arguments: str | None, tiny_settings: Settings) -> None:
    """By shapes alone, and in a step: single numbers are left out."""
    settings = tiny_settings | {"optimizer": name, "optimizer_args": arguments}
    prediction = count(StepSpec(TrainConfig(**settings), cached=False))
    with training(settings) as state:
        steps(state, fake_rows(0))
        tensors = [each for moments in state.optimizer.state.values() for each in moments.values()]
        expected = sum(each.numel() * each.element_size() for each in tensors if each is not None and each.dim())
    assert prediction.trained_bytes["optimizer"] == pytest.approx(expected, rel=1e-6)


def test_averages_are_counted(tiny_settings: Settings) -> None:
    without, averaged = (
        count(StepSpec(TrainConfig(**tiny_settings | {"use_ema": on}), cached=False)) for on in (False, True)
    )
    assert "averages" not in without.trained_bytes
    assert averaged.trained_bytes["averages"] == 4 * averaged.trained
    assert averaged.total(8) == without.total(8) + 4 * averaged.trained
    big = dataclasses.replace(averaged, trained=2**28)
    assert big.total(0) == big._fixed + 2**30, "a copy of them, with no activations beside it"
    room = (big.total(0) + 3 * 2**30 + big.activations(5)) / 0.97
    largest = big.largest_batch(room)
    assert big.total(largest) + 3 * 2**30 <= room * 0.97 < big.total(largest + 1) + 3 * 2**30


def test_check_and_the_disk_count_them(tiny_settings: Settings) -> None:
    """A checkpoint has the weights, their averages, and the optimizer's state: here one number a weight."""
    stream = io.StringIO()
    changed = {"use_ema": True, "optimizer": "torch.optim.SGD", "optimizer_args": "momentum=0.9"}
    train = TrainConfig(**tiny_settings | changed)
    prediction = check(CheckConfig(train=train), stream=stream)
    rows = [line.split()[:3] for line in stream.getvalue().splitlines() if line.startswith("  ")]
    sizes = {name: size for name, *size in rows}
    assert sizes["averages"] == sizes["optimizer"] == sizes["gradients"]
    one = Needs.of(StepSpec(train), prediction).checkpoint_bytes
    assert one == 3 * prediction.trained_bytes["ControlNet"]


def test_what_cannot_be_counted_is_taken_for_adamw(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert state_bytes_per_weight(config(optimizer="nowhere.Adam")) == 8
    assert "the state of nowhere.Adam is not counted" in caplog.text


# --- sweeps ---


def test_trials_with_optimizers_that_cannot_be_used() -> None:
    """Each class with all arguments that trials may draw."""
    space = {
        "optimizer": {"choice": ["torch.optim.AdamW", "torch.optim.SGD"]},
        "optimizer_args": {"choice": [{"maximize": True}, "nesterov=true"]},
    }
    found = optimizer_problems_of(config(), SweepConfig(train=config(), space=space).parsed_space)
    assert len(found) == 2
    trial = "--space: optimizer torch.optim.AdamW, optimizer_args nesterov=true"
    assert found[0].startswith(
        f"{trial}: --optimizer=torch.optim.AdamW, --optimizer_args=nesterov=true: AdamW.__init__()"
    )
    fitting = {
        "optimizer": {"choice": ["torch.optim.AdamW", "torch.optim.RAdam"]},
        "learning_rate": {"loguniform": [1e-5, 1e-3]},
        "use_ema": {"choice": [True, False]},
    }
    assert optimizer_problems_of(config(), SweepConfig(train=config(), space=fitting).parsed_space) == []
    mixed = fitting | {"adam_beta1": {"uniform": [0.8, 0.9]}}
    with pytest.raises(ConfigError) as error:
        SweepConfig(train=config(), space=mixed)
    own = "is for AdamW; give torch.optim.RAdam its arguments with --optimizer_args"
    assert error.value.problems == (f"--space: optimizer torch.optim.RAdam, adam_beta1 0.8: --adam_beta1=0.8: {own}",)
    others = {
        "optimizer": {"choice": ["torch.optim.RAdam", "torch.optim.SGD"]},
        "optimizer_args": {"choice": ["betas=[0.8,0.9]"]},
    }
    (problem,) = optimizer_problems_of(config(), SweepConfig(train=config(), space=others).parsed_space)
    assert "--optimizer=torch.optim.SGD, --optimizer_args=betas=[0.8, 0.9]: SGD.__init__() got an unexpected" in problem


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        ({}, False),
        ({"mixed_precision": "fp16"}, True),
        ({"use_8bit_adam": True}, False),
        ({"optimizer": "torch.optim.RAdam"}, True),
        ({"optimizer": "torch.optim.Adagrad"}, False),
        ({"optimizer": "torch.optim.RAdam", "optimizer_args": "foreach=false"}, False),
        ({"optimizer_args": "foreach=true"}, True),
        ({"optimizer_args": "fused=false"}, False),
        ({"optimizer": "torch.optim.Adafactor", "optimizer_args": "foreach=false"}, False),
    ],
)
def test_optimizers_that_copy_the_weights(settings: dict[str, Any], copies: bool) -> None:
    assert copies_weights(config(**settings)) is copies


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "Adamax", "RMSprop"])
def test_what_an_update_of_all_weights_together_takes(name: str) -> None:
    """A copy of them; only Adadelta makes two."""
    weights = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(8)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = getattr(torch.optim, name)(weights, foreach=True)
    optimizer.step()
    counter = StepCounter(1)
    with counter:
        optimizer.step()
    assert counter.of(1).activations == pytest.approx(sum(weight.nbytes for weight in weights), rel=0.01)

"""Learning-rate curves are those of diffusers' get_scheduler, counted in updates; the optimizer gets its settings."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fake_rows, steps, training
from runs import column, equal, losses, run, weights
from torch.multiprocessing.spawn import spawn

from raycontrolnet.config.settings import LR_SCHEDULERS
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch.fit import fit
from raycontrolnet.model.optim import build_lr_scheduler, build_optimizer
from raycontrolnet.training.schedule import Schedule, Share
from raycontrolnet.training.state import accelerator_for, build_state

UPDATES = 6
CURVE: dict[str, Any] = {
    "max_train_steps": UPDATES,
    "checkpointing_steps": UPDATES,
    "lr_warmup_steps": 2,
    "lr_num_cycles": 2,
    "lr_power": 2.0,
    "learning_rate": 1e-3,
    "scale_lr": True,
    "train_batch_size": 2,
}


def expected_curve(scheduler: str, learning_rate: float, updates: int = UPDATES) -> list[float]:
    """Return the learning rate of each update."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    lr_scheduler = get_scheduler(
        scheduler, optimizer=optimizer, num_warmup_steps=2, num_training_steps=updates, num_cycles=2, power=2.0
    )
    curve = []
    for _ in range(updates):
        curve.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        lr_scheduler.step()
    return curve


def test_the_expected_curves_are_six_different_ones() -> None:
    curves = {name: expected_curve(name, 1.0) for name in LR_SCHEDULERS}
    assert len({tuple(curve) for curve in curves.values()}) == len(curves) == 6
    assert curves.pop("constant") == [1.0] * UPDATES, "constant ignores the warm-up"
    for curve in curves.values():
        assert curve[:3] == [0, 0.5, 1]


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
def test_curves_of_a_run(scheduler: str, accumulation: int, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = tiny_settings | CURVE | {"lr_scheduler": scheduler, "gradient_accumulation_steps": accumulation}
    out = run(settings, tmp_path)
    assert column(out, "step") == list(range(1, UPDATES + 1))
    assert column(out, "lr") == expected_curve(scheduler, 1e-3 * accumulation * 2)


def test_without_scale_lr(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    changed = {"scale_lr": False, "gradient_accumulation_steps": 3, "lr_scheduler": "linear"}
    assert column(run(tiny_settings | CURVE | changed, tmp_path), "lr") == expected_curve("linear", 1e-3)


def test_the_length_of_a_curve_counts_epochs_in_updates(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """13 rows, batch 2, accumulation 3: 7 batches, 3 updates an epoch."""
    changed = {"max_train_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": 3, "scale_lr": False}
    out = run(tiny_settings | CURVE | changed | {"lr_scheduler": "polynomial"}, tmp_path)
    assert column(out, "lr") == expected_curve("polynomial", 1e-3, 9)


@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
def test_a_curve_goes_on_after_any_update(scheduler: str) -> None:
    optim = TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", **CURVE | {"lr_scheduler": scheduler})
    for done in range(UPDATES):
        optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], optim, 1e-3)
        lr_scheduler = build_lr_scheduler(optim, optimizer, UPDATES, done)
        curve = []
        for _ in range(done, UPDATES):
            curve.append(optimizer.param_groups[0]["lr"])
            assert lr_scheduler.get_last_lr() == curve[-1:]
            optimizer.step()
            lr_scheduler.step()
        assert curve == expected_curve(scheduler, 1e-3)[done:]


# --- two workers ---


def worker(rank: int, folder: str, settings: dict[str, Any]) -> None:
    """Set up what Ray Train does for a worker of two, then update with every scheduler."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for scheduler, accumulation in [(each, 1) for each in LR_SCHEDULERS] + [("linear", 3)]:
        config = TrainConfig(**settings | {"lr_scheduler": scheduler, "gradient_accumulation_steps": accumulation})
        plan = Schedule.of(config, 13, 2)
        with accelerator_for(config, use_gpu=False, world_size=2) as accelerator:
            assert accelerator.num_processes == 2
            state = build_state(config, plan, accelerator, None, None)
            batches = []
            for micro_step in range(UPDATES * accumulation):
                first = Share(rank, 2, plan.micro_batches).place(micro_step) * plan.batch_size
                batches.append(fake_rows(*range(first, first + plan.batch_size)))
            results = steps(state, *batches)
            weights = torch.cat([value.flatten() for value in state.components.controlnet.parameters()])
            found[f"{scheduler} {accumulation}"] = {
                "lr": [result.lr for result in results if result.grad_norm is not None],
                "grad_norm": [float(result.grad_norm) for result in results if result.grad_norm is not None],
                "losses": [float(accelerator.reduce(result.loss, reduction="mean")) for result in results],
                "weights": weights.double().sum().item(),
                "samples": state.samples,
            }
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_curves_of_two_workers(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """The same as of one: get_scheduler in updates. And two workers with half the batch train alike."""
    settings = tiny_settings | CURVE
    spawn(worker, (str(tmp_path), settings), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 7
    assert first == second, "both workers hold the same weights"
    for key, found in first.items():
        scheduler, accumulation = key.split()
        assert found["lr"] == expected_curve(scheduler, 1e-3 * 2 * int(accumulation) * 2)
        assert found["samples"] == UPDATES * int(accumulation) * 2 * 2
    one_worker = settings | {"train_batch_size": 4, "lr_scheduler": "linear"}
    with training(one_worker) as state:
        results = steps(state, *(fake_rows(*range(k, k + 4)) for k in range(0, 4 * UPDATES, 4)))
    found = first["linear 1"]
    assert [float(result.loss) for result in results] == pytest.approx(found["losses"], abs=1e-5)
    assert [float(result.grad_norm) for result in results] == pytest.approx(found["grad_norm"], rel=1e-3)


# --- the optimizer ---


def test_adamw_gets_its_settings(tiny_settings: dict[str, Any]) -> None:
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.3, "adam_epsilon": 1e-5}
    with training(tiny_settings | adam | {"learning_rate": 2e-4}) as state:
        assert type(state.optimizer.optimizer) is torch.optim.AdamW
        (group,) = state.optimizer.param_groups
        found = {name: group[name] for name in ("lr", "betas", "weight_decay", "eps")}
        assert found == {"lr": 2e-4, "betas": (0.8, 0.95), "weight_decay": 0.3, "eps": 1e-5}
        assert state.max_grad_norm == 1.0


def test_an_update_is_adamws(tiny_settings: dict[str, Any]) -> None:
    """The first one, written out: decay, then lr x g / (|g| + eps)."""
    changed = {"adam_epsilon": 1e-3, "adam_weight_decay": 0.5, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    with training(tiny_settings | changed) as state:
        before = [value.detach().clone() for value in state.components.controlnet.parameters()]
        steps(state, fake_rows(0, 1))
        for old, new in zip(before, state.components.controlnet.parameters(), strict=True):
            gradient = state.optimizer.state[new]["exp_avg"] / (1 - 0.9)
            expected = old * (1 - 1e-2 * 0.5) - 1e-2 * gradient / (gradient.abs() + 1e-3)
            torch.testing.assert_close(new.detach(), expected, rtol=1e-4, atol=1e-6)


MISSING = "--use_8bit_adam: bitsandbytes is not installed; run pip install 'raycontrolnet[8bit]'"


def test_8bit_adam_without_its_package(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by the driver before anything is loaded, and by a worker on another machine."""
    find_spec = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    config = TrainConfig(**tiny_settings | {"use_8bit_adam": True})
    with pytest.raises(ConfigError) as error:
        fit(config)
    assert error.value.problems == (MISSING,)
    with pytest.raises(UserError) as worker_error:
        build_optimizer([torch.nn.Parameter(torch.zeros(1))], config, 1e-3)
    assert str(worker_error.value) == MISSING


def quantised(output_dir: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    """Return the moments of a checkpoint, with bitsandbytes' maps and scales: parameter -> name -> tensor."""
    path = output_dir / f"checkpoint-{step}" / "training_state.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["optimizer"]["state"]
    return {index: flat(moment) for index, moment in state.items()}


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors, and numbers as tensors, of a state that may be nested."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        found |= flat(value) if isinstance(value, dict) else {name: torch.as_tensor(value)}
    return found


def test_8bit_adam(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Trains with 8-bit moments, and goes on from a checkpoint as if it had never stopped, bit for bit."""
    pytest.importorskip("bitsandbytes")
    settings = tiny_settings | {
        "use_8bit_adam": True,
        "adam_beta1": 0.8,
        "adam_weight_decay": 0.1,
        "lr_warmup_steps": 1,
    }
    with training(settings) as state:
        assert type(state.optimizer.optimizer).__name__ == "AdamW8bit"
        (group,) = state.optimizer.param_groups
        assert (group["betas"], group["weight_decay"]) == ((0.8, 0.999), 0.1)
        steps(state, fake_rows(0))
        assert torch.uint8 in {moment["state1"].dtype for moment in state.optimizer.state.values()}
    out = run(settings, tmp_path / "out")
    settings["resume_from_checkpoint"] = str(out / "checkpoint-2")
    resumed = run(settings, tmp_path / "resumed")
    assert equal(weights(resumed), weights(out))
    assert losses(resumed) == losses(out)[2:]
    ours, theirs = quantised(resumed, 4), quantised(out, 4)
    assert ours.keys() == theirs.keys()
    assert all(equal(ours[index], theirs[index]) for index in ours)
    in_8bit = [moment for moment in theirs.values() if moment["state1"].dtype == torch.uint8]
    assert in_8bit, "tensors of fewer than 4,096 weights keep their moments in fp32"
    for moment in in_8bit:
        assert {"qmap1", "qmap2", "absmax1", "absmax2", "step"} <= moment.keys()
        assert moment["state2"].dtype == torch.uint8
        assert moment["state1"].unique().numel() > 16
        assert moment["absmax1"].count_nonzero()
    before = quantised(out, 2)
    assert not any(torch.equal(moment["state1"], theirs[index]["state1"]) for index, moment in before.items())
    with pytest.raises(UserError, match=r"checkpoint-2 holds the state of bitsandbytes\..*AdamW8bit, and "):
        run(settings, tmp_path / "other", use_8bit_adam=False)

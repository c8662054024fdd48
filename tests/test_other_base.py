"""Runs that go on with another base model than they began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_model import write_random_base
from reference import CPU
from runs import Settings, run

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.model.components import load_components

LONGEST_LINE = 250


@pytest.fixture(scope="module")
def wider_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a base of the tiny one's family, and of another width."""
    return write_random_base(tmp_path_factory.mktemp("wider"), "small")


@pytest.mark.parametrize(
    ("of", "other", "problem"),
    [
        ("tiny_base", "tiny_xl_base", "made for another family of base models (Stable Diffusion 1.x and 2.x; "),
        ("tiny_xl_base", "tiny_base", "made for another family of base models (Stable Diffusion XL; "),
        ("tiny_base", "wider_base", "made for another base model (cross_attention_dim 16, "),
    ],
)
def test_a_checkpoint_of_another_base(
    of: str, other: str, problem: str, run_settings: Settings, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Refused before models are read, and where only a worker sees the base model."""
    bases = [str(request.getfixturevalue(name)) for name in (of, other)]
    out = run(run_settings | {"pretrained_model_name_or_path": bases[0], "max_train_steps": 2}, tmp_path / "out")
    with pytest.raises(ConfigError) as refused:
        run(run_settings | {"pretrained_model_name_or_path": bases[1]}, out, resume_from_checkpoint="latest")
    (message,) = refused.value.problems
    assert message.startswith(f"--resume_from_checkpoint=latest: checkpoint-2 was {problem}")
    assert message.endswith("; name the base model that it was trained on, or start anew in another --output_dir")
    assert len(message) <= LONGEST_LINE
    with pytest.raises(UserError) as late:
        load_components(
            ModelConfig(pretrained_model_name_or_path=bases[1]),
            device=CPU, dtype=torch.float32, seed=0, controlnet_path=str(out / "checkpoint-2" / "controlnet"),
        )  # fmt: skip
    assert f"checkpoint-2/controlnet: {problem}" in str(late.value)

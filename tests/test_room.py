"""Room on the disk, and in a quota, is looked for before Ray starts and models are read."""

from __future__ import annotations

import errno
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import Settings

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch import preflight
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.model.components import load_controlnet
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION
from raycontrolnet.model.size import controlnet_bytes_at_least
from raycontrolnet.storage import quota
from raycontrolnet.storage.run_folder import RunFolder


@pytest.fixture
def check(tiny_settings: Settings) -> Callable[..., CheckedRun]:
    """Return check(**settings): what is checked before Ray starts and models are read."""

    def check(**changed: object) -> CheckedRun:
        settings = tiny_settings | {"checkpointing_steps": 1} | changed
        return preflight.check(TrainConfig(**settings), RunFolder(settings["output_dir"]))

    return check


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return allowed(bytes, file_system): a quota allows that many more; gives what was asked for."""

    def allowed(num_bytes: int, file_system: str = "ext4", refusal: int = errno.EDQUOT) -> list[int]:
        asked: list[int] = []

        def fallocate(_: int, wanted: int) -> int:
            asked.append(wanted)
            return refusal if wanted > num_bytes else 0

        monkeypatch.setattr(quota, "_fallocate", fallocate)
        monkeypatch.setattr(quota, "_file_system", lambda folder: file_system)
        return asked

    return allowed


@pytest.fixture
def some_bytes(tiny_settings: Settings) -> int:
    """Return what the driver knows of the ControlNet's size."""
    return controlnet_bytes_at_least(TrainConfig(**tiny_settings))


def test_a_disk_without_room(
    check: Callable[..., object], tiny_settings: Settings, some_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four checkpoints of three times the weights, and the weights."""
    free = SimpleNamespace(free=13 * some_bytes, total=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check()
    free.free -= 1
    with pytest.raises(
        UserError, match=r" 4 checkpoints of at least .* and the weights need .* are free; keep fewer "
    ) as (error):
        check()
    assert str(error.value).startswith(f"--output_dir={tiny_settings['output_dir']}: ")
    check(checkpoints_total_limit=1)
    check(max_train_steps=3)
    free.total = 0  # of a file system that does not tell
    check()


@pytest.mark.parametrize(
    ("changed", "one"),
    [({"use_ema": True}, 4), ({"optimizer": "torch.optim.SGD"}, 1), ({"optimizer_args": "amsgrad=true"}, 4)],
)
def test_room_for_averages_and_for_the_optimizers_state(
    changed: Settings, one: int, check: Callable[..., object], allowed: Callable[..., list[int]], some_bytes: int
) -> None:
    """Four checkpoints, each `one` times the weights, and the weights."""
    asked = allowed(100 * some_bytes)
    check(**changed)
    assert asked == [(4 * one + 1) * some_bytes]


def test_a_quota_that_does_not_allow_it(
    check: Callable[..., object], allowed: Callable[..., list[int]], some_bytes: int
) -> None:
    asked = allowed(13 * some_bytes)
    check()
    assert asked == [13 * some_bytes]
    allowed(13 * some_bytes - 1)
    with pytest.raises(
        UserError, match=r"^--output_dir=.*, which your quota there does not allow; keep fewer with --ch"
    ):
        check()
    check(checkpoints_total_limit=2)


@pytest.mark.parametrize(
    ("file_system", "refusal", "is_asked"),
    [("tmpfs", errno.EDQUOT, False), ("", errno.EDQUOT, False), ("nfs4", errno.EOPNOTSUPP, True)],
)
def test_where_room_cannot_be_reserved_at_once(
    check: Callable[..., object], allowed: Callable[..., list[int]], file_system: str, refusal: int, is_asked: bool
) -> None:
    """The run begins: a write that fails is explained then."""
    asked = allowed(0, file_system, refusal)
    check()
    assert bool(asked) == is_asked


def test_a_quota_that_does_not_allow_the_latents(
    tiny_settings: Settings, allowed: Callable[..., list[int]], tmp_path: Path
) -> None:
    allowed(1000)
    settings = tiny_settings | {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents")}
    with pytest.raises(
        ConfigError, match=r"^--latents_cache_dir=.* are needed there, which your quota does not allow; "
    ):
        prepare(TrainConfig(**settings), stream=io.StringIO())


def test_reserving_leaves_nothing(tmp_path: Path) -> None:
    before = shutil.disk_usage(tmp_path).free
    assert not quota.quota_forbids(tmp_path, 2**24)
    assert list(tmp_path.iterdir()) == []
    assert shutil.disk_usage(tmp_path).free > before - 2**24
    with (tmp_path / "file").open("wb") as file:
        assert quota._fallocate(file.fileno(), -1) == errno.EINVAL


def test_the_size_before_weights_are_read(tiny_settings: Settings, tiny_base: Path, tmp_path: Path) -> None:
    """All of a ControlNet, what is copied of a UNet; nothing is known of the Hub's models, and of other formats."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    copy = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet"))
    copy.save_pretrained(tmp_path / "controlnet")
    loaded = load_controlnet(str(tmp_path / "controlnet"), STABLE_DIFFUSION)
    whole = 4 * sum(value.numel() for value in loaded.parameters())
    own = 4 * sum(value.numel() for name, value in copy.named_parameters() if name.startswith("controlnet_"))
    config = TrainConfig(**tiny_settings)
    assert controlnet_bytes_at_least(config) == whole - own
    named = TrainConfig(**tiny_settings | {"controlnet_model_name_or_path": str(tmp_path / "controlnet")})
    assert controlnet_bytes_at_least(named) == whole
    for other in ("runwayml/stable-diffusion-v1-5", str(tmp_path)):
        assert controlnet_bytes_at_least(TrainConfig(**tiny_settings | {"pretrained_model_name_or_path": other})) == 0
    (tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs")
    assert controlnet_bytes_at_least(named) == 0

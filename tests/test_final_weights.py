"""Final weights in half precision and as one file: what is written, what reads it, and what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_stand_in import HubStandIn, take_for_hub
from PIL import Image
from runs import WEIGHTS, Run, Settings, equal, losses, metadata, train, weights
from s3_server import BUCKET, S3Server, elsewhere, s3, use_s3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raycontrolnet import GenerateConfig, TrainConfig, cli, fit, generate
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.hub.push import push_command, push_to_hub
from raycontrolnet.model.families.registry import families
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import final_weights, validation
from raycontrolnet.tune.records import Trial, TrialRecord
from raycontrolnet.tune.results import write_best

__all__ = ["elsewhere", "s3", "use_s3"]  # fixtures

ONE_FILE = "my-circles.v2.safetensors"


@pytest.fixture(scope="module")
def half(validated_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train to fp16 and one file. Do not write into its folder."""
    changed = {"save_precision": "fp16", "save_name": "my-circles.v2", "num_validation_images": 1, "report_to": "none"}
    return train(validated_settings | changed | {"output_dir": str(tmp_path_factory.mktemp("half") / "run")})


def checkpoint(folder: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "controlnet" / WEIGHTS)


def test_half_precision(half: Run) -> None:
    """The weights are the checkpoint's, rounded; the checkpoint's are whole."""
    from diffusers import ControlNetModel

    exact = checkpoint(half.folder)
    assert {value.dtype for value in exact.values()} == {torch.float32}
    assert equal(weights(half.folder), {name: value.half() for name, value in exact.items()})
    assert not list(half.folder.glob(".*partial"))
    assert ControlNetModel.from_pretrained(half.folder, torch_dtype=torch.float16).dtype == torch.float16


def test_one_file(half: Run) -> None:
    """It holds the same weights under diffusers' names, by which other programs know a ControlNet."""
    file = half.folder / ONE_FILE
    assert equal(load_file(file), weights(half.folder))
    assert "controlnet_cond_embedding.conv_in.weight" in load_file(file)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "ModelSpec has no name for a base as tiny"
    assert file.stat().st_mode == (half.folder / "run.json").stat().st_mode
    card = (half.folder / "README.md").read_text()
    assert f"one file, `{ONE_FILE}`: put it into\n`models/controlnet` (ComfyUI)" in card
    assert '`save_precision`: `"fp16"`' in card


@pytest.mark.parametrize(
    ("controlnet", "prediction_type", "architecture", "predicted"),
    [
        ({"cross_attention_dim": 768}, "epsilon", "stable-diffusion-v1/controlnet", "epsilon"),
        ({"cross_attention_dim": 1024}, "v_prediction", "stable-diffusion-v2-768-v/controlnet", "v"),
        ({"cross_attention_dim": 1024}, "epsilon", "stable-diffusion-v2-512/controlnet", "epsilon"),
        (
            {"cross_attention_dim": 2048, "addition_embed_type": "text_time"},
            "epsilon", "stable-diffusion-xl-v1-base/controlnet", "epsilon",
        ),
    ],
)  # fmt: skip
def test_modelspec(controlnet: dict[str, Any], prediction_type: str, architecture: str, predicted: str) -> None:
    config = TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_name="edges", resolution=768)
    found = final_weights.modelspec(controlnet, config, prediction_type=prediction_type)
    assert found == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": "edges",
        "modelspec.resolution": "768x768",
        "modelspec.prediction_type": predicted,
    }
    assert families()[0].modelspec_architecture({"cross_attention_dim": 1024}, None) is None


def test_images_are_of_what_was_saved(
    half: Run, validated_settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last validation's, and those that `generate` draws from the folder: what is saved is not what was trained."""
    write = final_weights.write_weights

    def write_others(found: dict[str, torch.Tensor], *args: Any) -> None:
        write({name: value + 0.5 * name.startswith("controlnet_") for name, value in found.items()}, *args)

    monkeypatch.setattr(final_weights, "write_weights", write_others)
    changed = {"save_precision": "fp16", "num_validation_images": 1, "report_to": "none"}
    others = train(validated_settings | changed | {"output_dir": str(tmp_path / "others")})
    config = GenerateConfig(
        controlnet=str(others.folder), prompt=validated_settings["validation_prompt"], num_images=1, seed=7,
        image=validated_settings["validation_image"], out=str(tmp_path / "drawn"), use_gpu=False,
    )  # fmt: skip
    generate(config, stream=io.StringIO())
    last, trained = validation.step_folder(others.folder, 4), validation.step_folder(half.folder, 4)
    names = [row["file_name"] for row in metadata(last)]
    assert len(names) == 2
    for name in names:
        assert Image.open(last / name).tobytes() == Image.open(tmp_path / "drawn" / name).tobytes()
        assert Image.open(last / name).tobytes() != Image.open(trained / name).tobytes()


def test_a_resumed_run_is_exact(half: Run, validated_run: Run, tmp_path: Path, validated_settings: Settings) -> None:
    """Checkpoints have the weights of a run in fp32; the final weights can be written anew in another precision."""
    assert losses(half.folder) == losses(validated_run.folder)
    assert equal(checkpoint(half.folder), checkpoint(validated_run.folder))
    copy = shutil.copytree(half.folder, tmp_path / "run")
    shutil.rmtree(copy / "checkpoint-4")
    changed = {"save_precision": "bf16", "resume_from_checkpoint": "latest", "validation_prompt": None}
    changed |= {"validation_image": None, "control_fidelity": None, "report_to": "none"}
    train(validated_settings | changed | {"output_dir": str(copy)})
    assert losses(copy) == losses(half.folder)
    assert equal(checkpoint(copy), checkpoint(half.folder))
    assert equal(weights(copy), {name: value.bfloat16() for name, value in checkpoint(copy).items()})


def test_weights_that_a_precision_cannot_hold(half: Run, tmp_path: Path) -> None:
    config = TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_precision="fp16")
    large = checkpoint(half.folder)
    large["controlnet_mid_block.weight"][0, 0] = 1e6
    with pytest.raises(OverflowError, match=r"cannot hold controlnet_mid_block.weight \(up to 1e\+06\)"):
        final_weights.write_weights(large, tmp_path, config, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["my-circles.v2", None])
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_best_of_a_sweep(state: str, name: str | None, half: Run, validated_settings: Settings, tmp_path: Path) -> None:
    """It is written as a run's, also of the last checkpoint of a trial that was stopped, which is fp32."""
    folder = Path(shutil.copytree(half.folder, tmp_path / "trials" / "0000"))
    if state == "stopped":
        shutil.rmtree(folder / "checkpoint-4")
    given = validated_settings | {"save_precision": "fp16", "save_name": name, "output_dir": str(tmp_path)}
    config, sweep = TrainConfig(**given), RunFolder(str(tmp_path))
    plan: Any = SimpleNamespace(folder=sweep, sweep_dir=tmp_path, train=config, config_of=lambda *_: config)
    reports = ({"step": 2}, {"step": 4})
    best = write_best(plan, Trial(TrialRecord(0, {}, state=state), folder, reports), {"mixed_precision": None})
    assert {path.name for path in best.iterdir()} >= {"config.json", WEIGHTS, "README.md"}
    assert [path.name for path in best.glob("*.safetensors") if path.name != WEIGHTS] == ([ONE_FILE] if name else [])
    exact = checkpoint(half.folder, step=4 if state == "finished" else 2)
    assert equal(weights(best), {key: value.half() for key, value in exact.items()})
    if state == "finished":
        assert (best / WEIGHTS).read_bytes() == (half.folder / WEIGHTS).read_bytes()
    assert (f"`{ONE_FILE}`" in (best / "README.md").read_text()) == bool(name)


def test_best_that_fp16_cannot_hold(
    half: Run, validated_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is written in bf16, which its card and settings say: the sweep has done its work."""
    folder = Path(shutil.copytree(half.folder, tmp_path / "trials" / "0000"))
    shutil.rmtree(folder / "checkpoint-4")
    large = checkpoint(folder, step=2)
    large["controlnet_mid_block.weight"][0, 0] = 1e6
    save_file(large, folder / "checkpoint-2" / "controlnet" / WEIGHTS, {"format": "pt"})
    given = validated_settings | {"save_precision": "fp16", "output_dir": str(tmp_path)}
    config, sweep = TrainConfig(**given), RunFolder(str(tmp_path))
    plan: Any = SimpleNamespace(folder=sweep, sweep_dir=tmp_path, train=config, config_of=lambda *_: config)
    best = write_best(
        plan, Trial(TrialRecord(0, {}, state="stopped"), folder, ({"step": 2},)), {"mixed_precision": None}
    )
    assert equal(weights(best), {name: value.bfloat16() for name, value in large.items()})
    assert "save_precision: bf16" in (best / "config.yaml").read_text()
    assert '`save_precision`: `"bf16"`' in (best / "README.md").read_text()
    assert "--save_precision=fp16: cannot hold controlnet_mid_block.weight (up to 1e+06); best/ has bf16" in caplog.text


@pytest.mark.usefixtures("elsewhere")
def test_in_an_object_store(use_s3: S3Server, run_settings: Settings) -> None:
    changed = {"max_train_steps": 1, "save_precision": "bf16", "save_name": "edges"}
    fit(TrainConfig(**run_settings | changed | {"output_dir": f"s3://{BUCKET}/one-file"}), stream=io.StringIO())
    assert {f"one-file/{name}" for name in ("config.json", WEIGHTS, "edges.safetensors")} <= set(
        use_s3.names("one-file/")
    )
    assert use_s3.read("one-file/edges.safetensors") == use_s3.read(f"one-file/{WEIGHTS}")


def test_the_push_has_it(half: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubStandIn("hf_Right") as hub:
        take_for_hub(hub.url, monkeypatch)
        push_to_hub(half.folder, repo_id="someone/edges", token="hf_Right", single_file=ONE_FILE)
    assert hub.files["someone/edges"][ONE_FILE] == (half.folder / ONE_FILE).read_bytes()
    assert {WEIGHTS, "config.json", "README.md"} < hub.files["someone/edges"].keys()
    assert push_command(half.folder, "someone/edges", ONE_FILE).endswith(f" --include {ONE_FILE}")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("folder/edges", "must be a name of letters, digits, and . _ + -; the file is written to --output_dir"),
        ("folder\\edges", "must be a name of letters"),
        ("..", "must be a name of letters"),
        ("edges*", "must be a name of letters"),
        ("edges.safetensors", "leave out .safetensors, which is added"),
        ("diffusion_pytorch_model", "is a name of diffusers' own files; take one that does not begin with"),
        ("Diffusion_pytorch_model.fp16", "is a name of diffusers' own files"),
        ("e" * 101, "is too long; use at most 100 letters"),
    ],
)
def test_refused_names(name: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--pretrained_model_name_or_path", "b", "--train_data_dir", "d", "--save_name", name]
    assert cli.main(["train", *flags]) == 2
    shown = capsys.readouterr().err
    assert f"--save_name={name[:100]}: {problem}" in shown
    assert max(map(len, shown.splitlines())) <= 250
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", ["edges", "my-canny_sdxl.v1.5+", "Kanten-über-alles", "model"])
def test_good_names(name: str) -> None:
    assert TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_name=name).single_file == (
        f"{name}.safetensors"
    )


@pytest.mark.parametrize("precision", ["half", "float16", "FP16"])
def test_refused_precisions(precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"--save_precision={precision}: must be one of fp32, fp16, bf16"):
        TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_precision=precision)


def test_an_overflow_names_the_way_out(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(*_: object) -> None:
        raise OverflowError("cannot hold conv_in.weight (up to 1e+06)")

    monkeypatch.setattr(final_weights, "write_weights", overflow)
    with pytest.raises(RunError, match=r"--save_precision=fp16: cannot hold conv_in.weight .* --save_precision bf16"):
        fit(TrainConfig(**tiny_settings | {"save_precision": "fp16", "max_train_steps": 1}), stream=io.StringIO())

"""Models that cannot be used are refused by `check`, from their small files, before Ray, latents and weights."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_stand_in import HubStandIn, take_for_hub
from runs import equal
from safetensors.torch import load_file, save_file
from single_files import write_single_file

from raycontrolnet.cli import main
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.config.train_config import TrainConfig, names_with
from raycontrolnet.errors import ConfigError
from raycontrolnet.latents.prepare import prepare
from raycontrolnet.launch.preflight import check
from raycontrolnet.model import files, kinds
from raycontrolnet.model.families.registry import denoiser_problem, trained
from raycontrolnet.model.paths import model_path_problem
from raycontrolnet.model.problems import model_problems
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.uri import shown_name
from raycontrolnet.tune.checks import differences, problems

TOKEN = "hf_TheRightToken"
BASE = "someone/base"
LONGEST_LINE = 250
"""Letters of a message without the value, which may be a long path."""
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as hub:
        take_for_hub(hub.url, monkeypatch)
        yield hub


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def upload(hub: HubStandIn, folder: Path, repository: str = BASE) -> None:
    """Let the Hub have the names of all files, and the content of the small ones."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    hub.models[repository] = {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.suffix == ".json" else b"" for path in paths
    }


def problem(name: str | Path, *, elsewhere: bool = False, **settings: Any) -> str | None:
    """Return the one problem of a base model, without the flag and the value."""
    model = ModelConfig(pretrained_model_name_or_path=str(name), **settings)
    found = list(model_problems(model, TOKEN, elsewhere=elsewhere))
    assert len(found) <= 1
    if not found:
        return None
    start = f"--pretrained_model_name_or_path={shown_name(str(name))}: "
    assert found[0].startswith(start)
    assert len(found[0]) - len(str(name)) <= LONGEST_LINE
    assert "\n" not in found[0]
    return found[0].removeprefix(start)


KINDS = [
    ({"in_channels": 9}, "an inpainting model (UNet with 9 input channels)"),
    ({"in_channels": 8}, "a model that starts from an image, such as InstructPix2Pix (UNet with 8 input channels)"),
    ({"in_channels": 7, "num_class_embeds": 1000}, "an upscaler (UNet with 7 input channels)"),
    ({"in_channels": 5}, "a depth-to-image model (UNet with 5 input channels)"),
    (
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
        "an unCLIP or another model conditioned on more than text (UNet with class_embed_type projection)",
    ),
    ({"num_class_embeds": 10}, "a model conditioned on classes (UNet with num_class_embeds 10)"),
    ({"time_cond_proj_dim": 256}, "an LCM-distilled model (UNet with time_cond_proj_dim)"),
    (
        {
            "addition_embed_type": "text_time",
            "cross_attention_dim": 1280,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "an SDXL refiner, which only finishes images",
    ),
    (
        {"addition_embed_type": "text_time", "in_channels": 9},
        "an inpainting model (UNet with 9 input channels), of SDXL",
    ),
    ({"addition_embed_type": "image"}, "a model of another family (UNet with addition_embed_type image)"),
    ({"encoder_hid_dim_type": "text_proj"}, "a model of another family (UNet with encoder_hid_dim_type text_proj)"),
    ({"attention_type": "gated"}, "a GLIGEN model or one like it (UNet with attention_type gated)"),
    ({"mid_block_type": None}, "a model whose UNet ControlNets cannot be copied from (without a mid block)"),
    (
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        "a model whose UNet ControlNets cannot be copied from (with mid_block_type UNetMidBlock2DSimpleCrossAttn)",
    ),
    ({"_class_name": "UNetMotionModel"}, "a model with a UNetMotionModel"),
]


@pytest.mark.parametrize(("changed", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_kinds_of_unets(changed: dict[str, Any], kind: str, base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    change(base / "unet" / "config.json", **changed)
    assert problem(base) == f"is {kind}; {trained()}"
    upload(hub, base)
    assert problem(BASE, cache_dir=str(tmp_path / "cache")) == f"is {kind}; {trained()}"


PIPELINES = [
    ("FluxPipeline", {"unet": None, "transformer": ["diffusers", "FluxTransformer2DModel"]}, "unet: none"),
    ("StableDiffusion3Pipeline", {"unet": None, "text_encoder_3": ["transformers", "T5EncoderModel"]}, "unet: none"),
    ("AltDiffusionPipeline", {"text_encoder": ["alt", "RobertaSeries"]}, "text_encoder: RobertaSeries"),
    ("IFPipeline", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder: T5EncoderModel"),
    ("OnnxStableDiffusionPipeline", {"unet": ["diffusers", "OnnxRuntimeModel"]}, "unet: OnnxRuntimeModel"),
]


@pytest.mark.parametrize(("name", "parts", "shown"), PIPELINES, ids=[name for name, _, _ in PIPELINES])
def test_other_pipelines(
    name: str, parts: dict[str, Any], shown: str, base: Path, hub: HubStandIn, tmp_path: Path
) -> None:
    change(base / "model_index.json", _class_name=name, **parts)
    if parts.get("unet", "") is None:
        (base / "unet").rename(base / "transformer")
    message = f"is a {name} (its {shown}); {trained()}"
    assert problem(base) == message
    upload(hub, base)
    assert problem(BASE, cache_dir=str(tmp_path / "cache")) == message


def test_what_else_a_base_lacks(base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    change(base / "scheduler" / "scheduler_config.json", prediction_type="sample")
    wrong = "its scheduler's prediction_type is 'sample'; only epsilon and v_prediction can be trained"
    assert problem(base) == wrong
    upload(hub, base)
    assert problem(BASE, cache_dir=str(tmp_path / "cache")) == wrong
    change(base / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    assert problem(base) is None
    own = json.loads((base / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    for name in ("EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"):
        change(base / "scheduler" / "scheduler_config.json", _class_name=name)
        assert problem(base) == f"its scheduler is {name}; only DDPM's noise can be trained"
    change(base / "scheduler" / "scheduler_config.json", _class_name=own)
    shutil.rmtree(base / "tokenizer")
    assert problem(base) == "has no tokenizer; add that folder, or give --tokenizer_name"
    (base / "unet" / "config.json").unlink()
    assert problem(base) == "has no unet/config.json; a base model must be in diffusers' layout"
    (base / "unet" / "config.json").write_text("{broken")
    assert problem(base) == "has no tokenizer; add that folder, or give --tokenizer_name"  # loading it tells the rest


def test_good_bases_pass(tiny_base: Path, tiny_base_v: Path, hub: HubStandIn, tmp_path: Path) -> None:
    demo = Path(kinds.__file__).parents[1] / "demo" / "base"
    for good in (tiny_base, tiny_base_v, demo):
        assert problem(good) is None
        upload(hub, good)
        assert problem(BASE, cache_dir=str(tmp_path / "cache")) is None
    downloaded = [request.path for request in hub.calls if request.method == "GET" and "/resolve/" in request.path]
    assert {path.rpartition(".")[2] for path in downloaded} == {"json"}


# --- Stable Diffusion XL ---


def test_an_xl_base(tiny_xl_base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    """Complete it passes; each of its parts that is missing is named."""
    assert problem(tiny_xl_base) is None
    full_size = {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816}
    assert denoiser_problem({"addition_embed_type": "text_time", "addition_time_embed_dim": 256, **full_size}) is None
    upload(hub, tiny_xl_base)
    assert problem(BASE, cache_dir=str(tmp_path / "cache")) is None
    base = shutil.copytree(tiny_xl_base, tmp_path / "base")
    shutil.rmtree(base / "tokenizer_2")
    assert problem(base) == "has no tokenizer_2; add that folder"
    assert problem(base, tokenizer_name=str(base / "tokenizer")) == "has no tokenizer_2; add that folder"
    shutil.rmtree(base / "text_encoder_2")
    assert problem(base) == "its text_encoder_2 has no weights (.safetensors)"
    change(base / "model_index.json", text_encoder_2=[None, None])
    lacks = "has no text_encoder_2, which Stable Diffusion XL needs; complete it, or name another base model"
    assert problem(base) == lacks
    upload(hub, base)
    assert problem(BASE, cache_dir=str(tmp_path / "other_cache")) == lacks
    change(base / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    assert problem(base) == f"is a StableDiffusionXLPipeline (its text_encoder_2: T5EncoderModel); {trained()}"


def test_a_refiner(tiny_xl_base: Path, tmp_path: Path) -> None:
    """Told from the base by its UNet alone, whatever its width."""
    base = shutil.copytree(tiny_xl_base, tmp_path / "base")
    change(base / "unet" / "config.json", cross_attention_dim=24, projection_class_embeddings_input_dim=24 + 5 * 8)
    refused = f"is an SDXL refiner, which only finishes images; {trained()}"
    assert problem(base) == refused
    for part in ("text_encoder", "tokenizer"):  # as the refiner is published
        shutil.rmtree(base / part)
    change(base / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    assert problem(base) == refused


def test_controlnets_of_another_family(tiny_base: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel, UNet2DConditionModel

    families = {tiny_base: "Stable Diffusion 1.x and 2.x", tiny_xl_base: "Stable Diffusion XL"}
    for base, other in ((tiny_base, tiny_xl_base), (tiny_xl_base, tiny_base)):
        controlnet = tmp_path / base.name
        ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base, subfolder="unet")).save_pretrained(
            controlnet
        )
        names = {"controlnet_model_name_or_path": str(controlnet)}
        assert list(model_problems(ModelConfig(pretrained_model_name_or_path=str(base), **names), None)) == []
        (found,) = model_problems(ModelConfig(pretrained_model_name_or_path=str(other), **names), None)
        assert found == (
            f"--controlnet_model_name_or_path={controlnet}: made for another family of base models "
            f"({families[base]}; the base model is {families[other]})"
        )


def test_vaes(tiny_base: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    def found(name: Path | str, **settings: Any) -> list[str]:
        flag = "pretrained_vae_model_name_or_path"
        names = {"pretrained_model_name_or_path": str(tiny_xl_base), flag: str(name)}
        problems = model_problems(ModelConfig(**names | settings), None)
        return [problem.removeprefix(f"--{flag}={name}: ") for problem in problems]

    vae = shutil.copytree(tiny_base / "vae", tmp_path / "vae")
    assert found(vae) == []
    assert found(tiny_base) == ["name the folder vae in it"]
    assert found(tiny_base / "unet") == ["holds a UNet2DConditionModel, not an AutoencoderKL"]
    assert found(tiny_base / "tokenizer") == ["has no config.json; a VAE must be in diffusers' layout"]
    assert found(vae / "config.json") == [f"is a file; name the folder that it is in: {vae}"]
    change(vae / "config.json", latent_channels=16)
    channels = "its latents have 16 channels, the base model's UNet takes 4; name a VAE of the base model's family"
    assert found(vae) == [channels]
    (vae / f"{WEIGHTS}.safetensors").unlink()
    assert found(vae) == ["it has no weights (.safetensors)"]


OTHER_LATENTS = [
    ({"scaling_factor": 0.13025}, "scaling_factor 0.13025, the base model's own VAE scaling_factor 0.18215"),
    ({"shift_factor": 0.1159}, "shift_factor 0.1159, the base model's own VAE shift_factor 0"),
    (
        {"block_out_channels": [4, 4, 8]},
        "one latent for 4 x 4 pixels, the base model's own VAE one latent for 8 x 8 pixels",
    ),
]


@pytest.mark.parametrize(("changed", "message"), OTHER_LATENTS)
def test_vaes_with_other_latents(
    changed: dict[str, Any], message: str, tiny_base: Path, hub: HubStandIn, tmp_path: Path
) -> None:
    """With as many channels they would be trained on: for a base in a folder, on the Hub and as a single file."""
    flag = "pretrained_vae_model_name_or_path"
    vae, base = shutil.copytree(tiny_base / "vae", tmp_path / "vae"), shutil.copytree(tiny_base, tmp_path / "base")
    upload(hub, base)
    single = {"base_config": str(base)}
    file = write_single_file(tiny_base, tmp_path / "base.safetensors")

    def found() -> list[str]:
        cache = tmp_path / f"cache{len(list(tmp_path.glob('cache*')))}"
        bases: tuple[tuple[str, dict[str, str]], ...] = (
            (str(base), {}),
            (BASE, {"cache_dir": str(cache)}),
            (str(file), single),
        )
        models = [ModelConfig(pretrained_model_name_or_path=name, **{flag: str(vae)}, **more) for name, more in bases]
        cache.mkdir()
        return [problem for model in models for problem in model_problems(model, TOKEN)]

    assert found() == []
    for name in changed.keys() & {"scaling_factor", "shift_factor"}:  # a configuration that does not say
        config = json.loads((base / "vae" / "config.json").read_text())
        config.pop(name)
        (base / "vae" / "config.json").write_text(json.dumps(config))
    upload(hub, base)
    assert found() == []
    change(vae / "config.json", **changed)
    wrong = f"--{flag}={vae}: it has {message}; name a VAE of the base model's family"
    assert found() == [wrong] * 3
    assert len(wrong) - len(str(vae)) <= LONGEST_LINE
    shutil.rmtree(base / "vae")  # of which nothing is known then: one more reason to name a VAE
    model = ModelConfig(pretrained_model_name_or_path=str(base), **{flag: str(vae)})
    assert [problem for problem in model_problems(model, TOKEN) if flag in problem] == []


def test_sizes_for_a_base_that_knows_none(tiny_settings: dict[str, Any], tiny_xl_base: Path) -> None:
    given = {"size_conditioning": "real", "crops_coords_top_left_w": 8}
    with pytest.raises(ConfigError) as error:
        check(TrainConfig(**tiny_settings | given), RunFolder(tiny_settings["output_dir"]))
    end = "Stable Diffusion 1.x and 2.x is not conditioned on sizes; leave it out"
    assert error.value.problems == (f"--size_conditioning=real: {end}", f"--crops_coords_top_left_w=8: {end}")
    given["pretrained_model_name_or_path"] = str(tiny_xl_base)
    with pytest.raises(ConfigError) as error:
        check(TrainConfig(**tiny_settings | given), RunFolder(tiny_settings["output_dir"]))
    with pytest.raises(ConfigError, match="with --size_conditioning real, each image has its own"):
        prepare(TrainConfig(**tiny_settings | given))  # a cache that training would refuse
    assert error.value.problems == (
        "--crops_coords_top_left_w=8: with --size_conditioning real, each image has its own; leave out one of the two",
    )


# --- the commands ---


def test_the_commands_refuse(base: Path, tiny_settings: dict[str, Any]) -> None:
    """Each before it makes a latent cache; training tells the other problems in the same answer."""
    change(base / "unet" / "config.json", in_channels=9)
    changed = {"pretrained_model_name_or_path": str(base), "cache_latents": "on"}
    latents = base.with_name("latents")
    settings = tiny_settings | changed | {"latents_cache_dir": str(latents), "mixed_precision": "fp16"}
    out = Path(settings["output_dir"])
    wrong = f"--pretrained_model_name_or_path={base}: is an inpainting model (UNet with 9 input channels)"
    with pytest.raises(ConfigError) as error:
        check(TrainConfig(**settings), RunFolder(str(out)))
    assert error.value.problems[0].startswith(wrong)
    assert error.value.problems[1:] == ("--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU",)
    with pytest.raises(ConfigError, match="is an inpainting model"):
        prepare(TrainConfig(**settings))
    assert not latents.exists()


def test_xformers_without_a_gpu_is_told_at_once(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once: on the CPU nothing is gained by its package, whose lack is told where there is a GPU, or may be."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flag = "enable_xformers_memory_efficient_attention"

    def found(**settings: Any) -> tuple[str, ...]:
        with pytest.raises(ConfigError) as error:
            check(TrainConfig(**tiny_settings | settings), RunFolder(tiny_settings["output_dir"]))
        return error.value.problems

    no_gpu, no_package = (
        f"--{flag}: needs a GPU; leave it out on the CPU",
        f"--{flag}: xformers is not installed; run pip install 'raycontrolnet[xformers]'",
    )
    assert found(**{flag: True}) == (no_gpu,)
    half = "--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"
    adam = "--use_8bit_adam: bitsandbytes is not installed; run pip install 'raycontrolnet[8bit]'"
    both = found(**{flag: True}, mixed_precision="fp16", use_8bit_adam=True)
    assert sorted(both) == sorted((no_gpu, half, adam))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert found(**{flag: True}, use_gpu=True) == (no_package,)


# --- files, and names of files ---


def test_files(tmp_path: Path, base: Path) -> None:
    """Pickled ones are refused; those of a part lead to the model's folder."""
    for name in ("my model.ckpt", "model.PT", "model.bin"):
        (tmp_path / name).write_bytes(b"weights")
        assert problem(tmp_path / name) == (
            "is pickled, which can hide code; convert it by the script in examples/guides/bases.md"
        )
    for name in ("my model.safetensors", "model.ckpt"):
        (tmp_path / name).write_bytes(b"weights")
        (own,) = model_problems(ModelConfig(controlnet_model_name_or_path=str(tmp_path / name)), None)
        assert own.startswith(f"--controlnet_model_name_or_path={tmp_path / name}: is a single-file checkpoint; ")
        assert f"ControlNetModel as C; C.from_single_file('{name}')" in own
    assert problem(base / "model_index.json") == f"is a file; name the folder that it is in: {base}"
    part = base / "unet" / f"{WEIGHTS}.safetensors"
    assert problem(part) == f"is a file of a part; name the model's folder: {base}"
    (tmp_path / "notes.txt").write_text("")
    assert problem(tmp_path / "notes.txt") == "is a file; name the folder that it is in"
    assert problem("gone/model.safetensors") == "no such file, and not a Hub id (owner/name); correct the path"


def test_a_vae_as_a_file(tiny_base: Path, tmp_path: Path) -> None:
    """The command in the message makes of it the folder, with the base model's scaling factor."""
    from diffusers import AutoencoderKL

    whole = load_file(write_single_file(tiny_base, tmp_path / "base.safetensors"))
    start = "first_stage_model."
    weights = {name.removeprefix(start): value for name, value in whole.items() if name.startswith(start)}
    save_file(weights, tmp_path / "my-vae.SAFETENSORS")
    torch.save(weights, tmp_path / "my-vae.pt")
    for path in (tmp_path / "my-vae.SAFETENSORS", tmp_path / "my-vae.pt"):
        problem = model_path_problem("pretrained_vae_model_name_or_path", str(path)) or ""
        assert "is a file; convert it by the BASE's configuration: python" in problem
        assert len(problem) - len(str(path)) <= LONGEST_LINE
    run_python(problem.partition(" -c ")[2].replace("BASE", str(tiny_base)), tmp_path)
    own, made = (AutoencoderKL.from_pretrained(folder) for folder in (tiny_base / "vae", tmp_path / "my-vae"))
    assert made.config.scaling_factor == own.config.scaling_factor
    assert equal(made.state_dict(), own.state_dict())


class Callback:
    """An object of a trainer, which torch reads with weights_only=False alone."""


def test_a_file_with_objects_of_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's script reads it."""
    shared = torch.ones(3, 2)
    saved = {"state_dict": {"a": shared.T, "b": shared, "step": 1}, "callbacks": {Callback: Callback()}}
    torch.save(saved, tmp_path / "base.ckpt")
    guide = Path(__file__).parents[1] / "examples" / "guides" / "bases.md"
    script = guide.read_text().rpartition("```python\n")[2].partition("```")[0]
    monkeypatch.setattr("sys.argv", ["convert.py", "base.ckpt"])
    run_python(script, tmp_path)
    assert equal(load_file(tmp_path / "base.safetensors"), {"a": torch.ones(2, 3), "b": shared})


def run_python(code: str, folder: Path) -> None:
    """Run the quoted code of a command in this process, in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code.strip('"'), {})


@pytest.mark.parametrize("name", ["no owner/name", "a/b/c", "./here", "~/gone", "/gone", "a--b/c", "name"])
def test_names_that_are_neither(name: str) -> None:
    assert problem(name) == "no such folder, and not the form of a Hub id (owner/name)"


def test_an_address() -> None:
    assert problem(f"https://huggingface.co/{BASE}/tree/main") == f"is an address; give the Hub id: {BASE}"
    for end in ("blob/main/v2/model.safetensors", "resolve/main/v2/model.safetensors?download=true"):
        assert problem(f"https://huggingface.co/{BASE}/{end}") == (
            f"is an address; run `hf download {BASE} v2/model.safetensors`, and give the path that it prints"
        )
    for end in ("", "/"):
        assert problem(f"https://huggingface.co/{BASE}{end}") == f"is an address; give the Hub id: {BASE}"


KEYS = ("TOPSECRET", "AKIAKEY", "user")
WITH_KEYS = {
    "store://AKIAKEY:TOPSECRET@bucket/base.safetensors": "store://bucket/base.safetensors",
    "s3://AKIAKEY:TOP/TOPSECRET@bucket/base": "s3://bucket/base",
    "https://user:TOPSECRET@host/model.safetensors": "https://host/model.safetensors",
    "https://host/v1/model.safetensors?token=TOPSECRET": "https://host/v1/model.safetensors",
    "https://host/model?token=TOPSECRET.safetensors": "https://host/model",
    "https://huggingface.co/a/b/resolve/main/m.safetensors?token=TOPSECRET":
        "https://huggingface.co/a/b/resolve/main/m.safetensors",
    "https://user:TOPSECRET@huggingface.co/a/b": "https://huggingface.co/a/b",
    "huggingface.co/a/b?token=TOPSECRET": "huggingface.co/a/b",
}  # fmt: skip
"""Addresses that a user may give for a model -> the part that is shown."""


@pytest.mark.parametrize("given", WITH_KEYS)
def test_keys_in_addresses_are_not_shown(
    given: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the setting, and in `generate`, by a sweep's space and as the file of a space too."""
    required: dict[str, Any] = {"pretrained_model_name_or_path": str(tiny_base), "train_data_dir": "data"}
    models = (*names_with("model_folders"),)
    for name in models:
        problem = model_path_problem(name, given) or ""
        assert problem.startswith(f"--{name}={WITH_KEYS[given]}: ")
        assert len(problem) <= LONGEST_LINE
        with pytest.raises(ConfigError) as refused:
            check(TrainConfig(**required | {name: given}), RunFolder(str(tiny_base / "run")))
        assert problem in str(refused.value)
        sweep = SweepConfig(
            train=TrainConfig(**required),
            space={name: {"choice": [str(tiny_base), given]}},
            num_samples=1,
            allow_new_caches=True,
        )
        before = {"space": {name: [given]}, "searcher": "random", "num_trials": 1, "settings": {name: given}}
        found = [str(refused.value), *problems(sweep, sweep.parsed_space)]
        found += differences(before, sweep, {name: given + "2"}, sweep.parsed_space)
        assert len(found) > 2
        assert not [key for key in KEYS for line in found if key in line]
    (tmp_path / "config.json").write_text("{}")
    change(tmp_path / "config.json", _class_name="ControlNetModel", cross_attention_dim=16)
    draw = ["generate", "--prompt", "a", "--image", __file__, "--out", str(tmp_path / "out")]
    commands = [[*draw, "--controlnet", str(tmp_path), f"--{name}", given] for name in models[:3]]
    commands += [
        [*draw, "--controlnet", given],
        ["train", "--config", given],
        ["tune", "--pretrained_model_name_or_path", "a/b", "--train_data_dir", "d", "--space", given],
    ]
    for command in commands:
        assert main(command) == 2
        shown = capsys.readouterr().err
        assert command[-2] in shown
        assert not [key for key in KEYS if key in shown]


@pytest.mark.parametrize(("part", "stem"), [("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model")])
def test_variants(part: str, stem: str, base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    """Only some files, on disk and on the Hub."""
    weights = base / part / f"{stem}.safetensors"
    for name in (f"{stem}.fp16.safetensors", f"{stem}.fp16-00001-of-00002.safetensors"):
        weights = weights.rename(weights.with_name(name))
        message = f"its {part} has only files of the variant fp16; add --variant fp16"
        assert problem(base) == message
        upload(hub, base)
        assert problem(BASE, cache_dir=str(tmp_path / "cache")) == message
    first = "unet" if part != "unet" else "vae"
    message = f"its {first} has no files of the variant fp16; leave the flag out"
    assert problem(base, variant="fp16") == message
    for other in ("unet", "vae", "text_encoder"):
        for path in (base / other).glob("*.safetensors"):
            path.rename(path.with_name(f"{path.stem.partition('.')[0]}.fp16.safetensors"))
    assert problem(base, variant="fp16") is None
    assert problem(base, variant="ema") == "its unet has no files of the variant ema; there is fp16"


def test_other_weights(base: Path) -> None:
    weights = base / "unet" / f"{WEIGHTS}.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert problem(base) == "unet holds a Git LFS pointer, not weights; run `git lfs pull` in that folder"
    weights.unlink()
    assert problem(base) == "its unet has no weights (.safetensors)"
    shards = [weights.with_name(f"{WEIGHTS}-0000{n}-of-00002.bin") for n in (1, 2)]
    for shard in shards:
        shard.touch()
    pickled = "has only pickled weights; convert them once: python -c"
    code = "from diffusers import DiffusionPipeline as C; C.from_pretrained('base').save_pretrained('base-safetensors')"
    assert problem(base) == f'its unet {pickled} "{code}"'
    for shard in shards:
        shard.rename(shard.with_suffix(".safetensors"))
    assert problem(base) is None
    weights.write_bytes(whole)
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "pytorch_model.bin")
    assert problem(base) == f'its text_encoder {pickled} "{code}"'
    assert (problem(base, variant="fp16") or "").startswith("its unet has no files of the variant fp16")


def test_controlnets(tiny_base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    unet = json.loads((tiny_base / "unet" / "config.json").read_text())
    folder = tmp_path / "run" / "controlnet"
    folder.mkdir(parents=True)

    def found(name: Path | str) -> list[str]:
        model = ModelConfig(pretrained_model_name_or_path=str(tiny_base), controlnet_model_name_or_path=str(name))
        problems = list(model_problems(model, TOKEN, controlnet_flag="controlnet"))
        return [problem.removeprefix(f"--controlnet={name}: ") for problem in problems]

    assert found(folder) == ["has no config.json; it must be in diffusers' layout"]
    weights, config = folder / f"{WEIGHTS}.fp16.safetensors", folder / "config.json"
    weights.touch()
    config.write_text(json.dumps(unet))
    assert found(folder) == ["holds a UNet2DConditionModel, not a ControlNetModel"]
    change(config, _class_name="ControlNetModel")
    assert found(folder) == ["it has only files of the variant fp16; take .VARIANT out of their names"]
    weights.rename(folder / f"{WEIGHTS}.safetensors")
    assert found(folder) == []
    assert found(folder.parent) == ["name the folder controlnet in it"]
    change(config, cross_attention_dim=768)
    other = ["made for another base model (cross_attention_dim 768, the base model's UNet has 16)"]
    assert found(folder) == other
    upload(hub, folder, "someone/control")
    (name,) = found("someone/control")
    assert name == other[0]


def test_tokenizers(tiny_base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    def found(name: Path | str) -> list[str]:
        cache = str(tmp_path / "cache")
        model = ModelConfig(pretrained_model_name_or_path=str(tiny_base), tokenizer_name=str(name), cache_dir=cache)
        return [problem.removeprefix(f"--tokenizer_name={name}: ") for problem in model_problems(model, TOKEN)]

    assert found(tiny_base / "tokenizer") == []
    assert found(tiny_base) == ["name the folder tokenizer in it"]
    assert found(tiny_base / "unet") == ["has no vocab.json; it must hold a CLIP tokenizer"]
    upload(hub, tiny_base / "tokenizer", "someone/words")
    assert found("someone/words") == []
    (gone,) = found("someone/gone")
    assert gone.startswith("no such folder, and no such model on the Hub; correct it")


# --- the Hub ---


def test_models_that_the_hub_does_not_give(tiny_base: Path, hub: HubStandIn, tmp_path: Path) -> None:
    upload(hub, tiny_base)
    cache = str(tmp_path / "cache")
    gone = "no such folder, and no such model on the Hub"
    advice = "correct it, or, if it is private, give --hub_token or `hf auth login`"
    assert problem("someone/gone", cache_dir=cache) == f"{gone}; {advice}"
    where = f"look at https://huggingface.co/{BASE}/tree"
    assert problem(BASE, revision="v9", cache_dir=cache) == f"has no revision v9 on the Hub; {where}"
    assert problem(BASE, cache_dir=cache) is None
    del hub.models[BASE]
    assert problem(BASE, cache_dir=cache) is None, "what is in the cache is used although it left the Hub"


@pytest.mark.parametrize("failure", [500, 503, 429, "cut"])
def test_a_busy_hub_is_asked_again_by_loading(failure: Any, hub: HubStandIn, tmp_path: Path) -> None:
    hub.failures["/api/models/"] = failure
    start = time.monotonic()
    assert problem(BASE, cache_dir=str(tmp_path / "cache")) is None
    assert time.monotonic() - start < files.ANSWER_TIMEOUT_S
    assert len(hub.calls) == 1


def test_without_a_way_to_the_hub(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and not where other machines load the model, unless it looks like a path."""
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path / "cache")
    take_for_hub("http://127.0.0.1:9", monkeypatch)
    start = time.monotonic()
    message = (
        "no such folder, and, as a Hub id, not in the cache, and the Hub cannot be reached; correct the path, "
        "or run `hf download models/my-sd15` where it can"
    )
    assert problem("models/my-sd15", cache_dir=cache) == message
    assert problem("models/my-sd15", cache_dir=cache, elsewhere=True) is None
    (tmp_path / "models").mkdir()
    assert problem("models/my-sd15", cache_dir=cache, elsewhere=True) == message
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert problem("models/my-sd15", cache_dir=cache) == (
        "no such folder, and, as a Hub id, not in the cache, while HF_HUB_OFFLINE is set; correct the path, "
        "or download it with `hf download models/my-sd15`"
    )
    assert time.monotonic() - start < files.ANSWER_TIMEOUT_S


def test_offline_the_cache_is_looked_at(base: Path, tmp_path: Path) -> None:
    """As a download leaves it."""
    model = tmp_path / "hub" / "models--someone--base"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    cached = Path(shutil.copytree(base, model / "snapshots" / ("a" * 40)))
    assert problem(BASE, cache_dir=str(tmp_path / "hub")) is None
    change(cached / "unet" / "config.json", time_cond_proj_dim=256)
    found = problem(BASE, cache_dir=str(tmp_path / "hub"))
    assert found is not None
    assert found.startswith("is an LCM-distilled model")

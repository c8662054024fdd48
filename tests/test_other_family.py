"""The seam of families holds for what is no Stable Diffusion: a flow-matching transformer, registered for this test.

`flow_family.py` is all of the family; nothing else of the package is changed.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow_base import LATENT_SHAPE, write_random_flow_base
from flow_family import FLOW
from PIL import Image
from reference import CPU, fake_rows
from reference import write_trained_controlnet as write_sd_controlnet
from reference_flow import reference_loss, write_trained_controlnet
from runs import Run, Settings, equal, lines, losses, run, train, weights

from raycontrolnet import GenerateConfig, SweepConfig, TrainConfig, generate
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch.check import check
from raycontrolnet.model.base_family import base_family, family_of_saved
from raycontrolnet.model.batch import draw, make_batch
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.families import registry
from raycontrolnet.model.problems import model_files, model_problems
from raycontrolnet.model.size import controlnet_bytes_at_least
from raycontrolnet.model.step import controlnet_loss
from raycontrolnet.quiet import only_errors
from raycontrolnet.tune.plan import plan_sweep

CAPTIONS = ["red circle with blue background", "", "green square"]
LONGEST_LINE = 250
NO_IMAGES = {"validation_prompt": None, "validation_image": None}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Add the line to the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "FAMILIES", (*registry.FAMILIES, FLOW))
        yield


@pytest.fixture(scope="module")
def flow_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_flow_base(tmp_path_factory.mktemp("flow_base"))


@pytest.fixture(scope="module")
def flow_controlnet(flow_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(flow_base, tmp_path_factory.mktemp("flow_controlnet"))


def load(base: Path, controlnet: Path | None = None, vae_device: torch.device | None = None) -> Components:
    named = str(controlnet) if controlnet else None
    model = ModelConfig(pretrained_model_name_or_path=str(base), controlnet_model_name_or_path=named)
    return load_components(model, device=CPU, dtype=torch.float32, seed=0, vae_device=vae_device)


def rows() -> list[PreparedRow]:
    return [replace(row, prompt=prompt) for row, prompt in zip(fake_rows(0, 1, 2), CAPTIONS, strict=True)]


# --- the base model ---


def test_the_base_is_of_its_family(flow_base: Path, tiny_base: Path, tiny_xl_base: Path) -> None:
    for base, name in ((flow_base, "flow"), (tiny_base, "sd"), (tiny_xl_base, "sdxl")):
        model = ModelConfig(pretrained_model_name_or_path=str(base))
        assert list(model_problems(model, None)) == []
        family = base_family(model, None)
        assert family
        assert family.name == name
        (files,) = model_files(model)
        assert files.paths == (f"{base}/{family.denoiser}/config.json",)
        assert controlnet_bytes_at_least(model) > 0


def test_what_the_base_lacks(flow_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(flow_base, tmp_path / "base"))
    model = ModelConfig(pretrained_model_name_or_path=str(base))
    shutil.rmtree(base / "transformer")
    assert "no unet or transformer in that folder; it must be in diffusers' layout" in next(model_problems(model, None))
    shutil.copytree(flow_base / "transformer", base / "transformer")
    assert list(model_problems(model, None)) == []


def test_the_noise_of_another_family(flow_base: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Refused before models are read, and where only a worker sees the base model."""
    for own, other, allowed in ((flow_base, tiny_base, "rectified flow"), (tiny_base, flow_base, "DDPM's noise")):
        base = Path(shutil.copytree(own, tmp_path / own.name))
        shutil.rmtree(base / "scheduler")
        shutil.copytree(other / "scheduler", base / "scheduler")
        name = "PNDMScheduler" if other is tiny_base else "FlowMatchEulerDiscreteScheduler"
        refused = f"--pretrained_model_name_or_path={base}: its scheduler is {name}; only {allowed} can be trained"
        assert list(model_problems(ModelConfig(pretrained_model_name_or_path=str(base)), None)) == [refused]
        with pytest.raises(UserError) as late:
            load(base)
        assert str(late.value) == refused


# --- the step ---


def test_the_loss_is_rectified_flows(flow_base: Path, flow_controlnet: Path) -> None:
    """To 1e-6; at other timesteps, with other control images or captions it is another."""
    components, prepared = load(flow_base, flow_controlnet), rows()
    draws = draw(0, [0, 1, 2], LATENT_SHAPE, components.draw_timestep, CPU)
    batch = make_batch(prepared, components, CPU)
    with torch.no_grad():
        expected = reference_loss(flow_base, flow_controlnet, prepared, draws)
        found = controlnet_loss(components, components.controlnet, batch, draws)
        assert found.dtype == torch.float32
        assert abs(float(found.mean() - expected)) <= 1e-6
        assert expected > 0.1, "a loss near zero would agree with anything"
        for other in (
            (batch, draws._replace(timesteps=draws.timesteps.flip(0))),
            (batch._replace(conditioning_images=batch.conditioning_images.flip(0)), draws),
            (batch._replace(tokens=(batch.tokens[0].flip(0), batch.tokens[1])), draws),
            (batch._replace(tokens=(batch.tokens[0], batch.tokens[1].flip(0))), draws),
        ):
            changed = controlnet_loss(components, components.controlnet, *other).mean()
            assert abs(float(changed - expected)) > 1e-5


def test_timesteps_are_the_familys(flow_base: Path) -> None:
    """Not integers, from the sample's own generator, and with the shift of the scheduler (Esser et al., eq. 19, 23)."""
    components = load(flow_base)
    draws = draw(0, range(400), (1, 1, 1), components.draw_timestep, CPU)
    assert draws.timesteps.dtype == torch.float32
    assert torch.equal(draws.timesteps[7:8], draw(0, [7], (1, 1, 1), components.draw_timestep, CPU).timesteps)
    sigma = draws.timesteps / 1000
    unshifted = sigma / (3 - 2 * sigma)
    normal = torch.special.logit(unshifted.double())
    assert abs(float(normal.mean())) < 0.15
    assert abs(float(normal.std()) - 1) < 0.1
    assert FLOW.spread_timestep(0.5, components.noise_scheduler) == pytest.approx(750)


@pytest.mark.parametrize("changed", [{"mean": 0.0, "std": 1.0}, {"mean": 0.6, "std": 0.5}])
def test_timesteps_of_other_distributions(changed: dict[str, float], flow_base: Path) -> None:
    """As fractions of the timesteps, which the scheduler then shifts: 3 f / (1 + 2 f)."""
    components, count = load(flow_base), 4000

    def fractions(**settings: Any) -> torch.Tensor:
        objective = ObjectiveConfig(**settings)
        draws = draw(0, range(count), (1, 1, 1), components.draw_timestep, CPU, objective=objective)
        assert draws.timesteps.dtype == torch.float32
        sigma = draws.timesteps.double() / 1000
        return sigma / (3 - 2 * sigma)

    uniform = fractions(timestep_sampling="uniform")
    assert abs(float(uniform.mean()) - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(float(uniform.var()) - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    high = fractions(timestep_sampling="high_noise", high_noise_power=3.0)
    assert abs(float(high.mean()) - 3 / 4) < 5 * (9 / 112 / count) ** 0.5
    mean, std = changed["mean"], changed["std"]
    logit = torch.special.logit(fractions(timestep_sampling="logit_normal", logit_mean=mean, logit_std=std))
    assert abs(float(logit.mean()) - mean) < 5 * std / count**0.5
    assert abs(float(logit.std()) - std) < 5 * std / (2 * count) ** 0.5
    own = draw(0, range(9), (1, 1, 1), components.draw_timestep, CPU)
    standard = ObjectiveConfig(timestep_sampling="logit_normal")
    named = draw(0, range(9), (1, 1, 1), components.draw_timestep, CPU, objective=standard)
    assert torch.equal(own.timesteps, named.timesteps), "it is how this family is trained"


def test_an_objective_with_all_that_the_family_has(flow_base: Path, flow_controlnet: Path) -> None:
    components, prepared = load(flow_base, flow_controlnet), rows()
    objective = ObjectiveConfig(noise_offset=0.3, input_perturbation=0.4, timestep_sampling="high_noise")
    draws = draw(0, [0, 1, 2], LATENT_SHAPE, components.draw_timestep, CPU, objective=objective)
    batch = make_batch(prepared, components, CPU)
    with torch.no_grad():
        expected = reference_loss(flow_base, flow_controlnet, prepared, draws)
        found = controlnet_loss(components, components.controlnet, batch, draws, objective)
        assert abs(float(found.mean() - expected)) <= 1e-6
        huber = controlnet_loss(components, components.controlnet, batch, draws, ObjectiveConfig(loss="huber"))
        assert float(huber.mean()) < float(found.mean())


def test_objectives_of_another_kind_of_noise(flow_settings: Settings, flow_base: Path, tmp_path: Path) -> None:
    """Refused with the reason before models are read, and where only a worker sees the base model."""
    snr = (
        "--snr_gamma=5: weights the loss by DDPM's signal-to-noise ratio, which Tiny Flow is not trained by; leave it "
        "out, or see --timestep_sampling"
    )
    zero = "--rescale_betas_zero_snr: rescales DDPM's noise schedule, which Tiny Flow does not have; leave it out"
    both: Settings = {"snr_gamma": 5.0, "rescale_betas_zero_snr": True}
    with pytest.raises(ConfigError) as training:
        run(flow_settings, tmp_path / "out", **both)
    with pytest.raises(ConfigError) as checking:
        check(CheckConfig(train=TrainConfig(**flow_settings | both)), stream=io.StringIO())
    for error in (training, checking):
        assert list(error.value.problems) == [snr, zero]
    family, objective = load(flow_base).family, ObjectiveConfig(**both)
    assert list(family.objective_problems(objective, {})) == [snr, zero]
    space = {"snr_gamma": {"choice": [None, 5.0]}, "learning_rate": {"choice": [1e-4]}}
    config = SweepConfig(train=TrainConfig(**flow_settings, output_dir=str(tmp_path)), space=space, num_samples=2)
    with pytest.raises(ConfigError) as sweeping:
        plan_sweep(config, io.StringIO())
    assert list(sweeping.value.problems) == [snr]


def test_every_trained_weight_gets_a_gradient(flow_base: Path, flow_controlnet: Path) -> None:
    """Workers would wait for those of the others."""
    components = load(flow_base, flow_controlnet)
    draws = draw(0, [0, 1, 2], LATENT_SHAPE, components.draw_timestep, CPU)
    loss = controlnet_loss(components, components.controlnet, make_batch(rows(), components, CPU), draws)
    loss.mean().backward()
    parameters = dict(components.controlnet.named_parameters())
    assert [name for name, value in parameters.items() if value.requires_grad != (value.grad is not None)] == []
    assert 0 < sum(not value.requires_grad for value in parameters.values()) < 10


def test_the_vae_stays_where_control_images_are_encoded(flow_base: Path, tiny_base: Path) -> None:
    """Also in a run from cached latents, whose VAE waits elsewhere."""
    for base, place in ((flow_base, "cpu"), (tiny_base, "meta")):
        assert load(base, vae_device=torch.device("meta")).vae.device.type == place


# --- runs ---


@pytest.fixture(scope="module")
def flow_settings(run_settings: Settings, flow_base: Path, circles: Path) -> Settings:
    """Return settings of four updates, with validation images and a held-out measure at every second."""
    return run_settings | {
        "pretrained_model_name_or_path": str(flow_base),
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
        "proportion_empty_prompts": 0.3,
        "validation_split": 3,
        "validation_steps": 2,
        "validation_prompt": ("red circle",),
        "validation_image": (str(circles / "conditioning" / "00001.png"),),
        "num_validation_images": 1,
    }


@pytest.fixture(scope="module")
def flow_run(flow_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train. Do not write into its folder."""
    return train(flow_settings | {"output_dir": str(tmp_path_factory.mktemp("flow") / "run")})


def test_a_run_learns_and_is_measured(flow_run: Run) -> None:
    assert len(losses(flow_run.folder)) == 4
    measured = lines(flow_run.folder / "validation.jsonl")
    assert [line["step"] for line in measured] == [2, 4]
    assert measured[0]["val_loss"] != measured[1]["val_loss"]
    assert measured[1]["control_gap"] != 0
    assert family_of_saved(flow_run.folder) is FLOW


def test_a_resumed_run_is_the_whole_run(flow_run: Run, flow_settings: Settings, tmp_path: Path) -> None:
    out, settings = tmp_path / "resumed", flow_settings | NO_IMAGES
    run(settings, out, max_train_steps=2)
    run(settings, out, resume_from_checkpoint="latest")
    assert losses(out) == losses(flow_run.folder)
    assert equal(weights(out), weights(flow_run.folder))
    for name in ("val_loss", "control_gap"):
        one, other = ([line[name] for line in lines(folder / "validation.jsonl")] for folder in (out, flow_run.folder))
        assert one == other


def test_cached_latents_give_the_same_losses(flow_run: Run, flow_settings: Settings, tmp_path: Path) -> None:
    cache = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents"), "latents_dtype": "float32"}
    out = run(flow_settings | NO_IMAGES | cache, tmp_path / "cached")
    assert losses(out) == pytest.approx(losses(flow_run.folder), rel=1e-5)


def test_the_result_loads_in_diffusers(flow_run: Run, flow_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And draws the run's last validation image, if the control image's latents are their mean there too."""
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", DiagonalGaussianDistribution.mode)
    folder = flow_run.folder / "validation" / "step-000004"
    (line,) = lines(folder / "metadata.jsonl")
    with only_errors():
        pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
            flow_base,
            controlnet=SD3ControlNetModel.from_pretrained(flow_run.folder),
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            line["prompt"],
            control_image=Image.open(folder / line["conditioning_image_file_name"]),
            num_inference_steps=line["num_inference_steps"],
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]
    own = np.asarray(Image.open(folder / line["file_name"])).astype(int)
    assert own.std() > 1
    assert np.abs(np.asarray(image) - own).max() <= 1
    assert (line["scheduler"], line["guidance_scale"]) == ("FlowMatchEulerDiscreteScheduler", 7.0)
    card = (flow_run.folder / "README.md").read_text()
    names = "SD3ControlNetModel, StableDiffusion3ControlNetPipeline, FlowMatchEulerDiscreteScheduler"
    assert f"from diffusers import {names}\n" in card
    assert "control_image=control, " in card


def test_generate_draws(flow_run: Run, flow_settings: Settings, tmp_path: Path) -> None:
    """Its images are the run's, whatever torch's random state and the batch; in bf16 nearly the same."""
    drawn = []
    for number, (batch_size, precision) in enumerate(((1, "no"), (2, "no"), (1, "bf16"))):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        config = GenerateConfig(
            controlnet=str(flow_run.folder),
            prompt=flow_settings["validation_prompt"],
            image=flow_settings["validation_image"],
            num_images=2,
            batch_size=batch_size,
            mixed_precision=precision,
            out=str(tmp_path / str(number)),
        )
        (pair,) = generate(config, stream=io.StringIO())
        drawn.append(np.stack([np.asarray(Image.open(path)).astype(int) for path in pair.images]))
        assert torch.equal(torch.get_rng_state(), before)
    validated = flow_run.folder / "validation" / "step-000004" / "pair-00-image-00.png"
    assert np.array_equal(drawn[0][0], np.asarray(Image.open(validated)))
    assert np.abs(drawn[1] - drawn[0]).max() <= 1
    assert 0 < np.abs(drawn[2] - drawn[0]).mean() < 3 < drawn[0].std()


def test_a_size_that_patches_do_not_fill(flow_settings: Settings, flow_run: Run, tmp_path: Path) -> None:
    refused = "--resolution=40: must be divisible by 16 for Tiny Flow; use 32 or 48"
    with pytest.raises(ConfigError) as training:
        run(flow_settings, tmp_path / "out", resolution=40)
    names = {name: flow_settings[f"validation_{name}"] for name in ("prompt", "image")}
    with pytest.raises(ConfigError) as drawing:
        generate(GenerateConfig(controlnet=str(flow_run.folder), resolution=40, out=str(tmp_path / "drawn"), **names))
    assert [list(error.value.problems) for error in (training, drawing)] == [[refused]] * 2


# --- ControlNets of other families ---


def test_controlnets_of_other_families(
    flow_base: Path, flow_controlnet: Path, tiny_base: Path, tiny_xl_base: Path, run_settings: Settings, tmp_path: Path
) -> None:
    """Refused before models are read, and where only a worker sees the base model."""
    sd_controlnet = write_sd_controlnet(tiny_base, tmp_path / "sd")
    sd, xl = "Stable Diffusion 1.x and 2.x", "Stable Diffusion XL"
    for base, controlnet, titles in (
        (flow_base, sd_controlnet, (sd, "Tiny Flow")),
        (tiny_base, flow_controlnet, ("Tiny Flow", sd)),
        (tiny_xl_base, flow_controlnet, ("Tiny Flow", xl)),
    ):
        named = {"pretrained_model_name_or_path": str(base), "controlnet_model_name_or_path": str(controlnet)}
        problem = "made for another family of base models ({}; the base model is {})".format(*titles)
        refused = f"--controlnet_model_name_or_path={controlnet}: {problem}"
        assert list(model_problems(TrainConfig(**run_settings | named), None)) == [refused]
        with pytest.raises(UserError) as late:
            load(base, controlnet)
        assert str(late.value) == refused
        config = GenerateConfig(
            controlnet=str(controlnet),
            pretrained_model_name_or_path=str(base),
            prompt=("a",),
            image=(str(Path(run_settings["train_data_dir"]) / "conditioning" / "00001.png"),),
            out=str(tmp_path / "out"),
        )
        with pytest.raises(ConfigError) as drawing:
            generate(config, stream=io.StringIO())
        assert list(drawing.value.problems) == [f"--controlnet={controlnet}: {problem}"]
        assert len(problem) <= LONGEST_LINE


def test_what_is_no_controlnet(flow_base: Path, run_settings: Settings, tmp_path: Path) -> None:
    classes = "not a ControlNetModel or SD3ControlNetModel"
    for folder, kind in (("transformer", "SD3Transformer2DModel"), ("vae", "AutoencoderKL")):
        named = {"controlnet_model_name_or_path": str(flow_base / folder)}
        (problem,) = model_problems(TrainConfig(**run_settings | named), None)
        assert problem.endswith(f"{folder}: holds a {kind}, {classes}")


def test_what_it_needs(flow_settings: Settings) -> None:
    """The VAE stays on the device for the control images; latents have the family's channels."""
    settings = flow_settings | {"cache_latents": "on", "mixed_precision": "bf16"}
    stream = io.StringIO()
    found = check(CheckConfig(train=TrainConfig(**settings)), stream=stream)
    assert found.frozen_bytes["VAE"] == found.weights["VAE"] * 4  # in fp32, as this family has it
    assert 0 < found.trained < found.weights["ControlNet"]
    assert "cache: 384 B of latents a row, " in stream.getvalue()
    with pytest.raises(ConfigError, match="--resolution=40: "):
        check(CheckConfig(train=TrainConfig(**settings | {"resolution": 40})), stream=stream)

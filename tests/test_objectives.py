"""Each objective against its closed form: weights, pseudo-Huber, timesteps, added noise, the rescaled schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import CPU, LATENT_SHAPE, fake_rows, reference_prediction, write_trained_controlnet
from torch import Tensor

from raycontrolnet import TrainConfig
from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.batch import Draws, draw, make_batch
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.diffusion import PREDICTION_TYPES, add_noise, min_snr_weights, per_sample_loss
from raycontrolnet.model.families.unet import ZERO_SNR
from raycontrolnet.model.fractions import draw_fraction, high_noise, logit_normal
from raycontrolnet.model.step import controlnet_loss
from raycontrolnet.quiet import only_errors

ALPHAS_CUMPROD = torch.tensor([1.0, 0.9991, 0.75, 0.5, 0.1, 0.0047, 0.0], dtype=torch.float64)
INSIDE = ALPHAS_CUMPROD[1:-1]
"""Levels with a finite signal-to-noise ratio that is not zero."""
GAMMA = 5.0


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- min-SNR ---


@pytest.mark.parametrize("gamma", [0.01, 1.0, GAMMA, 1000.0])
def test_weights_by_hand(gamma: float) -> None:
    """Hang et al., eq. 10 and its form for the velocity."""
    epsilon, velocity = (min_snr_weights(kind, INSIDE, gamma) for kind in PREDICTION_TYPES)
    for level, of_noise, of_velocity in zip(INSIDE.tolist(), epsilon.tolist(), velocity.tolist(), strict=True):
        snr = level / (1 - level)
        assert of_noise == pytest.approx(min(snr, gamma) / snr, rel=1e-12)
        assert of_velocity == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-12)


def test_weights_at_the_ends() -> None:
    """Without noise and without signal they are the limits, not NaN."""
    epsilon, velocity = (min_snr_weights(kind, ALPHAS_CUMPROD[[0, -1]], GAMMA) for kind in PREDICTION_TYPES)
    assert epsilon.tolist() == [0.0, 1.0]
    assert velocity.tolist() == [0.0, 0.0]


def test_both_predictions_weight_the_same_error_of_the_latents() -> None:
    """By min(SNR, gamma), whatever the prediction: the weights' reason."""
    noise, latents, wrong = (normal(len(INSIDE), 64, seed=seed) for seed in range(3))
    a = INSIDE[:, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    clipped = (INSIDE / (1 - INSIDE)).clamp(max=GAMMA)
    predicted = noise + wrong
    found = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
    weighted = min_snr_weights("epsilon", INSIDE, GAMMA) * (predicted - noise).pow(2).mean(1)
    torch.testing.assert_close(weighted, clipped * (found - latents).pow(2).mean(1), rtol=1e-10, atol=0)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * latents
    predicted = velocity + wrong
    found = a.sqrt() * noisy - (1 - a).sqrt() * predicted
    weighted = min_snr_weights("v_prediction", INSIDE, GAMMA) * (predicted - velocity).pow(2).mean(1)
    torch.testing.assert_close(weighted, clipped * (found - latents).pow(2).mean(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_weights_of_every_timestep_agree_with_diffusers(kind: str, tiny_base: Path) -> None:
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_pretrained(tiny_base, subfolder="scheduler")
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, GAMMA * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if kind == "epsilon" else weights / (snr + 1)
    found = min_snr_weights(kind, scheduler.alphas_cumprod[timesteps], GAMMA)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=0)


def test_another_prediction_type_has_no_weights() -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample': must be one of epsilon, v_prediction"):
        min_snr_weights("sample", INSIDE, GAMMA)


# --- pseudo-Huber ---


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.1, 1.0, 1e3])
def test_the_huber_loss_by_hand(delta: float) -> None:
    differences = normal(3, 4, 2, 2) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).view(3, 1, 1, 1)
    loss = per_sample_loss(differences.float(), torch.zeros(3, 4, 2, 2), delta)
    assert loss.dtype == torch.float32
    exact = differences.float().double()
    expected = (2 * delta * ((exact**2 + delta**2).sqrt() - delta)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12)


def test_the_huber_loss_between_square_and_absolute_value() -> None:
    differences, zeros = normal(2, 4, 2, 2), torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    square = differences.pow(2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(per_sample_loss(differences, zeros, 1e6), square, rtol=1e-6, atol=0)
    far, delta = 1e4 + differences.abs(), 0.5
    absolute = (2 * delta * (far - delta)).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(per_sample_loss(far, zeros, delta), absolute, rtol=1e-6, atol=0)


def test_the_slope_of_the_huber_loss() -> None:
    """2 d x / sqrt(x^2 + d^2): at most 2 d, and zero without an error."""
    delta, values = 0.1, torch.tensor([0.0, 1e-4, -0.1, 3.0, -1e3])
    differences = values.clone().requires_grad_()
    per_sample_loss(differences[:, None], torch.zeros(5, 1), delta).sum().backward()
    expected = 2 * delta * values / (values**2 + delta**2).sqrt()
    torch.testing.assert_close(differences.grad, expected, rtol=1e-5, atol=0)


# --- timesteps ---


def test_fractions_by_hand() -> None:
    for value in (-2.0, 0.0, 0.3, 1.7):
        expected = 1 / (1 + math.exp(-(0.5 + 2 * value)))
        assert logit_normal(value, 0.5, 2.0) == pytest.approx(expected, rel=1e-15)
    for value in (0.0, 0.25, 0.999):
        assert high_noise(value, 3.0) == pytest.approx(1 - value * value * value, rel=1e-14)
        assert high_noise(value, 1.0) == pytest.approx(1 - value, rel=1e-15)


@pytest.mark.parametrize(
    ("objective", "timestep"),
    [
        (ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=1e6), 999),
        (ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=-1e6), 0),
        (ObjectiveConfig(timestep_sampling="logit_normal", logit_mean=1e300, logit_std=1e300), None),
        (ObjectiveConfig(timestep_sampling="high_noise", high_noise_power=1e9), 999),
    ],
)
def test_extreme_numbers_stay_timesteps(objective: ObjectiveConfig, timestep: int | None, base: Components) -> None:
    found = {base.draw_timestep(np.random.default_rng(seed), objective) for seed in range(200)}
    assert found == {0, 999} if timestep is None else {timestep}
    assert draw_fraction(np.random.default_rng(0), objective) < 1


def test_uniform_has_no_fraction() -> None:
    with pytest.raises(ValueError, match="timestep_sampling 'uniform': has no fractions of its own"):
        draw_fraction(np.random.default_rng(0), ObjectiveConfig(timestep_sampling="uniform"))


def test_timesteps_follow_their_distribution(base: Components) -> None:
    """Counts in tenths of the timesteps against the distribution function, by Pearson's chi squared within 5 sigma."""
    edges, count = np.linspace(0, 1, 11), 20_000

    def of_logit_normal(edge: float) -> float:
        if edge in (0, 1):
            return edge
        return 0.5 * (1 + math.erf((math.log(edge / (1 - edge)) - 0.4) / (0.7 * math.sqrt(2))))

    for changed, distribution in (
        ({}, lambda edge: edge),
        ({"timestep_sampling": "uniform"}, lambda edge: edge),
        ({"timestep_sampling": "logit_normal", "logit_mean": 0.4, "logit_std": 0.7}, of_logit_normal),
        ({"timestep_sampling": "high_noise"}, lambda edge: 1 - (1 - edge) ** (1 / 3)),
        ({"timestep_sampling": "high_noise", "high_noise_power": 2.0}, lambda edge: 1 - math.sqrt(1 - edge)),
    ):
        objective = ObjectiveConfig(**changed)
        timesteps = draw(0, range(count), (1, 1, 1), base.draw_timestep, CPU, objective=objective).timesteps
        assert timesteps.dtype == torch.int64
        expected = count * np.diff([distribution(float(edge)) for edge in edges])
        likely = expected > 5
        found = np.bincount(timesteps.numpy() // 100, minlength=10)
        chi_squared = float(((found - expected)[likely] ** 2 / expected[likely]).sum())
        freedom = int(likely.sum()) - 1
        assert chi_squared < freedom + 5 * math.sqrt(2 * freedom), objective
        assert found[~likely].sum() < 30


def test_uniform_is_what_it_was(base: Components) -> None:
    """Bit for bit the default; other samplings change the timesteps and nothing else."""
    plain, named, other = (
        draw(7, range(50), LATENT_SHAPE, base.draw_timestep, CPU, objective=ObjectiveConfig(timestep_sampling=name))
        for name in (None, "uniform", "high_noise")
    )
    expected = []
    for index in range(50):
        rng = np.random.default_rng((7, 3, index))
        rng.standard_normal((2, *LATENT_SHAPE), dtype=np.float32)
        expected.append(int(rng.integers(1000)))
    assert plain.timesteps.tolist() == named.timesteps.tolist() == expected
    assert other.timesteps.tolist() != expected
    for one in (named, other):
        assert torch.equal(one.noise, plain.noise)
        assert torch.equal(one.posterior_noise, plain.posterior_noise)


# --- added noise ---


def drawn(base: Components, count: int = 200, **changed: Any) -> Draws:
    objective = ObjectiveConfig(**changed)
    return draw(3, range(count), LATENT_SHAPE, base.draw_timestep, CPU, objective=objective)


def test_offset_noise(base: Components) -> None:
    """Added is the offset x a standard normal number of each sample and channel, and nothing else changes."""
    plain, found = drawn(base, 2000), drawn(base, 2000, noise_offset=0.5)
    assert torch.equal(plain.timesteps, found.timesteps)
    assert torch.equal(plain.posterior_noise, found.posterior_noise)
    assert found.input_noise is None
    added = (found.noise - plain.noise).double()
    flat = added.flatten(2)
    assert float((flat - flat[..., :1]).abs().max()) < 1e-6, "the same all over a channel"
    offsets = flat.mean(-1).flatten() / 0.5
    assert len(offsets) == 8000
    assert abs(float(offsets.mean())) < 5 / len(offsets) ** 0.5
    assert abs(float(offsets.var()) - 1) < 5 * (2 / len(offsets)) ** 0.5
    twice = (drawn(base, 10, noise_offset=1.0).noise - plain.noise[:10]).double()
    torch.testing.assert_close(twice, 2 * added[:10], rtol=0, atol=1e-6)


def test_input_perturbation(base: Components) -> None:
    """The input has the noise + p x standard normal numbers of its own; the target's noise stays."""
    plain, found = drawn(base), drawn(base, input_perturbation=0.25)
    assert torch.equal(plain.noise, found.noise)
    assert found.input_noise is not None
    assert torch.equal(plain.timesteps, found.timesteps)
    more = (found.input_noise - found.noise).double() / 0.25
    assert more.shape == (200, *LATENT_SHAPE)
    assert abs(float(more.mean())) < 5 / more.numel() ** 0.5
    assert abs(float(more.var()) - 1) < 5 * (2 / more.numel()) ** 0.5
    assert abs(float((more * plain.noise).mean())) < 5 / more.numel() ** 0.5


def test_one_addition_does_not_change_another(base: Components) -> None:
    """Nor does the way timesteps are drawn, so that trials of a sweep differ in one thing alone."""
    changed: dict[str, Any] = {"noise_offset": 0.5, "input_perturbation": 0.25}
    both, later = drawn(base, **changed), drawn(base, **changed, timestep_sampling="logit_normal")
    assert torch.equal(both.noise, drawn(base, noise_offset=0.5).noise)
    assert not torch.equal(both.timesteps, later.timesteps)
    assert torch.equal(both.noise, later.noise)
    alone = drawn(base, input_perturbation=0.25)
    assert both.input_noise is not None
    assert later.input_noise is not None
    assert alone.input_noise is not None
    assert torch.equal(both.input_noise, later.input_noise)
    torch.testing.assert_close(both.input_noise - both.noise, alone.input_noise - alone.noise, rtol=0, atol=1e-6)


# --- the rescaled schedule ---


def test_the_rescaled_schedule_by_hand(base_v: Components, tiny_base_v: Path) -> None:
    """Lin et al., algorithm 1, in float64; the last timestep has no signal, and the first one keeps its own."""
    from diffusers import DDPMScheduler

    before = DDPMScheduler.from_pretrained(tiny_base_v, subfolder="scheduler").alphas_cumprod.double().sqrt()
    expected = ((before - before[-1]) * before[0] / (before[0] - before[-1])) ** 2
    rescaled = load(tiny_base_v, zero_snr=True).noise_scheduler
    assert float(rescaled.alphas_cumprod[-1]) == 0
    assert float(base_v.noise_scheduler.alphas_cumprod[-1]) > 1e-3
    torch.testing.assert_close(rescaled.alphas_cumprod.double(), expected, rtol=2e-4, atol=1e-7)
    assert {name: rescaled.config[name] for name in ZERO_SNR} == ZERO_SNR


def test_the_last_timestep_is_pure_noise(tiny_base_v: Path) -> None:
    rescaled = load(tiny_base_v, zero_snr=True)
    noise, latents = normal(2, *LATENT_SHAPE).float(), normal(2, *LATENT_SHAPE, seed=1).float()
    draws = Draws(noise, noise, torch.tensor([999, 999]))
    noisy, target = rescaled.family.diffuse(rescaled.noise_scheduler, latents, draws)
    assert torch.equal(noisy, noise)
    assert torch.equal(target, -latents)
    assert not torch.equal(add_noise(latents, noise, torch.tensor([0.0047, 0.0047])), noise)


def test_images_begin_at_the_last_timestep(tiny_base_v: Path) -> None:
    from raycontrolnet.sampling.pipeline import build_pipeline

    for zero_snr in (True, False):
        sampler = build_pipeline(load(tiny_base_v, zero_snr=zero_snr)).scheduler
        with only_errors():
            sampler.set_timesteps(20)
        assert sampler.config["rescale_betas_zero_snr"] is zero_snr
        assert (int(sampler.timesteps[0]) == 999) == zero_snr
        assert len(sampler.timesteps) == 20


def test_the_noise_says_nothing_of_the_image_without_signal(base: Components, base_v: Components) -> None:
    objective = ObjectiveConfig(rescale_betas_zero_snr=True)
    (problem,) = base.family.objective_problems(objective, base.noise_scheduler.config)
    assert problem == (
        "--rescale_betas_zero_snr: the base model predicts the noise (epsilon), which says nothing of the image where "
        "all is noise; leave it out, or name a base that has v_prediction"
    )
    assert list(base_v.family.objective_problems(objective, base_v.noise_scheduler.config)) == []
    for components in (base, base_v):
        both = ObjectiveConfig(snr_gamma=5.0, loss="huber", noise_offset=0.1, input_perturbation=0.1)
        assert list(components.family.objective_problems(both, components.noise_scheduler.config)) == []


# --- the step ---

OBJECTIVES: dict[str, dict[str, Any]] = {
    "min-SNR": {"snr_gamma": GAMMA},
    "huber": {"loss": "huber", "huber_delta": 0.2},
    "offset": {"noise_offset": 0.3},
    "perturbation": {"input_perturbation": 0.4},
    "timesteps": {"timestep_sampling": "high_noise"},
    "all": {
        "snr_gamma": GAMMA, "loss": "huber", "huber_delta": 0.2, "noise_offset": 0.3, "input_perturbation": 0.4,
        "timestep_sampling": "logit_normal", "logit_mean": 0.5,
    },
}  # fmt: skip


def load(base: Path, controlnet: Path | None = None, *, zero_snr: bool = False) -> Components:
    named = str(controlnet) if controlnet else None
    model = TrainConfig(
        pretrained_model_name_or_path=str(base), controlnet_model_name_or_path=named, train_data_dir="none"
    )
    return load_components(
        model, device=CPU, dtype=torch.float32, seed=0, objective=ObjectiveConfig(rescale_betas_zero_snr=zero_snr)
    )


@pytest.fixture(scope="module")
def controlnet_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(tiny_base, tmp_path_factory.mktemp("controlnet"))


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Components:
    return load(tiny_base)


@pytest.fixture(scope="module")
def base_v(tiny_base_v: Path) -> Components:
    return load(tiny_base_v)


def by_diffusers(
    base: Path, controlnet: Path, draws: Draws, objective: ObjectiveConfig, indices: range, **scheduler: Any
) -> Tensor:
    """Return the loss of each sample as diffusers' text-to-image and consistency scripts compute it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", **scheduler)
    model_pred, target = reference_prediction(base, controlnet, fake_rows(*indices), draws, **scheduler)
    if objective.loss == "huber":
        c = objective.huber_delta
        loss = 2 * c * (torch.sqrt((model_pred.double() - target.double()) ** 2 + c**2) - c)
    else:
        loss = torch.nn.functional.mse_loss(model_pred.double(), target.double(), reduction="none")
    loss = loss.mean(dim=[1, 2, 3])
    if objective.snr_gamma is None:
        return loss
    snr = compute_snr(noise_scheduler, draws.timesteps).double()
    weights = torch.stack([snr, objective.snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    return loss * (weights / snr if noise_scheduler.config.prediction_type == "epsilon" else weights / (snr + 1))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("base_fixture", ["tiny_base", "tiny_base_v"])
def test_the_loss_is_diffusers(
    name: str, base_fixture: str, controlnet_folder: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(base_fixture)
    components, objective, indices = load(base, controlnet_folder), ObjectiveConfig(**OBJECTIVES[name]), range(4)
    draws = draw(0, indices, LATENT_SHAPE, components.draw_timestep, CPU, objective=objective)
    batch = make_batch(fake_rows(*indices), components, CPU)
    with torch.no_grad():
        expected = by_diffusers(base, controlnet_folder, draws, objective, indices)
        loss = controlnet_loss(components, components.controlnet, batch, draws, objective)
        plain_draws = draw(0, indices, LATENT_SHAPE, components.draw_timestep, CPU)
        plain = controlnet_loss(components, components.controlnet, batch, plain_draws)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    assert (loss - plain).abs().max() > 1e-3, "the objective changes the loss"


def test_the_loss_of_the_rescaled_schedule_is_diffusers(tiny_base_v: Path, controlnet_folder: Path) -> None:
    components, indices = load(tiny_base_v, controlnet_folder, zero_snr=True), range(4)
    draws = draw(0, indices, LATENT_SHAPE, components.draw_timestep, CPU)
    draws = draws._replace(timesteps=torch.tensor([999, 998, 700, 3]))
    batch = make_batch(fake_rows(*indices), components, CPU)
    objective = ObjectiveConfig(snr_gamma=GAMMA)
    with torch.no_grad():
        for given in (PLAIN, objective):
            expected = by_diffusers(tiny_base_v, controlnet_folder, draws, given, indices, **ZERO_SNR)
            loss = controlnet_loss(components, components.controlnet, batch, draws, given)
            torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    assert float(loss[0]) == 0, "min-SNR weights a sample without signal by zero"


def test_the_driver_need_not_see_the_base(tiny_base: Path, tiny_settings: dict[str, Any]) -> None:
    """A worker refuses what a driver without the base model could not."""
    from raycontrolnet.training.schedule import Schedule
    from raycontrolnet.training.state import accelerator_for, build_state

    config = TrainConfig(**tiny_settings | {"rescale_betas_zero_snr": True})
    with accelerator_for(config, use_gpu=False) as accelerator, pytest.raises(UserError) as error:
        build_state(config, Schedule.of(config, 13, 1), accelerator, None, None)
    assert str(error.value).startswith("--rescale_betas_zero_snr: the base model predicts the noise (epsilon)")

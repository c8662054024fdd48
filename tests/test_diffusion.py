"""Identities of the objective in float64, and agreement with diffusers at every timestep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from raycontrolnet.model.diffusion import (
    PREDICTION_TYPES,
    add_noise,
    per_sample_loss,
    prediction_target,
    sample_posterior,
)

SHAPE = (7, 4, 5, 3)
ALPHAS_CUMPROD = torch.tensor([1.0, 0.9991, 0.75, 0.5, 0.1, 0.0047, 0.0], dtype=torch.float64)


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def levels() -> tuple[Tensor, Tensor]:
    """(a_t, s_t), to be multiplied with latents."""
    column = ALPHAS_CUMPROD.view(-1, 1, 1, 1)
    return column.sqrt(), (1 - column).sqrt()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_latents_and_noise_follow_from_the_noisy_latents_and_the_velocity(latents: Tensor, noise: Tensor) -> None:
    """x0 = a x_t - s v and noise = s x_t + a v (Salimans & Ho 2022, appendix D), at every level, 0 and 1 included."""
    signal, sigma = levels()
    noisy = add_noise(latents, noise, ALPHAS_CUMPROD)
    velocity = prediction_target("v_prediction", latents, noise, ALPHAS_CUMPROD)
    close(signal * noisy - sigma * velocity, latents)
    close(sigma * noisy + signal * velocity, noise)


def test_noising_and_velocity_turn_the_plane_of_latents_and_noise(latents: Tensor, noise: Tensor) -> None:
    noisy = add_noise(latents, noise, ALPHAS_CUMPROD)
    velocity = prediction_target("v_prediction", latents, noise, ALPHAS_CUMPROD)
    close(noisy**2 + velocity**2, latents**2 + noise**2)


def test_the_ends(latents: Tensor, noise: Tensor) -> None:
    """Without noise the latents, with nothing else the noise."""
    noisy = add_noise(latents, noise, ALPHAS_CUMPROD)
    close(noisy[0], latents[0])
    close(noisy[-1], noise[-1])
    velocity = prediction_target("v_prediction", latents, noise, ALPHAS_CUMPROD)
    close(velocity[0], noise[0])
    close(velocity[-1], -latents[-1])


def test_unit_variance_is_preserved() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 7, 200_000, 1, 1), dtype=torch.float64, generator=generator)
    for values in (
        add_noise(latents, noise, ALPHAS_CUMPROD),
        prediction_target("v_prediction", latents, noise, ALPHAS_CUMPROD),
    ):
        assert (values.var(dim=(1, 2, 3)) - 1).abs().max() < 5 * (2 / 200_000) ** 0.5


def test_the_target_of_epsilon_is_the_noise(latents: Tensor, noise: Tensor) -> None:
    assert prediction_target("epsilon", latents, noise, ALPHAS_CUMPROD) is noise


def test_another_prediction_type_is_refused(latents: Tensor, noise: Tensor) -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample': must be one of epsilon, v_prediction"):
        prediction_target("sample", latents, noise, ALPHAS_CUMPROD)


def test_each_sample_has_its_own_level(latents: Tensor, noise: Tensor) -> None:
    for function in (add_noise, lambda *inputs: prediction_target("v_prediction", *inputs)):
        together = function(latents, noise, ALPHAS_CUMPROD)
        for i in range(len(latents)):
            assert torch.equal(
                together[i : i + 1], function(latents[i : i + 1], noise[i : i + 1], ALPHAS_CUMPROD[i : i + 1])
            )


def test_the_loss_is_torchs(latents: Tensor, noise: Tensor) -> None:
    loss = per_sample_loss(latents, noise)
    assert loss.shape == (len(latents),)
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.mse_loss(latents.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    mean = torch.nn.functional.mse_loss(latents.float(), noise.float(), reduction="mean")
    torch.testing.assert_close(loss.mean(), mean, rtol=1e-6, atol=0)
    assert per_sample_loss(latents, latents).eq(0).all()


def test_the_loss_of_half_precision_is_fp32(latents: Tensor, noise: Tensor) -> None:
    """Squares of a hundred overflow in fp16 sums."""
    prediction = (100 * latents).half()
    loss = per_sample_loss(prediction, noise)
    assert loss.dtype == torch.float32
    expected = (prediction.double() - noise.float().double()).pow(2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_posterior_samples_are_diffusers() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    generator = torch.Generator().manual_seed(0)
    moments = 3 * torch.randn((2, 8, 3, 3), generator=generator)
    moments[0, 4:, 0] = 50.0  # beyond the clamps
    moments[1, 4:, 0] = -70.0
    noise = torch.randn((2, 4, 3, 3), generator=generator)
    posterior = DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, dim=1)
    sample = sample_posterior(mean, logvar, noise)
    torch.testing.assert_close(sample, posterior.mean + posterior.std * noise, rtol=1e-6, atol=1e-6)
    assert sample.isfinite().all()
    assert sample_posterior(mean.half(), logvar.half(), noise).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_every_timestep_agrees_with_diffusers(prediction_type: str, tiny_base: Path) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_pretrained(tiny_base, subfolder="scheduler", prediction_type=prediction_type)
    timesteps = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 1000, 4, 2, 2), generator=generator)
    alphas_cumprod = scheduler.alphas_cumprod[timesteps]
    noisy = add_noise(latents, noise, alphas_cumprod)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps), rtol=0, atol=1e-6)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    target = prediction_target(prediction_type, latents, noise, alphas_cumprod)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)

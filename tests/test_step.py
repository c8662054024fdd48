"""The training step does the reference's arithmetic, to the ControlNet alone, and updates when it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    CPU,
    LATENT_SHAPE,
    draw_timestep,
    fake_rows,
    reference_loss,
    steps,
    training,
    write_trained_controlnet,
)
from safetensors.torch import load_file
from torch import Tensor

from raycontrolnet import TrainConfig
from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.config.settings import StepConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.batch import draw, latent_shape, make_batch
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.optim import build_optimizer
from raycontrolnet.model.performance import enable_memory_savers
from raycontrolnet.model.step import TrainState, controlnet_loss
from raycontrolnet.predict.count import as_autocast_on_gpus
from raycontrolnet.training.schedule import Schedule, Share
from raycontrolnet.training.state import accelerator_for


@pytest.fixture(scope="module")
def controlnet_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(tiny_base, tmp_path_factory.mktemp("controlnet"))


@pytest.fixture
def settings(tiny_settings: dict[str, Any], controlnet_folder: Path) -> dict[str, Any]:
    """Return the settings of a run that continues from a ControlNet that was trained a bit."""
    return tiny_settings | {"controlnet_model_name_or_path": str(controlnet_folder)}


@pytest.fixture
def components(settings: dict[str, Any]) -> Components:
    return load_tiny(settings)


def load_tiny(settings: dict[str, Any], seed: int = 0) -> Components:
    return load_components(TrainConfig(**settings), device=CPU, dtype=torch.float32, seed=seed)


def losses(components: Components, *sample_indices: int) -> Tensor:
    batch = make_batch(fake_rows(*sample_indices), components, CPU)
    draws = draw(0, sample_indices, LATENT_SHAPE, draw_timestep, CPU)
    return controlnet_loss(components, components.controlnet, batch, draws)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in module.named_parameters() if value.grad is not None}


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([tensor.norm() for tensor in tensors])))


@pytest.mark.parametrize("base_fixture", ["tiny_base", "tiny_base_v"])
def test_the_loss_is_the_references(
    base_fixture: str, settings: dict[str, Any], controlnet_folder: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(base_fixture)
    components = load_tiny(settings | {"pretrained_model_name_or_path": str(base)})
    seen = []
    for indices in ([0, 1, 2, 3], [4], [5, 6]):
        rows = fake_rows(*indices)
        draws = draw(0, indices, LATENT_SHAPE, draw_timestep, CPU)
        with torch.no_grad():
            expected = reference_loss(base, controlnet_folder, rows, draws)
            loss = controlnet_loss(components, components.controlnet, make_batch(rows, components, CPU), draws)
        assert loss.dtype == torch.float32
        assert loss.shape == (len(indices),)
        assert abs(float(loss.mean() - expected)) <= 1e-6
        seen.append(float(expected))
    assert min(seen) > 0.1, "a loss near zero would agree with anything"
    assert len(set(seen)) == 3


def test_the_gradients_are_the_references(
    components: Components, tiny_base: Path, controlnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import ControlNetModel

    reference = ControlNetModel.from_pretrained(controlnet_folder)
    monkeypatch.setattr(ControlNetModel, "from_pretrained", lambda _: reference)
    reference_loss(
        tiny_base, controlnet_folder, fake_rows(0, 1), draw(0, [0, 1], LATENT_SHAPE, draw_timestep, CPU)
    ).backward()
    losses(components, 0, 1).mean().backward()
    expected, found = gradients(reference), gradients(components.controlnet)
    assert len(expected) > 50
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_every_input_has_a_say(components: Components) -> None:
    """Agreement with the reference is worth something: each part of batch, draws and ControlNet moves the loss."""
    batch = make_batch(fake_rows(0, 1), components, CPU)
    draws = draw(0, [0, 1], LATENT_SHAPE, draw_timestep, CPU)
    other_batch = make_batch(fake_rows(2, 3), components, CPU)
    other_draws = draw(0, [2, 3], LATENT_SHAPE, draw_timestep, CPU)
    with torch.no_grad():
        loss = controlnet_loss(components, components.controlnet, batch, draws)
        assert batch.size_conditions is None  # of other families
        names = [name for name in batch._fields if name not in ("size_conditions", "posterior")]
        inputs = [
            *((batch._replace(**{name: getattr(other_batch, name)}), draws) for name in names),
            (batch._replace(posterior=torch.randn(2, 2, *LATENT_SHAPE)), draws),
            *((batch, draws._replace(**{name: getattr(other_draws, name)})) for name in draws._fields[:3]),
            (batch, draws._replace(input_noise=other_draws.noise)),
        ]
        assert len(inputs) == 8
        for changed_batch, changed_draws in inputs:
            other = controlnet_loss(components, components.controlnet, changed_batch, changed_draws)
            assert (loss - other).abs().min() > 1e-6
        for parameter in components.controlnet.parameters():
            parameter.zero_()
        assert (loss - controlnet_loss(components, components.controlnet, batch, draws)).abs().min() > 1e-3


def test_gradients_reach_only_the_controlnet(settings: dict[str, Any]) -> None:
    with training(settings | {"gradient_accumulation_steps": 2}) as state:
        steps(state, fake_rows(0, 1))
        for module in state.components.frozen():
            assert not module.training
            assert not [name for name, value in module.named_parameters() if value.requires_grad]
            assert gradients(module) == {}
        assert state.components.controlnet.training
        found = gradients(state.components.controlnet)
        assert found.keys() == dict(state.components.controlnet.named_parameters()).keys()
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert sum(bool(gradient.any()) for gradient in found.values()) > 0.9 * len(found)
        optimized = {id(value) for group in state.optimizer.param_groups for value in group["params"]}
        assert optimized == {id(value) for value in state.components.controlnet.parameters()}


def test_training_changes_only_the_controlnet(settings: dict[str, Any]) -> None:
    with training(settings) as state:
        parts = {"controlnet": state.components.controlnet, "unet": state.components.denoiser,
                 "vae": state.components.vae, "text_encoder": state.components.text_encoders[0]}  # fmt: skip
        before = {name: [value.clone() for value in part.state_dict().values()] for name, part in parts.items()}
        steps(state, fake_rows(0, 1), fake_rows(2, 3))
        changed = {
            name for name, part in parts.items() if not all(map(torch.equal, before[name], part.state_dict().values()))
        }
        assert changed == {"controlnet"}


def test_a_batch_is_the_mean_of_its_samples(components: Components) -> None:
    indices = (0, 1, 2, 3, 4)
    with torch.no_grad():
        together = losses(components, *indices)
        alone = torch.cat([losses(components, index) for index in indices])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert abs(float(together.mean() - alone.mean())) <= 1e-6
    assert together.std() > 1e-3


def forward_calls(module: torch.nn.Module) -> Counter[str]:
    """Count the forward passes of `module`'s residual blocks, recomputed ones included."""
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    for name, part in module.named_modules():
        if type(part).__name__ == "ResnetBlock2D":
            calls[name] = 0
            part.register_forward_pre_hook(counter(name))  # a recomputation stops before a forward pass ends
    return calls


def test_gradient_checkpointing(settings: dict[str, Any]) -> None:
    """The same loss and gradients, and the blocks that gradients pass are recomputed: in the UNet too."""
    found = []
    for checkpointing in (False, True):
        components = load_tiny(settings)
        enable_memory_savers(components, gradient_checkpointing=checkpointing, xformers=False)
        controlnet, unet = forward_calls(components.controlnet), forward_calls(components.denoiser.up_blocks)
        loss = losses(components, 0, 1).mean()
        loss.backward()
        found.append((loss.detach(), gradients(components.controlnet)))
        assert len(controlnet) >= 4
        assert len(unet) >= 4
        in_blocks = {name: count for name, count in controlnet.items() if name.startswith("down_blocks")}
        assert set(in_blocks.values()) == set(unet.values()) == {2 if checkpointing else 1}
    (plain_loss, plain), (loss, checkpointed) = found
    assert torch.equal(loss, plain_loss)
    assert checkpointed.keys() == plain.keys()
    for name, gradient in checkpointed.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-6, atol=1e-8)


def test_a_run_has_gradient_checkpointing_only_if_asked(settings: dict[str, Any]) -> None:
    for asked in (False, True):
        with training(settings | {"gradient_checkpointing": asked}) as state:
            calls = forward_calls(state.components.denoiser.up_blocks)
            steps(state, fake_rows(0))
            assert set(calls.values()) == {2 if asked else 1}


def first_moments(state: TrainState) -> list[Tensor]:
    """After one update: (1 - beta1) x the gradients that the optimizer was given."""
    return [moment["exp_avg"] for moment in state.optimizer.state.values()]


def test_clipping_happens_only_on_updates(settings: dict[str, Any]) -> None:
    settings |= {"gradient_accumulation_steps": 3}
    batches = [fake_rows(2 * i, 2 * i + 1) for i in range(3)]
    accumulated, given, norms = {}, {}, []
    for limit in (1e-3, 1e9):
        with training(settings | {"max_grad_norm": limit}) as state:
            first, second = steps(state, *batches[:2])
            assert (first.grad_norm, second.grad_norm) == (None, None)
            accumulated[limit] = [gradient.clone() for gradient in gradients(state.components.controlnet).values()]
            assert first_moments(state) == []
            (third,) = steps(state, batches[2])
            norms.append(float(third.grad_norm))
            given[limit] = [moment / (1 - 0.9) for moment in first_moments(state)]
    assert all(map(torch.equal, *accumulated.values()))
    assert norms[0] == norms[1] > 0.01, "the norm before clipping"
    assert norm(given[1e-3]) == pytest.approx(1e-3, rel=1e-3)
    assert norm(given[1e9]) == pytest.approx(norms[0], rel=1e-5)


def test_workers_with_more_and_fewer_batches_weigh_as_they_should(settings: dict[str, Any]) -> None:
    """One worker does two of three batches, another one: the mean of their gradients is that of an update of three."""
    batches = [fake_rows(2 * i, 2 * i + 1) for i in range(3)]
    settings |= {"gradient_accumulation_steps": 3, "max_grad_norm": 1e9, "train_batch_size": 2}
    with training(settings) as state:
        steps(state, *batches)
        expected = first_moments(state)
    summed = [torch.zeros_like(moment) for moment in expected]
    for rank in range(2):
        share = Share(rank, world_size=2, micro_batches=3)
        with training(settings) as state:
            state.begin_update(share.micro_steps(0))
            results = steps(state, *batches[rank::2], weight=share.weight(0))
            assert [result.grad_norm is None for result in results] == [True, False][rank:]
            assert (state.step, state.samples) == (1, 6)
            for total, moment in zip(summed, first_moments(state), strict=True):
                total += moment / 2
    for pair in zip(summed, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-8)


def test_an_update_that_the_loss_scaler_skips(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients overflowed: the schedule waits, and their norm is no sign of divergence."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    with training(settings | {"lr_scheduler": "linear", "lr_warmup_steps": 2, "train_batch_size": 1}) as state:
        results = steps(state, fake_rows(0), fake_rows(1))
        assert [(result.lr, float(result.grad_norm)) for result in results] == [(0, 0), (0, 0)]
        assert (state.step, state.samples) == (2, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_why_adamw_is_not_fused_with_a_loss_scaler(fused: bool, settings: dict[str, Any]) -> None:
    """A real scaler and infinite gradients: only the plain optimizer tells accelerate that the update was skipped."""
    from accelerate.optimizer import AcceleratedOptimizer

    with accelerator_for(TrainConfig(**settings), use_gpu=False):
        parameter = torch.nn.Parameter(torch.ones(4))
        scaler = torch.amp.GradScaler("cpu")
        optimizer = build_optimizer([parameter], TrainConfig(**settings), 1e-3, fused=fused)
        accelerated = AcceleratedOptimizer(optimizer, scaler=scaler)
        scaler.scale(parameter.sum() * torch.inf).backward()
        accelerated.step()
        assert torch.equal(parameter, torch.ones(4))
        assert accelerated.step_was_skipped == (not fused)


def test_three_batches_of_two_are_one_of_six(settings: dict[str, Any]) -> None:
    settings |= {"adam_epsilon": 1e-2}  # by default Adam makes float noise in a vanishing gradient a whole step
    weights, moments, losses_ = [], [], []
    for accumulation in (1, 3):
        size = 6 // accumulation
        with training(settings | {"gradient_accumulation_steps": accumulation, "train_batch_size": size}) as state:
            for update in range(2):
                first = 6 * update
                results = steps(state, *(fake_rows(*range(k, k + size)) for k in range(first, first + 6, size)))
                assert [result.grad_norm is None for result in results] == [True] * (accumulation - 1) + [False]
                assert (state.step, state.samples) == (update + 1, 6 * (update + 1))
            losses_.append(torch.stack([result.loss for result in results]).mean())
            weights.append([value.detach().clone() for value in state.components.controlnet.parameters()])
            moments.append(first_moments(state))
    torch.testing.assert_close(losses_[0], losses_[1], rtol=0, atol=1e-6)
    for pair in zip(*moments, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-7)
    for pair in zip(*weights, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_are_freed(accumulation: int, settings: dict[str, Any]) -> None:
    """One process on a CPU frees them; zeros in their place, as elsewhere, teach the same, bit for bit."""
    found = []
    for freed in (True, False):
        with training(settings | {"gradient_accumulation_steps": accumulation}) as state:
            assert state.set_grads_to_none
            state.set_grads_to_none = freed
            metrics = [steps(state, fake_rows(first)) for first in range(4)]
            weights = list(state.components.controlnet.parameters())
            assert len(weights) > 50
            assert all(weight.grad is None if freed else not weight.grad.any() for weight in weights)
            found.append((metrics, [weight.detach().clone() for weight in weights]))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_bf16_mixed_precision(settings: dict[str, Any]) -> None:
    """Frozen parts in bf16, the trained part and its optimizer in fp32."""
    losses_ = []
    for mixed_precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        with training(settings | {"mixed_precision": mixed_precision}) as state:
            before = [value.detach().clone() for value in state.components.controlnet.parameters()]
            results = steps(state, fake_rows(0, 1), fake_rows(2, 3))
            assert {value.dtype for part in state.components.frozen() for value in part.parameters()} == {dtype}
            after = list(state.components.controlnet.parameters())
            assert {value.dtype for value in after} == {torch.float32}
            moments = [moment[name] for moment in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
            assert len(moments) == 2 * len(after)
            assert {moment.dtype for moment in moments} == {torch.float32}
            assert not all(map(torch.equal, before, after))
            assert {result.loss.dtype for result in results} == {torch.float32}
            losses_.append(torch.stack([result.loss for result in results]))
    assert losses_[1].isfinite().all()
    torch.testing.assert_close(losses_[1], losses_[0], rtol=0.02, atol=0)
    assert not torch.equal(*losses_)


@pytest.mark.parametrize("autocast", [nullcontext, as_autocast_on_gpus], ids=["CPU", "GPU"])
def test_bf16_parity(settings: dict[str, Any], tiny_base: Path, autocast: Callable[[Any], Any]) -> None:
    """The reference's loss and the fp32 step's gradients, to what 8 bits of mantissa give; also with a GPU's autocast.

    That one computes normalizations in fp32; a CPU's leaves them in bf16.
    """
    found = []
    for mixed_precision in ("no", "bf16"):
        with training(settings | {"mixed_precision": mixed_precision, "max_grad_norm": 1e9}) as state:
            norms = [each for each in state.components.controlnet.modules() if isinstance(each, torch.nn.GroupNorm)]
            seen = set[torch.dtype]()
            for module in norms:
                module.register_forward_hook(lambda module, args, output, seen=seen: seen.add(output.dtype))
            with autocast(state.components):
                (result,) = steps(state, fake_rows(0, 1))
            found.append((result, [moment.clone() for moment in first_moments(state)], seen))
    (plain, right, _), (mixed, gradients, seen) = found
    assert seen == {torch.float32 if autocast is as_autocast_on_gpus else torch.bfloat16}
    draws = draw(0, [0, 1], LATENT_SHAPE, draw_timestep, CPU)
    loss = reference_loss(tiny_base, Path(settings["controlnet_model_name_or_path"]), fake_rows(0, 1), draws)
    torch.testing.assert_close(plain.loss, loss.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.loss, loss.detach(), rtol=0.02, atol=0)
    torch.testing.assert_close(mixed.grad_norm, plain.grad_norm, rtol=0.05, atol=0)
    near, exact = (torch.cat([moment.flatten() for moment in moments]) for moments in (gradients, right))
    assert torch.nn.functional.cosine_similarity(near, exact, dim=0) > 0.995


def test_the_controlnet_is_copied_from_the_unet(tiny_settings: dict[str, Any]) -> None:
    components = load_tiny(tiny_settings)
    state, copied = components.denoiser.state_dict(), components.controlnet.state_dict()
    shared = copied.keys() & state.keys()
    assert len(shared) > 50
    assert all(torch.equal(copied[name], state[name]) for name in shared)
    zero = [value for name, value in copied.items() if name.startswith(("controlnet_down_", "controlnet_mid_"))]
    assert zero
    assert not any(value.any() for value in zero)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    again, other = load_tiny(tiny_settings), load_tiny(tiny_settings, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(map(torch.equal, copied.values(), again.controlnet.state_dict().values()))
    differing = {name for name, value in other.controlnet.state_dict().items() if not torch.equal(value, copied[name])}
    assert differing
    assert all(name.startswith("controlnet_cond_embedding.") for name in differing)


def test_half_precision_weights_are_raised(settings: dict[str, Any], controlnet_folder: Path, tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    half = ControlNetModel.from_pretrained(controlnet_folder, torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    raised = load_tiny(settings | {"controlnet_model_name_or_path": str(tmp_path / "half")}).controlnet
    assert all(value.requires_grad for value in raised.parameters())
    found = raised.state_dict()
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in stored.items())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"cross_attention_dim": 8},
            "made for another base model (cross_attention_dim 8, the base model's UNet has 16",
        ),
        ({"block_out_channels": (8, 8)}, "made for another base model (block_out_channels [8, 8], the base model's"),
        ({"layers_per_block": 2}, "made for another base model (layers_per_block 2, the base model's UNet has 1"),
    ],
)
def test_a_controlnet_of_another_base_is_refused(
    changed: dict[str, Any], message: str, settings: dict[str, Any], controlnet_folder: Path, tmp_path: Path
) -> None:
    from diffusers import ControlNetModel

    config = dict(ControlNetModel.load_config(controlnet_folder)) | changed
    ControlNetModel.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError) as error:
        load_tiny(settings | {"controlnet_model_name_or_path": str(tmp_path / "other")})
    assert str(error.value).startswith(f"--controlnet_model_name_or_path={tmp_path / 'other'}: ")
    assert message in str(error.value)


def test_the_latents_have_the_vaes_shape(components: Components) -> None:
    assert latent_shape(components, 32) == LATENT_SHAPE
    pixels = torch.zeros(1, 3, 64, 64)
    assert tuple(components.vae.encode(pixels).latent_dist.mean.shape[1:]) == latent_shape(components, 64)


# --- draws ---


@pytest.mark.parametrize("objective", [PLAIN, ObjectiveConfig(noise_offset=0.1, input_perturbation=0.2)])
def test_a_samples_draws_are_its_own(objective: ObjectiveConfig) -> None:
    """The same in any batch and on any worker, whatever was drawn before."""
    batch = draw(0, [3, 10**9, 7, 3], LATENT_SHAPE, draw_timestep, CPU, objective=objective)
    torch.randn(3)
    assert (batch.input_noise is None) == (objective is PLAIN)
    for place, index in enumerate([3, 10**9, 7, 3]):
        alone = draw(0, [index], LATENT_SHAPE, draw_timestep, CPU, objective=objective)
        pairs = [(one, many) for one, many in zip(alone, batch, strict=True) if one is not None and many is not None]
        assert all(torch.equal(one[0], many[place]) for one, many in pairs)
        assert len(pairs) == (3 if objective is PLAIN else 4)
    assert (batch.noise.dtype, batch.posterior_noise.dtype, batch.timesteps.dtype) == (
        torch.float32, torch.float32, torch.int64
    )  # fmt: skip


def test_draws_differ_between_samples_seeds_and_purposes() -> None:
    draws = [draw(seed, [index], LATENT_SHAPE, draw_timestep, CPU) for seed in (0, 1, 2**40) for index in (0, 1, 2)]
    noises = [noise for one in draws for noise in (one.noise, one.posterior_noise)]
    assert len({noise.numpy().tobytes() for noise in noises}) == 18
    assert len({int(one.timesteps) for one in draws}) > 5


def test_no_two_samples_share_noise() -> None:
    """These two did, when torch's CPU generator took 32 bits of their keys: among 100,000 samples two always did."""
    draws = draw(0, [8790, 50346], LATENT_SHAPE, lambda rng, _: int(rng.integers(10**6)), CPU)
    assert not torch.equal(draws.noise[0], draws.noise[1])
    assert draws.timesteps[0] != draws.timesteps[1]


def test_two_workers_never_share_noise() -> None:
    schedule = Schedule.of(StepConfig(train_batch_size=2), 13, 2)
    of_rank: dict[int, list[int]] = {0: [], 1: []}
    for micro_step in range(20):
        for rank, indices in of_rank.items():
            first = Share(rank, 2, schedule.micro_batches).place(micro_step) * schedule.batch_size
            indices += range(first, first + schedule.batch_size)
    assert sorted(of_rank[0] + of_rank[1]) == list(range(80))
    noises = {
        rank: {noise.numpy().tobytes() for noise in draw(0, indices, LATENT_SHAPE, draw_timestep, CPU).noise}
        for rank, indices in of_rank.items()
    }
    assert [len(of) for of in noises.values()] == [40, 40]
    assert not noises[0] & noises[1]


def test_the_distributions_of_draws() -> None:
    """Standard normal noise, independent of the posterior's, and timesteps uniform over 0..999: within 5 sigma."""
    count = 20_000
    draws = draw(0, range(count), (4, 2, 2), draw_timestep, CPU)
    values = count * 16
    for noise in (draws.noise, draws.posterior_noise):
        assert abs(float(noise.mean())) < 5 / values**0.5
        assert abs(float(noise.var()) - 1) < 5 * (2 / values) ** 0.5
        assert abs(float(noise.pow(4).mean()) - 3) < 5 * (96 / values) ** 0.5
    assert abs(float((draws.noise * draws.posterior_noise).mean())) < 5 / values**0.5
    timesteps = draws.timesteps
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 999)
    counts = torch.bincount(timesteps // 100, minlength=10).float()
    chi_squared = float(((counts - count / 10) ** 2 / (count / 10)).sum())
    assert chi_squared < 9 + 5 * 18**0.5
    assert abs(float(torch.corrcoef(torch.stack([timesteps.float(), draws.noise[:, 0, 0, 0]]))[0, 1])) < 5 / count**0.5

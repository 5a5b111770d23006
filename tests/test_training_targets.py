"""Predictions, target rules and losses, against closed forms on Gaussian data, whose score is known exactly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from compress.errors import RefusedError
from compress.training.losses import weighted_error
from compress.training.objective import Objective
from compress.training.predictions import PREDICTIONS, clean_of, noise_of, output_of, step_coefficients
from compress.training.runs import Runs
from compress.training.targets import GuidedTarget, SegmentTarget, between
from compress.training.teacher import Network, Teacher

VP = [(0.999, (1 - 0.999**2) ** 0.5), (0.8, 0.6), (0.28, 0.96), (0.05, (1 - 0.05**2) ** 0.5)]
FLOW = [(0.99, 0.01), (0.6, 0.4), (0.25, 0.75), (0.02, 0.98)]
MEAN, SPREAD = 0.7, 0.3


def ideal(latents: Tensor, signal: Tensor, sigma: Tensor, mean: float = MEAN) -> Tensor:
    """The clean latent to be expected for data N(mean, SPREAD^2)."""
    gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + sigma**2)
    return mean + gain * (latents - signal * mean)


def flown(latents: Tensor, level: tuple[float, float], following: tuple[float, float], mean: float = MEAN) -> Tensor:
    """Where the probability flow takes a latent of the same data: it keeps its quantile."""
    (a, s), (b, r) = level, following
    ratio = ((b**2 * SPREAD**2 + r**2) / (a**2 * SPREAD**2 + s**2)) ** 0.5
    return b * mean + ratio * (latents - a * mean)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1, 1)


def drawn(count: int) -> Tensor:
    return torch.randn(count, 2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("levels", [VP, FLOW], ids=["variance preserving", "flow"])
def test_a_prediction_goes_back_and_forth(prediction: str, levels: list[tuple[float, float]]) -> None:
    signal, sigma = column(*(a for a, _ in levels)), column(*(s for _, s in levels))
    clean, noise = drawn(4), drawn(8)[4:]
    latents = signal * clean + sigma * noise
    output = output_of(prediction, clean, noise, signal, sigma)
    assert torch.allclose(clean_of(prediction, output, latents, signal, sigma), clean, rtol=0, atol=1e-12)
    assert torch.allclose(noise_of(prediction, output, latents, signal, sigma), noise, rtol=0, atol=1e-12)


def test_predictions_mean_what_the_field_means() -> None:
    signal, sigma, clean, noise = column(0.8), column(0.6), column(2.0), column(-1.0)
    expected = {"epsilon": -1.0, "v_prediction": 0.8 * -1.0 - 0.6 * 2.0, "flow": -3.0, "sample": 2.0}
    for prediction, value in expected.items():
        assert float(output_of(prediction, clean, noise, signal, sigma)) == pytest.approx(value, abs=1e-15)
    with pytest.raises(RefusedError, match="predicts 'score'; what can be trained is epsilon"):
        clean_of("score", clean, clean, signal, sigma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_holds_clean_latent_and_noise(prediction: str) -> None:
    clean, noise = drawn(1), drawn(2)[1:]
    for level, following in [(VP[3], VP[1]), (VP[1], (1.0, 0.0)), (FLOW[2], FLOW[0])]:
        x, m = step_coefficients(prediction, level, following)
        latents = level[0] * clean + level[1] * noise
        output = output_of(prediction, clean, noise, column(level[0]), column(level[1]))
        assert torch.allclose(x * latents + m * output, following[0] * clean + following[1] * noise, atol=1e-12)


def runs_of(states: Tensor, levels: list[tuple[float, float]], conditioning: dict[str, Tensor]) -> Runs:
    signal, sigma = (torch.tensor(values, dtype=torch.float64) for values in zip(*levels, strict=True))
    times = torch.arange(len(levels) - 1, dtype=torch.float64)
    return Runs(states, times, signal, sigma, torch.zeros(len(states), dtype=torch.int64), conditioning)


@pytest.mark.parametrize("levels", [VP[::-1], FLOW[::-1]], ids=["variance preserving", "flow"])
def test_a_segment_target_is_the_closed_form_of_the_flow(levels: list[tuple[float, float]]) -> None:
    """On Gaussian data: x = (sigma_t z_s - sigma_s z_t) / (alpha_s sigma_t - sigma_s alpha_t) with z_s known exactly.

    Written out for z_t = alpha_t mu + q, the numerator is mu (alpha_s sigma_t - sigma_s alpha_t) + q (sigma_t r -
    sigma_s), r being the ratio of the spreads.
    """
    ends = [*levels, (1.0, 0.0)]
    states = [drawn(64)]
    for level, following in itertools.pairwise(ends):
        states.append(flown(states[-1], level, following))
    source = runs_of(torch.stack(states, dim=1), ends, {})
    rule = SegmentTarget()
    shown = rule.draw(source, torch.Generator().manual_seed(1), 200)
    target = rule.target(source, shown)
    for row in range(200):
        at, (a, s), (b, r) = int(shown.at[row]), ends[int(shown.at[row])], ends[int(shown.at[row]) + 1]
        ratio = ((b**2 * SPREAD**2 + r**2) / (a**2 * SPREAD**2 + s**2)) ** 0.5
        rest = shown.latents[row] - a * MEAN
        expected = MEAN + rest * (s * ratio - r) / (b * s - r * a)
        assert torch.allclose(target[row], expected, rtol=0, atol=1e-9)
        x, m = step_coefficients("sample", (a, s), (b, r))
        landed = x * shown.latents[row] + m * target[row]
        assert torch.allclose(landed, source.states[shown.runs[row], at + 1], rtol=0, atol=1e-9)


def test_two_small_steps_are_progressive_distillation() -> None:
    """Algorithm 2 of Salimans and Ho, with their formula, on the ideal denoiser of Gaussian data."""
    (a, s), (b, r), (c, q) = VP[3], VP[2], VP[1]
    latents = drawn(16)
    middle = b * ideal(latents, column(a), column(s)) + r / s * (latents - a * ideal(latents, column(a), column(s)))
    last = c * ideal(middle, column(b), column(r)) + q / r * (middle - b * ideal(middle, column(b), column(r)))
    theirs = (last - q / s * latents) / (c - q / s * a)
    assert torch.allclose(between(latents, last, (column(a), column(s)), (column(c), column(q))), theirs, atol=1e-12)


def test_many_small_steps_come_to_the_flow() -> None:
    """The deterministic step with the ideal denoiser follows the probability flow: one order, so half the error."""
    errors = []
    for steps in (200, 400):
        angles = [1.5 - 1.4 * step / steps for step in range(steps + 1)]
        levels = [(math.cos(angle), math.sin(angle)) for angle in angles]
        latents = start = drawn(16)
        for level, following in itertools.pairwise(levels):
            x, m = step_coefficients("sample", level, following)
            latents = x * latents + m * ideal(latents, *map(column, level))
        errors.append(float((latents - flown(start, levels[0], levels[-1])).abs().max()))
    assert errors[1] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_guided_target_is_the_closed_form(prediction: str) -> None:
    """Unconditional data N(0, s^2), conditional N(mean, s^2): guidance by g has g times the mean, shrunk."""
    levels = [VP[3], VP[1], (1.0, 0.0)]

    def denoise(sample: Tensor, timestep: Tensor, shift: Tensor) -> tuple[Tensor]:
        signal, sigma = (column(*(levels[int(t)][side] for t in timestep)) for side in (0, 1))
        mean = shift.view(-1, 1, 1, 1)
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + sigma**2)
        clean = mean + gain * (sample - signal * mean)
        return (output_of(prediction, clean, (sample - signal * clean) / sigma, signal, sigma),)

    # Networks are asked in float32; a float64 prediction stays, and only its own result is cast.
    teacher = Teacher(Network(denoise, "sample", prediction), {"shift": torch.zeros(1, 1, dtype=torch.float64)})
    states = torch.stack([drawn(8)] * 3, dim=1)
    source = runs_of(states, levels, {"shift": torch.full((1, 1), MEAN, dtype=torch.float64)})
    rule = GuidedTarget(teacher, torch.tensor([3.0, 1.0], dtype=torch.float64))
    shown = rule.draw(source, torch.Generator().manual_seed(2), 50)
    target = rule.target(source, shown)
    assert set(shown.at.tolist()) == {0, 1}
    for row in range(50):
        signal, sigma = (column(number) for number in levels[int(shown.at[row])])
        scale = (3.0, 1.0)[int(shown.at[row])]
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + sigma**2)
        expected = gain * shown.latents[row] + scale * MEAN * (1.0 - gain * signal)
        assert torch.allclose(target[row], expected[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("levels", [VP[::-1], FLOW[::-1]], ids=["variance preserving", "flow"])
def test_guidance_is_asked_for_at_latents_of_the_right_noise(levels: list[tuple[float, float]]) -> None:
    """Noised Gaussian data: mean `signal mean`, variance `signal^2 spread^2 + sigma^2`, at every level by itself."""
    ends = [*levels, (1.0, 0.0)]
    clean = MEAN + SPREAD * torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    source = runs_of(torch.stack([torch.full_like(clean, 9.0), clean], dim=1), ends, {})
    rule = GuidedTarget(Teacher(Network(_never, "sample", "sample"), {}), torch.ones(len(levels)))
    shown = rule.draw(source, torch.Generator().manual_seed(4), 16000)
    for at, (signal, sigma) in enumerate(levels):
        rows = shown.at == at
        noised, plain = shown.latents[rows], source.states[shown.runs[rows], -1]
        spread = (signal**2 * SPREAD**2 + sigma**2) ** 0.5
        assert float(noised.mean()) == pytest.approx(signal * MEAN, abs=0.05 * spread)
        assert float(noised.std()) == pytest.approx(spread, rel=0.03)
        noise = (noised - signal * plain) / sigma
        assert float(noise.std()) == pytest.approx(1.0, rel=0.03)
        assert abs(float((noise * plain).mean()) - float(noise.mean()) * float(plain.mean())) < 0.03


def _never(**inputs: Tensor) -> tuple[Tensor, ...]:
    raise AssertionError("drawing asks no network")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_student_that_follows_the_flow_has_no_loss(prediction: str) -> None:
    """A whole objective on Gaussian data: the network whose output solves every segment exactly, and one that does not.

    A clean latent that is off by e costs (SNR + 1) e^2, and nothing else.
    """
    ends = [*VP[::-1], (1.0, 0.0)]
    states = [drawn(32)]
    for level, following in itertools.pairwise(ends):
        states.append(flown(states[-1], level, following))
    source = runs_of(torch.stack(states, dim=1), ends, {})
    for off in (0.0, 0.5):

        def denoise(sample: Tensor, timestep: Tensor, off: float = off) -> tuple[Tensor]:
            rows = []
            for latents, t in zip(sample.unbind(), timestep.tolist(), strict=True):
                (a, s), (b, r) = ends[int(t)], ends[int(t) + 1]
                ratio = ((b**2 * SPREAD**2 + r**2) / (a**2 * SPREAD**2 + s**2)) ** 0.5
                clean = off + MEAN + (latents - a * MEAN) * (s * ratio - r) / (b * s - r * a)
                rows.append(output_of(prediction, clean, (latents - a * clean) / s, column(a)[0], column(s)[0]))
            return (torch.stack(rows),)

        objective = Objective(source, SegmentTarget(), Network(denoise, "sample", prediction))
        parts = objective.losses(torch.Generator().manual_seed(6), 64, 4)
        at = SegmentTarget().draw(source, torch.Generator().manual_seed(6), 64).at
        expected = off**2 * float(torch.tensor([(a / s) ** 2 + 1.0 for a, s in VP[::-1]])[at].mean())
        assert sum(float(part()) for part in parts) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_a_loss_in_snr_plus_one_is_that_of_v() -> None:
    signal, sigma = column(*(a for a, _ in VP)), column(*(s for _, s in VP))
    clean, target, latents = drawn(4), drawn(8)[4:], drawn(12)[8:]
    v = [output_of("v_prediction", x, (latents - signal * x) / sigma, signal, sigma) for x in (clean, target)]
    assert float(weighted_error(clean, target, signal, sigma, "snr+1")) == pytest.approx(
        float((v[0] - v[1]).square().mean()), rel=1e-12
    )
    ratio = (signal / sigma) ** 2
    truncated = (torch.clamp(ratio, min=1.0) * (clean - target) ** 2).mean()
    assert float(weighted_error(clean, target, signal, sigma, "max(snr,1)")) == pytest.approx(float(truncated))

"""What a network predicts, turned into the clean latent and the noise and back, and the step that follows from it.

A noisy latent is `z = signal * clean + sigma * noise`. Where `signal^2 + sigma^2 = 1` the conversions are those of
Salimans and Ho 2022, arXiv 2202.00512, appendix D; where `signal + sigma = 1` a flow is that of Lipman et al. 2022,
arXiv 2210.02747. The forms here hold for any two levels.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

from compress.errors import RefusedError

PREDICTIONS = ("epsilon", "v_prediction", "flow", "sample")

Number = TypeVar("Number", float, Tensor)


class Linear(NamedTuple):
    """Clean latent and noise as linear functions of the noisy latent z and the network output m.

    Attributes:
        clean_z, clean_m: `clean = clean_z * z + clean_m * m`.
        noise_z, noise_m: `noise = noise_z * z + noise_m * m`.
    """

    clean_z: Number  # type: ignore[valid-type]
    clean_m: Number  # type: ignore[valid-type]
    noise_z: Number  # type: ignore[valid-type]
    noise_m: Number  # type: ignore[valid-type]


def linear(prediction: str, signal: Number, sigma: Number) -> Linear:
    """The coefficients of a prediction at a noise level.

    Args:
        prediction: `epsilon` (the noise), `v_prediction` (`signal * noise - sigma * clean`), `flow`
            (`noise - clean`) or `sample` (the clean latent).
        signal: of the level; not 0 for epsilon.
        sigma: of the level; not 0 for sample.

    Raises:
        RefusedError: an unknown prediction.
    """
    zero = 0.0 * signal
    one = zero + 1.0
    match prediction:
        case "epsilon":
            return Linear(one / signal, -sigma / signal, zero, one)
        case "v_prediction":
            power = signal * signal + sigma * sigma
            return Linear(signal / power, -sigma / power, sigma / power, signal / power)
        case "flow":
            total = signal + sigma
            return Linear(one / total, -sigma / total, one / total, signal / total)
        case "sample":
            return Linear(zero, one, one / sigma, -signal / sigma)
    raise RefusedError(f"the denoiser predicts {prediction!r}; what can be trained is {', '.join(PREDICTIONS)}")


def clean_of(prediction: str, output: Tensor, latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a network output stands for; all of one shape, or levels (samples, 1, 1, 1)."""
    at = linear(prediction, signal, sigma)
    clean: Tensor = at.clean_z * latents + at.clean_m * output
    return clean


def noise_of(prediction: str, output: Tensor, latents: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a network output stands for; shapes as for `clean_of`."""
    at = linear(prediction, signal, sigma)
    noise: Tensor = at.noise_z * latents + at.noise_m * output
    return noise


def output_of(prediction: str, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """The network output that stands for a clean latent and a noise; shapes as for `clean_of`.

    Raises:
        RefusedError: an unknown prediction.
    """
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":
            return signal * noise - sigma * clean
        case "flow":
            return noise - clean
        case "sample":
            return clean
    raise RefusedError(f"the denoiser predicts {prediction!r}; what can be trained is {', '.join(PREDICTIONS)}")


def step_coefficients(
    prediction: str, level: tuple[float, float], following: tuple[float, float]
) -> tuple[float, float]:
    """The deterministic step between two levels, `z' = x * z + m * output`.

    Both the clean latent and the noise are held (DDIM, Song et al. 2020, arXiv 2010.02502; Euler's method for a flow).

    Args:
        prediction: see `linear`.
        level: (signal, sigma) before.
        following: the same after.

    Returns:
        x and m.
    """
    at = linear(prediction, *level)
    signal, sigma = following
    return (
        float(signal * at.clean_z + sigma * at.noise_z),
        float(signal * at.clean_m + sigma * at.noise_m),
    )

"""Diffusers schedulers made ready to be probed: options sorted, noise given, latents kept in float64."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.overrides import TorchFunctionMode

from compress.errors import RefusedError

NONLINEAR = ("clip_sample", "thresholding", "clip_denoised")
"""Scheduler options that make an update depend on the values it updates."""

_BROWNIAN = {
    "DPMSolverSDEScheduler": "DPMSolverMultistepScheduler with algorithm_type: sde-dpmsolver++",
    "CosineDPMSolverMultistepScheduler": "EDMDPMSolverMultistepScheduler with algorithm_type: sde-dpmsolver++",
}
_LEARNED_VARIANCE = ("learned", "learned_range")
_RESERVED = ("num_inference_steps", "device", "model_output", "timestep", "sample", "generator", "return_dict")
_RANDOM = (
    torch.randn_like,
    torch.rand,
    torch.rand_like,
    torch.randint,
    torch.randint_like,
    torch.normal,
    torch.bernoulli,
    torch.multinomial,
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
)


@dataclass(frozen=True)
class SchedulerSetup:
    """Which scheduler, and the arguments of its constructor, its `set_timesteps` and its `step`."""

    cls: type[SchedulerMixin]
    config: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    timesteps: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1

    @property
    def name(self) -> str:
        """The class name of the scheduler."""
        return self.cls.__name__

    def build(self) -> Any:
        """Make the scheduler with its timesteps set.

        Raises:
            RefusedError: the scheduler does not take this number of steps or these options.
        """
        try:
            scheduler: Any = self.cls.from_config(dict(self.config), **self.overrides)
            kwargs = dict(self.timesteps)
            given = kwargs.get("timesteps", kwargs.get("sigmas"))
            if given is None:
                scheduler.set_timesteps(self.steps, **kwargs)
            elif len(given) != self.steps:
                raise ValueError(f"{len(given)} timesteps or sigmas are given for {self.steps} steps")
            else:
                scheduler.set_timesteps(**({"num_inference_steps": None} if self._needs_count() else {}), **kwargs)
        except Exception as error:
            raise RefusedError(f"{self.name} cannot be set up for {self.steps} steps: {_sentence(error)}") from error
        return scheduler

    def _needs_count(self) -> bool:
        parameter = inspect.signature(self.cls.set_timesteps).parameters["num_inference_steps"]
        return parameter.default is inspect.Parameter.empty


@functools.cache
def names() -> tuple[str, ...]:
    """The names of all schedulers of the installed diffusers."""
    return tuple(sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")))


def set_up(name: str, config: Mapping[str, Any], steps: int, options: Mapping[str, Any]) -> SchedulerSetup:
    """Look the scheduler up and sort the options by the function that takes them.

    Args:
        name: class name in diffusers.
        config: the model's `scheduler_config.json`; keys of other schedulers are ignored, as diffusers does.
        steps: sampling steps (not network calls).
        options: constructor arguments (`use_karras_sigmas`, `timestep_spacing`, ...), `set_timesteps` arguments
            (`mu`, `timesteps`, `sigmas`, ...) or `step` arguments (`eta`, `s_noise`, ...). Two more say what pipelines
            compute themselves: `image_seq_len` (tokens of a latent) stands for `mu`, and `even_sigmas: true` for
            `sigmas` from 1 to 1 / steps.

    Raises:
        RefusedError: unknown scheduler, unknown option, or one that cannot become a table of coefficients.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        raise RefusedError(f"there is no scheduler {name!r} in diffusers; did you mean {' or '.join(near or names())}?")
    if name in _BROWNIAN:
        raise RefusedError(
            f"{name} draws its noise from a Brownian path, so one draw depends on another; take {_BROWNIAN[name]}"
        )
    cls = getattr(diffusers, name)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin) and hasattr(cls, "step")):
        raise RefusedError(f"{name} is not a scheduler that steps a latent")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise RefusedError(f"the number of sampling steps must be a whole number of at least 1, not {steps!r}")
    return _sorted(cls, config, steps, options)


def _sorted(
    cls: type[SchedulerMixin], config: Mapping[str, Any], steps: int, options: Mapping[str, Any]
) -> SchedulerSetup:
    constructor = _parameters(cls.__init__)
    set_timesteps = _parameters(cls.set_timesteps)
    step = _parameters(cls.step)
    sorted_options: dict[str, dict[str, Any]] = {"overrides": {}, "timesteps": {}, "step": {}}
    for key, value in options.items():
        if key in constructor:
            sorted_options["overrides"][key] = value
        elif key in set_timesteps:
            sorted_options["timesteps"][key] = value
        elif key in step:
            sorted_options["step"][key] = value
        elif key == "image_seq_len" and "mu" in set_timesteps:
            sorted_options["timesteps"]["mu"] = _shift(cls, config, options)
        elif key == "even_sigmas" and "sigmas" in set_timesteps:
            if value:
                sorted_options["timesteps"]["sigmas"] = np.linspace(1.0, 1.0 / steps, steps).tolist()
        else:
            allowed = sorted({*constructor, *set_timesteps, *step})
            near = difflib.get_close_matches(key, allowed, n=3, cutoff=0.5)
            raise RefusedError(f"{cls.__name__} has no option {key!r}; it takes {' or '.join(near or allowed)}")
    effective = {**config, **sorted_options["overrides"]}
    if effective.get("variance_type") in _LEARNED_VARIANCE and "variance_type" in constructor:
        raise RefusedError(
            f"{cls.__name__} with variance_type: {effective['variance_type']} takes the variance from the network, "
            "which is not linear; set variance_type: fixed_small"
        )
    if effective.get("use_dynamic_shifting") and "mu" in set_timesteps and "mu" not in sorted_options["timesteps"]:
        raise RefusedError(
            f"{cls.__name__} with use_dynamic_shifting needs the resolution: give the option image_seq_len "
            "(latent tokens of one picture) or mu"
        )
    return SchedulerSetup(cls, config, steps=steps, **sorted_options)


def completed(
    name: str, config: Mapping[str, Any], options: Mapping[str, Any], told: Mapping[str, Any]
) -> dict[str, Any]:
    """The options, with what the model's pipeline tells its scheduler where neither they nor the scheduler settle it.

    Args:
        name: class name in diffusers.
        config: the model's `scheduler_config.json`.
        options: as for `set_up`.
        told: `even_sigmas` and `image_seq_len`, as the Flux pipelines compute them.
    """
    cls = getattr(diffusers, name, None)
    taken = [] if cls is None else _parameters(cls.set_timesteps)
    effective = {**config, **options}
    left = dict(told)
    if "sigmas" not in taken or {"sigmas", "timesteps"} & set(options) or effective.get("use_flow_sigmas"):
        left.pop("even_sigmas", None)
    if "mu" not in taken or "mu" in options or not effective.get("use_dynamic_shifting"):
        left.pop("image_seq_len", None)
    return left | dict(options)


def _parameters(function: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name != "self" and p.name not in _RESERVED]


def _shift(cls: type[SchedulerMixin], config: Mapping[str, Any], options: Mapping[str, Any]) -> float:
    """`mu` for a picture of `image_seq_len` tokens, on the line from `base_shift` to `max_shift`.

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2, in the form diffusers pipelines use.
    """
    numbers: dict[str, float] = {}
    for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"):
        default = inspect.signature(cls.__init__).parameters[key].default
        numbers[key] = float(options.get(key, config.get(key, default)))
    tokens = numbers["max_image_seq_len"] - numbers["base_image_seq_len"]
    slope = (numbers["max_shift"] - numbers["base_shift"]) / tokens
    return numbers["base_shift"] + slope * (float(options["image_seq_len"]) - numbers["base_image_seq_len"])


class ExactLatent(torch.Tensor):
    """A float64 latent that stays float64 where a scheduler casts it down to float32."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.to, torch.Tensor.float, torch.Tensor.half) and isinstance(args[0], cls):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


class GivenNoise(TorchFunctionMode):
    """Inside this context (of this thread only) `torch.randn` returns `draw()`; any other randomness is refused."""

    def __init__(self, draw: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return self._draw()
        if func in _RANDOM:
            raise RefusedError("the scheduler draws random numbers that are not standard-normal noise")
        return func(*args, **(kwargs or {}))


def twin(scheduler: Any) -> Any:
    """An independent copy; the configuration, which nothing changes, is shared."""
    return copy.deepcopy(scheduler, {id(scheduler.config): scheduler.config})


def exact(values: torch.Tensor) -> ExactLatent:
    """View values as an exact latent of shape (1, values, 1, 1)."""
    return values.to(torch.float64).reshape(1, -1, 1, 1).as_subclass(ExactLatent)


def plain(latent: torch.Tensor) -> torch.Tensor:
    """The values of an exact latent as a flat float64 tensor."""
    return latent.as_subclass(torch.Tensor).to(torch.float64).reshape(-1)


def noise_level(scheduler: Any, row: int) -> tuple[float, float]:
    """(signal, sigma): the latent before network call `row` is `signal * clean + sigma * noise`.

    Args:
        scheduler: fresh, with its timesteps set; it is changed.
        row: index of the network call.

    Raises:
        RefusedError: the scheduler does not say how noisy its latents are.
    """
    t = scheduler.timesteps[row]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(row)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    add_noise = getattr(scheduler, "add_noise", None) or getattr(scheduler, "scale_noise", None)
    if hasattr(scheduler, "scale_noise") and not hasattr(scheduler, "add_noise"):
        return float(scheduler.scale_noise(one, t[None], zero)), float(scheduler.scale_noise(zero, t[None], one))
    if add_noise is not None:
        return float(add_noise(one, zero, t[None])), float(add_noise(zero, one, t[None]))
    if hasattr(scheduler, "initial_alpha_cumprod"):  # inversion: one step cleaner than the network is told
        earlier = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        kept = float(scheduler.alphas_cumprod[earlier] if earlier >= 0 else scheduler.initial_alpha_cumprod)
        return kept**0.5, (1.0 - kept) ** 0.5
    if len(getattr(scheduler, "alphas", ())) > len(scheduler.timesteps):
        return float(scheduler.alphas[row]), float(scheduler.betas[row])
    if len(getattr(scheduler, "sigmas", ())) > row:
        return 1.0 - float(scheduler.sigmas[row]), float(scheduler.sigmas[row])
    raise RefusedError(f"{type(scheduler).__name__} does not say how noisy its latents are")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Executes a step plan over named functions, with numpy alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export import conditioning as text
from export.noise import INITIAL, noise
from export.picture import from_pictures, to_pictures
from export.start import start_row, started_at
from export.step_plan import Step, StepPlan, StepPlanError

PartFunction = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Named arrays in, named arrays out. It neither writes to its inputs nor keeps them, nor changes its outputs later."""

Prompts = Sequence[Any]
Conditioning = Mapping[str, np.ndarray]
NoiseSource = np.ndarray | Callable[[int, tuple[int, ...]], np.ndarray]
OnStep = Callable[[int, np.ndarray, dict[str, np.ndarray]], None]


class RuntimeInputError(ValueError):
    """What was asked of the runtime does not fit the model; one sentence."""


@dataclass(frozen=True)
class LatentSpec:
    """What a latent is: `channels`, pixels per latent pixel, and how the VAE's own latents are scaled.

    latent = (vae latent - shift_factor) * scaling_factor
    """

    channels: int
    downscale: int = 8
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


@dataclass(frozen=True)
class _Row:
    """One row of a plan, looked up: what runs, on which halves of the guidance batch, and what the slots do."""

    step: Step
    calls: tuple[tuple[PartFunction, tuple[str, ...], tuple[str, ...]], ...]
    both: bool
    reads: tuple[tuple[str, str | None, str, tuple[float, ...]], ...]
    writes: tuple[tuple[str, str, str | None], ...]


class Runtime:
    """Runs one plan. Latents are float32 (samples, channels, height / downscale, width / downscale).

    Guided rows run [unconditional; conditional] as one batch, as diffusers does. In a row without guidance only the
    conditional half runs, unless a slot it fills is read by a guided row later. Samples never mix: a sample is the
    same alone and in a batch, as far as the functions are.
    """

    def __init__(
        self,
        plan: StepPlan,
        functions: Mapping[str, PartFunction],
        conditioning: Mapping[str, Any],
        latent: LatentSpec,
        tokenizers: Mapping[str, text.Encodes] | None = None,
        *,
        latent_input: str | None = None,
        timestep_rank: int = 1,
        timestep_dtype: str = "float32",
    ) -> None:
        """Bind a plan to functions.

        Args:
            plan: validated here.
            functions: by segment name; also `vae_decoder`, `vae_encoder` and the text encoders, where used.
            conditioning: how prompts become tensors, see `export.conditioning`.
            latent: what a latent is.
            tokenizers: by the names in `conditioning`.
            latent_input: the segment input that takes the latent; None takes `sample`, or else `hidden_states`.
            timestep_rank: 1 feeds `timestep` as (batch,), 0 as a scalar.
            timestep_dtype: of `timestep`.

        Raises:
            StepPlanError: the plan contradicts itself.
            RuntimeInputError: a function is missing.
        """
        plan.validate()
        self.plan = plan
        self.functions = dict(functions)
        self.conditioning = dict(conditioning)
        self.latent = latent
        self.tokenizers = dict(tokenizers or {})
        inputs = {name for segment in plan.segments.values() for name in segment.inputs}
        self.latent_input = latent_input or ("sample" if "sample" in inputs else "hidden_states")
        if self.latent_input not in inputs:
            raise RuntimeInputError(f"no segment of the plan takes the latent {self.latent_input!r}")
        missing = sorted({name for path in plan.paths.values() for name in path} - set(functions))
        if missing:
            raise RuntimeInputError(f"there is no function for the segment {missing[0]!r}")
        produced = {name for segment in plan.segments.values() for name in segment.outputs}
        self._given = inputs - produced - {self.latent_input, "timestep"}
        self._timestep_rank = timestep_rank
        self._timestep_dtype = np.dtype(timestep_dtype)
        self._full = "full" if "full" in plan.paths else next(iter(plan.paths))
        self._programs: dict[int, tuple[StepPlan, list[_Row]]] = {}

    def encode(self, prompts: Prompts) -> dict[str, np.ndarray]:
        """Turn prompts (or class labels) into the conditioning tensors of the denoiser, one row per prompt.

        Raises:
            RuntimeInputError: a prompt the model does not know, or none at all.
        """
        if isinstance(prompts, str) or not len(prompts):
            raise RuntimeInputError("prompts must be a non-empty list, one entry per picture")
        try:
            return text.encode(self.conditioning, self.tokenizers, self.functions, prompts)
        except text.PromptError as error:
            raise RuntimeInputError(str(error)) from error

    def sample(
        self,
        prompts: Prompts | Conditioning,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompts: Prompts | Conditioning | None = None,
        noise: NoiseSource | None = None,
        strength: float | None = None,
        start_step: int | None = None,
        image_latents: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """Run the loop.

        Args:
            prompts: one per sample, or the conditioning tensors themselves.
            seeds: one per sample; may be None where `noise` gives every draw.
            height: of the picture in pixels; may be None where `noise` or `image_latents` has the shape.
            width: likewise.
            negative_prompts: what guidance leads away from; None is the empty prompt (or the null class).
            noise: the initial standard-normal noise (samples, channels, h, w), or a function of (draw, shape) where
                draw 0 is the initial noise and draw k + 1 belongs to row k; None draws from the seeds.
            strength: image-to-image: chooses `start_step` as diffusers does.
            start_step: image-to-image: the row to begin at.
            image_latents: (samples or 1, channels, h, w) of the picture to begin from, see `encode_image`.
            mask: inpainting: (samples or 1, 1 or channels, h, w), 1 where to paint, 0 where `image_latents` stay.
            on_step: called after every row with (row, latents after it, every tensor its segments computed, including
                the raw network output for both guidance halves).

        Returns:
            float32 latents (samples, channels, h, w).

        Raises:
            RuntimeInputError: one sentence on what does not fit.
        """
        start = self._start(strength, start_step, image_latents)
        plan, rows = self._program(start)
        cond, samples = self._conditioned(prompts)
        shape = self._shape(samples, height, width, noise, image_latents)
        draw = self._noise_source(noise, seeds, shape, start, rows)
        guided = any(row.both for row in rows)
        halves = {False: cond, True: self._guided(cond, samples, negative_prompts) if guided else cond}
        image = None if image_latents is None else self._fitting("image_latents", image_latents, shape)
        if mask is not None:
            if image is None:
                raise RuntimeInputError("a mask needs image_latents to keep where it is 0")
            mask = self._fitting("mask", mask, shape)
        start_noise = np.asarray(draw(INITIAL, shape), np.float32)
        if image is None or (mask is not None and start == 0):
            first = np.float32(plan.init_noise_sigma) * start_noise
        else:
            first = _noised(image, start_noise, rows[0].step)
        return self._loop(plan, rows, halves, first, start, draw, image, mask, start_noise, on_step)

    def _loop(
        self,
        plan: StepPlan,
        rows: Sequence[_Row],
        halves: Mapping[bool, Conditioning],
        first: np.ndarray,
        start: int,
        draw: Callable[[int, tuple[int, ...]], np.ndarray],
        image: np.ndarray | None,
        mask: np.ndarray | None,
        start_noise: np.ndarray,
        on_step: OnStep | None,
    ) -> np.ndarray:
        samples, shape = first.shape[0], first.shape
        keep_x, keep_m = plan.history()
        latents = _History(keep_x, shape)
        outputs = _History(keep_m, shape)
        latents.push()[...] = first
        total, term = np.empty(shape, np.float64), np.empty(shape, np.float64)
        batch = np.empty((2 * samples, *shape[1:]), np.float32)
        times = np.empty(2 * samples, self._timestep_dtype)
        slots = {name: deque[np.ndarray](maxlen=slot.history) for name, slot in plan.slots.items()}
        for at, row in enumerate(rows):
            step = row.step
            size = 2 * samples if row.both else samples
            np.multiply(latents[0], np.float32(step.input_scale), out=batch[:samples])
            if row.both:
                batch[samples:] = batch[:samples]
            times[:size] = step.t
            tensors = dict(halves[row.both])
            tensors[self.latent_input] = batch[:size]
            tensors["timestep"] = times[:size] if self._timestep_rank else times[0]
            raw = self._network(plan, row, tensors, slots, size)
            guided = outputs.push()
            if step.guidance == "cfg":
                np.subtract(raw[samples:], raw[:samples], out=guided)
                guided *= np.float32(step.guidance_scale)
                guided += raw[:samples]
            else:
                guided[...] = raw[-samples:]
            total.fill(0.0)
            for lag, coefficient in step.x.items():
                np.multiply(latents[lag], coefficient, out=term)
                total += term
            for lag, coefficient in step.m.items():
                np.multiply(outputs[lag], coefficient, out=term)
                total += term
            if step.noise:
                np.multiply(draw(start + at + 1, shape), step.noise, out=term)
                total += term
            after = latents.push()
            after[...] = total
            if image is not None and mask is not None:
                known = image if at + 1 == len(rows) else _noised(image, start_noise, rows[at + 1].step)
                after[...] = (1.0 - mask) * known + mask * after
            if on_step is not None:
                on_step(start + at, after.copy(), {name: np.array(value) for name, value in tensors.items()})
        return latents[0].copy()

    def _network(
        self,
        plan: StepPlan,
        row: _Row,
        tensors: dict[str, np.ndarray],
        slots: Mapping[str, deque[np.ndarray]],
        size: int,
    ) -> np.ndarray:
        """Run the path of a row; `tensors` gains every tensor computed, the slots what the row writes."""
        pending = list(row.reads)
        for function, names, out in row.calls:
            for read in pending[:]:
                tensor, base, name, alphas = read
                if tensor in names and (base is None or base in tensors):
                    tensors[tensor] = _forecast(slots[name], alphas, size, None if base is None else tensors[base])
                    pending.remove(read)
            computed = function({name: tensors[name] for name in names})
            for name in out:
                tensors[name] = computed[name]
        for tensor, base, name, alphas in pending:
            tensors[tensor] = _forecast(slots[name], alphas, size, None if base is None else tensors[base])
        for name, tensor, base in row.writes:
            value = np.array(tensors[tensor]) if base is None else tensors[tensor] - tensors[base]
            slots[name].appendleft(value)
        return tensors[plan.output]

    def denoise(self, latents: np.ndarray, t: float | np.ndarray, conditioning: Prompts | Conditioning) -> np.ndarray:
        """The network output of the whole denoiser at `latents`, without guidance or input scaling (the score oracle).

        Args:
            latents: (samples, channels, h, w), as the network takes them.
            t: one timestep, or one per sample.
            conditioning: prompts or conditioning tensors, one row per sample.
        """
        return self.features(latents, t, conditioning)[self.plan.output]

    def features(
        self,
        latents: np.ndarray,
        t: float | np.ndarray,
        conditioning: Prompts | Conditioning,
        names: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Every tensor the segments of the full path compute: the cut boundaries and the network output.

        Args:
            latents: (samples, channels, h, w), as the network takes them.
            t: one timestep, or one per sample.
            conditioning: prompts or conditioning tensors, one row per sample.
            names: of the tensors wanted; None is all.
        """
        cond, samples = self._conditioned(conditioning)
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[:2] != (samples, self.latent.channels):
            raise RuntimeInputError(
                f"latents must be ({samples}, {self.latent.channels}, height, width), not {latents.shape}"
            )
        times = np.asarray(t, self._timestep_dtype)
        if times.shape not in ((), (samples,)):
            raise RuntimeInputError(f"t must be one number or {samples} of them, not of shape {times.shape}")
        if not self._timestep_rank and times.ndim:
            raise RuntimeInputError("this denoiser takes one timestep for the whole batch")
        tensors = {**cond, self.latent_input: latents}
        tensors["timestep"] = np.array(np.broadcast_to(times, (samples,))) if self._timestep_rank else times
        computed: dict[str, np.ndarray] = {}
        for name in self.plan.paths[self._full]:
            segment = self.plan.segments[name]
            result = self.functions[name]({key: tensors[key] for key in segment.inputs})
            computed.update({key: result[key] for key in segment.outputs})
            tensors.update(computed)
        unknown = sorted(set(names or ()) - set(computed))
        if unknown:
            raise RuntimeInputError(f"there is no tensor {unknown[0]!r}; the full path computes {', '.join(computed)}")
        return computed if names is None else {name: computed[name] for name in names}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (samples, channels, h, w) to uint8 pictures (samples, height, width, 3)."""
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 4 or latents.shape[1] != self.latent.channels:
            raise RuntimeInputError(f"latents must be (samples, {self.latent.channels}, h, w), not {latents.shape}")
        scaled = latents / np.float32(self.latent.scaling_factor) + np.float32(self.latent.shift_factor)
        return to_pictures(self._part("vae_decoder")({"latent_sample": scaled})["sample"])

    def encode_image(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 pictures (samples, height, width, 3) to the latents at the mean of the VAE's posterior."""
        pictures = np.asarray(pictures)
        step = self.latent.downscale
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise RuntimeInputError("pictures must be uint8 of shape (samples, height, width, 3)")
        if pictures.shape[1] % step or pictures.shape[2] % step:
            raise RuntimeInputError(f"height and width of the pictures must be multiples of {step}")
        parameters = self._part("vae_encoder")({"sample": from_pictures(pictures)})["latent_parameters"]
        mean = parameters[:, : self.latent.channels]
        return (mean - np.float32(self.latent.shift_factor)) * np.float32(self.latent.scaling_factor)

    def generate(
        self,
        prompts: Prompts | Conditioning,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """`decode(sample(...))`: uint8 pictures (samples, height, width, 3)."""
        return self.decode(self.sample(prompts, seeds, height, width, **options))

    def _part(self, name: str) -> PartFunction:
        if name not in self.functions:
            raise RuntimeInputError(f"this model has no {name}")
        return self.functions[name]

    def _start(self, strength: float | None, start_step: int | None, image: np.ndarray | None) -> int:
        if strength is not None and start_step is not None:
            raise RuntimeInputError("give strength or start_step, not both")
        if (strength is not None or start_step) and image is None:
            raise RuntimeInputError("a start later than the first row needs image_latents")
        try:
            return start_row(self.plan, strength) if strength is not None else int(start_step or 0)
        except StepPlanError as error:
            raise RuntimeInputError(str(error)) from error

    def _program(self, start: int) -> tuple[StepPlan, list[_Row]]:
        if start not in self._programs:
            try:
                plan = started_at(self.plan, start)
            except StepPlanError as error:
                raise RuntimeInputError(str(error)) from error
            self._programs[start] = plan, _lookup(plan, self.functions)
        return self._programs[start]

    def _conditioned(self, prompts: Prompts | Conditioning) -> tuple[dict[str, np.ndarray], int]:
        tensors = dict(prompts) if isinstance(prompts, Mapping) else self.encode(prompts)
        missing = sorted(self._given - set(tensors))
        if missing:
            raise RuntimeInputError(f"the conditioning lacks {missing[0]!r}, which the denoiser takes")
        sizes = {len(value) for value in tensors.values()}
        if len(sizes) != 1:
            raise RuntimeInputError("the conditioning tensors have different numbers of samples")
        return {name: tensors[name] for name in self._given}, sizes.pop()

    def _guided(
        self, cond: Conditioning, samples: int, negative: Prompts | Conditioning | None
    ) -> dict[str, np.ndarray]:
        uncond, count = self._conditioned(text.unconditional(samples) if negative is None else negative)
        if count != samples:
            raise RuntimeInputError(f"there are {samples} prompts and {count} negative prompts")
        for name, value in cond.items():
            if uncond[name].shape != value.shape:
                shapes = f"{value.shape} for the prompts and {uncond[name].shape} for the negative prompts"
                raise RuntimeInputError(f"{name!r} has the shape {shapes}")
        return {name: np.concatenate([uncond[name], value]) for name, value in cond.items()}

    def _shape(
        self,
        samples: int,
        height: int | None,
        width: int | None,
        noise: NoiseSource | None,
        image: np.ndarray | None,
    ) -> tuple[int, ...]:
        like = noise if isinstance(noise, np.ndarray) else image
        if (height is None) != (width is None) or (height is None and like is None):
            raise RuntimeInputError("give height and width in pixels")
        if height is None or width is None:
            return (samples, self.latent.channels, *np.shape(like)[-2:])
        step = self.latent.downscale
        for name, value in (("height", height), ("width", width)):
            if value < step or value % step:
                raise RuntimeInputError(f"{name} must be a positive multiple of {step} pixels, not {value}")
        return samples, self.latent.channels, height // step, width // step

    def _noise_source(
        self,
        given: NoiseSource | None,
        seeds: Sequence[int] | None,
        shape: tuple[int, ...],
        start: int,
        rows: Sequence[_Row],
    ) -> Callable[[int, tuple[int, ...]], np.ndarray]:
        draws = [INITIAL, *(start + at + 1 for at, row in enumerate(rows) if row.step.noise)]
        initial = self._fitting("noise", given, shape, exact=True) if isinstance(given, np.ndarray) else None
        if callable(given):
            return lambda row, size: self._fitting(f"noise of draw {row}", given(row, size), shape, exact=True)
        if seeds is None and (initial is None or len(draws) > 1):
            raise RuntimeInputError("give one seed per sample")
        if seeds is not None and (
            len(seeds) != shape[0] or any(int(seed) != seed or not 0 <= seed < 2**64 for seed in seeds)
        ):
            raise RuntimeInputError(f"give one seed per sample, a whole number of at least 0: {shape[0]} of them")

        def draw(row: int, size: tuple[int, ...]) -> np.ndarray:
            if row == INITIAL and initial is not None:
                return initial
            return noise([int(seed) for seed in seeds or ()], row, size[1:])

        return draw

    def _fitting(self, name: str, value: Any, shape: tuple[int, ...], exact: bool = False) -> np.ndarray:
        array = np.asarray(value, np.float32)
        broadcasts = array.ndim == 4 and all(
            size == full or (axis < 2 and size == 1 and not exact)
            for axis, (size, full) in enumerate(zip(array.shape, shape, strict=True))
        )
        if not broadcasts:
            raise RuntimeInputError(f"{name} must have the shape {shape}, not {array.shape}")
        return array


class _History:
    """The last few arrays of one shape, newest first, in buffers that are used again."""

    def __init__(self, length: int, shape: tuple[int, ...]) -> None:
        self._kept = deque(np.zeros(shape, np.float32) for _ in range(length))

    def push(self) -> np.ndarray:
        """Forget the oldest; its buffer, now the newest, is to be filled."""
        self._kept.rotate(1)
        return self._kept[0]

    def __getitem__(self, lag: int) -> np.ndarray:
        return self._kept[lag]


def _lookup(plan: StepPlan, functions: Mapping[str, PartFunction]) -> list[_Row]:
    rows = []
    for step, both in zip(plan.steps, _both_halves(plan), strict=True):
        reads = tuple(
            (plan.slots[name].tensor, plan.slots[name].base, name, alphas) for name, alphas in step.read.items()
        )
        path = plan.paths[step.path]
        if any(plan.slots[name].kind == "output" for name in step.read):
            path = ()
        calls = tuple((functions[name], plan.segments[name].inputs, plan.segments[name].outputs) for name in path)
        writes = tuple((name, plan.slots[name].tensor, plan.slots[name].base) for name in step.write)
        rows.append(_Row(step, calls, both, reads, writes))
    return rows


def _both_halves(plan: StepPlan) -> list[bool]:
    """Whether each row runs both guidance halves: it is guided, or such a row reads a slot value that it wrote."""
    both = [step.guidance == "cfg" for step in plan.steps]
    writers: dict[str, deque[int]] = {name: deque(maxlen=slot.history) for name, slot in plan.slots.items()}
    sources: list[list[int]] = []
    for row, step in enumerate(plan.steps):
        sources.append([at for name, alphas in step.read.items() for at in list(writers[name])[: len(alphas)]])
        for name in step.write:
            writers[name].appendleft(row)
    for row in reversed(range(len(both))):
        if both[row]:
            for at in sources[row]:
                both[at] = True
    return both


def _forecast(kept: deque[np.ndarray], alphas: Sequence[float], size: int, base: np.ndarray | None) -> np.ndarray:
    """`sum_i alphas[i] * kept[i]` (+ base), of the last `size` rows: the conditional half where only that one runs."""
    value = kept[0][-size:]
    if tuple(alphas) != (1.0,):
        value = value * np.float32(alphas[0])
        for alpha, older in zip(alphas[1:], list(kept)[1:], strict=False):
            value += older[-size:] * np.float32(alpha)
    return value if base is None else base + value


def _noised(image: np.ndarray, start_noise: np.ndarray, step: Step) -> np.ndarray:
    return np.float32(step.signal) * image + np.float32(step.sigma) * start_noise

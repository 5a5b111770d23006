"""Executes a step plan over named functions, with numpy alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from export import conditioning as text
from export.loop import Draw, Inpainting, Joined, Loop, OnStep, PartFunction, Revise, Row, WholeLoop, look_up, noised
from export.noise import INITIAL, noise
from export.once import prepare, run_all
from export.picture import from_pictures, to_pictures
from export.resample import RISE, fits, level_size
from export.slots import Slots
from export.start import start_row, started_at
from export.step_plan import StepPlan, StepPlanError

Prompts = Sequence[Any]
Conditioning = Mapping[str, np.ndarray]
_LOG = logging.getLogger("export")

LoopFactory = Callable[[StepPlan, str, int], WholeLoop | None]
NoiseSource = np.ndarray | Callable[[int, tuple[int, ...]], np.ndarray]


class RuntimeInputError(ValueError):
    """What was asked of the runtime does not fit the model; one sentence."""


@dataclass(frozen=True)
class LatentSpec:
    """What a latent is.

    Attributes:
        channels: of the latent.
        downscale: pixels of the picture per latent pixel, in each direction.
        scaling_factor, shift_factor: latent = (vae latent - shift_factor) * scaling_factor.
        multiple: height and width of the latent are multiples of this.
    """

    channels: int
    downscale: int = 8
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    multiple: int = 1


class Runtime:
    """Runs one plan. Latents are float32 (samples, channels, height / downscale, width / downscale).

    Guided rows run [unconditional; conditional] as one batch, as diffusers does. In a row without guidance only the
    conditional half runs, unless a slot it fills is read by a guided row later. Samples never mix: a sample is the
    same alone and in a batch, as far as the functions are.

    Attributes:
        fallbacks: how many rows, over all runs, took the full path because a slot could not be read; 0 unless
            something is wrong, since a valid plan reads only what it wrote.
        joined: whole paths as one function each.
    """

    def __init__(
        self,
        plan: StepPlan,
        functions: Mapping[str, PartFunction],
        conditioning: Mapping[str, Any],
        latent: LatentSpec,
        tokenizers: Mapping[str, text.Encodes] | None = None,
        *,
        joined: Mapping[str, Joined] | None = None,
        whole_loop: LoopFactory | None = None,
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
            joined: whole paths as one function each, by path name; used where nothing in between is wanted.
            whole_loop: of (plan, latent input, timestep rank), the loop over the same functions that a runtime has of
                its own, if it has one; runs where no row is watched, revised or painted into.
            latent_input: the segment input that takes the latent; None takes `sample`, or else `hidden_states`.
            timestep_rank: 1 feeds `timestep` as (batch,), 0 as a scalar.
            timestep_dtype: of `timestep`.

        Raises:
            StepPlanError: the plan contradicts itself.
            RuntimeInputError: a function is missing, or rows span where there is one timestep for the whole batch.
        """
        self.latent_input = latent_input or plan.latent_input
        plan.validate(latent_input=self.latent_input)
        self.plan = plan
        self.functions = dict(functions)
        self.joined = dict(joined or {})
        self.whole_loop = whole_loop
        self.conditioning = dict(conditioning)
        self.latent = latent
        self.tokenizers = dict(tokenizers or {})
        inputs = {name for segment in plan.segments.values() for name in segment.inputs}
        if self.latent_input not in inputs:
            raise RuntimeInputError(f"no segment of the plan takes the latent {self.latent_input!r}")
        missing = sorted({*plan.once, *(name for path in plan.paths.values() for name in path)} - set(functions))
        if missing:
            raise RuntimeInputError(f"there is no function for the segment {missing[0]!r}")
        produced = {name for segment in plan.segments.values() for name in segment.outputs}
        self._given = inputs - produced - {self.latent_input, "timestep"}
        self._timestep_rank = timestep_rank
        self._timestep_dtype = np.dtype(timestep_dtype)
        if not timestep_rank:
            _refuse_spans(plan)
        self.fallbacks = 0
        self._programs: dict[int, tuple[StepPlan, list[Row]]] = {}
        self._loops: dict[int, WholeLoop | None] = {}
        self._idle_slots: list[Slots] = []

    def altered(self, plan: StepPlan | None = None, functions: Mapping[str, PartFunction] | None = None) -> Runtime:
        """The same runtime over another plan of the same segments, or over other functions.

        Raises:
            StepPlanError: the weights were distilled for a sampler, and the plan does not say so.
        """
        if plan is not None and functions is None and plan.contract != self.plan.contract:
            if self.plan.contract is None:
                raise StepPlanError("the plan is for distilled weights, and these are not: take the plan of this model")
            raise StepPlanError("the weights were distilled for one sampler: take a plan with the contract they hold")
        return Runtime(
            self.plan if plan is None else plan,
            self.functions if functions is None else functions,
            self.conditioning,
            self.latent,
            self.tokenizers,
            joined=self.joined if functions is None else None,
            whole_loop=self.whole_loop if functions is None else None,
            latent_input=self.latent_input,
            timestep_rank=self._timestep_rank,
            timestep_dtype=self._timestep_dtype.name,
        )

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
        revise: Revise | None = None,
    ) -> np.ndarray:
        """Run the loop.

        Args:
            prompts: one per sample, or the conditioning tensors themselves.
            seeds: one per sample; may be None where `noise` gives every draw.
            height: of the picture in pixels; may be None where `noise` or `image_latents` has the shape.
            width: likewise.
            negative_prompts: what guidance leads away from; None is no prompt: the empty one, the null class, or
                zeros, as the model was trained.
            noise: the initial standard-normal noise (samples, channels, h, w), or a function of (draw, shape) where
                draw 0 is the initial noise, draw k + 1 belongs to row k, and draw `export.resample.RISE + k` to a
                level that rises at row k; None draws from the seeds. Where the plan begins at a lower level, the
                initial noise is that small.
            strength: image-to-image: chooses `start_step` as diffusers does.
            start_step: image-to-image: the row to begin at.
            image_latents: (samples or 1, channels, h, w) of the picture to begin from, see `encode_image`.
            mask: inpainting: (samples or 1, 1 or channels, h, w), 1 where to paint, 0 where `image_latents` stay.
            on_step: called after every row with (row, latents after it, every tensor its segments computed, including
                the raw network output for both guidance halves).
            revise: see `export.loop.Revise`; rows are counted from the beginning of the plan.

        Returns:
            float32 latents (samples, channels, h, w).

        Raises:
            RuntimeInputError: one sentence on what does not fit.
        """
        self._refuse_negatives(negative_prompts)
        start = self._start(strength, start_step, image_latents)
        plan, rows = self._program(start)
        pixels = self._pixels(height, width, noise, image_latents)
        cond, samples = self._conditioned(prompts, pixels)
        shape = samples, self.latent.channels, *(side // self.latent.downscale for side in pixels)
        size = shape[2], shape[3]
        self._check_levels(plan, size, image_latents)
        first_shape = (*shape[:2], *level_size(size, rows[0].step.level))
        draw = self._noise_source(noise, seeds, first_shape, start, rows)
        guided = any(row.both for row in rows)
        halves = {False: cond, True: self._guided(cond, samples, negative_prompts, pixels) if guided else cond}
        image = None if image_latents is None else self._fitting("image_latents", image_latents, shape)
        if mask is not None:
            if image is None:
                raise RuntimeInputError("a mask needs image_latents to keep where it is 0")
            mask = self._fitting("mask", mask, shape)
        start_noise = np.asarray(draw(INITIAL, first_shape), np.float32)
        if image is None or (mask is not None and start == 0):
            first = np.float32(plan.init_noise_sigma) * start_noise
        else:
            first = noised(image, start_noise, rows[0].step)
        keep = None if mask is None or image is None else Inpainting(image, mask, start_noise)
        drawn = partial(_from_row, draw, start)
        watched = keep is not None or on_step is not None or revise is not None
        whole = None if watched else self._whole(start)
        if watched and self.whole_loop is not None:
            _LOG.info("the loop runs row by row: rows are watched, revised or painted into")
        if whole is not None:
            return whole.run(first, halves, drawn)
        given, by_row = prepare(plan, self.functions, halves, samples, self._timestep_dtype)
        slots = self._idle_slots.pop() if self._idle_slots else Slots(plan.slots)
        loop = Loop(plan, rows, self.latent_input, self._timestep_rank, self._timestep_dtype, slots)
        try:
            return loop.run(first, given, drawn, keep, _shifted(on_step, start), size, _shifted(revise, start), by_row)
        finally:
            self.fallbacks += len(loop.fallbacks)
            self._idle_slots.append(slots)

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
        latents = np.asarray(latents, np.float32)
        height, width = (self.latent.downscale * side for side in (*latents.shape, 0, 0)[2:4])
        cond, samples = self._conditioned(conditioning, (height, width))
        if latents.ndim != 4 or latents.shape[:2] != (samples, self.latent.channels):
            raise RuntimeInputError(
                f"latents must be ({samples}, {self.latent.channels}, height, width), not {latents.shape}"
            )
        times = np.asarray(t, self._timestep_dtype)
        if times.shape not in ((), (samples,)):
            raise RuntimeInputError(f"t must be one number or {samples} of them, not of shape {times.shape}")
        if not self._timestep_rank and times.ndim:
            raise RuntimeInputError("this denoiser takes one timestep for the whole batch")
        self._check_times(times)
        tensors = {**cond, self.latent_input: latents}
        tensors["timestep"] = np.array(np.broadcast_to(times, (samples,))) if self._timestep_rank else times
        tensors = run_all(self.plan, self.functions, self.plan.once, tensors)
        computed: dict[str, np.ndarray] = {}
        for name in self.plan.paths[self.plan.full_path]:
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

    def _check_times(self, times: np.ndarray) -> None:
        """What runs before the first row may know the timesteps of the plan alone."""
        if not any("timestep" in self.plan.segments[name].inputs for name in self.plan.once):
            return
        known = np.unique(np.array([step.t for step in self.plan.steps], self._timestep_dtype))
        if not np.isin(times, known).all():
            shown = ", ".join(f"{t:g}" for t in known[::-1])
            raise RuntimeInputError(
                f"t must be a timestep of the plan ({shown}), of which this engine holds a table; build it with "
                "`fold: false` to ask for others"
            )

    def _start(self, strength: float | None, start_step: int | None, image: np.ndarray | None) -> int:
        if strength is not None and start_step is not None:
            raise RuntimeInputError("give strength or start_step, not both")
        if (strength is not None or start_step) and image is None:
            raise RuntimeInputError("a start later than the first row needs image_latents")
        try:
            return start_row(self.plan, strength) if strength is not None else int(start_step or 0)
        except StepPlanError as error:
            raise RuntimeInputError(str(error)) from error

    def _program(self, start: int) -> tuple[StepPlan, list[Row]]:
        if start not in self._programs:
            try:
                plan = started_at(self.plan, start, self.latent_input)
            except StepPlanError as error:
                raise RuntimeInputError(str(error)) from error
            self._programs[start] = plan, look_up(plan, self.functions, self.joined)
        return self._programs[start]

    def _refuse_negatives(self, negative: Prompts | Conditioning | None) -> None:
        scale = None if self.plan.contract is None else self.plan.contract.guidance_scale
        if negative is not None and scale is not None:
            raise RuntimeInputError(
                f"the weights give guidance of scale {scale:g} by themselves, away from no prompt: leave negative "
                "prompts out"
            )

    def _whole(self, start: int) -> WholeLoop | None:
        if self.whole_loop is None:
            return None
        if start not in self._loops:
            self._loops[start] = self.whole_loop(self._program(start)[0], self.latent_input, self._timestep_rank)
        return self._loops[start]

    def _conditioned(
        self, prompts: Prompts | Conditioning, pixels: tuple[int, int], other: Conditioning | None = None
    ) -> tuple[dict[str, np.ndarray], int]:
        """The tensors the denoiser takes, and for how many samples; what both halves share comes from the `other`."""
        tensors = _plain(prompts) if isinstance(prompts, Mapping) else self.encode(prompts)
        tensors = text.residuals(self.conditioning, other or {}) | tensors
        count = max((len(value) for value in tensors.values() if value.ndim), default=0)
        tensors |= text.of_size(self.conditioning, tensors, count, *pixels)
        missing = sorted(self._given - set(tensors))
        if missing:
            raise RuntimeInputError(f"the conditioning lacks {missing[0]!r}, which the denoiser takes")
        sizes = {len(value) if value.ndim else 0 for value in tensors.values()}
        if len(sizes) != 1 or sizes == {0}:
            raise RuntimeInputError("the conditioning tensors must all have the same number of samples, at least one")
        return {name: tensors[name] for name in self._given}, sizes.pop()

    def _guided(
        self, cond: Conditioning, samples: int, negative: Prompts | Conditioning | None, pixels: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        uncond, count = self._conditioned(text.unconditional(samples) if negative is None else negative, pixels, cond)
        if count != samples:
            raise RuntimeInputError(f"there are {samples} prompts and {count} negative prompts")
        for name, value in cond.items():
            if uncond[name].shape != value.shape:
                shapes = f"{value.shape} for the prompts and {uncond[name].shape} for the negative prompts"
                raise RuntimeInputError(f"{name!r} has the shape {shapes}")
        return {name: np.concatenate([uncond[name], value]) for name, value in cond.items()}

    def _pixels(
        self, height: int | None, width: int | None, noise: NoiseSource | None, image: np.ndarray | None
    ) -> tuple[int, int]:
        """Height and width of the picture."""
        step = self.latent.downscale * self.latent.multiple
        like, level = (noise, self.plan.steps[0].level) if isinstance(noise, np.ndarray) else (image, 1.0)
        if height is None and width is None and like is not None and np.ndim(like) == 4:
            height, width = (self.latent.downscale * round(size / level) for size in np.shape(like)[-2:])
        if height is None or width is None:
            raise RuntimeInputError("give height and width in pixels")
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, int | np.integer) or value < step or value % step:
                raise RuntimeInputError(f"{name} must be a positive multiple of {step} pixels, not {value}")
        return int(height), int(width)

    def _check_levels(self, plan: StepPlan, size: tuple[int, int], image: np.ndarray | None) -> None:
        for row, step in enumerate(plan.steps):
            if step.level == 1.0:
                return
            if image is not None:
                raise RuntimeInputError(
                    f"a picture cannot be begun from or kept: this plan samples at a lower level ({step.level:g}) first"
                )
            if not fits(size, step.level, self.latent.multiple):
                height, width = (self.latent.downscale * side for side in size)
                raise RuntimeInputError(
                    f"{height} x {width} pixels at level {step.level:g} (row {row}) are no whole multiple of "
                    f"{self.latent.downscale * self.latent.multiple} pixels; take another size"
                )

    def _noise_source(
        self,
        given: NoiseSource | None,
        seeds: Sequence[int] | None,
        shape: tuple[int, ...],
        start: int,
        rows: Sequence[Row],
    ) -> Callable[[int, tuple[int, ...]], np.ndarray]:
        draws = [INITIAL, *(start + at + 1 for at, row in enumerate(rows) if row.step.noise)]
        draws += [start + RISE + at for at, row in enumerate(rows) if row.rise]
        initial = self._fitting("noise", given, shape, exact=True) if isinstance(given, np.ndarray) else None
        if callable(given):
            return lambda row, size: self._fitting(f"noise of draw {row}", given(row, size), size, exact=True)
        if seeds is None and (initial is None or len(draws) > 1):
            raise RuntimeInputError("give one seed per sample")
        if seeds is not None and (
            len(seeds) != shape[0]
            or not all(isinstance(seed, int | np.integer) and 0 <= seed < 2**64 for seed in seeds)
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


def _refuse_spans(plan: StepPlan) -> None:
    """One timestep for the whole batch cannot be the timesteps of several rows."""
    for row, step in enumerate(plan.steps):
        if step.span > 1 and any("timestep" in plan.segments[name].inputs for name in plan.paths[step.path]):
            raise RuntimeInputError(
                f"step {row} spans {step.span} rows, but this denoiser takes one timestep for the whole batch"
            )


def _plain(tensors: Conditioning) -> dict[str, np.ndarray]:
    """The arrays given, real numbers as float32."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    return {name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in arrays.items()}


def _from_row(draw: Draw, start: int, at: int, shape: tuple[int, ...]) -> np.ndarray:
    """The draw of a row of a plan that begins at `start`."""
    return draw(start + at, shape)


def _shifted(callback: Callable[..., Any] | None, start: int) -> Callable[..., Any] | None:
    """What is called with a row of the whole plan, from a plan that begins at `start`."""
    if callback is None or not start:
        return callback
    return lambda row, *rest: callback(start + row, *rest)

"""The original: the diffusers pipeline as its user runs it, in float32."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import RefusedError

if TYPE_CHECKING:
    from export.step_plan import StepPlan


@dataclass(frozen=True)
class PipelineCall:
    """How the pipeline is called.

    Attributes:
        scheduler: class name in diffusers; None keeps the model's own.
        options: of the scheduler's constructor.
        steps: sampling steps.
        guidance_scale: of classifier-free guidance, or of the guidance that the denoiser embeds.
        height, width: of the picture, in pixels.
        max_sequence_length: of the T5 prompt, where the pipeline has one.
    """

    scheduler: str | None
    steps: int
    guidance_scale: float
    height: int
    width: int
    options: Mapping[str, Any] = field(default_factory=dict)
    max_sequence_length: int | None = None

    @classmethod
    def of(
        cls, plan: StepPlan, conditioning: Mapping[str, Any], height: int, width: int, steps: int | None = None
    ) -> PipelineCall:
        """Read off a step plan and its conditioning how diffusers runs the same sampler.

        Args:
            plan: as `compile_sampler` made it.
            conditioning: of the model.
            height: of the picture, in pixels.
            width: likewise.
            steps: other than the plan's.
        """
        return cls(
            scheduler=plan.key.get("scheduler"),
            steps=int(plan.key.get("steps", plan.network_calls)) if steps is None else steps,
            guidance_scale=float(conditioning.get("guidance", plan.key.get("guidance_scale", 1.0))),
            height=height,
            width=width,
            options=dict(plan.key.get("options") or {}),
            max_sequence_length=conditioning.get("max_sequence_length"),
        )

    def to_json(self) -> str:
        """Write the call for another process."""
        return json.dumps(asdict(self))


class Pipeline:
    """An opened pipeline that makes one picture at a time."""

    def __init__(self, pipeline: Any, call: PipelineCall) -> None:
        """Bind a diffusers pipeline to how it is called."""
        self._pipeline = pipeline
        self._arguments = _arguments(pipeline, call)

    def generate(self, prompt: str | int, seed: int = 0) -> np.ndarray:
        """Make one uint8 picture (height, width, 3), from text to pixels, with the noise of a torch generator."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        image = self._pipeline(**self._asked(prompt), **self._arguments, generator=generator).images[0]
        return np.asarray(image)

    def _asked(self, prompt: str | int) -> dict[str, Any]:
        if "class_labels" not in _parameters(self._pipeline):
            return {"prompt": prompt}
        known = isinstance(prompt, int) or prompt.isdigit()
        return {"class_labels": [int(prompt)] if known else self._pipeline.get_label_ids([prompt])}

    def with_steps(self, steps: int) -> Pipeline:
        """The same pipeline called with another number of steps."""
        copy = object.__new__(Pipeline)
        copy._pipeline, copy._arguments = self._pipeline, {**self._arguments, "num_inference_steps": steps}
        return copy


def open_pipeline(folder: str | Path, call: PipelineCall | Mapping[str, Any], device: str = "cpu") -> Pipeline:
    """Open the original with `DiffusionPipeline.from_pretrained`, in float32, from local files only.

    Args:
        folder: of the model, as diffusers saves it.
        call: how it will be called; a mapping holds the fields.
        device: as PyTorch names it; noise is drawn on the CPU wherever the networks are.

    Raises:
        RefusedError: diffusers cannot open the folder.
    """
    import diffusers
    import torch

    how = call if isinstance(call, PipelineCall) else PipelineCall(**call)
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
        # The SD3 pipeline asks for components that the index says are absent, unless they are given as None.
        absent: dict[str, Any] = {key: None for key, value in index.items() if value == [None, None]}
        with _no_bars():
            pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(
                folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"diffusers cannot open {folder}: {' '.join(str(error).split())[:300]}") from error
    if how.scheduler is not None:
        cls = getattr(diffusers, how.scheduler)
        constructor = _own_options(cls, how.options)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **constructor)
    pipeline.set_progress_bar_config(disable=True)
    return Pipeline(pipeline.to(device), how)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keep diffusers from drawing progress bars of its own, and transformers through the loader's silence."""
    from diffusers.utils import logging

    from compress.model.loader import quiet

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _own_options(cls: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that the scheduler's constructor takes; diffusers has no way to pass the others."""
    import inspect

    return {key: value for key, value in options.items() if key in inspect.signature(cls.__init__).parameters}


def _parameters(pipeline: Any) -> Mapping[str, Any]:
    import inspect

    return inspect.signature(pipeline.__call__).parameters


def _arguments(pipeline: Any, call: PipelineCall) -> dict[str, Any]:
    known = _parameters(pipeline)
    wanted = {
        "num_inference_steps": call.steps,
        "guidance_scale": call.guidance_scale,
        "height": call.height,
        "width": call.width,
        "max_sequence_length": call.max_sequence_length,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    return {key: value for key, value in wanted.items() if key in known and value is not None}

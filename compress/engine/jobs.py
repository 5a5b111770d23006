"""The graphs an engine consists of: functions with the inputs that they are traced and checked with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compress.errors import RefusedError
from export import conditioning as text
from export.to_tensorrt import Profile

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

_SIDES = ("height", "width", "prompt_tokens")

Sizes = tuple[int, int, int]
"""Least, best and greatest."""


@dataclass(frozen=True)
class Job:
    """One graph to write: a function of the runtime.

    Attributes:
        function: segment or part; what the runtime calls.
        part: whose quantization plan applies.
        folder, file: where it goes, without the ending.
        module: with `prefix` before the component's module names.
        example, check: inputs at two sizes.
        axes: what is dynamic.
    """

    function: str
    part: str
    folder: str
    file: str
    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Mapping[str, Tensor]
    check: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]


def checked_shapes(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> dict[str, Sizes]:
    """All four sizes, in pixels and tokens.

    Raises:
        RefusedError: a side is no multiple of what the model can take, or prompts are padded to another length.
    """
    step = model.latent["downscale"] * model.latent["multiple"]
    for name in ("height", "width"):
        wrong = [size for size in shapes[name] if size % step]
        if wrong:
            raise RefusedError(f"shapes.{name}: {wrong[0]} is no multiple of {step} pixels, which this model needs")
        free = {axis for axes in model.family.dynamic_axes().values() for axis in axes.values()}
        if shapes[name][0] != shapes[name][2] and name not in free:
            raise RefusedError(
                f"shapes.{name}: a {model.family.name} denoiser has one size; give one value, not a range"
            )
    level = 1.0 if model.step_plan is None else min(row.level for row in model.step_plan.steps)
    for name in ("height", "width"):
        if level < 1.0 and shapes[name][1] * level < shapes[name][0]:
            low, best, high = round(shapes[name][1] * level), *shapes[name][1:]
            raise RefusedError(
                f"shapes.{name}: the plan begins at {low} pixels, which lie outside: write [{low}, {best}, {high}]"
            )
    encoders = model.conditioning.get("encoders") or [{"max_length": 1}]
    length = int(encoders[0]["max_length"])
    low, best, high = shapes.get("prompt_tokens") or (length, length, length)
    if not low <= length <= high:
        raise RefusedError(f"shapes.prompt_tokens: prompts of this model are padded to {length} tokens; allow for that")
    return {**{name: shapes[name] for name in ("batch", "height", "width")}, "prompt_tokens": (low, best, high)}


def jobs_of(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> Iterator[Job]:
    """Every graph of the engine, the denoiser's segments first."""
    return _jobs(model, shapes, _example_sizes(model, shapes), _extra_tokens(model))


def _jobs(
    model: LatentDiffusion, shapes: Mapping[str, Sizes], sizes: Sequence[Mapping[str, int]], extra_tokens: int
) -> Iterator[Job]:
    """Every graph of the engine, the denoiser's segments first.

    Args:
        model: to be exported.
        shapes: of the engine.
        sizes: in latent pixels, of `example` and of `check`.
        extra_tokens: see `_extra_tokens`.
    """
    dynamic = {"batch"} | {name for name, (low, _, high) in shapes.items() if low != high}
    parts = model.parts()
    del parts["denoiser"]
    yield from _segment_jobs(model, dynamic, sizes, extra_tokens)
    lengths = {encoder["part"]: int(encoder["max_length"]) for encoder in model.conditioning.get("encoders", ())}
    first = next(iter(lengths.values()), 0)
    for name, part in parts.items():
        extra = lengths.get(name, first) - first
        example, check = (
            _part_inputs(part, {**size, "prompt_tokens": size["prompt_tokens"] + extra}) for size in sizes
        )
        axes = _axes(example, check, part.axes, dynamic)
        yield Job(name, name, name, "model", part, part.inputs, part.outputs, example, check, axes)


def _example_sizes(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> list[dict[str, int]]:
    """Two sizes to trace and check at, which differ on every dynamic axis."""
    return [
        _size(model, 2, {name: _pick(shapes[name], False) for name in _SIDES}),
        _size(model, 1, {name: _pick(shapes[name], True) for name in _SIDES}),
    ]


def _size(model: LatentDiffusion, batch: int, sides: Mapping[str, int]) -> dict[str, int]:
    """Sides in latent pixels."""
    step = model.latent["downscale"]
    return {"batch": batch, **sides, "height": sides["height"] // step, "width": sides["width"] // step}


def profiles(model: LatentDiffusion, shapes: Mapping[str, Sizes]) -> dict[str, Profile]:
    """Function -> input -> its least, best and greatest shape; found without computing anything.

    Both guidance halves run as one batch, and so do the rows of a span.

    Args:
        model: with a step plan.
        shapes: as `checked_shapes` gives them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert model.step_plan is not None
    halves = 2 if any(step.guidance != "none" for step in model.step_plan.steps) else 1
    span = max(step.span for step in model.step_plan.steps)
    _, best, most = shapes["batch"]
    sizes = [
        _size(model, batch, {name: shapes[name][at] for name in _SIDES})
        for at, batch in enumerate((1, best * halves, most * halves * span))
    ]
    extra = _extra_tokens(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        least, usual = (list(_jobs(model, shapes, [size, sizes[2]], extra)) for size in sizes[:2])
    return {
        low.function: {
            name: (tuple(tensor.shape), tuple(middle.example[name].shape), tuple(low.check[name].shape))
            for name, tensor in low.example.items()
        }
        for low, middle in zip(least, usual, strict=True)
    }


def _segment_jobs(
    model: LatentDiffusion, dynamic: set[str], sizes: Sequence[Mapping[str, int]], extra: int
) -> Iterator[Job]:
    segments = model.segments()
    tensors = [
        model.family.example_inputs(model.denoiser, **{**size, "prompt_tokens": size["prompt_tokens"] + extra})
        for size in sizes
    ]
    for segment in segments:
        example, check = ({name: known[name] for name in segment.inputs} for known in tensors)
        axes = _axes(example, check, model.family.dynamic_axes(), dynamic)
        file = "model" if len(segments) == 1 else segment.name
        yield Job(
            segment.name,
            "denoiser",
            model.family.part,
            file,
            segment.module,
            segment.inputs,
            segment.outputs,
            example,
            check,
            axes,
        )
        for known in tensors:
            with torch.no_grad():
                known.update(zip(segment.outputs, segment.module(**{k: known[k] for k in segment.inputs}), strict=True))


def _extra_tokens(model: LatentDiffusion) -> int:
    """How many more text tokens the denoiser sees than the first encoder reads (a second, or zeros in its place)."""
    encoders = model.conditioning.get("encoders")
    if not encoders:
        return 0
    from compress.model.tokenizers import portable

    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    tensors = text.encode(model.conditioning, tokenizers, model.functions(simulate=False), text.unconditional(1))
    return int(tensors["encoder_hidden_states"].shape[1]) - int(encoders[0]["max_length"])


def _part_inputs(part: Any, size: Mapping[str, int]) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = part.example_inputs(**size)
    return {name: inputs[name] for name in part.inputs}


def _pick(sizes: Sizes, other: bool) -> int:
    """The best size, or another one where there is any."""
    low, best, high = sizes
    return best if not other else low if low != best else high


def _axes(
    example: Mapping[str, Tensor],
    check: Mapping[str, Tensor],
    known: Mapping[str, Mapping[int, str]],
    dynamic: set[str],
) -> dict[str, dict[int, str]]:
    """Input -> its dynamic dimensions. What the family does not name differs between the two sizes."""
    axes = {}
    for name, tensor in example.items():
        differing = [d for d, size in enumerate(tensor.shape) if size != check[name].shape[d]]
        if name in known:
            axes[name] = {d: axis for d, axis in known[name].items() if axis in dynamic and d in differing}
        else:
            axes[name] = {d: "batch" if d == 0 else f"{name}_{d}" for d in differing}
    return axes

"""The recipe: one YAML file to typed fields; every error names file, line, key and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    PrivateAttr,
    model_validator,
)

from compress.errors import RecipeError
from compress.nearest import shown, unknown
from compress.passes.base import Pass
from compress.recipe import yaml_lines
from compress.recipe.reader import CONFIG, Places, kind, override, pass_fields, read_passes, validate
from compress.recipe.vocabulary import scheduler_names, target_names
from compress.recipe.yaml_lines import KeyPath


class Range(NamedTuple):
    """A dynamic size: the smallest, the one that is optimised for, and the largest."""

    min: int
    best: int
    max: int


def _read_range(value: object) -> object:
    numbers: list[Any] = value if isinstance(value, list) else [value] * 3
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise ValueError(f"{shown(value)} is neither one integer nor [min, best, max]")
    if len(numbers) != 3:
        raise ValueError(f"{shown(value)} has {len(numbers)} values; write one integer or [min, best, max]")
    if not 1 <= numbers[0] <= numbers[1] <= numbers[2] <= 65536:
        raise ValueError(f"{shown(value)} must rise from at least 1 to at most 65536: min <= best <= max")
    return numbers


def _write_range(value: Range) -> int | list[int]:
    return value.min if value.min == value.max else list(value)


Sizes = Annotated[Range, BeforeValidator(_read_range), PlainSerializer(_write_range)]


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else (value,)


def _listed_or_none(value: object) -> object:
    return None if value is None else _listed(value)


def _one_of(noun: str, known: Callable[[], Iterable[str]]) -> AfterValidator:
    """Check a name against a table that is looked up only when a recipe is read."""

    def check(name: str) -> str:
        if name not in known():
            raise ValueError(unknown(name, noun, known()))
        return name

    return AfterValidator(check)


def _without_repeats(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is there twice")
    return names


def _interval(value: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= value[0] < value[1] <= 1.0:
        raise ValueError(f"{shown(list(value))} is not [from, to] with 0 <= from < to <= 1")
    return value


Metric = Literal[
    "latency_ms",
    "size_mib",
    "peak_rss_mib",
    "latent_psnr_db",
    "image_psnr_db",
    "ssim",
    "frechet_distance",
    "attribute_accuracy",
    "clip_score",
]
"""The fixed metric names of a report, which gates refer to."""

Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]+$")]
OptionValue = str | int | float | bool | None | list[Any] | dict[str, Any]


class Sampler(BaseModel):
    """How the loop runs: the diffusers scheduler, the number of steps, the guidance.

    Attributes:
        scheduler: a diffusers scheduler class; None takes the model's own.
        steps: denoising steps, as `num_inference_steps` of diffusers.
        guidance_scale: classifier-free guidance, `uncond + scale * (cond - uncond)`; 1.0 is none. A denoiser that
            embeds its guidance is given the scale instead.
        guidance_interval: the share of the run, [from, to] in [0, 1] counted from the noise, where guidance is on.
        options: options of the scheduler class, e.g. `{use_karras_sigmas: true}`.
    """

    model_config = CONFIG
    scheduler: Annotated[Text, _one_of("a scheduler of diffusers", scheduler_names)] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    guidance_interval: Annotated[tuple[float, float], AfterValidator(_interval)] | None = None
    options: dict[str, OptionValue] = {}


class Lora(BaseModel):
    """A low-rank change of the weights, added to them before anything else is done.

    Attributes:
        file: safetensors, with the names of PEFT, diffusers or kohya-ss.
        strength: the weight of the change.
    """

    model_config = CONFIG
    file: Text
    strength: Annotated[float, Field(ge=-10.0, le=10.0)] = 1.0


class Shapes(BaseModel):
    """Sizes the engine must take; height and width in pixels, prompt_tokens None is the tokenizer's own length."""

    model_config = CONFIG
    batch: Sizes = Range(1, 1, 1)
    height: Sizes
    width: Sizes
    prompt_tokens: Sizes | None = None


class TensorRT(BaseModel):
    """What is asked of the builder of the targets `tensorrt-rtx` and `tensorrt`.

    Attributes:
        architectures: compute capabilities that `tensorrt-rtx` builds for, `sm_89`; None takes those of its row.
        weight_streaming: weights may stay in host memory while an engine runs.
        version_compatible: later versions of the library may open the engines.
        refit: weights can be replaced in a built engine.
    """

    model_config = CONFIG
    architectures: Annotated[
        tuple[Annotated[str, Field(pattern=r"^sm_\d{2,3}$")], ...] | None, BeforeValidator(_listed_or_none)
    ] = None
    weight_streaming: bool = False
    version_compatible: bool = False
    refit: bool = False


class Web(BaseModel):
    """What the page of the target `web` is made of.

    Attributes:
        onnxruntime: folder of the npm package onnxruntime-web; None looks for it in `node_modules`, here and above.
        webgpu: whether the runtime for graphics cards goes into the folder too.
    """

    model_config = CONFIG
    onnxruntime: Text | None = None
    webgpu: bool = True


class Calibration(BaseModel):
    """Prompts whose denoising runs give the activation ranges: a .txt (one a line) or .jsonl file."""

    model_config = CONFIG
    prompts: Text
    samples: Annotated[int, Field(ge=1, le=100_000)] = 64


class Evaluate(BaseModel):
    """How quality and speed are measured.

    Attributes:
        samples: pictures generated at each stage.
        prompts: a .jsonl or .txt file; None takes heldout.jsonl in the scorer folder, or beside the
            calibration prompts.
        scorer: a folder with scorer.json and model.onnx that reads attributes from pictures.
        clip_model: a folder of a CLIP model, for the CLIP score.
        against: baselines measured beside the original.
        threads: thread counts the latency is measured with.
        batch: pictures generated at once while measuring quality.
        allow_slower: an engine slower than the original is no error.
    """

    model_config = CONFIG
    samples: Annotated[int, Field(ge=2, le=1_000_000)] = 64
    prompts: Text | None = None
    scorer: Text | None = None
    clip_model: Text | None = None
    against: Annotated[tuple[Literal["fewer_steps", "plain_runtime"], ...], AfterValidator(_without_repeats)] = ()
    threads: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], BeforeValidator(_listed)] = (1,)
    batch: Annotated[int, Field(ge=1, le=4096)] = 8
    allow_slower: bool = False


class Limits(BaseModel):
    """What the run may take by the estimate made beforehand; it is refused where that is more.

    Attributes:
        memory_gib: at the peak of the process.
        minutes: of the whole run.
    """

    model_config = CONFIG
    memory_gib: Annotated[float, Field(gt=0.0)] | None = None
    minutes: Annotated[float, Field(gt=0.0)] | None = None


class Gate(BaseModel):
    """Bounds on one metric; the run fails where one is not met.

    Attributes:
        max_loss: how much worse than the original, in the metric's own unit.
        min_ratio: original / engine at least (a speed-up of 5 is 5.0).
        max_ratio: engine / original at most (30 % of the size is 0.30).
        min, max: bounds on the engine's own value.
    """

    model_config = CONFIG
    max_loss: float | None = None
    min_ratio: Annotated[float, Field(gt=0.0)] | None = None
    max_ratio: Annotated[float, Field(gt=0.0)] | None = None
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Gate:
        if not self.model_fields_set:
            raise ValueError(f"has no bound; known: {', '.join(type(self).model_fields)}")
        return self


class Recipe(BaseModel):
    """One run of the compiler: a model, what to do to it, what it must still be, and where the engine goes.

    Relative paths are taken from the current folder if they exist there, else from the recipe's folder
    (`Recipe.locate`); the fields keep them as they were written, so that equal recipes are equal everywhere.

    `fold` computes what depends on no latent before the loop, see `export.fold`, where the targets allow.
    """

    model_config = CONFIG
    schema_version: Literal[1]
    model: Text
    loras: tuple[Lora, ...] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    sampler: Sampler
    passes: tuple[InstanceOf[Pass], ...] = ()
    fold: bool = True
    targets: Annotated[
        tuple[Annotated[str, _one_of("a target", target_names)], ...],
        Field(min_length=1),
        AfterValidator(_without_repeats),
    ]
    shapes: Shapes
    tensorrt: TensorRT | None = None
    web: Web | None = None
    calibration: Calibration | None = None
    evaluate: Evaluate | None = None
    gates: dict[Metric, Gate] = {}
    limits: Limits | None = None
    out: Text
    _folder: Path = PrivateAttr(default=Path())
    _places: Places = PrivateAttr(default=Places("recipe", {}))

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file.

        Args:
            path: a YAML file.
            overrides: `key=value` texts (`sampler.steps=8`, `passes.0.quantize.scheme=int8-w8a8`) that win over it.

        Raises:
            RecipeError: one sentence with the file, the line, the key, and what is allowed.
        """
        path = Path(path)
        raw, lines = yaml_lines.read(path)
        return cls._build(raw, lines, str(path), path.parent, overrides)

    @classmethod
    def parse(
        cls, text: str, overrides: Sequence[str] = (), *, source: str = "recipe", folder: Path = Path()
    ) -> Recipe:
        """Read recipe text; `source` stands for the file name in errors, `folder` for the file's folder."""
        raw, lines = yaml_lines.parse(text, source)
        return cls._build(raw, lines, source, folder, overrides)

    @classmethod
    def _build(
        cls, raw: Any, lines: Mapping[KeyPath, int], source: str, folder: Path, overrides: Sequence[str]
    ) -> Recipe:
        if raw is None:
            raise RecipeError(f"{source}: is empty; a recipe needs at least model, sampler, targets, shapes and out")
        if not isinstance(raw, dict):
            raise RecipeError(f"{source}: is {kind(raw)}, not a mapping of keys to values")
        where = {key: f"{source}:{line}" for key, line in lines.items()}
        for text in overrides:
            override(raw, text, where)
        places = Places(source, where)
        passes = read_passes(raw.pop("passes", None), places)
        recipe = validate(cls, raw, places).model_copy(update={"passes": passes})
        recipe._folder, recipe._places = folder, places
        recipe._check_together()
        return recipe

    def _check_together(self) -> None:
        """Refuse keys that are each right but do not fit together, and files that are not there."""
        for index, step in enumerate(self.passes):
            if "calibration" in step.required() and self.calibration is None:
                raise self.error(("passes", index, step.name), "needs the key calibration: {prompts: FILE, samples: N}")
        for metric, key in {"attribute_accuracy": "scorer", "clip_score": "clip_model"}.items():
            if metric in self.gates and (self.evaluate is None or getattr(self.evaluate, key) is None):
                raise self.error(("gates", metric), f"needs the key evaluate.{key}, which measures it")
        if self.gates and self.evaluate is None:
            raise self.error(("gates",), "needs the key evaluate, which measures what the gates bound")
        for at, lora in enumerate(self.loras):
            if not self.locate(lora.file).is_file():
                raise self.error(("loras", at, "file"), f"there is no file {shown(lora.file)}")
        if self.tensorrt is not None and not {"tensorrt", "tensorrt-rtx"} & set(self.targets):
            raise self.error(("tensorrt",), "is for the targets tensorrt-rtx and tensorrt, and the recipe has neither")
        if self.web is not None and "web" not in self.targets:
            raise self.error(("web",), "is for the target web, which the recipe does not have")
        if self.calibration is not None:
            self._check_prompts(("calibration", "prompts"), self.locate(self.calibration.prompts))
        if self.evaluate is not None:
            for key, files in {"scorer": ("scorer.json", "model.onnx"), "clip_model": ("config.json",)}.items():
                folder = getattr(self.evaluate, key)
                for file in files if folder is not None else ():
                    if not (self.locate(folder) / file).is_file():
                        raise self.error(("evaluate", key), f"{shown(folder)} is not a folder that holds {file}")
            prompts = self.prompts_file()
            if prompts is None:
                raise self.error(
                    ("evaluate", "prompts"), "is missing, and no heldout.jsonl lies with the scorer or the calibration"
                )
            self._check_prompts(("evaluate", "prompts"), prompts)
        out = self.locate(self.out)
        if out.is_file():
            raise self.error(("out",), f"{shown(self.out)} is a file; name the engine folder to be written")
        if out.resolve() in {Path.cwd(), *Path.cwd().parents, Path.home(), self.locate(self.model).resolve()}:
            raise self.error(("out",), f"{shown(self.out)} would replace a folder that holds something else")

    def _check_prompts(self, key: KeyPath, path: Path) -> None:
        if path.suffix not in (".txt", ".jsonl"):
            raise self.error(key, f"{shown(str(path))} is neither a .txt nor a .jsonl file")
        if not path.is_file():
            raise self.error(key, f"there is no file {shown(str(path))}")

    def error(self, key: KeyPath, message: str) -> RecipeError:
        """Return an error that names file, line and key, for what only turns out later."""
        return self._places.error(key, message)

    def placed(self, error: RecipeError) -> RecipeError:
        """Add file and line to an error that only names its key (`gates.ssim.max_loss: ...`), as passes raise them."""
        name, colon, message = str(error).partition(": ")
        key = tuple(int(part) if part.isdigit() else part for part in re.sub(r"\[(\d+)\]", r".\1", name).split("."))
        return self.error(key, message) if colon and key[0] in type(self).model_fields else error

    def locate(self, path: str) -> Path:
        """Find a path of the recipe: relative to the current folder if it exists there, else to the recipe's."""
        here = Path(path).expanduser()
        beside = self._folder / here
        return beside if not here.exists() and beside.exists() else here

    def prompts_file(self) -> Path | None:
        """Return the file with the evaluation prompts, or None where nothing is evaluated."""
        if self.evaluate is None:
            return None
        if self.evaluate.prompts is not None:
            return self.locate(self.evaluate.prompts)
        folders = [self.locate(self.evaluate.scorer)] if self.evaluate.scorer is not None else []
        folders += [self.locate(self.calibration.prompts).parent] if self.calibration is not None else []
        return next((folder / "heldout.jsonl" for folder in folders if (folder / "heldout.jsonl").is_file()), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with every default written out."""
        plain = self.model_dump(mode="json", exclude={"passes"})
        plain["passes"] = [{step.name: pass_fields(step)} for step in self.passes]
        sections = [
            plain,
            plain["sampler"],
            plain["shapes"],
            plain["evaluate"] or {},
            plain["tensorrt"] or {},
            plain["web"] or {},
            plain["limits"] or {},
            *plain["gates"].values(),
        ]
        for section in sections:
            for name in [name for name, value in section.items() if value is None]:
                del section[name]
        return {name: plain[name] for name in type(self).model_fields if name in plain}

    def to_yaml(self) -> str:
        """Write the resolved recipe; reading it back gives an equal recipe."""
        return yaml_lines.write(self.to_dict())

    def __eq__(self, other: object) -> bool:
        """Compare what the recipes say, not where they were read from."""
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.to_yaml())

"""Engine: an opened engine folder that generates pictures; needs numpy, tokenizers and one runtime package."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.backends import BUILT_ONLY, LoadedGraph, TensorSpec, available, backend, holds_machine_code
from export.conditioning import PromptError
from export.errors import EngineError
from export.loop import Joined, WholeLoop
from export.manifest import STEP_PLAN, Golden, Manifest, TargetEntry, read_manifest, sha256_of, verify_files
from export.runtime import LatentSpec, Runtime, RuntimeInputError
from export.step_plan import StepPlan, StepPlanError
from export.tokenizer import Tokenizer, TokenizerError

__all__ = ["Engine", "EngineError"]


class Engine:
    """A compiled latent diffusion model. NumPy in, NumPy out; every method raises `EngineError` with one sentence.

    Attributes:
        folder: it was opened from.
        manifest: what the folder says about itself.
        plan: the denoising loop.
        target: the row of the target table it runs as.
        threads: given to the runtime; None is the runtime's own choice.
        runtime: executes the plan; for what the methods here do not offer.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        target: str,
        threads: int | None,
        graphs: Mapping[str, LoadedGraph] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.target = target
        self.threads = threads
        row = manifest.targets[target]
        with _one_sentence(), _sensible_manifest():
            self.plan = StepPlan.from_json((folder / STEP_PLAN).read_text(encoding="utf-8"))
            self._backend = None if graphs is not None else backend(row.backend)
            self._graphs = (
                {name: _Graph(partial(_given, graph)) for name, graph in graphs.items()}
                if graphs is not None
                else {
                    name: _Graph(
                        partial(_read, folder / path, row, name, threads, manifest.files[path].sha256, options)
                    )
                    for name, path in row.graphs.items()
                }
            )
            timestep = self._load_segments(self._graphs)
            self.runtime = Runtime(
                self.plan,
                self._graphs,
                manifest.conditioning,
                _latent_spec(manifest),
                {name: Tokenizer.open(folder / path) for name, path in manifest.tokenizers.items()},
                joined=self._join_paths(self._graphs),
                whole_loop=self._whole_loop,
                timestep_rank=len(timestep.shape),
                timestep_dtype=timestep.dtype,
            )

    @classmethod
    def open(
        cls,
        folder: str | Path,
        target: str | None = None,
        threads: int | None = None,
        *,
        trusted: bool = False,
        graphs: Mapping[str, LoadedGraph] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Engine:
        """Open an engine folder after verifying that it is whole.

        The segments of the denoiser are loaded now, the parts around it when first used. The hashes show that a folder
        is whole, not who made it: the graphs of most targets are data, but some targets hold machine code, which can
        do all that the user may, and is only loaded from a folder that is trusted.

        Args:
            folder: with a `manifest.json`.
            target: one the engine was built for; None takes the fastest measured one whose runtime is installed, and
                where nothing was measured the first.
            threads: to compute with; None leaves the choice to the runtime.
            trusted: the user's word that the folder was made by somebody who may run programs here.
            graphs: the functions of the target, where somebody else runs them (a server its own models); those in the
                folder are not loaded then.
            options: of the backend for every function, over those of the engine, as `{"provider": "cuda"}` of ONNX
                Runtime, see `OPTIONS` in the files of `export/backends`.

        Raises:
            EngineError: no engine, another schema version, a missing, changed or foreign file, an unknown target,
                a runtime that is not installed, or machine code in a folder that is not trusted.
        """
        if threads is not None and threads < 1:
            raise EngineError(f"threads must be at least 1, not {threads}")
        folder = Path(folder)
        manifest = read_manifest(folder)
        if graphs is not None and target is None:
            target = next(iter(manifest.targets))
        return cls(folder, manifest, _choose(manifest, target, trusted), threads, graphs, options)

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Prompts (or class labels) to pictures.

        Args:
            prompts: one per picture.
            seeds: one per picture; None is 0, 1, 2, ...
            height: in pixels; None is the size the engine was built for.
            width: likewise.
            image: image-to-image and inpainting: uint8 (pictures or 1, height, width, 3) to begin from.
            mask: inpainting: (pictures or 1, height, width), non-zero where to paint.
            options: of `export.runtime.Runtime.sample`: `negative_prompts`, `strength`, `start_step`, `noise`, ...

        Returns:
            uint8 (pictures, height, width, 3).
        """
        if image is not None:
            options["image_latents"] = self.encode(image)
            height, width = height or image.shape[1], width or image.shape[2]
        if mask is not None:
            options["mask"] = self.latent_mask(mask)
        return self.decode(self.sample(prompts, seeds, height, width, **options))

    def sample(
        self,
        prompts: Sequence[Any] | Mapping[str, np.ndarray],
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Run the denoising loop: float32 latents (samples, channels, h, w). Arguments as for `generate`.

        `noise=` is the initial noise, or a function of (draw, shape), see `export.runtime.Runtime.sample`.
        """
        shaped = any(isinstance(options.get(key), np.ndarray) for key in ("noise", "image_latents"))
        if not shaped or height is not None or width is not None:
            height = self._size("height", height)
            width = self._size("width", width)
        if seeds is None and options.get("noise") is None:
            count = len(next(iter(prompts.values()))) if isinstance(prompts, Mapping) else len(prompts)
            seeds = range(count)
        with _one_sentence():
            return self.runtime.sample(prompts, seeds, height, width, **options)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents (samples, channels, h, w) to uint8 pictures (samples, height, width, 3)."""
        with _one_sentence():
            return self.runtime.decode(latents)

    def encode(self, image: np.ndarray) -> np.ndarray:
        """uint8 pictures (samples, height, width, 3) to latents (samples, channels, h, w)."""
        with _one_sentence():
            return self.runtime.encode_image(image)

    def latent_mask(self, mask: np.ndarray) -> np.ndarray:
        """Nearest latent pixels of a picture mask: float32 (pictures, 1, h, w) of 0 and 1."""
        mask, step = np.asarray(mask), int(self.manifest.latent["downscale"])
        if mask.ndim != 3:
            raise EngineError(f"a mask must be (pictures, height, width), not of shape {mask.shape}")
        return (mask[:, None, ::step, ::step] != 0).astype(np.float32)

    def denoise(self, latents: np.ndarray, t: float | np.ndarray, conditioning: Any) -> np.ndarray:
        """The network output at `latents` and timestep `t`, without guidance: the score oracle.

        Args:
            latents: (samples, channels, h, w), scaled as the network takes them.
            t: one timestep, or one per sample.
            conditioning: prompts, or the conditioning tensors.
        """
        with _one_sentence():
            return self.runtime.denoise(latents, t, conditioning)

    def features(
        self, latents: np.ndarray, t: float | np.ndarray, conditioning: Any, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The tensors at the cuts of the denoiser, and its output; arguments as for `denoise`."""
        with _one_sentence():
            return self.runtime.features(latents, t, conditioning, names)

    def verify(self, golden: bool = True) -> dict[str, float]:
        """Hash every file again, load every graph, and recompute the golden latents on this target.

        Args:
            golden: False leaves the latents out.

        Returns:
            `files` (how many were checked) and, where there are golden latents, `relative_error` and `tolerance`.

        Raises:
            EngineError: a file has changed, a graph cannot be loaded, or the latents differ by more than the tolerance.
        """
        verify_files(self.folder, self.manifest)
        for graph in self._graphs.values():
            graph.loaded()
        found: dict[str, float] = {"files": len(self.manifest.files)}
        kept = self.manifest.golden
        if not golden or kept is None or self.target not in kept.files:
            return found
        path = self.folder / kept.files[self.target]
        try:
            expected = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise EngineError(f"the golden latents {path.name} cannot be read: {error}") from error
        difference = relative_error(self.golden_latents(kept), expected)
        if not difference <= kept.tolerance:
            raise EngineError(
                f"on {self.target} the engine's latents differ from the golden ones by {difference:.2e} (relative "
                f"root mean square), allowed is {kept.tolerance:.2e}"
            )
        return {**found, "relative_error": difference, "tolerance": kept.tolerance}

    def golden_latents(self, golden: Golden) -> np.ndarray:
        """Final latents of the golden run, computed now."""
        return self.sample(list(golden.prompts), list(golden.seeds), golden.height, golden.width)

    def _load_segments(self, graphs: Mapping[str, _Graph]) -> TensorSpec:
        """Load the denoiser; gives what it takes as `timestep`."""
        timesteps = []
        for name, segment in self.plan.segments.items():
            if name not in graphs:
                raise EngineError(f"the engine has no graph for the segment {name!r} of its plan")
            loaded = graphs[name].loaded()
            missing = sorted(set(segment.outputs).difference(loaded.outputs))
            if missing:
                raise EngineError(f"the graph of segment {name!r} does not compute {missing[0]!r}")
            timesteps += [spec for key, spec in loaded.inputs.items() if key == "timestep"]
        if len(set(timesteps)) != 1:
            raise EngineError("the segments of the denoiser do not agree on what a timestep is")
        return timesteps[0]

    def _join_paths(self, graphs: Mapping[str, _Graph]) -> dict[str, Joined]:
        """Paths of several segments that the runtime would rather run as one graph."""
        slots = {name for slot in self.plan.slots.values() for name in (slot.tensor, slot.base)}
        row, found = self.manifest.targets[self.target], dict[str, Joined]()
        if self._backend is None:
            return found
        for path, names in self.plan.paths.items():
            if len(names) < 2 or any(row.options.get(name) != row.options.get(names[0]) for name in names):
                continue
            made = [tensor for name in names for tensor in self.plan.segments[name].outputs]
            outputs = tuple(tensor for tensor in made if tensor in slots or tensor == self.plan.output)
            whole = self._backend.joined([graphs[name].loaded() for name in names], outputs)
            if whole is not None:
                found[path] = Joined(whole, outputs)
        return found

    def _whole_loop(self, plan: StepPlan, latent_input: str, timestep_rank: int) -> WholeLoop | None:
        """The loop over this engine's segments that the runtime has of its own, if any."""
        if self._backend is None:
            return None
        loaded = {name: self._graphs[name].loaded() for name in plan.segments}
        return self._backend.whole_loop(plan, loaded, latent_input, timestep_rank)

    def _size(self, name: str, asked: int | None) -> int:
        low, best, high = self.manifest.shapes[name]
        if asked is not None and low == high != asked:
            raise EngineError(f"this engine was built for the {name} {best} alone, not {asked}")
        return best if asked is None else asked


class _Graph:
    """One function of the engine, loaded when first called."""

    def __init__(self, load: Callable[[], LoadedGraph]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._loaded: LoadedGraph | None = None

    def loaded(self) -> LoadedGraph:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return (self._loaded or self.loaded())(arrays)


def _given(graph: LoadedGraph) -> LoadedGraph:
    return graph


def _read(
    path: Path, row: TargetEntry, name: str, threads: int | None, sha256: str, options: Mapping[str, Any] | None
) -> LoadedGraph:
    """Load a graph of the folder; machine code is hashed again before it is."""
    if holds_machine_code(row.backend) and sha256_of(path) != sha256:
        raise EngineError(f"the engine is damaged: {path.name} was changed after the engine was opened")
    return backend(row.backend).load(path, threads, {**row.options.get(name, {}), **(options or {})})


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of `expected`; infinite where shapes differ or a value is NaN."""
    if values.shape != expected.shape or not np.isfinite(values).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(values.astype(np.float64) - expected)))) / max(scale, 1e-30)


def _latent_spec(manifest: Manifest) -> LatentSpec:
    try:
        spec = LatentSpec(**manifest.latent)
        sizes, factors = (spec.channels, spec.downscale, spec.multiple), (spec.scaling_factor, spec.shift_factor)
        sound = all(type(size) is int and 0 < size < 2**16 for size in sizes) and all(map(math.isfinite, factors))
    except TypeError as error:
        raise EngineError(f"manifest.json: latent cannot be read: {error}") from error
    if not sound or spec.scaling_factor == 0.0:
        raise EngineError(f"manifest.json: latent holds a number that makes no sense: {dict(manifest.latent)}")
    return spec


def _choose(manifest: Manifest, target: str | None, trusted: bool) -> str:
    names = list(manifest.targets)
    if target is not None and target not in names:
        raise EngineError(f"the engine was not built for {target!r}, but for {', '.join(names)}")
    here = [name for name in names if available(manifest.targets[name].backend)] if target is None else [target]
    opened = [name for name in here if trusted or not holds_machine_code(manifest.targets[name].backend)]
    if here and not opened:
        raise EngineError(
            f"the target {here[0]} of this engine is machine code, which could do anything you can: if you built the "
            "engine yourself, or trust who did, say so with trusted=True (--trusted on the command line)"
        )
    if not opened and all(manifest.targets[name].backend in BUILT_ONLY for name in names):
        raise EngineError(BUILT_ONLY[manifest.targets[names[0]].backend])
    if not opened:
        needed = " or ".join(sorted({row.backend for row in manifest.targets.values()} - set(BUILT_ONLY)))
        raise EngineError(f"no runtime of this engine is installed: install {needed}")
    return min(opened, key=lambda name: manifest.targets[name].measured.get("latency_ms", float("inf")))


@contextlib.contextmanager
def _sensible_manifest() -> Iterator[None]:
    """Turn what a manifest of valid JSON and no sense leads to into `EngineError`."""
    try:
        yield
    except (TypeError, KeyError, AttributeError) as error:
        raise EngineError(f"the manifest of the engine makes no sense: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn the errors of the modules below into `EngineError`."""
    try:
        yield
    except (RuntimeInputError, StepPlanError, TokenizerError, PromptError) as error:
        raise EngineError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the engine cannot be read: {error}") from error

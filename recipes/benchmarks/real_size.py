"""Exports and runs denoisers of production size with random weights: memory, size and time, and what a cut costs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from compress.families import FAMILIES, Family
from compress.families.layout import FULL, Layout
from compress.families.segments import Segmentation
from compress.measure.environment import environment
from export import half_weights
from export.backends import LoadedGraph, backend
from export.engine import relative_error
from export.to_onnx import export_module, strip_metadata
from export.weights import PoolWriter, Storage, write_graph
from recipes.benchmarks import int8_speed

ROOT = Path(__file__).parent.parent.parent
PROMPT_TOKENS = 77
LIMIT_GIB = 16.0
"""Peak resident memory allowed to a process that exports or runs a network of production size; it is ended beyond."""
SPARE_GIB = 2.5
"""It is ended, too, where less than this is left to the rest of the machine."""
TOLERANCE = 1e-3
"""Relative error (root mean square) allowed between a path in a runtime and PyTorch."""

Arrays = Mapping[str, np.ndarray]


def stable_diffusion_1_5() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5: 860 million parameters."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def stable_diffusion_xl() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL: 2.57 thousand million parameters."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def toy() -> UNet2DConditionModel:
    """The layout of Stable Diffusion XL, small enough for a test."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


NETWORKS: dict[str, Callable[[], Any]] = {
    "sd15": stable_diffusion_1_5,
    "sdxl": stable_diffusion_xl,
    "unet": int8_speed.unet,
    "reference-unet": int8_speed.reference_unet,
    "toy": toy,
}


@dataclass(frozen=True)
class Case:
    """A network, and how it is measured.

    Attributes:
        network: of `NETWORKS`.
        cuts: that share a pool with the full path; of the overhead, the one that is measured.
        side: of the latent that is run.
        storage: of the weights.
        runtimes: (backend, options) that run it.
        threads: to compute with.
        rounds: timed runs of every path.
    """

    network: str
    cuts: tuple[int, ...]
    side: int
    storage: Storage = "float32"
    runtimes: tuple[tuple[str, Mapping[str, Any]], ...] = (("onnxruntime", {}), ("openvino", {}))
    threads: int = 2
    rounds: int = 2


REAL = {
    "sd15": Case("sd15", (0, 2), 64),
    "sdxl": Case(
        "sdxl",
        (0, 2),
        32,
        "float16",
        (("onnxruntime", {}), ("openvino", {"inference_precision": "bfloat16"})),
    ),
    "toy": Case("toy", (0,), 8, "float16"),
}
OVERHEAD = {
    "overhead-reference-unet": Case("reference-unet", (2,), 16, threads=1, rounds=400),
    "overhead-unet": Case("unet", (2,), 32, threads=1, rounds=60),
    "overhead-toy": Case("toy", (2,), 8, threads=1, rounds=3),
}
CASES = {**REAL, **OVERHEAD}


def build(case: Case) -> tuple[Family, Any]:
    """The family and the network, random; weights stored in 16 bits are never float32 all at once."""
    torch.manual_seed(0)
    with torch.device("meta" if case.network in ("sd15", "sdxl", "toy") else "cpu"):
        denoiser = NETWORKS[case.network]().eval().requires_grad_(False)
    for owner in denoiser.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(owner, name, nn.Parameter(random_weights(name, parameter, case.storage), requires_grad=False))
    return FAMILIES[type(denoiser).__name__], denoiser


def random_weights(name: str, parameter: Tensor, storage: Storage) -> Tensor:
    """In the place of one without values: biases 0, scales of norms 1."""
    if parameter.ndim < 2:
        return torch.full(parameter.shape, float(name == "weight"))
    half = storage == "float16" and parameter.numel() >= half_weights.LARGE
    bound = (parameter.numel() / len(parameter)) ** -0.5
    values = torch.empty(parameter.shape, dtype=torch.float16 if half else torch.float32).uniform_(-bound, bound)
    return half_weights.HalfWeight(values) if half else values.half().float() if storage == "float16" else values


def layout(family: Family, denoiser: Any, cuts: Sequence[int]) -> Layout:
    """A slot and a path for each cut."""
    slots = {f"deep_{cut}": family.deep_slot(denoiser, cut) for cut in cuts}
    return Layout.of(slots, {f"shallow_{cut}": (f"deep_{cut}",) for cut in cuts})


def write(
    family: Family, denoiser: Any, found: Segmentation, folder: Path, storage: Storage, dynamic: Sequence[str]
) -> dict[str, Any]:
    """Export segments into one pool, as small as the network takes them; gives seconds and bytes."""
    step = family.latent_multiple(denoiser)
    sizes = ((2, 2 * step, 3 * step), (1, 3 * step, 2 * step)) if "height" in dynamic else None
    side = family.latent_side(denoiser)
    known = [
        family.example_inputs(denoiser, batch, height, width, PROMPT_TOKENS)
        for batch, height, width in sizes or ((2, side, side), (1, side, side))
    ]
    named = family.dynamic_axes()
    seconds = {}
    for segment in found.segments:
        for tensors in known:
            give(segment, tensors)
    with PoolWriter(folder) as pool:
        for segment in found.segments:
            example, check = ({name: tensors[name] for name in segment.inputs} for tensors in known)
            axes = {}
            for name, tensor in example.items():
                differing = [d for d, size in enumerate(tensor.shape) if size != check[name].shape[d]]
                axes[name] = {d: named.get(name, {}).get(d, "batch" if d == 0 else f"{name}_{d}") for d in differing}
            began = time.perf_counter()
            graph = export_module(
                segment.module, example, axes, segment.outputs, check, name=segment.name, pool=pool, storage=storage
            )
            strip_metadata(graph)
            write_graph(graph, folder / f"{segment.name}.onnx")
            seconds[segment.name] = round(time.perf_counter() - began, 1)
            print(segment.name, seconds[segment.name], "s", peak_gib(), "GiB", file=sys.stderr, flush=True)
    return {
        "export_seconds": seconds,
        "pool_bytes": pool.bytes,
        "graph_bytes": {path.stem: path.stat().st_size for path in sorted(folder.glob("*.onnx"))},
        "bytes_without_sharing": pool.unshared_bytes,
    }


def give(segment: Any, tensors: dict[str, Tensor]) -> None:
    """Run a segment in PyTorch, and keep what it gives."""
    with torch.no_grad():
        outputs = segment.module(**{name: tensors[name] for name in segment.inputs})
    tensors.update((name, value) for name, value in zip(segment.outputs, outputs, strict=True) if name not in tensors)


def export_real(case: Case, folder: Path) -> dict[str, Any]:
    """Everything PyTorch does: the costs of the cuts, the graphs, and the output they must give."""
    family, denoiser = build(case)
    with half_weights.stand_ins(denoiser):
        cuts = [family.cut_info(denoiser, cut) for cut in case.cuts]
    found = family.segments(denoiser, layout(family, denoiser, case.cuts))
    dynamic = ("batch", "height", "width")
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "cuts": [
            {"cut": cut.index, "macs_share": round(cut.macs_share, 4), "parameter_share": round(cut.parameter_share, 4)}
            for cut in cuts
        ],
        "built_rss_gib": peak_gib(),
        **write(family, denoiser, found, folder / "cut", case.storage, dynamic),
        "paths": found.paths,
    }
    tensors = family.example_inputs(denoiser, 1, case.side, case.side, PROMPT_TOKENS)
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    with torch.no_grad():
        began = time.perf_counter()
        np.save(folder / "output.npy", family.whole(denoiser, *tensors.values()).numpy())
        result["pytorch_seconds"] = round(time.perf_counter() - began, 1)
    return result


def export_whole(case: Case, folder: Path) -> dict[str, Any]:
    """The same network as one graph."""
    family, denoiser = build(case)
    found = family.segments(denoiser, None)
    return write(family, denoiser, found, folder / "whole", case.storage, ("batch", "height", "width"))


def run_real(case: Case, folder: Path, runtime: int) -> dict[str, Any]:
    """Run every path in one runtime, and compare with PyTorch."""
    name, options = case.runtimes[runtime]
    paths = json.loads((folder / "export.json").read_text())["paths"]
    inputs = dict(np.load(folder / "inputs.npz"))
    expected = np.load(folder / "output.npy")
    began = time.perf_counter()
    segments = list(dict.fromkeys(name for path in paths.values() for name in path))
    functions = {
        segment: backend(name).load(folder / "cut" / f"{segment}.onnx", case.threads, options) for segment in segments
    }
    result: dict[str, Any] = {"backend": name, "options": dict(options), "load_seconds": since(began), "paths": {}}
    known = dict(inputs)
    for path, names in paths.items():
        run = follow([functions[segment] for segment in names])
        seconds = []
        for _ in range(case.rounds + 1):  # the first also compiles and allocates
            began = time.perf_counter()
            outputs = run(known)
            seconds.append(since(began))
        if path == FULL:
            known.update((key, value) for key, value in outputs.items() if key not in known and key != "out_sample")
        error = relative_error(outputs["out_sample"], expected)
        result["paths"][path] = {"first_seconds": seconds[0], "seconds": min(seconds[1:]), "relative_error": error}
        result["peak_rss_gib"] = peak_gib()
    return result


def follow(functions: Sequence[Callable[[Arrays], dict[str, np.ndarray]]]) -> Callable[[Arrays], dict[str, np.ndarray]]:
    """One function of the segments of a path."""

    def run(arrays: Arrays) -> dict[str, np.ndarray]:
        known = dict(arrays)
        for function in functions:
            known.update(function(known))
        return known

    return run


def overhead(case: Case, folder: Path) -> dict[str, Any]:
    """The full path in segments that share weights with a shallow one, against one graph, in turn on one thread."""
    family, denoiser = build(case)
    side = family.latent_side(denoiser)
    forms = {
        "whole": family.segments(denoiser, None),
        "cut": family.segments(denoiser, layout(family, denoiser, case.cuts)),
    }
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "at": case.cuts[0],
        "segments": list(forms["cut"].paths[FULL]),
        **{
            form: write(family, denoiser, found, folder / form, case.storage, ("batch",))
            for form, found in forms.items()
        },
        "runtimes": {},
    }
    inputs = {k: v.numpy() for k, v in family.example_inputs(denoiser, 1, side, side, PROMPT_TOKENS).items()}
    for name, options in case.runtimes:
        runs = {form: follow(full_path(name, case, options, found, folder / form)) for form, found in forms.items()}
        error = relative_error(runs["cut"](inputs)["out_sample"], runs["whole"](inputs)["out_sample"])
        times: dict[str, dict[str, list[float]]] = {form: {"wall_ms": [], "cpu_ms": []} for form in runs}
        for turn in range(case.rounds):
            for form in ("whole", "cut") if turn % 2 else ("cut", "whole"):
                wall, cpu = time.perf_counter(), time.process_time()
                runs[form](inputs)
                times[form]["cpu_ms"].append((time.process_time() - cpu) * 1e3)
                times[form]["wall_ms"].append((time.perf_counter() - wall) * 1e3)
        result["runtimes"][name] = {
            "relative_error": error,
            **{form: {clock: spread(values) for clock, values in clocks.items()} for form, clocks in times.items()},
            **{f"{clock}_ratio": ratios(times["cut"][clock], times["whole"][clock]) for clock in ("wall_ms", "cpu_ms")},
        }
    return result


def full_path(
    name: str, case: Case, options: Mapping[str, Any], found: Segmentation, folder: Path
) -> list[LoadedGraph]:
    """The segments of the full path as an engine runs them: as one graph, where the runtime gains by it."""
    names = found.paths[FULL]
    graphs = [backend(name).load(folder / f"{segment}.onnx", case.threads, options) for segment in names]
    made = {tensor for segment in found.segments for tensor in segment.outputs}
    kept = {tensor for slot in found.slots.values() for tensor in (slot.tensor, slot.base)}
    whole = None if len(graphs) < 2 else backend(name).joined(graphs, [*sorted(made & kept), "out_sample"])
    return graphs if whole is None else [whole]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, median."""
    return {"min": round(min(values), 3), "median": round(float(np.median(values)), 3)}


def ratios(cut: Sequence[float], whole: Sequence[float]) -> dict[str, float]:
    """Of the least times, of the mean of the faster tenth, and the median over the rounds."""
    tenth = max(1, len(cut) // 10)
    fast = float(np.mean(sorted(cut)[:tenth]) / np.mean(sorted(whole)[:tenth]))
    median = float(np.median(np.divide(cut, whole)))
    return {"min": round(min(cut) / min(whole), 4), "fastest_tenth": round(fast, 4), "median": round(median, 4)}


def since(began: float) -> float:
    """Seconds."""
    return round(time.perf_counter() - began, 3)


def peak_gib() -> float:
    """The most memory that was resident in this process so far."""
    return round(memory_gib("/proc/self/status", "VmHWM"), 2)


def step(name: str, what: str, folder: Path) -> None:
    """One process of a case: writes `<what>.json` beside what it makes."""
    case = CASES[name]
    torch.set_num_threads(case.threads)
    began = time.perf_counter()
    verbs: dict[str, Callable[[], dict[str, Any]]] = {
        "export": lambda: export_real(case, folder),
        "whole": lambda: export_whole(case, folder),
        "overhead": lambda: overhead(case, folder),
        **{f"run-{i}": lambda i=i: run_real(case, folder, i) for i in range(len(case.runtimes))},  # type: ignore[misc]
    }
    result = verbs[what]()
    result |= {"peak_rss_gib": peak_gib(), "seconds": since(began), "load_average": round(os.getloadavg()[0], 1)}
    (folder / f"{what}.json").write_text(json.dumps(result, indent=1))


def process(name: str, what: str, folder: Path) -> dict[str, Any]:
    """Run a step in a process of its own, and end it where it takes too much memory.

    Raises:
        RuntimeError: the step failed.
    """
    words = [
        sys.executable,
        "-m",
        "recipes.benchmarks.real_size",
        "--case",
        name,
        "--step",
        what,
        "--folder",
        str(folder),
    ]
    # One arena, so that freed memory goes back; large blocks are mapped, and unmapped when freed.
    began = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    while began.poll() is None:
        resident, left = memory_gib(f"/proc/{began.pid}/status", "VmRSS"), memory_gib("/proc/meminfo", "MemAvailable")
        if resident > LIMIT_GIB or left < SPARE_GIB:
            began.kill()
            began.wait()
            return {"ended": f"at {resident:.1f} GiB resident, with {left:.1f} GiB left to the machine"}
        time.sleep(0.1)
    if began.returncode:
        raise RuntimeError(f"the step {what} of {name} failed with exit code {began.returncode}")
    result: dict[str, Any] = json.loads((folder / f"{what}.json").read_text())
    return result


def memory_gib(file: str, key: str) -> float:
    """A line of a file in /proc; 0 where the process has ended."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{key}:")), 0.0)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """All steps of a case."""
    case = CASES[name]
    told = {"network": case.network, "latent": [case.side, case.side], "storage": case.storage, "threads": case.threads}
    folder.mkdir(parents=True, exist_ok=True)
    if name in OVERHEAD:
        result = process(name, "overhead", folder)
        whole, cut = (result[form]["pool_bytes"] for form in ("whole", "cut"))
        return {**told, "size_ratio": round(cut / whole, 5), **result}
    result = {**told, "export": process(name, "export", folder)}
    result["whole"] = process(name, "whole", folder)
    shutil.rmtree(folder / "whole", ignore_errors=True)
    if "pool_bytes" in result["whole"] and "pool_bytes" in result["export"]:
        result["size_ratio"] = round(result["export"]["pool_bytes"] / result["whole"]["pool_bytes"], 5)
    result["runs"] = [process(name, f"run-{i}", folder) for i in range(len(case.runtimes))]
    return result


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write JSON; what is there of the same day for other cases is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if "toy" not in name])
    parser.add_argument("--out", type=Path, help="the JSON file; default real_size-DATE.json in results/")
    parser.add_argument("--work", type=Path, help="a folder for the graphs (24 GB); default a temporary one")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.step:
        step(options.case, options.step, options.folder)
        return
    today = datetime.date.today().isoformat()
    out = options.out or Path(__file__).parent / "results" / f"real_size-{today}.json"
    out.parent.mkdir(exist_ok=True)
    report: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    head = {"what": __doc__, "date": today, "environment": environment(), "limit_gib": LIMIT_GIB}
    report = {**head, "cases": report["cases"]}
    for name in options.cases:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            report["cases"][name] = measure(name, Path(folder))
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({name: report["cases"][name]}, indent=1))


if __name__ == "__main__":
    main()

"""Measures int8 denoisers against floats in the same runtime: 50M-class ones with random weights, and our own."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from compress.families import FAMILIES, Family
from compress.measure.environment import environment
from compress.quantization.attention import attentions, observed, scales
from compress.quantization.observers import Histogram
from compress.quantization.scheme import scheme
from compress.quantization.weights import weight_grid
from export.backends import backend
from export.errors import EngineError
from export.qdq import lower
from export.quant_plan import LayerQuant, QuantPlan
from export.target import TARGETS
from export.to_onnx import export_module, strip_metadata

SIDE = 32  # of the latents of the large networks: 32 x 32, or 16 x 16 = 256 tokens in patches of 2 x 2
REFERENCE = Path(__file__).parent.parent / "reference"
PROMPT_TOKENS = 77
CALIBRATION = 4


def unet() -> UNet2DConditionModel:
    """The reference UNet's layout, wider: one resnet a level, attention in the lower two."""
    return UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(128, 256, 384),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=768,
        attention_head_dim=8,
    )


def mmdit() -> SD3Transformer2DModel:
    """The reference MMDiT's layout, wider: joint blocks of 64-channel heads, normalised queries and keys."""
    return SD3Transformer2DModel(
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=64,
        num_attention_heads=10,
        caption_projection_dim=640,
        joint_attention_dim=768,
        pooled_projection_dim=768,
        pos_embed_max_size=SIDE,
        qk_norm="rms_norm",
    )


def reference_unet() -> UNet2DConditionModel:
    """The trained UNet of this repository."""
    return UNet2DConditionModel.from_pretrained(REFERENCE / "unet", subfolder="unet", dtype=torch.float32)


def reference_mmdit() -> SD3Transformer2DModel:
    """The trained MMDiT of this repository."""
    return SD3Transformer2DModel.from_pretrained(REFERENCE / "mmdit", subfolder="transformer", dtype=torch.float32)


NETWORKS: dict[str, Callable[[], Any]] = {
    "unet": unet,
    "mmdit": mmdit,
    "reference-unet": reference_unet,
    "reference-mmdit": reference_mmdit,
}


def quant_plan(
    family: Family,
    module: Any,
    denoiser: Any,
    inputs: list[Mapping[str, torch.Tensor]],
    form: str = "int8-w8a8",
    *,
    everything: bool = False,
) -> QuantPlan:
    """What the pass `quantize` would plan, calibrated on random inputs: speed depends on no more than that they fit."""
    skip, modulation = set(family.sensitive(denoiser)), set(family.modulation(denoiser))
    if everything:  # as NNCF does
        skip, modulation = set(), set()
    layers = {
        name: layer
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in skip
    }
    seen = {name: (Histogram(), Histogram()) for name in layers}
    hooks = []
    for name, layer in layers.items():

        def watch(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
            seen[name][0].update(args[0])
            seen[name][1].update(output)

        hooks.append(layer.register_forward_hook(watch))
    with torch.inference_mode(), observed(denoiser, attentions(denoiser)) as largest:
        for tensors in inputs:
            module(**tensors)
    for hook in hooks:
        hook.remove()
    return QuantPlan(
        {
            name: LayerQuant(
                "conv" if isinstance(layer, nn.Conv2d) else "linear",
                "int8-w8a32" if name in modulation else form,
                weight_grid(
                    layer.weight.detach().flatten(1), scheme("int8-w8a32" if name in modulation else form).weight
                ),
                None if name in modulation else seen[name][0].grid("minmax"),
                seen[name][1].grid("minmax") if isinstance(layer, nn.Conv2d) else None,
            )
            for name, layer in layers.items()
        },
        {name: "sensitive" for name in skip},
        "float16",
        attentions=scales(largest),
    )


def measure(
    name: str, side: int | None, targets: list[str], rounds: int, repeats: int, nncf: str | None
) -> dict[str, Any]:
    """One network on every target: CPU and wall time of one call, in turn: float, 8 and 4 bits, and what NNCF makes."""
    torch.manual_seed(0)
    denoiser = NETWORKS[name]().eval().requires_grad_(False)
    family = FAMILIES[type(denoiser).__name__]
    segment = family.segments(denoiser, None)[0][0]
    side = side or family.latent_side(denoiser)
    example, check = (family.example_inputs(denoiser, batch, side, side, PROMPT_TOKENS) for batch in (2, 1))
    axes = {tensor: {0: "batch"} for tensor in example}
    generator = torch.Generator().manual_seed(1)
    calibration = [
        {
            k: torch.randn(v.shape, generator=generator) if v.is_floating_point() and v.ndim > 1 else v
            for k, v in check.items()
        }
        for _ in range(CALIBRATION)
    ]
    plans = {
        form: quant_plan(family, segment.module, denoiser, calibration, scheme)
        for form, scheme in (("int8", "int8-w8a8"), ("int4", "int4-w4a8"))
    }
    plans["int8, everything"] = quant_plan(family, segment.module, denoiser, calibration, everything=True)
    graph = export_module(segment.module, example, axes, segment.outputs, check, name=name)
    arrays = {key: tensor.numpy() for key, tensor in calibration[0].items()}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = {}
        for target in targets:
            row = TARGETS[target]
            paths = {form: Path(folder) / f"{target}-{form}.onnx" for form in ("float32", *plans)}
            nodes = {}
            for form, path in paths.items():
                model = onnx.ModelProto()
                model.CopyFrom(graph)
                if form in plans:
                    nodes[form] = dict(lower(model, plans[form], row.dialect).nodes)
                strip_metadata(model)
                onnx.save(model, path)
            runtime = backend(row.backend)
            kernels = Counter(
                kernel.operation
                for kernel in runtime.executed_kernels(paths["int8"], arrays, {}).values()
                if kernel.precision == "int8"
            )
            functions, refused = {}, {}
            for form, path in paths.items():
                try:
                    function = runtime.load(path, 1, {})
                    function(arrays)
                    functions[form] = function
                except EngineError as error:  # OpenVINO 2026.4 cannot do some graphs whose layers all are in int8
                    refused[form] = str(error)
            results[target] = {
                **({"refused": refused} if refused else {}),
                "layers": nodes["int8"],
                "int8_kernels": dict(kernels),
                "size_mib": {form: round(path.stat().st_size / 2**20, 1) for form, path in paths.items()},
            }
            if nncf is not None and row.backend == "openvino":
                peer = Path(folder) / f"{target}-nncf.xml"
                quantize_with_nncf(nncf, paths["float32"], arrays, peer)
                functions["nncf"] = runtime.load(peer, 1, {})
            outputs = {form: next(iter(function(arrays).values())) for form, function in functions.items()}
            exact = outputs.pop("float32")
            results[target]["sqnr_db"] = {form: sqnr_db(exact, output) for form, output in outputs.items()}
            loaded.update({(target, form): function for form, function in functions.items()})
        times = interleaved(loaded, arrays, rounds, repeats)
    for target in targets:
        for clock in ("cpu_ms", "wall_ms"):
            medians = {form: float(np.median(taken[clock])) for (of, form), taken in times.items() if of == target}
            results[target][clock] = {form: round(value, 2) for form, value in medians.items()}
            clocked = clock.removesuffix("_ms")
            results[target][f"{clocked}_speedup"] = round(medians["float32"] / medians["int8"], 3)
            for other in (*plans, "nncf"):
                if other in medians and other != "int8":
                    results[target][f"{clocked}_speedup_{other}"] = round(medians["float32"] / medians[other], 3)
    return {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "latent": [side, side],
        "prompt_tokens": PROMPT_TOKENS,
        "targets": results,
    }


def sqnr_db(exact: np.ndarray, output: np.ndarray) -> float:
    """The energy of the float output over that of the difference."""
    return round(float(10 * np.log10((exact**2).sum() / ((exact - output) ** 2).sum())), 1)


def quantize_with_nncf(python: str, graph: Path, arrays: Mapping[str, np.ndarray], out: Path) -> None:
    """Write what NNCF makes of a float graph; `python` is an interpreter that has nncf."""
    inputs = out.with_suffix(".npz")
    np.savez(inputs, **arrays)  # type: ignore[arg-type]
    script = Path(__file__).with_name("nncf_peer.py")
    subprocess.run([python, str(script), str(graph), str(inputs), str(out)], check=True, stdout=subprocess.DEVNULL)


def interleaved(
    functions: Mapping[Any, Callable[..., Any]], arrays: Mapping[str, np.ndarray], rounds: int, repeats: int
) -> dict[Any, dict[str, list[float]]]:
    """Time every function in every round, so that what else the machine does falls on all of them alike."""
    times: dict[Any, dict[str, list[float]]] = {key: {"cpu_ms": [], "wall_ms": []} for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                function(arrays)
            times[key]["cpu_ms"].append((time.process_time() - cpu) * 1e3 / repeats)
            times[key]["wall_ms"].append((time.perf_counter() - wall) * 1e3 / repeats)
    return times


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sides", nargs="+", type=int, help="of the latents; default each network's own")
    here = [name for name, row in TARGETS.items() if not row.library and row.page is None]
    parser.add_argument("--targets", nargs="+", choices=here, default=here)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=2, help="calls per round")
    parser.add_argument("--nncf", metavar="PYTHON", help="an interpreter that has nncf: time what it makes, too")
    parser.add_argument("--out", type=Path, help="the JSON file; default int8_speed-DATE.json in results/")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    today = datetime.date.today().isoformat()
    report = {
        "what": __doc__,
        "date": today,
        "environment": environment(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "batch": 1,
        "threads": 1,
        "rounds": options.rounds,
        "networks": {
            name if side is None else f"{name}, {side}x{side}": measure(
                name, side, options.targets, options.rounds, options.repeats, options.nncf
            )
            for name in options.networks
            for side in options.sides or [None]
        },
    }
    for name, network in report["networks"].items():  # type: ignore[attr-defined]
        for target, row in network["targets"].items():
            columns = []
            for clock in ("cpu", "wall"):
                times = row[f"{clock}_ms"]
                speedup = row[f"{clock}_speedup"]
                columns.append(f"{clock} {times['float32']:7.1f} -> {times['int8']:6.1f} ms x{speedup:.2f}")
            size = f"{network['parameters'] / 1e6:.1f}M"
            print(f"{name:6s} {size:6s} {target:16s} {'   '.join(columns)}   {row['cpu_ms']} {row['sqnr_db']}")
    out = options.out or Path(__file__).parent / "results" / f"int8_speed-{today}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

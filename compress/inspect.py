"""Takes stock of a model or an engine: parts, parameters, multiply-accumulates, cuts, files, and the loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import RefusedError

if TYPE_CHECKING:
    from torch import nn

    from compress.model.latent_diffusion import LatentDiffusion


# The two halves of a VAE are views of one module, so each is told by the names of its own parameters.
_HALVES = {"vae_decoder": ("vae.decoder.", "vae.post_quant_conv."), "vae_encoder": ("vae.encoder.", "vae.quant_conv.")}


def take_stock(folder: Path) -> dict[str, Any]:
    """Describe an engine folder, or a model folder.

    Raises:
        RefusedError: it is neither.
    """
    if not folder.is_dir():
        raise RefusedError(f"{folder} is not a folder; give an engine or a diffusers model folder")
    if (folder / "manifest.json").exists():
        return {"kind": "engine", **stock_of_engine(folder)}
    if (folder / "model_index.json").exists():
        from compress.model.latent_diffusion import load

        return {"kind": "model", **stock_of_model(load(folder))}
    raise RefusedError(f"{folder} holds neither manifest.json (an engine) nor model_index.json (a diffusers model)")


def stock_of_model(model: LatentDiffusion) -> dict[str, Any]:
    """Describe a model: what each part holds and costs, and where its denoiser can be cut.

    MACs are those of one picture, at the resolution the denoiser was trained at: one network call of the denoiser,
    one run of every other part.
    """
    side = model.family.latent_side(model.denoiser)
    lengths = [encoder["max_length"] for encoder in model.conditioning.get("encoders", ())]
    sizes = {"batch": 1, "height": side, "width": side, "prompt_tokens": min([77, *lengths])}
    parts = {}
    for name, part in model.parts().items():
        source: Any = part
        own = _HALVES.get(name, "")
        tensors = [tensor for path, tensor in part.named_parameters() if path.startswith(own)]
        inputs = (
            model.family.example_inputs(model.denoiser, **sizes)
            if name == "denoiser"
            else source.example_inputs(**sizes)
        )
        parts[name] = {
            "class": type(source.component).__name__,
            "parameters": sum(tensor.numel() for tensor in tensors),
            "mib": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20,
            "macs": _macs(part, inputs),
        }
    return {
        "family": model.family.name,
        "latent": model.latent,
        "latent_side": side,
        "scheduler": model.scheduler_config.get("_class_name"),
        "conditioning": model.conditioning.get("kind"),
        "hash": model.hash(),
        "parts": parts,
        "cuts": [
            {
                "index": cut.index,
                "module": cut.name,
                "macs_share": cut.macs_share,
                "parameter_share": cut.parameter_share,
            }
            for cut in model.family.cuts(model.denoiser)
        ],
    }


def _macs(module: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Count the multiply-accumulates of one run: convolutions, matrix products, attention."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        module(**inputs)
    return int(counter.get_total_flops() // 2)


def stock_of_engine(folder: Path) -> dict[str, Any]:
    """Describe an engine from its manifest and step plan; no runtime is needed.

    Raises:
        EngineError: it is not whole.
    """
    from export.manifest import STEP_PLAN, read_manifest
    from export.step_plan import StepPlan

    manifest = read_manifest(folder)
    plan = StepPlan.from_json((folder / STEP_PLAN).read_text(encoding="utf-8"))
    calls = {path: sum(step.path == path for step in plan.steps) for path in plan.paths}
    letters = {path: path[0].upper() if path == "full" else path[0] for path in plan.paths}
    files = manifest.files
    return {
        "family": manifest.family,
        "engine_hash": manifest.engine_hash,
        "mib": sum(file.bytes for file in files.values() if file.run) / 2**20,
        "latent": dict(manifest.latent),
        "shapes": {name: list(sizes) for name, sizes in manifest.shapes.items()},
        "targets": {
            name: {
                "backend": row.backend,
                "evidence": row.evidence,
                "formats": dict(row.formats),
                "measured": dict(row.measured),
                "build": dict(row.build),
            }
            for name, row in manifest.targets.items()
        },
        "step_plan": {
            "network_calls": plan.network_calls,
            "strip": "".join(letters[step.path] for step in plan.steps),
            "paths": {path: list(segments) for path, segments in plan.paths.items()},
            "calls": calls,
            "guided": sum(step.guidance != "none" for step in plan.steps),
            "key": dict(plan.key),
        },
        "files": {name: {"bytes": file.bytes, "sha256": file.sha256, "run": file.run} for name, file in files.items()},
    }

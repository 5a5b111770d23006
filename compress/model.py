"""LatentDiffusion: a trained latent diffusion model with the plan that runs it; load, save, hash."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.checkpoint import read_json, refusing
from compress.errors import RefusedError
from compress.families import DenoiserSegment, Family
from compress.loader import Components, load_components
from compress.parts import TEXT_ENCODERS, VaeDecoder, VaeEncoder
from export.quant_plan import QuantPlan
from export.step_plan import StepPlan

SCHEMA_VERSION = 1
STATE_FILE = "compress.json"
"""What a saved model knows beyond a diffusers folder: cut, step plan, quantization plans, provenance."""

PartFunction = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Named arrays to named arrays; takes more than it needs."""

_VOLATILE = ("_name_or_path", "_diffusers_version", "_commit_hash", "transformers_version", "torch_dtype", "dtype")


@dataclass
class LatentDiffusion:
    """A model as passes see it: networks in float32, and plain data.

    Attributes:
        folder: where it was loaded from.
        index: the content of model_index.json.
        family: what is known about the denoiser.
        denoiser, vae, text_encoders: the networks; text encoders by their name in the folder.
        tokenizers: fast tokenizers by their name in the folder.
        scheduler_config: of the scheduler, its class under `_class_name`.
        conditioning: how prompts become the denoiser's conditioning tensors; plain JSON.
        step_plan: the compiled sampler; None until there is one.
        cut: how the denoiser is segmented; None is one segment.
        quant_plans: part -> which layers compute in integers; names are those of modules of the component.
        provenance: what was done to the model, oldest first.
    """

    folder: Path
    index: dict[str, Any]
    family: Family
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    conditioning: dict[str, Any]
    step_plan: StepPlan | None = None
    cut: int | None = None
    quant_plans: dict[str, QuantPlan] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)

    @property
    def latent(self) -> dict[str, Any]:
        """channels; downscale (pixels per latent pixel); scaling_factor and shift_factor of the VAE; size; multiple."""
        config: Any = self.vae.config
        return {
            "channels": int(config.latent_channels),
            "downscale": 2 ** (len(config.block_out_channels) - 1),
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(config.shift_factor or 0.0),
        }

    def segments(self) -> list[DenoiserSegment]:
        """The denoiser as cut, over its own weights."""
        return self.family.segments(self.denoiser, self.cut)[0]

    def parts(self) -> dict[str, nn.Module]:
        """Every network behind a fixed signature, over its own weights: `denoiser` (uncut), `vae_decoder`,
        `vae_encoder`, and the text encoders by name. Each has `inputs`, `outputs`, `prefix` and `component`.
        """
        return _parts(self.family, self.denoiser, self.vae, self.text_encoders)

    def functions(self, simulate: bool = True) -> dict[str, PartFunction]:
        """NumPy functions for the runtime: the denoiser's segments, `vae_decoder`, `vae_encoder`, text encoders.

        Args:
            simulate: quantized parts compute with fake-quantized weights and activations; False ignores the plans.
        """
        parts = self.parts()
        denoiser = self.denoiser
        if simulate and self.quant_plans:
            from compress.fake_quantize import fake_quantized

            for name, plan in self.quant_plans.items():
                quantized = fake_quantized(parts[name].component, plan)
                if name == "denoiser":
                    denoiser = quantized
                else:
                    parts[name] = type(parts[name])(quantized)
        del parts["denoiser"]
        modules = {segment.name: segment.module for segment in self.family.segments(denoiser, self.cut)[0]} | parts
        return {name: _function(module) for name, module in modules.items()}

    def hash(self) -> str:
        """SHA-256 over all weights, configurations and tokenizers; not over plans."""
        digest = hashlib.sha256()
        for name, module in sorted(self._modules().items()):
            digest.update(
                _canonical(
                    {name: _stable(module.config.to_dict() if name in self.text_encoders else dict(module.config))}
                )
            )
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
        for name, tokenizer in sorted(self.tokenizers.items()):
            content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
            digest.update(_canonical({name: content, "max_length": tokenizer.model_max_length}))
        digest.update(_canonical([self.scheduler_config, self.conditioning, self.index.get("_class_name")]))
        return digest.hexdigest()

    def state_hash(self) -> str:
        """SHA-256 over everything a pass can change: the weights and the plans; the key of the pass cache."""
        return hashlib.sha256(_canonical([self.hash(), self._state()])).hexdigest()

    def clone(self) -> LatentDiffusion:
        """An independent copy; tokenizers, which nothing changes, are shared."""
        return LatentDiffusion(
            **{
                name: value if name in ("family", "tokenizers") else copy.deepcopy(value)
                for name, value in vars(self).items()
            }
        )

    def save(self, folder: Path) -> None:
        """Write a standard diffusers folder plus `compress.json`; `load` gives the same model back, bit for bit."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(self.index, indent=2, sort_keys=True) + "\n")
        for name, component in (self._modules() | self.tokenizers).items():
            component.save_pretrained(folder / name)
        (folder / "scheduler").mkdir(exist_ok=True)
        text = json.dumps(self.scheduler_config, indent=2, sort_keys=True) + "\n"
        (folder / "scheduler" / "scheduler_config.json").write_text(text)
        (folder / STATE_FILE).write_text(json.dumps(self._state(), indent=1, sort_keys=True) + "\n")

    def _modules(self) -> dict[str, Any]:
        return {self.family.part: self.denoiser, "vae": self.vae, **self.text_encoders}

    def _state(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "cut": self.cut,
            "step_plan": None if self.step_plan is None else json.loads(self.step_plan.to_json()),
            "quant_plans": {name: json.loads(plan.to_json()) for name, plan in sorted(self.quant_plans.items())},
            "conditioning": self.conditioning,
            "provenance": self.provenance,
        }


def load(path: str | Path) -> LatentDiffusion:
    """Load a diffusers folder, or one written by `LatentDiffusion.save`. Nothing in the folder is executed.

    Raises:
        RefusedError: one sentence with the file, the cause and the way out.
    """
    root = Path(path)
    components = load_components(root)
    model = LatentDiffusion(
        folder=root,
        index=components.index,
        family=components.family,
        denoiser=components.denoiser,
        vae=components.vae,
        text_encoders=components.text_encoders,
        tokenizers=components.tokenizers,
        scheduler_config=components.scheduler_config,
        conditioning=_conditioning(components),
        provenance=[{"loaded": root.name, "ignored": components.ignored}],
    )
    if (root / STATE_FILE).exists():
        _restore(model, read_json(root, STATE_FILE), root / STATE_FILE)
    return model


def _restore(model: LatentDiffusion, state: Mapping[str, Any], path: Path) -> None:
    if state.get("schema_version") != SCHEMA_VERSION:
        raise RefusedError(f"{path} has schema version {state.get('schema_version')!r}; this reads {SCHEMA_VERSION}")
    with refusing(f"{path} cannot be read"):
        model.cut = state["cut"]
        model.segments()
        if state["step_plan"] is not None:
            model.step_plan = StepPlan.from_json(json.dumps(state["step_plan"]))
        plans = state["quant_plans"].items()
        model.quant_plans = {name: QuantPlan.from_json(json.dumps(plan)) for name, plan in plans}
        model.conditioning = dict(state["conditioning"])
        model.provenance = list(state["provenance"])


def _conditioning(components: Components) -> dict[str, Any]:
    """What the runtime needs to turn prompts into conditioning tensors as the diffusers pipeline does."""
    config: Any = components.denoiser.config  # type: ignore[union-attr]
    encoders = [
        {
            "part": name,
            "tokenizer": name.replace("text_encoder", "tokenizer"),
            "max_length": int(components.tokenizers[name.replace("text_encoder", "tokenizer")].model_max_length),
        }
        for name in components.text_encoders
    ]
    match components.family.name:
        case "sd3":
            for encoder in encoders:
                layers = components.text_encoders[encoder["part"]].config.num_hidden_layers  # type: ignore[union-attr, operator]
                encoder |= {"hidden": f"hidden_states.{layers - 1}", "pooled": "text_embeds"}
            return {
                "kind": "stable-diffusion-3",
                "encoders": encoders,
                "joint_attention_dim": int(config.joint_attention_dim),
                "max_sequence_length": 256,
            }
        case "pixart":
            return {"kind": "pixart", "encoders": encoders}
        case "dit":
            return {"kind": "class", "encoders": [], "classes": int(config.num_embeds_ada_norm)}
    return {"kind": "stable-diffusion", "encoders": encoders}


def _parts(
    family: Family, denoiser: nn.Module, vae: nn.Module, text_encoders: Mapping[str, nn.Module]
) -> dict[str, Any]:
    return {
        "denoiser": family.segments(denoiser, None)[0][0].module,
        "vae_decoder": VaeDecoder(vae),
        "vae_encoder": VaeEncoder(vae),
        **{name: TEXT_ENCODERS[type(encoder).__name__](encoder) for name, encoder in text_encoders.items()},
    }


def _function(module: Any) -> PartFunction:
    def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in module.inputs}
        with torch.inference_mode():
            outputs = module(**tensors)
        return {name: output.numpy() for name, output in zip(module.outputs, outputs, strict=True)}

    return call


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()

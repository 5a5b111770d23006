"""LatentDiffusion: a trained latent diffusion model with the plan that runs it; load, save, hash."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from compress.errors import PassError, RefusedError
from compress.families import DenoiserSegment, Family, Layout, Network
from compress.model.checkpoint import read_json, refusing
from compress.model.fitting import check_fit
from compress.model.loader import Components, load_components, quiet
from compress.model.parts import TEXT_ENCODERS, Part, T5Encoder, VaeDecoder, VaeEncoder
from compress.model.tokenizers import portable
from compress.pruning.structure import STRUCTURE_FILE, Structure
from export.quant_plan import QuantPlan
from export.runtime import LatentSpec, Runtime
from export.step_plan import StepPlan

SCHEMA_VERSION = 4
STATE_FILE = "compress.json"
"""What a saved model knows beyond a diffusers folder: layout, step plan, quantization plans, fusions, provenance."""
ARRAYS_FILE = "compress.safetensors"
"""The numbers of its quantization plans."""

PartFunction = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Named arrays to named arrays; takes more than it needs."""

_T5_TOKENS = {
    "StableDiffusion3Pipeline": 256,
    "StableDiffusion3Img2ImgPipeline": 256,
    "StableDiffusion3InpaintPipeline": 256,
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "FluxPipeline": 512,
    "FluxImg2ImgPipeline": 512,
    "FluxInpaintPipeline": 512,
}
"""How many tokens T5 reads, or how many zeros stand for it, unless the folder says otherwise (as diffusers does)."""

_EMBEDDED_GUIDANCE = 3.5
"""Of the Flux pipelines, until a sampler says otherwise."""

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
        layout: how the denoiser is segmented; None is one segment.
        quant_plans: part -> which layers compute in integers; names are those of modules of the component.
        fusions: module path in the denoiser -> the pattern it is fused by, see `compress.fusion`.
        structures: component -> what was cut out of the network that its configuration describes.
        provenance: what was done to the model, oldest first.
    """

    folder: Path
    index: dict[str, Any]
    family: Family
    denoiser: Network
    vae: Network
    text_encoders: dict[str, Network]
    tokenizers: dict[str, Any]
    scheduler_config: dict[str, Any]
    conditioning: dict[str, Any]
    step_plan: StepPlan | None = None
    layout: Layout | None = None
    quant_plans: dict[str, QuantPlan] = field(default_factory=dict)
    fusions: dict[str, str] = field(default_factory=dict)
    structures: dict[str, Structure] = field(default_factory=dict)
    provenance: list[dict[str, Any]] = field(default_factory=list)

    @property
    def latent(self) -> dict[str, Any]:
        """What a latent is: the fields of `export.runtime.LatentSpec`."""
        config = self.vae.config
        return {
            "channels": int(config.latent_channels),
            "downscale": 2 ** (len(config.block_out_channels) - 1),
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(config.shift_factor or 0.0),
            "multiple": self.family.latent_multiple(self.denoiser),
        }

    def segments(self, *, fused: bool = False) -> list[DenoiserSegment]:
        """The denoiser as laid out, over its own weights; fused, it calls our operators where that is planned."""
        return self.family.segments(self._fused() if fused else self.denoiser, self.layout).segments

    def parts(self) -> dict[str, Network]:
        """Every network behind a fixed signature, over its own weights.

        They are `denoiser` (uncut), `vae_decoder`, `vae_encoder`, and the text encoders by their name in the folder;
        each has `inputs`, `outputs`, `prefix` and `component` (see `compress.model.parts.Part`).
        """
        return {"denoiser": self.family.segments(self.denoiser, None).segments[0].module, **self._surroundings()}

    def functions(self, simulate: bool = True, dialect: str | None = None) -> dict[str, PartFunction]:
        """NumPy functions for the runtime: the denoiser's segments, `vae_decoder`, `vae_encoder`, the text encoders.

        Args:
            simulate: quantized parts compute with fake-quantized weights and activations; False ignores the plans.
            dialect: see `modules`.
        """
        return {name: _function(module) for name, module in self.modules(simulate, dialect).items()}

    def modules(self, simulate: bool = True, dialect: str | None = None, *, fused: bool = False) -> dict[str, Network]:
        """The networks behind `functions`; their weights are the model's own, or fake-quantized copies.

        Args:
            simulate: quantized parts compute with fake-quantized weights and activations; False ignores the plans.
            dialect: round only what the lowering to it rounds, see `export.qdq.Dialect`; None all that is planned.
            fused: the denoiser calls our operators where that is planned.
        """
        denoiser, parts = self._fused() if fused else self.denoiser, self._surroundings()
        for name, plan in self.quant_plans.items() if simulate else ():
            from compress.quantization.fake_quantize import fake_quantized

            if name == "denoiser":
                denoiser = fake_quantized(denoiser, plan, dialect=dialect)
            else:
                parts[name] = parts[name].over(fake_quantized(parts[name].component, plan, dialect=dialect))
        segments = self.family.segments(denoiser, self.layout).segments
        return {segment.name: segment.module for segment in segments} | parts

    def runtime(self, simulate: bool = True, dialect: str | None = None) -> Runtime:
        """The networks, in PyTorch, bound to the step plan.

        Args:
            simulate: quantized parts compute with fake-quantized weights and activations.
            dialect: see `modules`; that of the target to predict what it computes.
        """
        if self.step_plan is None:
            raise PassError("the model has no step plan yet; compile its sampler first")
        tokenizers = {name: portable(tokenizer) for name, tokenizer in self.tokenizers.items()}
        functions = self.functions(simulate, dialect)
        return Runtime(self.step_plan, functions, self.conditioning, LatentSpec(**self.latent), tokenizers)

    def hash(self) -> str:
        """SHA-256 over all weights, configurations and tokenizers; not over what was planned for them."""
        digest = hashlib.sha256()
        for name, network in sorted(self._networks().items()):
            config = network.config.to_dict() if name in self.text_encoders else dict(network.config)
            digest.update(_canonical({name: _stable(config)}))
            if name in self.structures:
                digest.update(self.structures[name].to_json().encode())
            for key, tensor in sorted(network.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().cpu().numpy().data)
        for name, tokenizer in sorted(self.tokenizers.items()):
            # Padding and truncation are what the last call left behind.
            content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
            digest.update(_canonical({name: content, "max_length": tokenizer.model_max_length}))
        digest.update(_canonical([_stable(self.scheduler_config), self.conditioning, self.index["_class_name"]]))
        return digest.hexdigest()

    def state_hash(self) -> str:
        """SHA-256 over everything a pass can change: weights, layout, step plan, quantization plans, fusions."""
        state, arrays = self._state()
        del state["provenance"]
        digest = hashlib.sha256(_canonical([self.hash(), state]))
        for name, array in arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def computes_like(self, other: LatentDiffusion) -> bool:
        """Whether `runtime` makes the same of both: fusions, and weights only stored in 16 bits, do not show there."""

        def shown(model: LatentDiffusion) -> tuple[object, ...]:
            plans = {name: plan for name, plan in model.quant_plans.items() if plan.layers or plan.attentions}
            return model.layout, model.step_plan, plans, model.conditioning

        if shown(self) != shown(other):
            return False
        own, others = self._networks(), other._networks()
        return all(own[name] is others[name] for name in own) or self.hash() == other.hash()

    def to(self, device: torch.device) -> None:
        """Move the networks; their functions go on taking and giving NumPy arrays."""
        for network in self._networks().values():
            network.to(device)

    def clone(self, *, networks: bool = True) -> LatentDiffusion:
        """A copy with plans of its own, and networks of its own unless they are to be shared.

        Tokenizers, which nothing changes, are shared.
        """
        shared = {"family", "tokenizers"} | (set() if networks else {"denoiser", "vae", "text_encoders"})
        return replace(self, **{key: copy.deepcopy(value) for key, value in vars(self).items() if key not in shared})

    def save_plans(self, folder: Path) -> None:
        """Write what `with_plans` of the same model reads: everything but networks, tokenizers and scheduler."""
        folder.mkdir(parents=True, exist_ok=True)
        state, arrays = self._state()
        _write_json(folder / STATE_FILE, state)
        if self.quant_plans:  # empty where layers are only stored in 16 bits
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / ARRAYS_FILE)

    def with_plans(self, folder: Path) -> LatentDiffusion:
        """The same networks with the plans that `save_plans` wrote.

        Raises:
            RefusedError: one sentence with the file, the cause and the way out.
        """
        model = self.clone(networks=False)
        _restore(model, folder)
        return model

    def save(self, folder: Path, without: Collection[str] = ()) -> None:
        """Write a diffusers folder plus `compress.json`, and `structure.json` where a configuration cannot say it all.

        `load` gives the same model back, bit for bit.

        Args:
            folder: made where it is not there.
            without: networks, by their names in the folder, that the caller writes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        kept = {*self._networks(), *self.tokenizers, "scheduler"}
        index = {
            key: entry if not isinstance(entry, list) or key in kept else [None, None]
            for key, entry in self.index.items()
        }
        _write_json(folder / "model_index.json", index)
        with quiet():
            for name, component in (self._networks() | self.tokenizers).items():
                if name not in without:
                    component.save_pretrained(folder / name)
        for name, structure in self.structures.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / STRUCTURE_FILE).write_text(structure.to_json(), encoding="utf-8")
        (folder / "scheduler").mkdir(exist_ok=True)
        _write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler_config)
        self.save_plans(folder)

    def _networks(self) -> dict[str, Network]:
        return {self.family.part: self.denoiser, "vae": self.vae, **self.text_encoders}

    def _fused(self) -> Network:
        if not self.fusions:
            return self.denoiser
        from compress.fusion.fused import fused

        return fused(self.denoiser, self.fusions)

    def _surroundings(self) -> dict[str, Part]:
        hidden = {entry["part"]: entry.get("hidden") for entry in self.conditioning.get("encoders", ())}
        encoders = {
            name: TEXT_ENCODERS[type(encoder).__name__](encoder, hidden.get(name))
            for name, encoder in self.text_encoders.items()
        }
        return {"vae_decoder": VaeDecoder(self.vae), "vae_encoder": VaeEncoder(self.vae), **encoders}

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain data, and the arrays it refers to by name."""
        arrays: dict[str, np.ndarray] = {}
        plans = {name: json.loads(plan.to_json(arrays, name)) for name, plan in sorted(self.quant_plans.items())}
        state = {
            "schema_version": SCHEMA_VERSION,
            "layout": None if self.layout is None else self.layout.to_dict(),
            "step_plan": None if self.step_plan is None else json.loads(self.step_plan.to_json()),
            "quant_plans": plans,
            "fusions": self.fusions,
            "conditioning": self.conditioning,
            "provenance": self.provenance,
        }
        return state, arrays


def load(path: str | Path) -> LatentDiffusion:
    """Load a diffusers folder, or one written by `LatentDiffusion.save` or `quantized_checkpoint.write`.

    Nothing in the folder is executed.

    Raises:
        RefusedError: one sentence with the file, the cause and the way out.
    """
    root = Path(path)
    components = load_components(root)
    with refusing(f"{root / 'model_index.json'} cannot be followed"):
        check_fit(components)
        conditioning = _conditioning(components)
    model = LatentDiffusion(
        folder=root,
        index=components.index,
        family=components.family,
        denoiser=components.denoiser,
        vae=components.vae,
        text_encoders=components.text_encoders,
        tokenizers=components.tokenizers,
        scheduler_config=components.scheduler_config,
        conditioning=conditioning,
        structures=components.structures,
        provenance=[{"loaded": root.name, "ignored": components.ignored}],
    )
    if (root / STATE_FILE).exists():
        _restore(model, root)
    if components.layers:
        rest = model.quant_plans.get("denoiser", QuantPlan({}))
        model.quant_plans["denoiser"] = replace(rest, layers={**rest.layers, **components.layers})
    return model


def _restore(model: LatentDiffusion, folder: Path) -> None:
    state, path = read_json(folder, STATE_FILE), folder / STATE_FILE
    if state.get("schema_version") != SCHEMA_VERSION:
        raise RefusedError(f"{path} has schema version {state.get('schema_version')!r}; this reads {SCHEMA_VERSION}")
    with refusing(f"{path} cannot be read"):
        model.layout = None if state["layout"] is None else Layout.from_dict(state["layout"])
        model.segments()
        if state["step_plan"] is not None:
            model.step_plan = StepPlan.from_json(json.dumps(state["step_plan"]))
        plans = state["quant_plans"].items()
        arrays = load_file(folder / ARRAYS_FILE) if plans else {}
        model.quant_plans = {name: QuantPlan.from_json(json.dumps(plan), arrays) for name, plan in plans}
        model.fusions = dict(state["fusions"])
        model.segments(fused=True)
        model.conditioning = dict(state["conditioning"])
        model.provenance = list(state["provenance"])


def _conditioning(components: Components) -> dict[str, Any]:
    """The specification `export.conditioning` follows to make tensors of prompts as the diffusers pipeline does.

    `max_sequence_length` in model_index.json says how many T5 tokens, or zeros in their place, the model was trained
    with; without it the default of the pipeline holds.
    """
    config, index = components.denoiser.config, components.index
    long = index.get("max_sequence_length", _T5_TOKENS.get(index["_class_name"]))
    if long is not None and (not isinstance(long, int) or long < 1):
        raise RefusedError(f"max_sequence_length in model_index.json is {long!r}: it must be a whole number above 0")
    encoders: list[dict[str, Any]] = []
    for name, encoder in components.text_encoders.items():
        tokenizer = name.replace("text_encoder", "tokenizer")
        entry = {"part": name, "tokenizer": tokenizer, "max_length": components.tokenizers[tokenizer].model_max_length}
        if TEXT_ENCODERS[type(encoder).__name__] is T5Encoder:
            entry["max_length"] = min(entry["max_length"], long)
        elif components.family.name == "sd3" or (
            components.family.part == "unet" and len(components.text_encoders) > 1
        ):
            entry |= {"hidden": f"hidden_states.{encoder.config.num_hidden_layers - 1}", "pooled": "text_embeds"}
        elif components.family.name == "flux":
            entry |= {"pooled": "pooler_output"}
        encoders.append(entry)
    match components.family.name:
        case "unet" | "controlled-unet" if len(encoders) > 1:
            zeros = bool(index.get("force_zeros_for_empty_prompt", True))
            sized = {"kind": "stable-diffusion-xl", "encoders": encoders, "unconditional_zeros": zeros}
            return sized | _residuals(components)
        case "unet" | "controlled-unet":
            return {"kind": "stable-diffusion", "encoders": encoders} | _residuals(components)
        case "sd3":
            joint = {"joint_attention_dim": int(config.joint_attention_dim), "max_sequence_length": long}
            return {"kind": "stable-diffusion-3", "encoders": encoders, **joint}
        case "flux":
            embedded = components.family.guidance(components.denoiser) == "embedded"
            guidance = {"guidance": _EMBEDDED_GUIDANCE} if embedded else {}
            length = encoders[-1]["max_length"]
            return {"kind": "flux", "encoders": encoders, "max_sequence_length": length, **guidance}
        case "pixart":
            return {"kind": "pixart", "encoders": encoders}
    named = (index.get("id2label") or {}).items()
    labels = {name.strip(): int(number) for number, names in named for name in names.split(",")}
    return {"kind": "class", "encoders": [], "classes": int(config.num_embeds_ada_norm), "labels": labels}


def _residuals(components: Components) -> dict[str, Any]:
    """The channels of every residual, and how many pixels of the picture one of its own stands for, in a direction."""
    side = 2 ** (len(components.vae.config.block_out_channels) - 1)
    found = components.family.residuals(components.denoiser)
    shapes = {name: [channels, side * divisor] for name, (channels, divisor) in found.items()}
    return {"residuals": shapes} if shapes else {}


def _function(module: Network) -> PartFunction:
    device = next((parameter.device for parameter in module.component.parameters()), torch.device("cpu"))

    def call(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])).to(device) for name in module.inputs}
        with torch.inference_mode():
            outputs = module(**tensors)
        return {name: output.cpu().numpy() for name, output in zip(module.outputs, outputs, strict=True)}

    return call


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE}


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, default=str).encode()

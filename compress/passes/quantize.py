"""The pass `quantize`: choose a number format for every layer, calibrate, and leave a QuantPlan per part."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from compress.errors import PassError, RecipeError, RefusedError
from compress.nearest import unknown
from compress.passes.base import Edit, Pass, PassContext
from compress.quantization.scheme import Scheme, scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model.latent_diffusion import LatentDiffusion
    from export.quant_plan import AttentionQuant, LayerQuant, QuantPlan, Storage
    from export.target import Target

SKIP = "skip"
STORE = "store "
QK = "int8-qk"
"""The scores of attention from 8-bit queries and keys; softmax and values stay in float."""

_OWN = {"vae_decoder": r"^(decoder|post_quant_conv)\b", "vae_encoder": r"^(encoder|quant_conv)\b"}
"""What belongs to a part where a component has two: the rest of the VAE is the other one's."""

_SENSITIVE = {
    "vae_decoder": r"^post_quant_conv$|^decoder\.conv_(in|out)$",
    "vae_encoder": r"^quant_conv$|^encoder\.conv_(in|out)$",
}
"""Cheap layers whose error reaches every pixel; those of a denoiser are known to its family."""


class LayerRule(BaseModel):
    """A number format for some layers.

    Attributes:
        match: a shell pattern over `<part>.<module path>`, e.g. `denoiser.*.to_out.0`.
        scheme: a number format with integer weights, or `none` to leave them in float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    match: str
    scheme: str


@dataclass
class Quantize(Pass):
    """Post-training quantization of the linear and convolution layers of denoiser, text encoders and VAE.

    Layers in float keep their weights as float16 (widened on load) where their part is quantized.

    Attributes:
        scheme: of every part but the VAE encoder, whose weights are only stored in 8 bits: text to image never runs it.
        parts: other schemes for some parts.
        layers: other schemes for some layers; the last rule that matches wins.
        sensitive: the scheme of the few cheap layers whose error is everywhere (first and last).
        modulation: the scheme of the layers that read one vector per picture (time embedding, adaptive norms); their
            speed is that of reading their weights, and their error is everywhere.
        attention: `int8-qk` also computes the scores of the denoiser's attention from 8-bit queries and keys, on
            targets where that is faster (SageAttention, Zhang et al. 2024, arXiv 2410.02367, with calibrated scales).
        observer: how activation ranges are chosen; `average` is Brevitas' own calibration.
        bias_correction: add each layer's mean error to its bias.
    """

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv 1712.05877; over timesteps: Li et al. 2023, arXiv 2302.04304"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    changes: ClassVar[frozenset[str]] = frozenset({"weights", "graph"})

    scheme: str
    parts: dict[str, str] | None = None
    layers: tuple[LayerRule, ...] = ()
    sensitive: str = "none"
    modulation: str = "int8-w8a32"
    attention: Literal["none", "int8-qk"] = "none"
    observer: Literal["minmax", "percentile", "mse", "average"] = "mse"
    bias_correction: bool = True

    def __post_init__(self) -> None:
        """Check every name.

        Raises:
            RecipeError: a number format that is unknown or not one for layers; the message begins with the field.
        """
        for_layers = {f"layers.{i}.scheme": rule.scheme for i, rule in enumerate(self.layers)}
        for_layers |= {"sensitive": self.sensitive, "modulation": self.modulation}
        for_parts = {"scheme": self.scheme} | {f"parts.{part}": name for part, name in (self.parts or {}).items()}
        for field, name in (for_parts | for_layers).items():
            try:
                found = scheme(name)
            except RecipeError as error:
                raise RecipeError(f"{field}: {error}") from None
            if field in for_layers and not found.is_quantized and name != "none":
                raise RecipeError(f"{field}: {name!r} is a format for whole parts; write none to leave layers in float")

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        if model.quant_plans:
            raise RefusedError(f"the model is already quantized ({', '.join(model.quant_plans)})")
        known = model.parts()
        for part in self.parts or {}:
            if part not in known:
                raise RefusedError(f"quantize.parts: {unknown(part, 'a part of this model', known)}")
        matched: set[int] = set()
        edits = [
            edit for part, module in known.items() for edit in self._plan_part(model, part, module.component, matched)
        ]
        edits += self._plan_attention(model, targets)
        for i, rule in enumerate(self.layers):
            if i not in matched:
                raise RefusedError(
                    f"quantize.layers[{i}] matches nothing: no linear or convolution layer is called {rule.match!r} "
                    f"(they are called like {edits[0].module!r})"
                )
        if all(edit.bytes_after == edit.bytes_before for edit in edits):
            raise RefusedError("quantize would change nothing: every layer of every part stays in float32")
        return edits

    def _plan_part(self, model: LatentDiffusion, part: str, component: nn.Module, matched: set[int]) -> list[Edit]:
        default = self._part_scheme(part)
        special = self._special(model, part, component)
        own = _OWN.get(part, "")
        layers = {name: layer for name, layer in _layers(component).items() if re.search(own, name)}
        width = scheme(_storage(default)).weight_bytes
        edits = []
        for name, layer in layers.items():
            chosen, reason = default, f"{part} is {default.name}"
            if default.is_quantized and name in special:
                chosen, reason = special[name]
            for i, rule in enumerate(self.layers):
                if fnmatch.fnmatchcase(f"{part}.{name}", rule.match):
                    chosen, reason = scheme(rule.scheme), f"layers[{i}] matches {rule.match!r}"
                    matched.add(i)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            numbers, channels = weight.numel(), weight.shape[0]
            after = numbers * chosen.weight_bytes + 4 * channels if chosen.is_quantized else numbers * width
            action = chosen.name if chosen.is_quantized else SKIP
            edits.append(Edit(self.name, f"{part}.{name}", action, 4 * numbers, int(after), reason))
        weights = {f"{name}.weight" for name in layers}
        rest = [p for path, p in component.named_parameters() if re.search(own, path) and path not in weights]
        before = 4 * sum(p.numel() for p in rest)
        halved = sum(p.numel() for p in rest if p.ndim > 1 and width < 4)
        action = f"{STORE}{_storage(default)}"
        return [*edits, Edit(self.name, part, action, before, before - 2 * halved, "norms, biases, embeddings")]

    def _plan_attention(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        from compress.quantization.attention import attentions

        if self.attention == "none":
            return []
        whole = self._part_scheme("denoiser")
        if not whole.is_calibrated:
            raise RefusedError(
                f"quantize.attention is {self.attention}, but the denoiser is {whole.name}: "
                "8-bit queries and keys need a denoiser that computes in 8 bits; write attention: none"
            )
        able = [row.name for row in targets if self.attention in row.formats]
        if targets and not able:
            others = ", ".join(row.name for row in targets)
            raise RefusedError(
                f"quantize.attention is {self.attention}, which gains nothing on {others}: "
                "write attention: none, or add the target openvino-cpu"
            )
        reason = f"attention is {QK}" + (f" (on {', '.join(able)})" if able else "")
        return [Edit(self.name, f"denoiser.{name}", QK, 0, 0, reason) for name in attentions(model.denoiser)]

    def _special(self, model: LatentDiffusion, part: str, component: nn.Module) -> dict[str, tuple[Scheme, str]]:
        """Layer -> the scheme it gets whatever its part gets, and why."""
        if part == "denoiser":
            sensitive, modulation = model.family.sensitive(component), model.family.modulation(component)
        else:
            pattern = _SENSITIVE.get(part)
            sensitive = [] if pattern is None else [name for name in _layers(component) if re.search(pattern, name)]
            modulation = []
        return {
            **dict.fromkeys(sensitive, (scheme(self.sensitive), "sensitive: cheap, and its error is everywhere")),
            **dict.fromkeys(modulation, (scheme(self.modulation), "modulation: one vector per picture")),
        }

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        from compress import calibrate

        rows = _rows(edits)
        chosen = {
            part: {name: edit.action for name, edit in own.items() if edit.action not in (SKIP, QK)}
            for part, own in rows.items()
        }
        calibrated = {
            part: [n for n, action in own.items() if scheme(action).is_calibrated] for part, own in chosen.items()
        }
        grids = calibrate.observe(model, calibrated, self.observer, context) if any(calibrated.values()) else {}
        attending = [name for name, edit in rows.get("denoiser", {}).items() if edit.action == QK]
        attentions = calibrate.observe_attention(model, attending, context) if attending else {}
        layers = calibrate.layer_quants(model, chosen, grids)
        if self.bias_correction and grids:
            calibrate.correct_biases(model, layers, context)
        for part, own in rows.items():
            skipped = {name: edit.reason for name, edit in own.items() if edit.action == SKIP}
            plan = self._quant_plan(part, layers[part], skipped, attentions if part == "denoiser" else {})
            if plan is not None:
                model.quant_plans[part] = plan
        model.provenance.append({"pass": self.name, "scheme": self.scheme, "layers": sum(map(len, layers.values()))})

    def _quant_plan(
        self,
        part: str,
        layers: dict[str, LayerQuant],
        skipped: dict[str, str],
        attentions: dict[str, AttentionQuant],
    ) -> QuantPlan | None:
        from export.quant_plan import QuantPlan

        default = self._part_scheme(part)
        if not layers and _storage(default) == "float32":
            return None
        plan = QuantPlan(layers, skipped, _storage(default), default.inference_precision, attentions)
        plan.validate()
        return plan

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        for part, own in _rows(edits).items():
            wanted = {name: edit.action for name, edit in own.items() if edit.action != SKIP}
            plan = model.quant_plans.get(part)
            found = {} if plan is None else plan.schemes
            if found != wanted:
                differing = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
                raise PassError(
                    f"quantize planned {len(wanted)} layers of {part} and left {len(found)}; {differing!r} differs"
                )
            if plan is None:
                continue
            component = model.parts()[part].component
            for name, layer in plan.layers.items():
                self._check_layer(f"{part}.{name}", component.get_submodule(name), layer)

    def _check_layer(self, name: str, layer: nn.Module, quant: LayerQuant) -> None:
        """Rounding a weight to its scales must not cost more than 8 bits do."""
        from compress.quantization.fake_quantize import rounded_weight

        weight = layer.weight.detach()  # type: ignore[operator]
        error = (rounded_weight(weight, quant) - weight).abs().flatten(1).amax(1)
        step = weight.new_tensor(quant.weight_scale)
        if bool((error > 0.51 * step + 1e-7).any()):
            raise PassError(f"the weights of {name} do not fit the scales planned for them")

    def _part_scheme(self, part: str) -> Scheme:
        named = (self.parts or {}).get(part)
        if named is None and part == "vae_encoder" and scheme(self.scheme).is_calibrated:
            return scheme("int8-w8a32")
        return scheme(named or self.scheme)


def _rows(edits: Sequence[Edit]) -> dict[str, dict[str, Edit]]:
    """Part -> layer -> edit."""
    rows: dict[str, dict[str, Edit]] = {}
    for edit in edits:
        part, _, name = edit.module.partition(".")
        own = rows.setdefault(part, {})
        if name:
            own[name] = edit
    return rows


def _layers(component: nn.Module) -> dict[str, nn.Module]:
    from torch import nn

    return {name: layer for name, layer in component.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def _storage(default: Scheme) -> Storage:
    """How the float weights of a part under this scheme are stored."""
    return "float32" if default.weight.dtype == "float32" else "float16"

"""The pass `quantize`: choose a number format for every layer, calibrate, and leave a QuantPlan per part."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from compress.errors import PassError, RecipeError, RefusedError
from compress.mixed_precision import Budget, choose, formats_below, limit, limited, summary
from compress.nearest import unknown
from compress.passes.base import Edit, Pass, PassContext
from compress.quantization.scheme import Scheme, scheme

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from compress.model.latent_diffusion import LatentDiffusion
    from compress.quantization.layer import Methods
    from compress.quantization.statistics import LayerStatistics
    from export.quant_plan import AttentionQuant, LayerQuant, QuantPlan, Storage
    from export.target import Target

    Made = dict[tuple[str, str, str], LayerQuant]
    """(part, layer, scheme) -> what became of it."""

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
        observer: how static activation ranges are chosen: all that was seen, all but 1e-5 at either end, or the range
            of the least mean squared error.
        weights: how weight scales are: `minmax` reaches the largest weight, `mse` has the least error of the output.
        smooth: divide the inputs of each layer, channel by channel, and multiply its weights: with a given strength
            from 0 to 1, or `search` for each layer's best (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438).
        rotate: rotate the inputs of linear layers by Hadamard matrices, so that outliers spread over the channels
            (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).
        low_rank: the rank of a 16-bit branch beside each layer (SVDQuant, Li et al. 2024, arXiv 2411.05007).
        rounding: `nearest`; `gptq` (Frantar et al. 2023, arXiv 2210.17323); or `learned` (AdaRound, Nagel et al. 2020,
            arXiv 2004.10568, on the steps of integers or floats).
        bias_correction: add each layer's mean error to its bias (Nagel et al. 2019, arXiv 1906.04721).
        finetune: steps in which layers that read the timestep, the quarter of the others with the largest errors, the
            scales of activations and the biases of the denoiser learn to give the float output (QuEST, Wang et al.
            2025, arXiv 2402.03666); 300 are a good start.
        budget: of the denoiser: its schemes are then upper limits, and layers in which it costs least get fewer bits.
        formats: that a budget may choose from, beside the schemes; all that round activations alike and are as fast on
            every target, unless given.
    """

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Jacob et al. 2018, arXiv 1712.05877; over timesteps: Li et al. 2023, arXiv 2302.04304"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    changes: ClassVar[frozenset[str]] = frozenset({"graph"})

    scheme: str
    parts: dict[str, str] | None = None
    layers: tuple[LayerRule, ...] = ()
    sensitive: str = "none"
    modulation: str = "int8-w8a32"
    attention: Literal["none", "int8-qk"] = "none"
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    weights: Literal["minmax", "mse"] = "mse"
    smooth: float | Literal["search"] | None = None
    rotate: bool = False
    low_rank: int = 0
    rounding: Literal["nearest", "gptq", "learned"] = "nearest"
    bias_correction: bool = True
    finetune: Annotated[int, Ge(0)] = 0
    budget: Budget | None = None
    formats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every name.

        Raises:
            RecipeError: a number format that is unknown or not one for layers; the message begins with the field.
        """
        for_layers = {f"layers.{i}.scheme": rule.scheme for i, rule in enumerate(self.layers)}
        for_layers |= {"sensitive": self.sensitive, "modulation": self.modulation}
        for_layers |= {f"formats.{i}": name for i, name in enumerate(self.formats)}
        for_parts = {"scheme": self.scheme} | {f"parts.{part}": name for part, name in (self.parts or {}).items()}
        for field, name in (for_parts | for_layers).items():
            try:
                found = scheme(name)
            except RecipeError as error:
                raise RecipeError(f"{field}: {error}") from None
            if field in for_layers and not found.is_quantized and name != "none":
                raise RecipeError(f"{field}: {name!r} is a format for whole parts; write none to leave layers in float")
        if self.formats and self.budget is None:
            raise RecipeError("formats: are for a budget to choose from; give budget, or leave them out")
        if self.budget is not None and (self.budget.size_ratio is None) == (self.budget.latent_psnr_db is None):
            raise RecipeError("budget: give size_ratio or latent_psnr_db, and not both")

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
        if self.budget is not None:
            edits = self._limited(edits, self.budget, targets)
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
        width = scheme(_storage(default)).weight.bits / 8
        edits = []
        for name, layer in layers.items():
            chosen, reason = default, f"{part} is {default.name}"
            if default.is_quantized and name in special:
                chosen, reason = special[name]
            for i, rule in enumerate(self.layers):
                if fnmatch.fnmatchcase(f"{part}.{name}", rule.match):
                    chosen, reason = scheme(rule.scheme), f"layers[{i}] matches {rule.match!r}"
                    matched.add(i)
            if not _plain(layer):
                chosen, reason = scheme("none"), "a convolution with groups, dilation or other padding than zeros"
            weight: Tensor = layer.weight  # type: ignore[assignment]
            numbers, channels = weight.numel(), weight.shape[0]
            after = chosen.weight.bytes_of(channels, numbers // channels) if chosen.is_quantized else numbers * width
            action = chosen.name if chosen.is_quantized else SKIP
            edits.append(Edit(self.name, f"{part}.{name}", action, 4 * numbers, int(after), reason))
        weights = {f"{name}.weight" for name in layers}
        rest = [p for path, p in component.named_parameters() if re.search(own, path) and path not in weights]
        before = 4 * sum(p.numel() for p in rest)
        halved = sum(p.numel() for p in rest if p.ndim > 1 and width < 4)
        action = f"{STORE}{_storage(default)}"
        return [*edits, Edit(self.name, part, action, before, before - 2 * halved, "norms, biases, embeddings")]

    def _limited(self, edits: Sequence[Edit], budget: Budget, targets: Sequence[Target]) -> list[Edit]:
        """The edits, with upper limits where the budget has a choice."""
        named = {e.module for e in edits for rule in self.layers if fnmatch.fnmatchcase(e.module, rule.match)}
        own = _rows(edits).get("denoiser", {})
        tops = {
            e.module: scheme(e.action) for e in own.values() if e.action not in (SKIP, QK) and e.module not in named
        }
        mine = [edit for edit in edits if edit.module.partition(".")[0] == "denoiser"]
        planned = iter(limited(mine, tops, budget, lambda top: self.choices(top, targets)))
        return [next(planned) if edit in mine else edit for edit in edits]

    def choices(self, top: Scheme, targets: Sequence[Target]) -> list[Scheme]:
        """What the budget may give a layer of that scheme."""
        if not self.formats:
            return formats_below(top, targets)
        given = [scheme(name) for name in dict.fromkeys((top.name, *self.formats))]
        return [row for row in given if row.is_calibrated == top.is_calibrated and row.weight.bits <= top.weight.bits]

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

        attending = [name for name, edit in _rows(edits).get("denoiser", {}).items() if edit.action == QK]
        attentions = calibrate.observe_attention(model, attending, context) if attending else {}
        seen = self.observe(model, edits, context)
        made: Made = {}
        if self.budget is not None:
            edits = self._within(self.budget, model, edits, seen, context, made)
        self.quantize(model, edits, seen, context, attentions, made)

    def observe(
        self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext
    ) -> dict[tuple[str, str], LayerStatistics]:
        """What layers see in calibration, (part, layer) -> statistics: those that round their inputs.

        Those that are only stored in few bits are watched, too, where their weights are not rounded to the nearest.
        """
        from compress import calibrate

        methods, watched = self.methods(), dict[str, list[str]]()
        for part, own in _rows(edits).items():
            watched[part] = [
                name
                for name, edit in own.items()
                if edit.action not in (SKIP, QK)
                and (limit(edit) is not None or methods.needs_rows or scheme(edit.action).is_calibrated)
            ]
        kept = calibrate.ROWS if methods.looks_at_rows or self.budget is not None else 0
        return calibrate.observe(model, watched, context, rows=kept) if any(watched.values()) else {}

    def quantize(
        self,
        model: LatentDiffusion,
        edits: Sequence[Edit],
        seen: Mapping[tuple[str, str], LayerStatistics],
        context: PassContext,
        attentions: Mapping[str, AttentionQuant],
        made: Made | None = None,
    ) -> None:
        """Give the model its quantization plans.

        Args:
            model: not quantized yet.
            edits: what is planned for it, and decided.
            seen: what `observe` gave.
            context: of the pass.
            attentions: of the denoiser, calibrated.
            made: layers that are quantized already.
        """
        from compress import calibrate
        from compress.quantization.checks import check_inputs
        from compress.quantization.layer import quantized_layer

        methods, rows, made = self.methods(), _rows(edits), {} if made is None else made
        total = sum(edit.action not in (SKIP, QK) for own in rows.values() for edit in own.values())
        done = 0
        for part, own in rows.items():
            component, layers = calibrate.component_of(model, part), {}
            for name, edit in own.items():
                if edit.action in (SKIP, QK):
                    continue
                key = part, name, edit.action
                if key not in made:
                    layer, statistics = component.get_submodule(name), seen.get((part, name))
                    made[key] = quantized_layer(layer, scheme(edit.action), statistics, methods)
                    if statistics is not None:
                        check_inputs(edit.module, made[key], statistics)
                layers[name] = made[key]
                done += 1
                context.progress("quantize", done, total)
            skipped = {name: edit.reason for name, edit in own.items() if edit.action == SKIP}
            plan = self._quant_plan(part, layers, skipped, attentions if part == "denoiser" else {})
            if plan is not None and part == "denoiser" and self.finetune:
                plan = self._finetuned(model, plan, seen, context)
            if plan is not None:
                model.quant_plans[part] = plan
        model.provenance.append({"pass": self.name, "scheme": self.scheme, "layers": total})

    def _within(
        self,
        budget: Budget,
        model: LatentDiffusion,
        edits: Sequence[Edit],
        seen: Mapping[tuple[str, str], LayerStatistics],
        context: PassContext,
        made: Made,
    ) -> list[Edit]:
        """The edits, with the schemes that the budget decides."""
        from compress.measure.metrics import latent_peak, psnr_per_sample
        from compress.prospects import prospects

        own = [edit for edit in edits if edit.module.partition(".")[0] == "denoiser"]
        tops = {name: top for name, edit in _rows(own)["denoiser"].items() if (top := limit(edit)) is not None}
        formats = {name: self.choices(top, context.targets) for name, top in tops.items()}
        found = prospects(model, formats, seen, replace(self.methods(), rounding="nearest"), context)

        @functools.cache
        def exact() -> np.ndarray:
            return latents_of(model, context)

        def measure(tried: list[Edit]) -> float:
            other = model.clone(networks=False)
            self.quantize(other, tried, seen, context, {}, made)
            return float(psnr_per_sample(exact(), latents_of(other, context), latent_peak(exact())).mean())

        chosen = choose(own, budget, found, measure, context.progress)
        model.provenance.append({"pass": self.name, **summary(chosen, found)})
        return [*chosen, *(edit for edit in edits if edit not in own)]

    def _finetuned(
        self,
        model: LatentDiffusion,
        plan: QuantPlan,
        seen: Mapping[tuple[str, str], LayerStatistics],
        context: PassContext,
    ) -> QuantPlan:
        from compress.finetune import finetuned, recorded
        from compress.quantization.layer import output_error

        errors = {
            name: output_error(model.denoiser.get_submodule(name), layer, seen["denoiser", name])
            for name, layer in plan.layers.items()
            if ("denoiser", name) in seen
        }
        worst = sorted(errors, key=errors.__getitem__, reverse=True)[: -(-len(errors) // 4)]
        selected = {name for name in (*worst, *model.family.modulation(model.denoiser)) if name in plan.layers}
        return finetuned(model, plan, recorded(model, context), selected, self.finetune, context)

    def methods(self) -> Methods:
        """How layers are quantized."""
        from compress.quantization.layer import Methods

        return Methods(**{one.name: getattr(self, one.name) for one in fields(Methods)})

    def _quant_plan(
        self,
        part: str,
        layers: dict[str, LayerQuant],
        skipped: dict[str, str],
        attentions: Mapping[str, AttentionQuant],
    ) -> QuantPlan | None:
        from export.quant_plan import QuantPlan, QuantPlanError

        default = self._part_scheme(part)
        if not layers and _storage(default) == "float32":
            return None
        plan = QuantPlan(layers, skipped, _storage(default), default.inference_precision, attentions)
        try:
            plan.validate()
        except QuantPlanError as error:
            raise PassError(f"the quantization of {part} is impossible: {error}") from error
        return plan

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        from compress.quantization.checks import check_layer

        for part, own in _rows(edits).items():
            plan = model.quant_plans.get(part)
            found = {} if plan is None else plan.schemes
            wanted = {name: edit.action for name, edit in own.items() if edit.action != SKIP}
            wanted |= {name: found.get(name, "") for name, edit in own.items() if limit(edit) is not None}
            if found != wanted:
                differing = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
                raise PassError(
                    f"quantize planned {len(wanted)} layers of {part} and left {len(found)}; {differing!r} differs"
                )
            if plan is None:
                continue
            component = model.parts()[part].component
            for name, layer in plan.layers.items():
                check_layer(f"{part}.{name}", component.get_submodule(name), layer)

    def _part_scheme(self, part: str) -> Scheme:
        named = (self.parts or {}).get(part)
        if named is None and part == "vae_encoder" and scheme(self.scheme).is_calibrated:
            return scheme("int8-w8a32")
        return scheme(named or self.scheme)


def latents_of(model: LatentDiffusion, context: PassContext) -> np.ndarray:
    """One per calibration prompt."""
    import numpy as np

    runtime, found = model.runtime(), list[np.ndarray]()
    for first in range(0, len(context.prompts), context.batch):
        prompts = list(context.prompts[first : first + context.batch])
        seeds = [context.seed + first + i for i in range(len(prompts))]
        found.append(runtime.sample(prompts, seeds, context.height, context.width))
    return np.concatenate(found)


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


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is linear, or a convolution of whole channels over neighbouring pixels with zeros around them."""
    from torch import nn

    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def _storage(default: Scheme) -> Storage:
    """How the float weights of a part under this scheme are stored."""
    return "float32" if default.weight.dtype == "float32" else "float16"

"""The pass `quantize`: choose a number format for every layer, calibrate, and leave a QuantPlan per part."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from typing_extensions import override

from compress.cost import Cost
from compress.errors import PassError, RecipeError, RefusedError
from compress.mixed_precision import Budget, choose, formats_below, limit, limited, summary
from compress.nearest import unknown
from compress.passes.base import Edit, Pass, PassContext
from compress.passes.quantize_layers import (
    QK,
    SKIP,
    LayerRule,
    in_float,
    plan_part,
    rows_of,
    special,
    storage_of,
)
from compress.quantization.scheme import Scheme, computed_in_float, scheme

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model.latent_diffusion import LatentDiffusion
    from compress.quantization.layer import Methods
    from compress.quantization.statistics import LayerStatistics
    from export.quant_plan import AttentionQuant, LayerQuant, QuantPlan
    from export.target import Target

    Made = dict[tuple[str, str, str], LayerQuant]
    """(part, layer, scheme) -> what became of it."""


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
        float_share: of the multiply-accumulates of the denoiser's layers with calibrated activations: as many may be
            computed in float, with weights in few bits, where rounding their inputs costs most; a layer must be worth
            it. To find them, the denoising run is differentiated once.
        calls: how much each network call counts in calibration: `alike`; by the root of the `sensitivity` of the
            result to errors at that call; or whichever a `search` measures to be better on calibration noises.
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
    float_share: Annotated[float, Ge(0.0), Le(1.0)] = 0.02
    calls: Literal["alike", "sensitivity", "search"] = "alike"
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
        edits = list[Edit]()
        for part, module in known.items():
            own = special(model, part, module.component, self.sensitive, self.modulation)
            found, rules = plan_part(part, module.component, self._part_scheme(part), own, self.layers)
            edits += found
            matched |= rules
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

    def _limited(self, edits: Sequence[Edit], budget: Budget, targets: Sequence[Target]) -> list[Edit]:
        """The edits, with upper limits where the budget has a choice."""
        named = {e.module for e in edits for rule in self.layers if fnmatch.fnmatchcase(e.module, rule.match)}
        own = rows_of(edits).get("denoiser", {})
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

    @override
    def costs(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> list[Cost] | None:
        """Measured beforehand; None with a budget, finetuning or a search, whose work depends on what they find."""
        from compress import calibrate, probe

        if self.budget is not None or self.finetune or self.calls == "search" or not context.prompts:
            return None
        own = [edit for edit in edits if edit.pass_name == self.name]
        rows = {
            (part, name): scheme(edit.action)
            for part, layers in rows_of(own).items()
            for name, edit in layers.items()
            if edit.action not in (SKIP, QK)
        }
        floats = list(self._may_float(own)) if self.float_share else []
        watched = self._watched(own)
        backwards = watched.get("denoiser", []) if floats or (self.calls != "alike" and self._may_float(own)) else []
        kept = calibrate.ROWS if self.methods().looks_at_rows or self.float_share else 0
        passes = 1 if self.attention == "none" else 2
        work = probe.Work(rows, watched, backwards, floats, self.methods(), kept, passes)
        return probe.costs(model, work, context)

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        from compress import calibrate
        from compress.fidelity import Fidelity
        from compress.float_layers import call_weights

        attending = [name for name, edit in rows_of(edits).get("denoiser", {}).items() if edit.action == QK]
        attentions = calibrate.observe_attention(model, attending, context) if attending else {}
        found = self._sensitivities(model, edits, context)
        weights = {"alike": None, "sensitivity": call_weights(found)}
        tried = list(weights) if self.calls == "search" and found else [self.calls]
        fidelity = Fidelity(model, context)
        best: tuple[float, LatentDiffusion] | None = None
        for calls in tried:
            made = model.clone(networks=False)
            self._calibrated(made, edits, found, weights[calls], attentions, context)
            made.provenance[-1] |= {"calls": calls}
            reached = fidelity.psnr(made) if len(tried) > 1 else 0.0
            if best is None or reached > best[0]:
                best = reached, made
        if best is not None:
            model.quant_plans, model.provenance = best[1].quant_plans, best[1].provenance

    def _calibrated(
        self,
        model: LatentDiffusion,
        edits: Sequence[Edit],
        sensitivities: Mapping[str, Tensor],
        weights: Mapping[str, Sequence[float]] | None,
        attentions: Mapping[str, AttentionQuant],
        context: PassContext,
    ) -> None:
        """Calibrate with these weights of the network calls, decide what is open, and quantize."""
        seen = self.observe(model, edits, context, weights)
        made: Made = {}
        if self.float_share and sensitivities:
            edits = self._floated(model, edits, seen, sensitivities, context, made)
        if self.budget is not None:
            edits = self._within(self.budget, model, edits, seen, sensitivities, context, made)
        self.quantize(model, edits, seen, context, attentions, made)

    def observe(
        self,
        model: LatentDiffusion,
        edits: Sequence[Edit],
        context: PassContext,
        weights: Mapping[str, Sequence[float]] | None = None,
    ) -> dict[tuple[str, str], LayerStatistics]:
        """What layers see in calibration, (part, layer) -> statistics; see `calibrate.observe`."""
        from compress import calibrate

        watched = self._watched(edits)
        kept = calibrate.ROWS if self.methods().looks_at_rows or self.budget is not None or self.float_share else 0
        return calibrate.observe(model, watched, context, rows=kept, weights=weights) if any(watched.values()) else {}

    def _watched(self, edits: Sequence[Edit]) -> dict[str, list[str]]:
        """Part -> its layers that round their inputs.

        Those that are only stored in few bits are watched, too, where their weights are not rounded to the nearest.
        """
        methods = self.methods()
        return {
            part: [
                name
                for name, edit in own.items()
                if edit.action not in (SKIP, QK)
                and (limit(edit) is not None or methods.needs_rows or scheme(edit.action).is_calibrated)
            ]
            for part, own in rows_of(edits).items()
        }

    def _sensitivities(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> dict[str, Tensor]:
        """Of the layers of the denoiser that are watched; none where nothing depends on them."""
        from compress.sensitivity import sensitivities

        wanted = self._watched(edits).get("denoiser", [])
        static = bool(self._may_float(edits))
        if self.budget is None and not (static and (self.float_share or self.calls != "alike")):
            return {}
        return sensitivities(model, wanted, context)

    def _may_float(self, edits: Sequence[Edit]) -> dict[str, Scheme]:
        """The layers of the denoiser that may be computed in float, and their schemes; not those of a rule."""
        found = {}
        for name, edit in rows_of(edits).get("denoiser", {}).items():
            if edit.action in (SKIP, QK) or any(fnmatch.fnmatchcase(edit.module, r.match) for r in self.layers):
                continue
            row = limit(edit) or scheme(edit.action)
            if row.is_static:
                found[name] = row
        return found

    def _floated(
        self,
        model: LatentDiffusion,
        edits: Sequence[Edit],
        seen: Mapping[tuple[str, str], LayerStatistics],
        sensitivities: Mapping[str, Tensor],
        context: PassContext,
        made: Made,
    ) -> list[Edit]:
        """The edits, with layers that are computed in float after all."""
        from compress.float_layers import float_layers
        from compress.quantization.layer import quantized_layer

        rows, methods = self._may_float(edits), self.methods()
        for name, row in rows.items():
            layer, statistics = model.denoiser.get_submodule(name), seen["denoiser", name]
            made["denoiser", name, row.name] = quantized_layer(layer, row, statistics, methods)
            context.progress("quantize", len(made), len(rows))
        layers = {name: made["denoiser", name, row.name] for name, row in rows.items()}
        chosen = float_layers(model, layers, seen, sensitivities, self.float_share, context)
        model.provenance.append({"pass": self.name, "computed_in_float": chosen})
        return [
            in_float(edit, rows[name]) if (name := edit.module.removeprefix("denoiser.")) in chosen else edit
            for edit in edits
        ]

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

        methods, rows, made = self.methods(), rows_of(edits), {} if made is None else made
        total = sum(edit.action not in (SKIP, QK) for own in rows.values() for edit in own.values())
        done = 0
        for part, own in rows.items():
            component, layers = calibrate.component_of(model, part), {}
            for name, edit in own.items():
                if edit.action in (SKIP, QK):
                    continue
                key = part, name, edit.action
                statistics = seen.get((part, name))
                if key not in made:
                    made[key] = quantized_layer(component.get_submodule(name), scheme(edit.action), statistics, methods)
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
        sensitivities: Mapping[str, Tensor],
        context: PassContext,
        made: Made,
    ) -> list[Edit]:
        """The edits, with the schemes that the budget decides."""
        from compress.fidelity import Fidelity
        from compress.prospects import prospects

        own = [edit for edit in edits if edit.module.partition(".")[0] == "denoiser"]
        tops = {name: top for name, edit in rows_of(own)["denoiser"].items() if (top := limit(edit)) is not None}
        formats = {name: self.choices(top, context.targets) for name, top in tops.items()}
        methods = replace(self.methods(), rounding="nearest")
        found = prospects(model, formats, seen, sensitivities, methods, context)

        fidelity = Fidelity(model, context)

        def measure(tried: list[Edit]) -> float:
            other = model.clone(networks=False)
            self.quantize(other, tried, seen, context, {}, made)
            return fidelity.psnr(other)

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
        if not layers and storage_of(default) == "float32":
            return None
        plan = QuantPlan(layers, skipped, storage_of(default), default.inference_precision, attentions)
        try:
            plan.validate()
        except QuantPlanError as error:
            raise PassError(f"the quantization of {part} is impossible: {error}") from error
        return plan

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        from compress.quantization.checks import check_layer

        for part, own in rows_of(edits).items():
            plan = model.quant_plans.get(part)
            found = {} if plan is None else plan.schemes
            wanted = {name: edit.action for name, edit in own.items() if edit.action != SKIP}
            wanted |= {name: found.get(name, "") for name, edit in own.items() if limit(edit) is not None}
            if part == "denoiser" and self.float_share:
                floats = {name: computed_in_float(row).name for name, row in self._may_float(edits).items()}
                wanted |= {name: action for name, action in floats.items() if found.get(name) == action}
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

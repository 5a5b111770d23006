"""The pass `prune`: remove attention heads, hidden and inner channels and blocks within a budget, or by shares."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from compress.cost import Cost
from compress.errors import PassError, RecipeError, RefusedError
from compress.passes.base import Edit, Pass, PassContext
from compress.passes.prune_latency import check_latency, choose, timed_target, timing_cost
from compress.passes.prune_recover import Recover, Whole

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.pruning.axis import Axis
    from compress.pruning.costs import Costs
    from compress.pruning.units import Chunk
    from export.step_plan import Step
    from export.target import Target

SKIP = "skip"
UP_TO = "up to "
"""Before what a budget may remove."""

Part = Literal["denoiser", "vae_decoder"]
AxisName = Literal["heads", "ffn", "resnet", "depth"]
_BUDGETS = ("size_ratio", "macs_ratio", "latency_ratio")
_WIDTHS: tuple[AxisName, ...] = ("heads", "ffn", "resnet")
_NETWORKS = {"denoiser": "", "vae_decoder": "decoder."}
"""Part -> where it lies in its network."""


class KeepRule(BaseModel):
    """A share for the axes of some modules.

    Attributes:
        match: shell pattern of the modules, as `--dry-run` names them.
        keep: share of the units that is left; 1 leaves all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    match: str = Field(min_length=1)
    keep: float = Field(gt=0.0, le=1.0)


@dataclass
class Prune(Pass):
    """Structured pruning: what is removed is gone from weights and graphs, on every runtime.

    Give a budget (`size_ratio`, `macs_ratio` or `latency_ratio`), or shares (`keep`, `layers`). Quality is lost, and
    `recover` trains what is left to win it back.

    Attributes:
        part: the network.
        size_ratio: its parameters at most, as a share of those it has.
        macs_ratio: its multiply-accumulates at most, likewise.
        latency_ratio: what one call of it takes at most, likewise; measured on the first CPU target's runtime, on one
            thread, layer by layer and then as a whole.
        axes: that a budget may take from: attention `heads`, hidden channels of MLPs (`ffn`), inner channels of
            resnets in whole groups of their norm (`resnet`), blocks (`depth`).
        keep: axis -> share of its units that is left everywhere.
        layers: other shares for some modules; the last rule that matches wins.
        importance: how the loss is estimated, see `compress.importance.losses`.
        cutoff: of `taylor`: timesteps whose loss is less than this share of the largest are left out.
        multiple: of the channels left in `ffn` and `resnet`; 16 for GPUs and 8 for CPUs unless given.
        recover: how the denoiser is trained afterwards; not at all unless given.
    """

    name: ClassVar[str] = "prune"
    paper: ClassVar[str] = "Fang et al. 2023, arXiv 2305.10924; Zhang et al. 2024, arXiv 2404.11098"
    needs: ClassVar[frozenset[str]] = frozenset({"calibration", "training"})
    changes: ClassVar[frozenset[str]] = frozenset({"weights", "graph"})

    part: Part = "denoiser"
    size_ratio: Annotated[float, Gt(0.0), Lt(1.0)] | None = None
    macs_ratio: Annotated[float, Gt(0.0), Lt(1.0)] | None = None
    latency_ratio: Annotated[float, Gt(0.0), Lt(1.0)] | None = None
    axes: tuple[AxisName, ...] = _WIDTHS
    keep: dict[AxisName, Annotated[float, Gt(0.0), Le(1.0)]] | None = None
    layers: tuple[KeepRule, ...] = ()
    importance: Literal["taylor", "magnitude", "additive", "random"] = "taylor"
    cutoff: Annotated[float, Ge(0.0), Lt(1.0)] = 0.05
    multiple: Annotated[int, Ge(1), Le(256)] | None = None
    recover: Recover | None = None

    def __post_init__(self) -> None:
        """Check what is asked for together.

        Raises:
            RecipeError: no budget, or two; axes that do not count; the message begins with the field.
        """
        asked = [name for name in _BUDGETS if getattr(self, name) is not None]
        asked += ["shares (keep, layers)"] * bool(self.keep or self.layers)
        if len(asked) != 1:
            given = f"not {' and '.join(asked)}" if asked else "and there is none"
            raise RecipeError(f"prune needs one of {', '.join(_BUDGETS)} and shares (keep, layers), {given}")
        if not self.axes:
            raise RecipeError(f"axes: must not be empty; known: {', '.join((*_WIDTHS, 'depth'))}")
        if not self.budget and self.axes != _WIDTHS:
            raise RecipeError("axes: are for a budget to choose from; name them in keep, or leave them out")
        if self.part == "vae_decoder" and self.importance == "taylor":
            raise RecipeError(
                "importance: taylor differentiates the denoising loss, which a VAE has not; take magnitude or additive"
            )
        if self.part == "vae_decoder" and self.latency_ratio is not None:
            raise RecipeError("latency_ratio: times the denoiser, and the part is vae_decoder; give macs_ratio")
        if self.part == "vae_decoder" and self.recover is not None:
            raise RecipeError("recover: trains the denoiser, and the part is vae_decoder; leave it out")

    @property
    def budget(self) -> float | None:
        """The share that may be left, where there is one."""
        return self.size_ratio or self.macs_ratio or self.latency_ratio

    @override
    def required(self) -> frozenset[str]:
        if self.recover is not None:
            return self.needs
        return self.needs - {"training"} if self.importance in ("taylor", "additive") else frozenset()

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        from compress.pruning.units import together_of

        if model.quant_plans or model.layout is not None or model.fusions:
            raise RefusedError("prune: the model is quantized, cut or fused already; prune the model it was made of")
        if self.latency_ratio is not None:
            timed_target(targets)
        axes, multiple, costs = self._axes(model), self._multiple(targets), self._costs(model)
        edits, matched = list[Edit](), set[int]()
        for axis in axes:
            share, rule = self._share(axis)
            matched |= rule
            whole = 4 * float(costs.parameters_of(axis).sum())
            said = f"{axis.kind} of {axis.size} units"
            if axis.removable < together_of(axis, multiple):
                why = (
                    "it has one unit" if axis.size == 1 else f"a multiple of {multiple} channels, or a block, must stay"
                )
                edits.append(self._edit(axis, SKIP, whole, whole, f"{said}: {why}"))
            elif self.budget is not None:
                why = f"{said}; the budget may take up to {axis.removable}"
                edits.append(self._edit(axis, UP_TO + axis.kind, whole, whole * self.budget, why))
            elif (left := self._left(axis, share, multiple)) < axis.size:
                edits.append(self._edit(axis, axis.kind, whole, whole * left / axis.size, f"{said}, {left} are kept"))
        self._refuse(model, costs, axes, edits, matched, multiple)
        return edits

    def _edit(self, axis: Axis, action: str, before: float, after: float, reason: str) -> Edit:
        return Edit(self.name, f"{self.part}.{axis.module}", action, round(before), round(after), reason)

    def _refuse(
        self,
        model: LatentDiffusion,
        costs: Costs,
        axes: Sequence[Axis],
        edits: Sequence[Edit],
        matched: set[int],
        multiple: int,
    ) -> None:
        """Refuse rules that match nothing, budgets that cannot be kept, and a pass without an edit."""
        for i, rule in enumerate(self.layers):
            if i not in matched:
                near = f"{self.part}.{axes[0].module}" if axes else "nothing here"
                raise RefusedError(
                    f"prune.layers[{i}] matches nothing: {rule.match!r} (what can be pruned is called like {near!r})"
                )
        kinds = {axis.kind for axis in axes}
        if lacking := [kind for kind in self.keep or {} if kind not in kinds]:
            known = ", ".join(sorted(kinds)) or "none of these"
            raise RefusedError(f"prune.keep: the {self.part} has no axis {lacking[0]}; it has {known}")
        if all(edit.action == SKIP for edit in edits):
            raise RefusedError(
                f"prune would change nothing: no axis of the {self.part} can lose a whole step of {multiple} channels; "
                "ask for less to be kept, or give a smaller multiple"
            )
        if self.budget is not None and self.latency_ratio is None:  # what layers take is measured when it is applied
            least = 1.0 - self._most(costs, axes, multiple) / self._cost(costs)
            if least > self.budget:
                raise RefusedError(
                    f"prune.{self._measure}: {self.budget:g} of the {self.part} cannot be reached by "
                    f"{', '.join(self.axes)}: with one step of each left it is {least:.3f}; raise it, or add axes"
                )

    def _most(self, costs: Costs, axes: Sequence[Axis], multiple: int) -> float:
        """What can be saved at most."""
        import torch

        from compress.pruning.units import chunks, tree

        found = [one for axis in axes for one in chunks(axis, torch.zeros(axis.size), multiple)]
        items = tree(found, dict.fromkeys(found, 0.0), self._savings(costs, axes))
        return sum(item.saving for item in items)

    @override
    def costs(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> list[Cost] | None:
        if self.recover is None and self.latency_ratio is None:
            return None
        from compress.training.cost import denoiser_cost

        one, steps = denoiser_cost(model, context.height, context.width), _steps(model)
        found = []
        if self.importance in ("taylor", "additive"):
            halves = sum(2 if step.guidance != "none" else 1 for step in steps)
            seconds = 2 * len(context.prompts) * halves * one.forward
            found.append(Cost("the pass prune", seconds, int(3 * one.weights), "fewer calibration.samples"))
        if self.latency_ratio is not None:
            found.append(timing_cost(len(self._axes(model)), int(one.weights)))
        if self.recover is not None:
            left = self.macs_ratio or self.latency_ratio or 1.0  # of other budgets it is not known yet
            found.append(self.recover.cost(one, len(steps), left))
        return found

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        from compress.importance import losses
        from compress.pruning.axis import CutError
        from compress.pruning.structure import Structure, prune
        from compress.pruning.units import cuts_of

        multiple, before = self._multiple(context.targets), self._costs(model)
        asked = {(edit.module, edit.action.removeprefix(UP_TO)) for edit in edits if edit.action != SKIP}
        axes = [axis for axis in self._axes(model) if (f"{self.part}.{axis.module}", axis.kind) in asked]
        found = losses(model, self.part, axes, multiple, self.importance, self.cutoff, context)
        network, name = self._network(model)
        timed = dict[str, Any]()
        if self.latency_ratio is None:
            removed = self._chosen(before, axes, found, multiple)
        else:
            choice = choose(model, self.part, network, axes, found, self.latency_ratio, context)
            removed, timed = choice.removed, {"latency_ms": choice.row}
        whole = None if self.recover is None else Whole.of(model)
        try:
            structure = prune(network, cuts_of(removed), model.structures.get(name, Structure()))
        except CutError as error:
            raise PassError(f"prune chose what cannot be removed: {error}") from error
        if structure.cuts:
            model.structures[name] = structure
        after = self._costs(model)
        units = Counter[str]()
        for one in removed:
            units[one.axis.kind] += len(one.units)
        model.provenance.append(
            {
                "pass": self.name,
                "part": self.part,
                "importance": self.importance,
                "units_removed": dict(units),
                "parameters": [before.parameters, after.parameters],
                "macs": [before.macs, after.macs],
                **timed,
            }
        )
        if whole is not None and self.recover is not None:
            whole.teach(model, self.recover, context)

    def _chosen(self, costs: Costs, axes: Sequence[Axis], found: Mapping[Chunk, float], multiple: int) -> list[Chunk]:
        """What is removed."""
        from compress.pruning.knapsack import least_loss
        from compress.pruning.units import Chunk, least_important, tree

        if self.budget is None:
            chosen = list[Chunk]()
            for axis in axes:
                own = [one for one in found if one.axis is axis]
                left = self._left(axis, self._share(axis)[0], multiple)
                chosen += least_important(own, found, axis.size - left)
            return chosen
        items = tree(list(found), found, self._savings(costs, axes))
        taken = least_loss(items, (1.0 - self.budget) * self._cost(costs))
        if taken is None:
            raise RefusedError(f"prune.{self._measure}: {self.budget:g} cannot be reached; raise it, or add axes")
        return [item.what for item in taken]

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        """The network is as large as was written down, within the budget, and gives finite outputs.

        Raises:
            PassError: it is not.
        """
        import torch

        done = next((row for row in reversed(model.provenance) if row.get("units_removed")), None)
        if done is None or done.get("pass") != self.name:
            raise PassError("prune removed nothing")
        costs = self._costs(model)
        (parameters, left), (macs, macs_left) = done["parameters"], done["macs"]
        if (costs.parameters, costs.macs) != (left, macs_left):
            raise PassError(
                f"prune left {costs.parameters} parameters and {costs.macs} multiply-accumulates, but wrote down "
                f"{left} and {macs_left}"
            )
        if self.latency_ratio is not None:
            check_latency(done["latency_ms"], self.latency_ratio, self.part)
        ratios = {"size_ratio": left / parameters, "macs_ratio": macs_left / macs}
        if self._measure in ratios and self.budget is not None and ratios[self._measure] > self.budget * (1 + 1e-6):
            raise PassError(f"prune.{self._measure} is {ratios[self._measure]:.4f}, above {self.budget:g}")
        with torch.inference_mode():
            if not torch.isfinite(self._run(model)()).all():
                raise PassError(f"the pruned {self.part} gives outputs that are not finite")

    @property
    def _measure(self) -> str:
        return next((name for name in _BUDGETS if getattr(self, name) is not None), "")

    def _cost(self, costs: Costs) -> int:
        return costs.parameters if self.size_ratio is not None else costs.macs

    def _savings(self, costs: Costs, axes: Sequence[Axis]) -> dict[tuple[str, str], Any]:
        from compress.pruning.units import name_of

        price = costs.parameters_of if self.size_ratio is not None else costs.macs_of
        return {name_of(axis): price(axis) for axis in axes}

    def _axes(self, model: LatentDiffusion) -> list[Axis]:
        """Those that may lose something."""
        from compress.pruning.axes import axes_of
        from compress.pruning.axis import KINDS

        kinds = self.axes if self.budget is not None else KINDS if self.layers else tuple(self.keep or {})
        return axes_of(self._network(model)[0], kinds, _NETWORKS[self.part])

    def _share(self, axis: Axis) -> tuple[float, set[int]]:
        """The share that is kept of an axis, and the rules that match it."""
        path = f"{self.part}.{axis.module}"
        rules = {i for i, rule in enumerate(self.layers) if fnmatch.fnmatchcase(path, rule.match)}
        share = (self.keep or {}).get(axis.kind, 1.0)
        return (self.layers[max(rules)].keep if rules else share), rules

    def _left(self, axis: Axis, share: float, multiple: int) -> int:
        from compress.pruning.units import kept_count

        return axis.size if share == 1.0 else kept_count(axis, share, multiple)

    def _multiple(self, targets: Sequence[Target]) -> int:
        on_gpu = any(row.device != "cpu" for row in targets)
        return self.multiple or (16 if on_gpu else 8)

    def _network(self, model: LatentDiffusion) -> tuple[Any, str]:
        """The network that is cut, and its name in the folder."""
        return (model.denoiser, model.family.part) if self.part == "denoiser" else (model.vae, "vae")

    def _costs(self, model: LatentDiffusion) -> Costs:
        from compress.pruning.costs import costs_of

        return costs_of(self._network(model)[0], self._run(model), _NETWORKS[self.part])

    def _run(self, model: LatentDiffusion) -> Any:
        """One call of the part on one sample of the size it was trained at."""
        side, part = model.family.latent_side(model.denoiser), model.parts()[self.part]
        if self.part == "denoiser":
            inputs = model.family.example_inputs(model.denoiser, batch=1, height=side, width=side, prompt_tokens=77)
        else:
            inputs = part.example_inputs(1, side, side, 77)
        device = next(part.parameters()).device
        return partial(_first, part, {key: tensor.to(device) for key, tensor in inputs.items()})


def _steps(model: LatentDiffusion) -> Sequence[Step]:
    return () if model.step_plan is None else model.step_plan.steps


def _first(part: Any, inputs: Mapping[str, Any]) -> Any:
    return part(**inputs)[0]

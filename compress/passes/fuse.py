"""The pass `fuse`: modules of the denoiser call our operators in place of several operations of torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from compress.errors import PassError, RefusedError
from compress.passes.base import Edit, Pass, PassContext

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from export.target import Target

TOLERANCE = 1e-5
"""Largest difference of the network outputs in float32, `||fused - plain|| / ||plain||`."""

SKIP = "skip"
_PART = "denoiser"


@dataclass
class Fuse(Pass):
    """Norms with their activation or modulation, gated activations, gated residuals, attention: one operation each.

    No weight changes and no module moves: what is left behind is a list of fused modules, for targets whose graphs keep
    our operators. The others export the model as it would be without this pass.

    Attributes:
        leave: patterns of module paths that keep their own computation.
    """

    name: ClassVar[str] = "fuse"
    paper: ClassVar[str] = "none: the same mathematics in fewer launches; see kernels/README.md"
    needs: ClassVar[frozenset[str]] = frozenset()
    changes: ClassVar[frozenset[str]] = frozenset({"graph"})

    leave: tuple[str, ...] = ()

    @override
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        from compress.fusion.patterns import pattern_of

        if model.fusions:
            raise RefusedError("fuse: the model is fused already; use one fuse pass")
        if targets and not any(row.operators for row in targets):
            raise RefusedError(
                f"fuse gains nothing on {', '.join(row.name for row in targets)}, whose runtimes fuse graphs by "
                "themselves: leave it out, or add a target for GPUs"
            )
        edits = list[Edit]()
        for path, module in model.denoiser.named_modules():
            pattern = pattern_of(module)
            if pattern is None:
                continue
            name = ".".join(filter(None, (_PART, path)))
            left = any(fnmatch.fnmatchcase(name, rule) for rule in self.leave)
            reason = "fuse.leave names it" if left else pattern.unfit(module)
            said = f"{type(module).__name__}: {pattern.name}" if reason is None else reason
            edits.append(Edit(self.name, name, SKIP if reason else pattern.name, 0, 0, said))
        for i, rule in enumerate(self.leave):
            if not any(fnmatch.fnmatchcase(edit.module, rule) for edit in edits):
                near = f" (they are called like {edits[0].module!r})" if edits else ""
                raise RefusedError(f"fuse.leave[{i}] matches nothing that could be fused{near}")
        if all(edit.action == SKIP for edit in edits):
            raise RefusedError("fuse would change nothing: no module of the denoiser has a fused form that fits it")
        return edits

    @override
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        model.fusions = _fusions(edits)

    @override
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        from compress.fusion.compare import difference

        wanted = _fusions(edits)
        if model.fusions != wanted:
            differing = sorted(set(wanted.items()) ^ set(model.fusions.items()))[0][0]
            raise PassError(
                f"fuse planned {len(wanted)} modules and left {len(model.fusions)}; {differing or _PART!r} differs"
            )
        error = difference(model.family, model.denoiser, wanted)
        if not error <= TOLERANCE:
            raise PassError(f"the fused denoiser differs by {error:.1e} of its output; at most {TOLERANCE} is allowed")


def _fusions(edits: Sequence[Edit]) -> dict[str, str]:
    """Module path in the denoiser -> the pattern it is fused by."""
    return {edit.module.removeprefix(_PART).lstrip("."): edit.action for edit in edits if edit.action != SKIP}

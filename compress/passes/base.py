"""What a pass is: it plans edits, applies them, and proves its postcondition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from compress.cost import Cost
from compress.progress import Progress, silent

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion
    from compress.store import Store
    from export.target import Target


@dataclass(frozen=True)
class Edit:
    """One planned change to one module; a module left alone is an edit with the action `skip` and a reason."""

    pass_name: str
    module: str
    action: str
    bytes_before: int
    bytes_after: int
    reason: str


@dataclass(frozen=True)
class PassContext:
    """What a pass may use while it is applied.

    Attributes:
        prompts: calibration prompts (or class labels as text), disjoint from the evaluation prompts.
        seed: of the calibration noises.
        height, width: of the pictures, in pixels.
        progress: receives (what, done, total).
        targets: what the engine is built for, for passes that measure.
        store: keeps what is exported on the way, by content; None keeps nothing.
        batch: calibration pictures made at once; with guidance the denoiser sees twice as many.
    """

    prompts: Sequence[str]
    seed: int
    height: int
    width: int
    progress: Progress = field(default=silent)
    targets: Sequence[Target] = ()
    store: Store | None = None
    batch: int = 4


class Pass(ABC):
    """A rewrite of a model. Subclasses are dataclasses whose fields are their recipe keys.

    Class facts, given at the head of every pass: `name` (the recipe key), `paper` (where the method comes from),
    `needs` (of calibration, training), `changes` (of weights, graph, plan); one that does not change weights shares
    the networks of the model it is given.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    changes: ClassVar[frozenset[str]]

    def required(self) -> frozenset[str]:
        """What it needs with the fields it has; `needs`, unless its fields decide."""
        return self.needs

    @property
    def label(self) -> str:
        """What a recipe may hold once: the name, unless its fields make it another."""
        return self.name

    @abstractmethod
    def plan(self, model: LatentDiffusion, targets: Sequence[Target]) -> list[Edit]:
        """List every edit, without touching the model.

        Raises:
            RefusedError: the model or a target cannot take this pass; says why and the way out.
        """

    def costs(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> list[Cost] | None:
        """What it will take, from a few measured calls of the model; None where it cannot tell.

        Raises:
            RefusedError: it would exceed a limit that is one of its fields.
        """
        return None

    @abstractmethod
    def apply(self, model: LatentDiffusion, edits: Sequence[Edit], context: PassContext) -> None:
        """Carry the edits out, in place."""

    @abstractmethod
    def check(self, model: LatentDiffusion, edits: Sequence[Edit]) -> None:
        """Prove that the model now is what `plan` promised.

        Raises:
            PassError: it is not.
        """

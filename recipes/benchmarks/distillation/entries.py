"""What the distillation benchmark measures: students, and their teacher at few steps and other guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace

from recipes.benchmarks.caching.bench import GUIDANCE
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.distillation.students import CHAIN, TEACHER_STEPS

FULL_STEPS = 50
FEW = (4, 2, 1)
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SCHEME = "int8-w8a8"
SWEPT = (TEACHER_STEPS, FEW[0])


@dataclass(frozen=True)
class Entry:
    """One way to make the pictures.

    Attributes:
        steps: network calls.
        guidance: scale of classifier-free guidance, which doubles a call; 1 is none.
        sampler: a scheduler of the teacher; empty for a student.
        student: of `CHAIN`; empty for the teacher.
        scheme: number format of the networks; empty is float32.
    """

    steps: int
    guidance: float
    sampler: str = ""
    student: str = ""
    scheme: str = ""

    def __str__(self) -> str:
        scheme = f", {self.scheme}" if self.scheme else ""
        if self.student:
            return f"student, {self.student}{scheme}"
        return f"{self.sampler}, {self.steps} step{'s' if self.steps > 1 else ''}, scale {self.guidance:g}{scheme}"

    @property
    def evaluations(self) -> int:
        """Of the denoiser, a picture: two halves make a guided call."""
        return self.steps * (2 if self.guidance > 1.0 else 1)


def full(model: str) -> Entry:
    """The teacher with all steps, which all else is compared with."""
    return Entry(FULL_STEPS, GUIDANCE, next(iter(SAMPLERS[model])))


def students() -> list[Entry]:
    """Every student; its guidance is in its weights."""
    return [Entry(int(fields.get("steps", TEACHER_STEPS)), 1.0, student=name) for name, fields in CHAIN.items()]


def teachers(model: str) -> list[Entry]:
    """The teacher at the calls of the students, guided and not, by its own sampler and by UniPC."""
    own, other = next(iter(SAMPLERS[model])), "UniPCMultistepScheduler"
    plain = [Entry(steps, scale, own) for scale in (GUIDANCE, 1.0) for steps in (TEACHER_STEPS, *FEW)]
    halves = [Entry(TEACHER_STEPS // 2, GUIDANCE, own)]
    return plain + halves + [Entry(steps, scale, other) for scale in (GUIDANCE, 1.0) for steps in FEW]


def sweep(model: str) -> list[Entry]:
    """The teacher at other scales of guidance."""
    own = next(iter(SAMPLERS[model]))
    return [Entry(steps, scale, own) for steps in SWEPT for scale in SCALES]


def quantized(model: str) -> list[Entry]:
    """The students of few steps in 8 bits, and the teacher without guidance, which takes no training."""
    few = [replace(entry, scheme=SCHEME) for entry in students() if entry.steps in FEW]
    return few + [Entry(steps, 1.0, next(iter(SAMPLERS[model])), scheme=SCHEME) for steps in FEW]


def entries(model: str) -> list[Entry]:
    """All of a model, each once, what matters most first."""
    return list(dict.fromkeys([full(model), *students(), *teachers(model), *quantized(model), *sweep(model)]))

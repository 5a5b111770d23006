"""Divides the graph of a denoiser by what its tensors depend on: the latent, the prompt, the timestep, or the last two.

A plan fixes the timesteps of all network calls. So what depends on the timestep alone is a table with a row per
timestep, known when the engine is built; what depends on the prompt alone (keys and values of cross-attention, text
projections) is computed once per run; and what depends on both, and is one vector per picture (adaptive norms, and the
time embedding where pooled text was added to it), is computed once per run for all calls as one batch, which reads its
weights once in place of once per call. All of that is exact: every operation stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.float_graph import FloatGraph
from export.folded_graph import Draft, Pack
from export.plan_rows import Segment
from export.qdq import scopes_of

if TYPE_CHECKING:
    import onnx

    from export.step_plan import StepPlan

TIMESTEP = "timestep"
FOR_PROMPT, FOR_CALLS = "_prompt", "_calls"
"""What is put behind the name of a segment to name what runs before the first call."""

_TIMESTEP, _PROMPT, _LATENT = 1, 2, 4  # flags: what a tensor depends on; 0 is a constant

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Piece:
    """A part of a divided graph.

    Attributes:
        name: of the segment, perhaps with `_prompt` or `_calls` behind it.
        graph: float, with the metadata of its nodes; its weights may lie in a file beside the graph that was divided.
        check: arrays of all inputs.
    """

    name: str
    graph: onnx.ModelProto
    check: Arrays

    @property
    def segment(self) -> Segment:
        """What it takes and gives."""
        return Segment(
            tuple(value.name for value in self.graph.graph.input),
            tuple(value.name for value in self.graph.graph.output),
        )


class Folding:
    """Divides the segments of one denoiser, in the order they run.

    Attributes:
        tabulated: modules, by the paths in the nodes' metadata, of which only a table is left.
        pieces: segment -> what it became.
        counts: tensors of the timestep alone in tables, of the prompt alone, and of both.
    """

    def __init__(self, plan: StepPlan) -> None:
        self.tabulated: set[str] = set()
        self.pieces: dict[str, list[Piece]] = {}
        self.counts = [0, 0, 0]
        self._plan = plan
        self._times = np.unique(np.array([step.t for step in plan.steps], np.float32))
        # What a slot keeps or a gate watches is of the loop, whatever it depends on.
        self._kept = {slot.tensor for slot in plan.slots.values()} | ({plan.gate.tensor} if plan.gate else set())
        self._kinds = {plan.latent_input: _LATENT, TIMESTEP: _TIMESTEP}
        self._tables = {TIMESTEP: self._times}

    def divide(self, name: str, model: onnx.ModelProto, folder: Path, inputs: Sequence[Arrays]) -> list[Piece]:
        """Divide one segment.

        Args:
            name: of the segment.
            model: its float graph; not changed.
            folder: where the weights lie that the graph only refers to.
            inputs: all inputs at two sizes, of different batch; the second becomes `check`.

        Returns:
            What runs once per run, what runs for all calls at a time, and what stays in the loop: those of the three
            that compute something.

        Raises:
            ExportError: ONNX Runtime does not run a part of the graph.
        """
        graph = FloatGraph(name, model, folder)
        facts = _Facts(graph, self._kinds, self._kept, inputs)
        outputs = list(graph.outputs)
        self._kinds |= {key: facts.kind(key) for key in outputs}
        early = [key for key in outputs if facts.kind(key) != _LATENT]
        late = [key for key in outputs if facts.kind(key) == _LATENT]

        loop, taken = graph.closure(late, facts.can_be_handed)
        handed = list(dict.fromkeys([*early, *taken]))
        by_call = [key for key in handed if facts.kind(key) & _TIMESTEP]
        tables = self._tabulate(graph, by_call, facts)
        calls, used = graph.closure(
            by_call, lambda key: key in tables or (facts.kind(key) == _PROMPT and facts.can_be_handed(key))
        )
        by_prompt = [key for key in dict.fromkeys([*handed, *used]) if facts.kind(key) == _PROMPT]
        prompt, _ = graph.closure(by_prompt, lambda key: False)

        for at, count in enumerate((len(tables), len(by_prompt), len(set(by_call).difference(tables)))):
            self.counts[at] += count
        self._note_tabulated(graph, tables, [*loop, *calls])
        packs = _packs(f"{name}{FOR_CALLS}", [key for key in by_call if key not in early], facts)
        shown = {key: key if key in early else f"{name}.{key}" for key in (*handed, *by_prompt)}
        draft = Draft(graph, facts.seen, shown, packs)
        pieces = []
        if by_prompt:
            pieces.append(Piece(name + FOR_PROMPT, *draft.for_prompt(prompt, by_prompt)))
        if by_call:
            pieces.append(Piece(name + FOR_CALLS, *draft.for_calls(calls, by_call, tables, self._times)))
        if late:
            pieces.append(Piece(name, *draft.loop(loop, late)))
        self.pieces[name] = pieces
        return pieces

    def plan(self) -> StepPlan:
        """The plan over the pieces instead of the segments; what runs before the first call is `once`."""
        segments = {piece.name: piece.segment for pieces in self.pieces.values() for piece in pieces}
        once = [
            piece.name
            for end in (FOR_PROMPT, FOR_CALLS)
            for name, pieces in self.pieces.items()
            for piece in pieces
            if piece.name == name + end
        ]
        paths = {path: tuple(name for name in names if name in segments) for path, names in self._plan.paths.items()}
        return replace(self._plan, segments=segments, paths=paths, once=tuple(once))

    def summary(self) -> str:
        """What was folded, in one line."""
        tabulated, prompt, calls = self.counts
        return (
            f"{tabulated} tensors of the timestep alone are tables of {len(self._times)} rows, {prompt} of the prompt "
            f"alone are computed once per run, {calls} of both once per run for all calls"
        )

    def _tabulate(self, graph: FloatGraph, wanted: Sequence[str], facts: _Facts) -> dict[str, np.ndarray]:
        """Tables (timesteps, ...) of what is wanted of the timestep alone; none where they are larger than weights."""

        def of_timestep(key: str) -> bool:
            return facts.kind(key) == _TIMESTEP and key != TIMESTEP and facts.movable(key)

        _, names = graph.closure(wanted, of_timestep)
        nodes, _ = graph.closure(names, lambda key: False)
        if not names or not graph.reads(nodes) <= self._tables.keys():
            return {}
        made = [key for key in names if key in graph.makers]
        tables = {key: self._tables[key] for key in names if key in self._tables} | graph.run(made, self._tables)
        if sum(tables[key].nbytes for key in made) > graph.weight_bytes(nodes):
            return {}
        self._tables |= {key: tables[key] for key in graph.outputs if key in tables}
        return tables

    def _note_tabulated(self, graph: FloatGraph, tables: Iterable[str], left: Sequence[onnx.NodeProto]) -> None:
        nodes, _ = graph.closure(tables, lambda key: False)
        kept = {id(node) for node in left}
        self.tabulated |= {scope for node in nodes if id(node) not in kept for scope in scopes_of(node)[:-1]}


class _Facts:
    """What the tensors of a graph depend on, and those that depend on no latent as computed at two sizes.

    Attributes:
        seen: tensor -> array, once for each size.
    """

    def __init__(self, graph: FloatGraph, known: Mapping[str, int], kept: set[str], inputs: Sequence[Arrays]) -> None:
        self._graph = graph
        self._kinds = {key: known.get(key, _PROMPT) for key in graph.inputs}
        self._batches = [len(next(iter(arrays.values()))) for arrays in inputs]
        self.seen: list[dict[str, np.ndarray]] = [dict(arrays) for arrays in inputs]
        self._spread(kept, lambda key: True)
        free = [key for key in graph.makers if 0 < self._kinds[key] < _LATENT]
        self.seen = [dict(arrays) | graph.run(free, arrays) for arrays in inputs] if free else self.seen
        self._spread(kept, self._joins)
        self._kinds |= {key: _LATENT for key in graph.outputs if not self.movable(key)}

    def kind(self, key: str) -> int:
        """Flags of what a tensor depends on; `_LATENT` alone where that is among them."""
        return self._kinds.get(key, 0)

    def movable(self, key: str) -> bool:
        """Whether a tensor has a row per picture, of real numbers, and depends on no latent."""
        if not 0 < self.kind(key) < _LATENT:
            return False
        arrays = zip((arrays[key] for arrays in self.seen), self._batches, strict=True)
        return all(a.dtype == np.float32 and a.ndim > 0 and len(a) == batch for a, batch in arrays)

    def can_be_handed(self, key: str) -> bool:
        """Whether a tensor is computed here and can be computed before the loop."""
        return key in self._graph.makers and self.movable(key)

    def vector_axis(self, key: str) -> int | None:
        """The axis along which a tensor is a vector per picture; None where it is more than that."""
        shapes = {arrays[key].shape[1:] for arrays in self.seen}
        wide = [axis for axis, size in enumerate(next(iter(shapes)), start=1) if size != 1]
        return wide[0] if len(shapes) == 1 and len(wide) == 1 else None

    def _joins(self, key: str) -> bool:
        """Whether something of both timestep and prompt may be made of a tensor: a vector per picture, or a shape."""
        shape = all(arrays[key].dtype != np.float32 for arrays in self.seen)
        return shape or (self.movable(key) and self.vector_axis(key) is not None)

    def _spread(self, kept: set[str], joins: Callable[[str], bool]) -> None:
        for node in self._graph.nodes:
            kind = 0
            for key in node.input:
                kind |= self.kind(key)
            apart = kind == _TIMESTEP | _PROMPT and not all(joins(key) for key in node.input if self.kind(key))
            branches = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
            kind = _LATENT if kind & _LATENT or apart or branches else kind
            self._kinds |= {key: _LATENT if key in kept else kind for key in node.output}


def _packs(name: str, keys: Sequence[str], facts: _Facts) -> list[Pack]:
    """Vectors of the same rank and axis, which go to the loop as one tensor: every input of a graph has its price."""
    groups: dict[tuple[int, int], list[str]] = {}
    for key in keys:
        axis = facts.vector_axis(key)
        if axis is not None:
            groups.setdefault((facts.seen[0][key].ndim, axis), []).append(key)
    return [
        Pack(f"{name}_{rank}_{axis}", axis, tuple(members))
        for (rank, axis), members in groups.items()
        if len(members) > 1
    ]

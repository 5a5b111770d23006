"""What modules take on the runtime of a target: exported one by one, loaded together, and timed in turn."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from compress.doctor import processor_name
from compress.errors import PassError
from compress.families.segments import Unit
from compress.measure.latency import Contestant, interleave
from compress.progress import Progress
from export.backends import BACKENDS, backend
from export.errors import ExportError
from export.to_onnx import export_module, strip_metadata
from export.weights import PoolWriter, write_graph

if TYPE_CHECKING:
    from compress.store import Store
    from export.target import Target

THREADS = 1
"""To compute with: what a layer takes then is its work, not how well it is divided."""
ROUNDS = 15
"""Of turns; the median of each is taken."""


@dataclass(frozen=True)
class Piece:
    """A module with its inputs.

    Attributes:
        key: what its time depends on; weights count by their shapes alone.
        module: takes the inputs by name, and gives a tuple.
        inputs: by name.
        outputs: names of what it gives.
    """

    key: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]


@dataclass(frozen=True)
class Bench:
    """Where modules are timed.

    Attributes:
        target: on the CPU; its runtime is used.
        store: keeps times by content; None measures anew.
        progress: receives (what, done, in all).
    """

    target: Target
    store: Store | None
    progress: Progress

    def milliseconds(self, pieces: Sequence[Piece], what: str) -> dict[str, float]:
        """Key -> the median of interleaved runs on one thread; pieces of one key are timed once.

        Args:
            pieces: to be timed together.
            what: they are, for progress.

        Raises:
            PassError: one cannot be exported.
            EngineError: the runtime is missing, or cannot compile one.
        """
        different = {piece.key: piece for piece in pieces}
        ordered = [different[key] for key in sorted(different)]
        inputs = {
            "what": "graph times",
            "target": self.target.name,
            "runtime": metadata.version(BACKENDS[self.target.backend].package),
            "processor": processor_name(),
            "threads": THREADS,
            "rounds": ROUNDS,
            "pieces": [piece.key for piece in ordered],
        }
        measured = partial(self._measured, ordered, what)
        if self.store is None:
            return measured()
        return self.store.fetch(inputs, lambda folder: _write(folder, measured()), _read)

    def _measured(self, pieces: Sequence[Piece], what: str) -> dict[str, float]:
        runtime = backend(self.target.backend)
        with tempfile.TemporaryDirectory(prefix="timed-") as name:
            contestants = []
            for at, piece in enumerate(pieces):
                self.progress(f"export {what}", at, len(pieces))
                folder = Path(name) / str(at)
                loaded = runtime.load(_exported(piece, folder), THREADS, {})
                arrays = {key: tensor.numpy() for key, tensor in piece.inputs.items()}
                contestants.append(Contestant(piece.key, partial(loaded, arrays)))
            times = interleave(contestants, ROUNDS, progress=self.progress, what=f"time {what}")
        return {key: timing.median for key, timing in times.items()}


def _exported(piece: Piece, folder: Path) -> Path:
    try:
        with PoolWriter(folder) as pool:
            graph = export_module(piece.module, piece.inputs, {}, piece.outputs, piece.inputs, name="timed", pool=pool)
            strip_metadata(graph)
            write_graph(graph, folder / "timed.onnx")
    except ExportError as error:
        raise PassError(f"a layer cannot be timed by itself: {error}; give macs_ratio or size_ratio") from error
    return folder / "timed.onnx"


def _write(folder: Path, times: Mapping[str, float]) -> None:
    (folder / "times.json").write_text(json.dumps(times), encoding="utf-8")


def _read(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "times.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Call:
    """How a module is called within its network: its arguments, and how many tensors it gives."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: int

    def piece(self, module: nn.Module) -> Piece:
        """A module of the same inputs, by itself; what is no tensor is bound to it."""
        leaves, form = tree_flatten((self.args, dict(self.kwargs)))
        places = [at for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        names = tuple(f"x{at}" for at in places)
        outputs = tuple(f"y{at}" for at in range(self.outputs))

        def run(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = list(leaves)
            for at, tensor in zip(places, tensors, strict=True):
                given[at] = tensor
            args, kwargs = tree_unflatten(given, form)
            return tuple(leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, Tensor))

        inputs = {name: leaves[at].detach().clone() for name, at in zip(names, places, strict=True)}
        return piece_of(Unit("timed", names, outputs, run).bind(module).module, module, inputs, outputs)


def piece_of(module: nn.Module, network: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Piece:
    """A module over a network, keyed by what the network is made of and the shapes it is given."""
    heads = [getattr(part, "heads", 0) for part in network.modules()]
    shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in inputs.items()}
    content = json.dumps([type(network).__name__, repr(network), heads, shapes], default=str)
    return Piece(hashlib.sha256(content.encode()).hexdigest()[:24], module, inputs, outputs)


def calls_of(network: nn.Module, run: Callable[[], object], paths: Sequence[str]) -> dict[str, Call]:
    """How each of some modules is called when the network runs.

    Args:
        network: holds the modules.
        run: calls it.
        paths: of the modules.

    Raises:
        PassError: one was not called.
    """
    found: dict[str, Call] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            count = sum(isinstance(leaf, Tensor) for leaf in tree_leaves(output))
            found.setdefault(path, Call(args, kwargs, count))

        return hook

    with _hooked(network, {path: keep(path) for path in paths}), torch.no_grad():
        run()
    for path in paths:
        if path not in found:
            raise PassError(f"{path} is not called by itself, so it cannot be timed: give macs_ratio or size_ratio")
    return found


@contextmanager
def _hooked(network: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    handles = [
        network.get_submodule(path).register_forward_hook(hook, with_kwargs=True) for path, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

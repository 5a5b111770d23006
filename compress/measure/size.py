"""Bytes that are needed to run: of the original pipeline, and of one target of an engine folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from compress.report.report import Size

if TYPE_CHECKING:
    from compress.model.latent_diffusion import LatentDiffusion

MIB = 2**20


def original_size(model: LatentDiffusion, parts: Iterable[str]) -> Size:
    """Weights of the original's parts in float32, as the pipeline holds them.

    Args:
        model: the original.
        parts: which ones the engine replaces: `denoiser`, `vae_decoder`, `vae_encoder` and text encoders. The two
            halves of a VAE count as one VAE, as the pipeline opens them, only where both are replaced.
    """
    modules = model.parts()
    sizes = {}
    for name in parts:
        component = model.denoiser if name == "denoiser" else modules[name].component
        count = sum(
            tensor.numel()
            for path, tensor in component.state_dict().items()
            if tensor.is_floating_point() and _belongs(name, path)
        )
        sizes[name] = 4 * count / MIB
    return Size(name="original, float32", role="original", parts=sizes)


def _belongs(part: str, path: str) -> bool:
    """Whether a weight of the VAE is of its decoder or of its encoder."""
    if part == "vae_decoder":
        return path.startswith(("decoder.", "post_quant_conv."))
    if part == "vae_encoder":
        return path.startswith(("encoder.", "quant_conv."))
    return True


def engine_size(folder: Path, target: str) -> Size:
    """What one target of an engine folder reads: its graphs, their share of the weight pools, tokenizers, plan.

    Graphs of several targets share a pool; a target is charged with the tensors that its own graphs refer to, each
    once, and with the gap that aligns them.

    Args:
        folder: of the engine.
        target: one the engine was built for.

    Raises:
        EngineError: the folder is no engine, or was not built for the target.
    """
    from export.errors import EngineError
    from export.manifest import FILE, read_manifest

    manifest = read_manifest(folder)
    if target not in manifest.targets:
        raise EngineError(f"the engine was not built for {target!r}, but for {', '.join(manifest.targets)}")
    every_graph = {path for row in manifest.targets.values() for path in row.graphs.values()}
    mine = set(manifest.targets[target].graphs.values())
    pooled = _pool_bytes(folder, sorted(mine), sorted(every_graph))
    pools = {f"{PurePosixPath(path).parent}/{name}" for path, name in _pools(folder, every_graph)}
    sizes: dict[str, int] = {}
    for path, entry in manifest.files.items():
        if not entry.run or path in pools or path in every_graph - mine:
            continue
        part = PurePosixPath(path).parts[0] if path in mine else "rest"
        sizes[part] = sizes.get(part, 0) + entry.bytes
    sizes["rest"] = sizes.get("rest", 0) + (folder / FILE).stat().st_size
    for part, count in pooled.items():
        sizes[part] = sizes.get(part, 0) + count
    ordered = sorted(sizes.items(), key=lambda item: (item[0] == "rest", -item[1]))
    return Size(name=target, role="engine", parts={part: count / MIB for part, count in ordered})


def _pools(folder: Path, graphs: Iterable[str]) -> set[tuple[str, str]]:
    """The pool files that graphs refer to, as (graph, file name beside it)."""
    return {(path, name) for path in graphs for name, _, _ in _references(folder / path)}


def _references(graph: Path) -> list[tuple[str, int, int]]:
    """Where a graph's weights lie: (file, offset, bytes); machine code and built engines hold their own."""
    import onnx

    if graph.suffix != ".onnx":
        return []
    model = onnx.load(graph, load_external_data=False)
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            found.append((entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0))))
    return found


def _pool_bytes(folder: Path, mine: Iterable[str], every_graph: Iterable[str]) -> dict[str, int]:
    """Folder -> bytes of its pools that `mine` refer to, with the gap before each tensor."""
    used: dict[str, set[tuple[str, int, int]]] = {}
    known: dict[tuple[str, str], set[tuple[int, int]]] = {}
    own = set(mine)
    for path in every_graph:
        part = PurePosixPath(path).parts[0]
        for name, offset, length in _references(folder / path):
            known.setdefault((part, name), set()).add((offset, length))
            if path in own:
                used.setdefault(part, set()).add((name, offset, length))
    sizes: dict[str, int] = {}
    for (part, name), places in known.items():
        end = 0
        for offset, length in sorted(places):
            if (name, offset, length) in used.get(part, ()):
                sizes[part] = sizes.get(part, 0) + offset + length - end
            end = offset + length
    return sizes

"""Puts together a model repository of Triton Inference Server: an engine, our runtime as a Python model, its config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compress.deploy import archive, texts
from compress.deploy.closure import sources
from compress.deploy.package import Packaged, kept
from compress.deploy.triton_config import ModelConfig, Tensor, check_name
from compress.deploy.triton_graphs import BACK_ENDS, graph_models
from export.backends import BACKENDS
from export.manifest import FILE, STEP_PLAN, Manifest, read_manifest

MODEL = '''"""The model that Triton loads; what it does is in `serve/triton_model.py`, beside this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the server looks in the folder that it was started from, too

from serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
GRAPHS = "graphs.json"
VERSION = "1"
RUNTIME = ("tokenizers",)
NUMPY = "# NumPy is the server's own; Triton before 24.11 needs one below 2.\n"


def package_for_triton(
    folder: Path, out: Path, target: str | None = None, name: str = "pictures", backends: bool = False
) -> Packaged:
    """Write a model repository into one archive: a folder `models` for the server, and `requirements.txt`.

    Args:
        folder: of the engine.
        out: the archive, .tar.gz.
        target: the target that the server runs; None takes the fastest measured one, or else the first; with
            `backends` the first that the server has a back end for.
        name: of the model.
        backends: the graphs are models of their own, which back ends of the server run, and the Python model calls;
            where our own runtime cannot open the target they are so in any case.

    Raises:
        EngineError: no engine, a damaged one, an unknown target, or one that runs where it was built alone.
        RefusedError: a name that Triton cannot take, a target that it has no back end for, or the archive cannot be
            written.
    """
    check_name(name)
    version = f"models/{name}/{VERSION}"
    whole = read_manifest(folder)
    asked = None if target is None else whole.targets.get(target)
    backends = backends or (asked is not None and asked.backend in BACK_ENDS and asked.backend not in BACKENDS)
    manifest = _one_target(whole, target, backends)
    (chosen, row), packages, modules = next(iter(manifest.targets.items())), list(RUNTIME), ["serve.triton_model"]
    files: dict[str, bytes] = {}
    if backends:
        models, told = graph_models(folder, manifest, chosen, name)
        files |= {f"models/{path}": content for path, content in models.items()}
        files[f"{version}/{GRAPHS}"] = told.encode()
        manifest = _without_graphs(manifest)
    else:
        packages.append(BACKENDS[row.backend].package)
        modules.append(BACKENDS[row.backend].module)
    files |= {f"{version}/engine/{path}": (folder / path).read_bytes() for path in manifest.files}
    files |= {f"{version}/{path}": file.read_bytes() for path, file in sources(modules).items()}
    files |= {
        path: text.encode()
        for path, text in {
            f"models/{name}/config.pbtxt": pictures_config(manifest, name).text(),
            f"{version}/model.py": MODEL,
            f"{version}/engine/{FILE}": manifest.to_json(),
            "requirements.txt": NUMPY + texts.requirements(packages),
        }.items()
    }
    sha256 = archive.write(files, f"triton-{manifest.engine_hash[:12]}", out)
    return Packaged(sha256, len(files) + 1, out.stat().st_size, manifest.engine_hash, (chosen,))


def _one_target(whole: Manifest, target: str | None, backends: bool) -> Manifest:
    """The manifest for one target alone."""
    if backends and target is None:
        target = next((name for name, row in whole.targets.items() if row.backend in BACK_ENDS), None)
    if backends and target is not None and target in whole.targets:
        return replace(whole, targets={target: whole.targets[target]})
    targets = kept(whole, target).targets
    return kept(whole, min(targets, key=lambda name: targets[name].measured.get("latency_ms", float("inf"))))


def _without_graphs(manifest: Manifest) -> Manifest:
    """The manifest of what the loop needs beside its graphs: the plan and the tokenizers."""
    tokenizers = tuple(f"{folder}/" for folder in manifest.tokenizers.values())
    bare = replace(
        manifest,
        targets={name: replace(row, graphs={}, options={}) for name, row in manifest.targets.items()},
        files={
            path: entry
            for path, entry in manifest.files.items()
            if entry.run and (path == STEP_PLAN or path.startswith(tokenizers))
        },
        golden=None,
    )
    return replace(bare, engine_hash=bare.digest())


def pictures_config(manifest: Manifest, name: str) -> ModelConfig:
    """The configuration of the Python model: what a request says, and the pictures it gets."""
    sides = [low if low == high else None for low, _, high in (manifest.shapes[side] for side in ("height", "width"))]
    return ModelConfig(
        name,
        "python",
        [
            Tensor("prompt", "string", (1,)),
            Tensor("seed", "uint64", (1,)),
            Tensor("negative_prompt", "string", (1,), optional=True),
            Tensor("height", "int32", (1,), optional=True),
            Tensor("width", "int32", (1,), optional=True),
        ],
        [Tensor("picture", "uint8", (*sides, 3))],
        "KIND_CPU",
        manifest.shapes["batch"][2],
    )

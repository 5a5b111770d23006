"""Reads the files of an untrusted model folder: JSON and safetensors, nothing else, and nothing outside the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from compress.errors import CompressError, RefusedError

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Weights:
    """The weights of one component.

    Attributes:
        files: the safetensors files that hold them.
        variant: `fp16` in `model.fp16.safetensors`; None where the file name has none.
        parameters: how many numbers they hold.
    """

    files: tuple[Path, ...]
    variant: str | None
    parameters: int


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn whatever a library raises over the content of a folder into one sentence.

    Raises:
        RefusedError: `what`, then the cause.
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{what}: {cause[:200]}") from error


def inside(root: Path, relative: str) -> Path:
    """The existing path `relative` below `root`.

    Raises:
        RefusedError: it does not exist, or it leads out of the folder.
    """
    path = root / relative
    if not path.exists() and not path.is_symlink():
        raise RefusedError(f"{path} is missing: the model folder is incomplete, fetch it again")
    if not path.resolve().is_relative_to(root.resolve()):
        raise RefusedError(f"{path} leads out of the model folder: copy the file itself into the folder")
    if not path.exists():
        raise RefusedError(f"{path} is a link to nothing: copy the file itself into the folder")
    return path


def read_json(root: Path, relative: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RefusedError: the file is missing, outside the folder, not JSON, or not an object.
    """
    path = inside(root, relative)
    with refusing(f"{path} is not valid JSON, fetch it again"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise RefusedError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_weights(root: Path, component: str, stem: str) -> Weights:
    """Find and check the weights of a component: every file complete, every number finite.

    Args:
        root: of the model.
        component: its folder in `root`.
        stem: of the file name, `diffusion_pytorch_model` (diffusers) or `model` (transformers).

    Raises:
        RefusedError: no safetensors, a truncated or damaged file, NaN or Inf; names the file and the tensor.
    """
    folder = inside(root, component)
    variant = _variant(folder, stem)
    name = f"{stem}.{variant}" if variant else stem
    if (folder / f"{name}.safetensors").exists():
        files = [inside(root, f"{component}/{name}.safetensors")]
    else:
        files = _shards(root, component, f"{stem}.safetensors.index{'.' + variant if variant else ''}.json")
    return Weights(tuple(files), variant, sum(check_file(file) for file in files))


def _variant(folder: Path, stem: str) -> str | None:
    """Which of the stored variants is read: the plain one if there is one, else the only one there is."""
    names = sorted(path.name for path in folder.iterdir())
    if f"{stem}.safetensors" in names or f"{stem}.safetensors.index.json" in names:
        return None
    single = {name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in names if _is_variant(name, stem)}
    if len(single) == 1:
        return single.pop()
    if single:
        raise RefusedError(f"{folder} holds several variants of its weights ({', '.join(sorted(single))}): keep one")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise RefusedError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is read: convert it to safetensors "
            "(load it where you trust it, then save_pretrained)"
        )
    raise RefusedError(f"{folder / (stem + '.safetensors')} is missing: the model folder is incomplete, fetch it again")


def _is_variant(name: str, stem: str) -> bool:
    return name.startswith(f"{stem}.") and name.endswith(".safetensors") and name.count(".") == stem.count(".") + 2


def _shards(root: Path, component: str, index: str) -> list[Path]:
    files = read_json(root, f"{component}/{index}").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise RefusedError(f"{root / component / index} has no weight_map from tensors to files: fetch it again")
    return [inside(root, f"{component}/{file}") for file in sorted(set(files.values()))]


def check_file(path: Path) -> int:
    """How many numbers a safetensors file holds; all are read once.

    Raises:
        RefusedError: it is truncated, or a number is not finite.
    """
    parameters = 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                parameters += tensor.numel()
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise RefusedError(f"{path} holds NaN or Inf in {name!r}: the checkpoint is damaged")
    except (SafetensorError, OSError) as error:
        raise RefusedError(
            f"{path} is truncated or no safetensors file, fetch it again: {' '.join(str(error).split())}"
        ) from error
    return parameters

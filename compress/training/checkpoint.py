"""Checkpoints of a training run: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import RefusedError
from compress.flush import flush, flush_folder

_NAME = re.compile(r"update-(\d{8})")
_TENSORS, _FACTS = "tensors.safetensors", "facts.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after some updates.

    Attributes:
        done: updates so far.
        tensors: by name.
        facts: plain data.
    """

    done: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint beside the last one, then take older ones away; a kill in between leaves one of them whole.

    Args:
        folder: of the run; made where it is not there.
        checkpoint: its tensors are written as they are on the CPU.
    """
    name = f"update-{checkpoint.done:08d}"
    temporary = folder / f"{name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in checkpoint.tensors.items()}
    save_file(tensors, temporary / _TENSORS)
    (temporary / _FACTS).write_text(json.dumps(dict(checkpoint.facts), sort_keys=True), encoding="utf-8")
    flush(temporary)
    shutil.rmtree(folder / name, ignore_errors=True)
    temporary.rename(folder / name)
    flush_folder(folder)
    for old in folder.iterdir():
        if old.name != name and _NAME.match(old.name):
            shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None.

    Raises:
        RefusedError: its files cannot be read.
    """
    found = sorted(int(match[1]) for path in folder.glob("update-*") if (match := _NAME.fullmatch(path.name)))
    if not found:
        return None
    newest = folder / f"update-{found[-1]:08d}"
    try:
        facts = json.loads((newest / _FACTS).read_text(encoding="utf-8"))
        return Checkpoint(found[-1], load_file(newest / _TENSORS), dict(facts))
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{newest} cannot be read: {cause}; delete it to train from the start") from error

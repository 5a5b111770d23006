"""The scorer: an ONNX network that reads attributes and features off a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import RefusedError

if TYPE_CHECKING:
    import onnxruntime

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Scores:
    """What the scorer says about n pictures.

    Attributes:
        features: float32 (n, width).
        logits: head -> float32 (n, classes).
    """

    features: np.ndarray
    logits: Mapping[str, np.ndarray]


class Scorer:
    """A scorer folder, opened: `scorer.json` says what `model.onnx` takes and gives.

    `model.onnx` takes `image` float32 (n, 3, height, width) in [0, 1] and gives one features output (n, width) and
    one logits output (n, classes) per head. `scorer.json` holds schema_version, image_size [height, width], input,
    features, heads {head: [class, ...]} and the sha256 of `model.onnx`.

    Attributes:
        heads: head -> class names, in the order of the logits.
        image_size: (height, width) in pixels.
        sha256: of `model.onnx`.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Open and check a scorer folder.

        Raises:
            RefusedError: a file is missing or damaged, or the network does not have the outputs that are promised.
        """
        raw = _read(folder)
        self.folder = folder
        self.image_size: tuple[int, int] = (raw["image_size"][0], raw["image_size"][1])
        self.heads: dict[str, tuple[str, ...]] = {head: tuple(classes) for head, classes in raw["heads"].items()}
        self.sha256: str = raw["sha256"]
        self._input: str = raw["input"]
        self._features: str = raw["features"]
        self._session = _open(folder / "model.onnx", self.sha256, threads)
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        if inputs != [self._input]:
            raise RefusedError(f"the scorer {folder} takes {inputs}, but its scorer.json promises {self._input!r}")
        for name in (self._features, *self.heads):
            if name not in outputs:
                raise RefusedError(f"the scorer {folder} has no output {name!r}; model.onnx gives {outputs}")

    def score(self, images: np.ndarray, batch: int = 64) -> Scores:
        """Read features and attributes off pictures.

        Args:
            images: uint8 (n, height, width, 3); resized (bicubic, antialiased) where the scorer wants another size.
            batch: how many pictures go through the network at once.

        Raises:
            RefusedError: the network gives other shapes than scorer.json promises, or not-a-number.
        """
        outputs = [self._features, *self.heads]
        parts = [
            self._session.run(outputs, {self._input: self._prepare(images[start : start + batch])})
            for start in range(0, len(images), batch)
        ]
        features, *logits = (np.concatenate(list(column)) for column in zip(*parts, strict=True))
        scores = Scores(features.reshape(len(images), -1), dict(zip(self.heads, logits, strict=True)))
        for head, classes in self.heads.items():
            if scores.logits[head].shape != (len(images), len(classes)):
                raise RefusedError(
                    f"the head {head!r} of the scorer {self.folder} gives the shape {scores.logits[head].shape[1:]}, "
                    f"but scorer.json names {len(classes)} classes"
                )
        if not all(np.isfinite(array).all() for array in (scores.features, *scores.logits.values())):
            raise RefusedError(f"the scorer {self.folder} gives values that are not finite")
        return scores

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:3] != self.image_size:
            images = np.stack([resize(image, *self.image_size) for image in images])
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize one uint8 (h, w, 3) picture, bicubic with antialiasing."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "scorer.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"the scorer {folder} has no readable scorer.json: {error}") from error
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        raise RefusedError(f"{path} does not have schema_version {SCHEMA_VERSION}")
    size, heads = raw.get("image_size"), raw.get("heads")
    fit = (
        all(isinstance(raw.get(key), str) for key in ("input", "features", "sha256"))
        and isinstance(size, list)
        and len(size) == 2
        and all(isinstance(side, int) and side > 0 for side in size)
        and isinstance(heads, dict)
        and all(isinstance(classes, list) and _names(classes) for classes in heads.values())
    )
    if not fit:
        raise RefusedError(f"{path} needs input, features, sha256, image_size [height, width] and heads of class names")
    return raw


def _names(classes: Sequence[object]) -> bool:
    return bool(classes) and len(set(map(str, classes))) == len(classes) and all(isinstance(c, str) for c in classes)


def _open(path: Path, sha256: str, threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    try:
        data = path.read_bytes()
    except OSError as error:
        raise RefusedError(f"the scorer's network cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RefusedError(f"{path} is damaged: its sha256 is not the one in scorer.json")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises several unrelated classes for a damaged graph
        raise RefusedError(f"{path} is not a network that ONNX Runtime opens: {str(error).splitlines()[0]}") from error

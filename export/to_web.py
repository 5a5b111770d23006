"""Puts the page into an engine folder, which a browser then runs: our own files, and those of an onnxruntime-web."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from export.errors import EngineError
from export.tokenizer import FILE as TOKENIZER_FILE

PACKAGE = "onnxruntime-web"
INSTALL = f"npm install {PACKAGE}@1.30"
FOLDER = "web/onnxruntime"
"""Where the files of the package go in the engine folder."""

PROCESSOR = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
GRAPHICS = ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm")

TOKENIZER_KINDS: dict[str, frozenset[str]] = {
    "normalizer": frozenset(
        "Sequence NFC NFD NFKC NFKD Lowercase Replace Prepend Strip StripAccents Precompiled".split()
    ),
    "pre_tokenizer": frozenset("Sequence Split WhitespaceSplit Whitespace ByteLevel Metaspace".split()),
    "model": frozenset(("BPE", "Unigram")),
    "post_processor": frozenset(("Sequence", "RobertaProcessing", "BertProcessing", "TemplateProcessing", "ByteLevel")),
}
"""What `web/tokenizer.js` reads of a `tokenizer.json`."""

_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}


@dataclass(frozen=True)
class PageOptions:
    """What the page is made of.

    Attributes:
        onnxruntime: folder of the npm package onnxruntime-web; empty looks for `node_modules/onnxruntime-web` in the
            current folder and those above it.
        webgpu: whether the folder also holds the runtime for graphics cards, 27 MB more than the 14 MB of the
            processor's; a browser loads one of the two.
    """

    onnxruntime: str = ""
    webgpu: bool = True

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the package that the page needs."""
        return (*PROCESSOR, *(GRAPHICS if self.webgpu else ()))


@dataclass(frozen=True)
class Package:
    """An installed onnxruntime-web."""

    folder: Path
    version: str
    licence: str


def find_package(options: PageOptions) -> Package:
    """Find the installed onnxruntime-web.

    Raises:
        EngineError: there is none, or it lacks a file; says what to do.
    """
    here = Path.cwd()
    places = [folder / "node_modules" / PACKAGE for folder in (here, *here.parents)]
    asked = Path(options.onnxruntime).expanduser() if options.onnxruntime else None
    folder = asked or next((place for place in places if (place / "package.json").is_file()), None)
    if folder is None:
        raise EngineError(
            f"the target web needs the npm package {PACKAGE}, and there is no node_modules/{PACKAGE} here or above: "
            f"run `{INSTALL}`, or name its folder with the recipe key web.onnxruntime"
        )
    try:
        said: Any = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        named, version, licence = (str(said[key]) for key in ("name", "version", "license"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{folder} is not the npm package {PACKAGE} (its package.json cannot be read): run `{INSTALL}`, or name "
            "its folder with the recipe key web.onnxruntime"
        ) from error
    missing = [name for name in options.files if not (folder / "dist" / name).is_file()]
    if named != PACKAGE or missing:
        cause = f"its dist has no {missing[0]}" if named == PACKAGE else f"it is {named}"
        raise EngineError(f"{folder} ({version}) does not serve the target web: {cause}; run `{INSTALL}`")
    return Package(folder, version, licence)


def write_page(options: PageOptions, folder: Path) -> dict[str, str]:
    """Put the page and its runtime into an engine folder; equal packages give equal files.

    Args:
        options: where the runtime comes from.
        folder: with the tokenizers already in place.

    Returns:
        What the manifest says about the runtime.

    Raises:
        EngineError: onnxruntime-web is missing or incomplete, or a tokenizer is of a kind that the page cannot read.
    """
    package = find_package(options)
    for path in sorted(folder.glob(f"*/{TOKENIZER_FILE}")):
        _require_readable(path)
    for name, source in _tree(resources.files("export") / "site"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in options.files:
        shutil.copyfile(package.folder / "dist" / name, folder / FOLDER / name)
    return {"runtime": f"{PACKAGE} {package.version}", "licence": package.licence}


def _tree(folder: Traversable, above: str = "") -> Iterator[tuple[str, Traversable]]:
    """Every file of a folder, by its path in it."""
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.is_dir():
            yield from _tree(entry, f"{above}{entry.name}/")
        else:
            yield above + entry.name, entry


def _require_readable(path: Path) -> None:
    """Refuse a tokenizer with a step that the page does not have."""
    content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for what, known in TOKENIZER_KINDS.items():
        for kind in _kinds(content.get(what), _STEPS.get(what, "")):
            if kind not in known:
                raise EngineError(
                    f"the target web cannot read {path.parent.name}/{path.name}: its {what} is of the kind {kind}; "
                    f"it reads {', '.join(sorted(known))}"
                )


def _kinds(step: Any, inner: str) -> Iterator[str]:
    if step is not None:
        yield str(step["type"])
        for each in step.get(inner, ()) if step["type"] == "Sequence" else ():
            yield from _kinds(each, inner)

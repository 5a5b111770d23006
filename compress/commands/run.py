"""`compress run`: generate pictures with an engine, without PyTorch."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import RecipeError, RefusedError
from compress.terminal import Terminal

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26
DEFAULT_STRENGTH = 0.8


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", metavar="ENGINE", type=Path, help="an engine folder")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to draw, or a class; may be repeated")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="picture k of a prompt has seed N + k")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pictures per prompt")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PATH", help="a .png file, or a folder")
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--target", metavar="NAME", help="a target of the engine; the best one here by default")
    parser.add_argument("--threads", type=int, metavar="N", help="of the runtime")
    parser.add_argument("--trusted", action="store_true", help="run machine code of the engine: you know who built it")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="image-to-image: begin from this picture")
    parser.add_argument("--strength", type=float, metavar="S", help="image-to-image: in (0, 1], 1 keeps nothing (0.8)")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="inpainting: white is painted, black is kept")


def execute(arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any]:
    """Generate the pictures and write them as PNG."""
    _check(arguments)
    from PIL import Image

    from export.engine import Engine

    prompts, seeds = _requests(arguments)
    options = _options(arguments, len(seeds))
    paths = _paths(arguments.out, len(seeds))
    began = time.perf_counter()
    engine = Engine.open(
        arguments.engine, target=arguments.target, threads=arguments.threads, trusted=arguments.trusted
    )
    opened = time.perf_counter()
    pictures = engine.generate(prompts=prompts, seeds=seeds, **options)
    done = time.perf_counter()
    for path, picture in zip(paths, pictures, strict=True):
        _write(Image.fromarray(picture), path)
        terminal.say(str(path))
    return {
        "engine": str(arguments.engine),
        "target": engine.target,
        "pictures": [
            {"file": str(path), "prompt": prompt, "seed": seed}
            for path, prompt, seed in zip(paths, prompts, seeds, strict=True)
        ],
        "open_ms": (opened - began) * 1e3,
        "generate_ms": (done - opened) * 1e3,
    }


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not fit together, before anything is loaded."""
    if not arguments.prompt:
        raise RecipeError("compress run needs --prompt TEXT")
    if not 1 <= arguments.count <= 100_000:
        raise RecipeError(f"--count must be from 1 to 100000, not {arguments.count}")
    if not 0 <= arguments.seed < 2**63:
        raise RecipeError(f"--seed must be a whole number from 0 to 2^63 - 1, not {arguments.seed}")
    if arguments.threads is not None and not 1 <= arguments.threads <= 4096:
        raise RecipeError(f"--threads must be from 1 to 4096, not {arguments.threads}")
    if arguments.strength is not None and not 0.0 < arguments.strength <= 1.0:
        raise RecipeError(f"--strength must be above 0 and at most 1, not {arguments.strength}")
    for option in ("mask", "strength"):
        if getattr(arguments, option) is not None and arguments.init_image is None:
            raise RecipeError(f"--{option} needs --init-image FILE")
    many = len(arguments.prompt) * arguments.count > 1
    if many and arguments.out.suffix.lower() == ".png":
        raise RecipeError(f"-o names one file, {arguments.out}, for more than one picture; name a folder")
    if not many and arguments.out.suffix.lower() not in ("", ".png"):
        raise RecipeError(f"-o {arguments.out}: pictures are written as .png")


def _requests(arguments: argparse.Namespace) -> tuple[list[str], list[int]]:
    pairs = [(prompt, arguments.seed + index) for prompt in arguments.prompt for index in range(arguments.count)]
    return [prompt for prompt, _ in pairs], [seed for _, seed in pairs]


def _paths(out: Path, count: int) -> list[Path]:
    """Return where each picture goes; refused now, not after the work, where nothing can be written."""
    single = out.suffix.lower() == ".png"
    folder = out.parent if single else out
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RefusedError(f"{out} cannot be written: {there} is no folder that may be written to")
    return [out] if single else [out / f"{index:04d}.png" for index in range(count)]


def _write(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror or error}") from error


def _options(arguments: argparse.Namespace, count: int) -> dict[str, Any]:
    options: dict[str, Any] = {"height": arguments.height, "width": arguments.width}
    if arguments.negative is not None:
        options["negative_prompts"] = [arguments.negative] * count
    if arguments.init_image is None:
        return options
    import numpy as np

    image = _read(arguments.init_image, "RGB")
    size = (arguments.width or image.width, arguments.height or image.height)
    options |= {"height": size[1], "width": size[0], "image": np.asarray(image.resize(size))[None]}
    if arguments.mask is not None:
        options["mask"] = np.asarray(_read(arguments.mask, "L").resize(size))[None] >= 128
        options["strength"] = arguments.strength
    else:
        options["strength"] = DEFAULT_STRENGTH if arguments.strength is None else arguments.strength
    return options


def _read(path: Path, mode: str) -> Image.Image:
    """Open a picture from an untrusted file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RefusedError(f"{path}: {image.width}x{image.height} pixels are too many")
            return image.convert(mode)
    except FileNotFoundError:
        raise RefusedError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise RefusedError(f"{path}: is not a picture that can be read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RefusedError(f"{path}: cannot be read: {error}") from error

"""Procedural generator of captioned 64x64 RGB scenes: every scene is a pure function of its own integer seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

SIDE = 64
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
LAYOUTS = ("centre", "left", "right", "top", "bottom", "left of", "above")
TEXTURES = ("plain", "striped", "dotted")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.12, 0.78, 0.18),
    "blue": (0.10, 0.22, 0.92),
    "yellow": (0.97, 0.86, 0.08),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "gray": (0.44, 0.44, 0.46),
    "brown": (0.42, 0.24, 0.10),
    "purple": (0.38, 0.14, 0.46),
    "teal": (0.06, 0.42, 0.44),
}
#: Recogniser heads in order, each with its class names; the `second_*` heads apply to two-object scenes only.
HEADS: dict[str, tuple[str, ...]] = {
    "layout": LAYOUTS,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": SIZES,
    "second_shape": SHAPES,
    "second_colour": tuple(COLOURS),
    "second_size": SIZES,
    "texture": TEXTURES,
    "background": tuple(BACKGROUNDS),
}
#: First seed of each split; the splits are 2**40 seeds apart.
SPLITS: dict[str, int] = {"train": 0, "calibration": 1 << 40, "heldout": 2 << 40, "check": 3 << 40}
PAIR_SHARE = 0.3
_SINGLE_LAYOUTS = 5
_HELD_OUT_SHARE = 5  # of 16 caption buckets
_RADII = (9.0, 14.0)
_NEAR, _MIDDLE, _FAR = 16.5, 32.0, 47.5
_FIRST_CENTRES = ((32.0, 32.0), (_NEAR, 32.0), (_FAR, 32.0), (32.0, _NEAR), (32.0, _FAR), (_NEAR, 32.0), (32.0, _NEAR))
_SECOND_CENTRES = ((_FAR, 32.0), (32.0, _FAR))


@dataclass(frozen=True)
class Scenes:
    """A batch of n scenes: `images` float32 (n, 3, 64, 64) in [0, 1], `captions`, `attributes` head -> int64 (n,).

    A head that does not apply to a scene (second object of a one-object scene) holds -1.
    """

    images: torch.Tensor
    captions: list[str]
    attributes: dict[str, torch.Tensor]


def _mix(values: np.ndarray) -> np.ndarray:
    """Splitmix64 finaliser (Steele, Lea and Flood 2014): uint64 -> uint64 of the same shape, well mixed."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _uniform(seeds: np.ndarray, salt: int, columns: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 (n, columns), a pure function of (seed, salt, column)."""
    lanes = np.arange(columns, dtype=np.uint64) + np.uint64(salt * 1009)
    return (_mix(_mix(seeds)[:, None] + _mix(lanes)[None, :]) >> np.uint64(11)) * (1.0 / (1 << 53))


def _pick_attributes(uniform: np.ndarray) -> np.ndarray:
    """Class ids (n, 9) in the order of `HEADS` from uniform numbers (n, 10); -1 where a head does not apply."""
    pair = uniform[:, 0] < PAIR_SHARE
    single = (uniform[:, 1] * _SINGLE_LAYOUTS).astype(np.int64)
    double = _SINGLE_LAYOUTS + (uniform[:, 1] * (len(LAYOUTS) - _SINGLE_LAYOUTS)).astype(np.int64)
    ids = np.empty((len(uniform), len(HEADS)), np.int64)
    ids[:, 0] = np.where(pair, double, single)
    for column, (head, classes) in enumerate(list(HEADS.items())[1:], start=1):
        ids[:, column] = (uniform[:, column + 1] * len(classes)).astype(np.int64)
        if head.startswith("second_"):
            ids[~pair, column] = -1
    return ids


def _is_held_out(ids: np.ndarray) -> np.ndarray:
    """True (n,) where the caption given by class ids (n, 9) belongs to the held-out fraction never trained on."""
    code = np.zeros(len(ids), np.uint64)
    for column in range(ids.shape[1]):
        code = code * np.uint64(16) + (ids[:, column] + 1).astype(np.uint64)
    return _mix(code) % np.uint64(16) < np.uint64(_HELD_OUT_SHARE)


def attribute_ids(split: str, start: int, count: int) -> np.ndarray:
    """Class ids int64 (count, 9) of scenes `start ... start + count - 1` of a split, columns in the order of `HEADS`.

    Captions of "heldout" never occur in the other splits. Raises KeyError for an unknown split.
    """
    seeds = np.arange(start, start + count, dtype=np.uint64) + np.uint64(SPLITS[split])
    ids = np.empty((count, len(HEADS)), np.int64)
    open_rows = np.arange(count)
    salt = 1
    while len(open_rows):
        drawn = _pick_attributes(_uniform(seeds[open_rows], salt, 10))
        fits = np.ones(len(drawn), bool) if split == "check" else _is_held_out(drawn) == (split == "heldout")
        ids[open_rows[fits]] = drawn[fits]
        open_rows = open_rows[~fits]
        salt += 1
    return ids


def caption(ids: np.ndarray) -> str:
    """The caption of one scene from its class ids (9,), at most 15 words."""
    names = {head: classes[ids[i]] for i, (head, classes) in enumerate(HEADS.items()) if ids[i] >= 0}
    first = f"a {names['size']} {names['colour']} {names['shape']}"
    ground = f"on a {names['texture']} {names['background']} background"
    if "second_shape" in names:
        second = f"a {names['second_size']} {names['second_colour']} {names['second_shape']}"
        return f"{first} {names['layout']} {second} {ground}"
    return f"{first} at the {names['layout']} {ground}"


def named_attributes(ids: np.ndarray) -> dict[str, str]:
    """Head -> class name of one scene's class ids (9,); heads that do not apply are absent."""
    return {head: classes[ids[i]] for i, (head, classes) in enumerate(HEADS.items()) if ids[i] >= 0}


def _texture_masks(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-texture factor and lift (textures, 64, 64): ground = colour * factor + lift, all with a fixed phase."""
    line = torch.arange(SIDE, device=device, dtype=torch.float32) + 0.5
    factor = torch.ones(len(TEXTURES), SIDE, SIDE, device=device)
    lift = torch.zeros_like(factor)
    bands = (((line % 16.0) - 8.0).abs() - 4.0).clamp(-0.5, 0.5) + 0.5
    factor[1] = (1.0 - 0.62 * bands)[:, None].expand(SIDE, SIDE)
    wave = (line % 16.0) - 8.0
    distance = (wave[:, None] ** 2 + wave[None, :] ** 2).sqrt()
    lift[2] = 0.34 * (3.6 - distance).clamp(-0.5, 0.5).add(0.5)
    return factor, lift


def _distance(shape: int, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Signed distance in pixels (negative inside) of one shape at offsets x, y (n, 64, 64) from its centre."""
    name = SHAPES[shape]
    if name == "circle":
        return (x * x + y * y).sqrt() - radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if name == "triangle":
        down = y - 0.18 * radius
        return torch.maximum(down, 0.8660254 * x.abs() - 0.5 * down) - 0.58 * radius
    arm = 0.34 * radius
    across = torch.maximum(x.abs() - radius, y.abs() - arm)
    return torch.minimum(across, torch.maximum(x.abs() - arm, y.abs() - radius))


def _paint(
    images: torch.Tensor,
    rows: torch.Tensor,
    shapes: torch.Tensor,
    centres: torch.Tensor,
    radii: torch.Tensor,
    colours: torch.Tensor,
) -> None:
    """Blend one object into each `rows` picture of `images` in place, antialiased over one pixel."""
    line = torch.arange(SIDE, device=images.device, dtype=torch.float32) + 0.5
    for shape in range(len(SHAPES)):
        chosen = (shapes == shape).nonzero()[:, 0]
        if len(chosen) == 0:
            continue
        x = line[None, None, :] - centres[chosen, 0, None, None]
        y = line[None, :, None] - centres[chosen, 1, None, None]
        cover = (0.5 - _distance(shape, x, y, radii[chosen, None, None])).clamp(0.0, 1.0)[:, None]
        target = rows[chosen]
        ground = images[target]
        images[target] = ground + cover * (colours[chosen, :, None, None] - ground)


def draw_scenes(split: str, start: int, count: int, device: torch.device | str = "cpu") -> Scenes:
    """Draw scenes `start ... start + count - 1` of a split; equal arguments give equal pictures on a given device.

    Raises KeyError for an unknown split.
    """
    device = torch.device(device)
    ids = attribute_ids(split, start, count)
    seeds = np.arange(start, start + count, dtype=np.uint64) + np.uint64(SPLITS[split])
    jitter = torch.from_numpy(_uniform(seeds, 0, 20)).to(device, torch.float32) * 2.0 - 1.0
    classes = torch.from_numpy(ids).to(device)
    colours = torch.tensor(list(COLOURS.values()), device=device)
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=device)
    radii = torch.tensor(_RADII, device=device)

    factor, lift = _texture_masks(device)
    ground = grounds[classes[:, 8]] + 0.025 * jitter[:, 0:3]
    images = ground[:, :, None, None] * factor[classes[:, 7], None] + lift[classes[:, 7], None]

    everyone = torch.arange(count, device=device)
    centre = torch.tensor(_FIRST_CENTRES, device=device)[classes[:, 0]] + 1.2 * jitter[:, 3:5]
    _paint(
        images,
        everyone,
        classes[:, 1],
        centre,
        radii[classes[:, 3]] + 0.3 * jitter[:, 5],
        colours[classes[:, 2]] + 0.025 * jitter[:, 6:9],
    )
    pairs = (classes[:, 4] >= 0).nonzero()[:, 0]
    if len(pairs):
        two, shake = classes[pairs], jitter[pairs]
        _paint(
            images,
            pairs,
            two[:, 4],
            torch.tensor(_SECOND_CENTRES, device=device)[two[:, 0] - _SINGLE_LAYOUTS] + 1.2 * shake[:, 9:11],
            radii[two[:, 6]] + 0.3 * shake[:, 11],
            colours[two[:, 5]] + 0.025 * shake[:, 12:15],
        )
    attributes = {head: classes[:, i] for i, head in enumerate(HEADS)}
    return Scenes(images.clamp_(0.0, 1.0), [caption(row) for row in ids], attributes)

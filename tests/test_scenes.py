"""Tests of the scene generator: determinism, captions that agree with pictures and attributes, disjoint splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.reference.prompts import PROMPT_FILES, prompt_rows
from recipes.reference.scenes import BACKGROUNDS, COLOURS, HEADS, SPLITS, attribute_ids, caption, draw_scenes

PROMPTS = Path(__file__).resolve().parent.parent / "recipes" / "reference" / "prompts"


def test_scene_depends_on_its_seed_alone() -> None:
    whole = draw_scenes("train", 100, 40)
    again = draw_scenes("train", 100, 40)
    part = draw_scenes("train", 117, 5)
    assert torch.equal(whole.images, again.images)
    assert torch.equal(whole.images[17:22], part.images)
    assert whole.captions[17:22] == part.captions
    assert not torch.equal(whole.images, draw_scenes("train", 101, 40).images)


def test_pictures_are_in_range_and_varied() -> None:
    images = draw_scenes("heldout", 0, 64).images
    assert images.shape == (64, 3, 64, 64)
    assert images.dtype == torch.float32
    assert float(images.min()) >= 0.0
    assert float(images.max()) <= 1.0
    assert float(images.std(0).mean()) > 0.1


def test_captions_name_every_attribute() -> None:
    scenes = draw_scenes("check", 0, 300)
    for row, text in enumerate(scenes.captions):
        assert len(text.split()) <= 15
        for head, classes in HEADS.items():
            index = int(scenes.attributes[head][row])
            assert (index < 0) == (head.startswith("second_") and " at the " in text)
            if index >= 0:
                assert f" {classes[index]} " in f" {text} "


def test_objects_have_the_colour_and_place_the_caption_says() -> None:
    scenes = draw_scenes("check", 0, 200)
    names, palette = list(COLOURS), torch.tensor(list(COLOURS.values()))
    single = {"centre": (32, 32), "left": (16, 32), "right": (47, 32), "top": (32, 16), "bottom": (32, 47)}
    pairs = {"left of": ((16, 32), (47, 32)), "above": ((32, 16), (32, 47))}
    for row in range(200):
        layout = HEADS["layout"][int(scenes.attributes["layout"][row])]
        places = pairs.get(layout, (single.get(layout, (0, 0)),))
        for head, (x, y) in zip(("colour", "second_colour"), places, strict=False):
            pixel = scenes.images[row, :, y, x]
            nearest = int((palette - pixel).abs().sum(1).argmin())
            assert names[nearest] == names[int(scenes.attributes[head][row])]


def test_background_colour_is_the_one_named() -> None:
    scenes = draw_scenes("check", 500, 100)
    palette = torch.tensor(list(BACKGROUNDS.values()))
    corner = scenes.images[:, :, 1, 1]  # bright band of the stripes, gap of the dots
    nearest = (palette[None] - corner[:, None]).abs().sum(2).argmin(1)
    striped = scenes.attributes["texture"] == HEADS["texture"].index("striped")
    assert torch.equal(nearest[~striped], scenes.attributes["background"][~striped])


def test_held_out_captions_never_occur_in_training() -> None:
    held_out = {caption(row) for row in attribute_ids("heldout", 0, 3000)}
    seen = {caption(row) for split in ("train", "calibration") for row in attribute_ids(split, 0, 20000)}
    assert len(held_out) > 1500
    assert not held_out & seen
    starts = sorted(SPLITS.values())
    assert min(np.diff(starts)) >= 1 << 40


def test_class_frequencies() -> None:
    ids = attribute_ids("check", 0, 8000)
    assert abs(float((ids[:, 4] >= 0).mean()) - 0.3) < 0.03
    for column, classes in enumerate(HEADS.values()):
        counts = np.bincount(ids[ids[:, column] >= 0, column], minlength=len(classes))
        assert counts.min() > 0.7 * counts.sum() / len(classes)


@pytest.mark.parametrize("split", PROMPT_FILES)
def test_prompt_files_are_what_the_generator_writes(split: str) -> None:
    rows = [json.loads(line) for line in (PROMPTS / f"{split}.jsonl").read_text().splitlines()]
    assert rows == prompt_rows(split, PROMPT_FILES[split])
    assert all(set(row["attributes"]) <= set(HEADS) for row in rows)


def test_prompt_files_are_disjoint() -> None:
    prompts = {
        split: [json.loads(line)["prompt"] for line in (PROMPTS / f"{split}.jsonl").read_text().splitlines()]
        for split in PROMPT_FILES
    }
    assert {split: len(set(rows)) for split, rows in prompts.items()} == PROMPT_FILES
    assert not set(prompts["calibration"]) & set(prompts["heldout"])

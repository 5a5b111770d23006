"""The scorer folder and the CLIP score: what they read, and what they refuse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import RefusedError
from compress.measure.clip_score import ClipScorer
from compress.measure.scorer import Scorer

HEADS = {"colour": ["red", "green", "blue"], "level": ["dark", "bright"]}


def write_scorer(folder: Path, change: Callable[[dict[str, Any]], object] = lambda raw: None) -> Path:
    """Write a scorer that reads the average colour: features are the channel means, two linear heads on top."""
    folder.mkdir(parents=True, exist_ok=True)
    level = np.array([[-1, 1]] * 3, np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["features"], keepdims=0),
            helper.make_node("Identity", ["features"], ["colour"]),
            helper.make_node("MatMul", ["features", "weight"], ["brightness"]),
            helper.make_node("Add", ["brightness", "bias"], ["level"]),
        ],
        "scorer",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("colour", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("level", TensorProto.FLOAT, ["n", 2]),
        ],
        [
            numpy_helper.from_array(np.array([2, 3], np.int64), "axes"),
            numpy_helper.from_array(level, "weight"),
            numpy_helper.from_array(np.array([1.0, -1.0], np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    raw = {
        "schema_version": 1,
        "image_size": [8, 8],
        "input": "image",
        "features": "features",
        "heads": HEADS,
        "sha256": hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest(),
    }
    change(raw)
    (folder / "scorer.json").write_text(json.dumps(raw))
    return folder


def test_reads_attributes_and_features(tmp_path: Path) -> None:
    images = np.zeros((5, 8, 8, 3), np.uint8)
    images[:3] = np.eye(3, dtype=np.uint8)[:, None, None] * 200
    images[3] = (250, 255, 250)
    scorer = Scorer(write_scorer(tmp_path))
    scores = scorer.score(images, batch=2)
    assert scores.logits["colour"].argmax(1)[:4].tolist() == [0, 1, 2, 1]
    assert scores.logits["level"].argmax(1).tolist() == [0, 0, 0, 1, 0]
    np.testing.assert_allclose(scores.features, images.mean((1, 2)) / 255, atol=1e-6)


def test_resizes_pictures_of_another_size(tmp_path: Path) -> None:
    images = np.broadcast_to(np.array([10, 20, 200], np.uint8), (2, 24, 16, 3))
    scores = Scorer(write_scorer(tmp_path)).score(images)
    np.testing.assert_allclose(scores.features, [[10 / 255, 20 / 255, 200 / 255]] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=9), "schema_version 1"),
        (lambda raw: raw.pop("heads"), "needs input"),
        (lambda raw: raw.update(image_size=[8, -8]), "needs input"),
        (lambda raw: raw.update(heads={"colour": ["red", "red"]}), "needs input"),
        (lambda raw: raw.update(heads={"size": ["small"]}), "no output 'size'"),
        (lambda raw: raw.update(features="nothing"), "no output 'nothing'"),
        (lambda raw: raw.update(input="picture"), "promises 'picture'"),
        (lambda raw: raw.update(sha256="0" * 64), "damaged"),
    ],
)
def test_refuses_a_wrong_description(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        Scorer(write_scorer(tmp_path, change))


def test_refuses_missing_or_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"no readable scorer\.json"):
        Scorer(tmp_path / "nowhere")
    folder = write_scorer(tmp_path / "cut")
    data = (folder / "model.onnx").read_bytes()[:40]
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(RefusedError, match="damaged"):
        Scorer(folder)
    raw = json.loads((folder / "scorer.json").read_text())
    raw["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "scorer.json").write_text(json.dumps(raw))
    with pytest.raises(RefusedError, match="not a network"):
        Scorer(folder)


def test_refuses_heads_of_another_width(tmp_path: Path) -> None:
    folder = write_scorer(tmp_path, lambda raw: raw.update(heads={"colour": ["red", "green"]}))
    with pytest.raises(RefusedError, match="names 2 classes"):
        Scorer(folder).score(np.zeros((1, 8, 8, 3), np.uint8))


def test_clip_score_is_the_cosine(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

    letters = "abcdefgh"
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"), unk_token="<|endoftext|>"
    ).save_pretrained(tmp_path)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**narrow, "vocab_size": len(vocabulary), "max_position_embeddings": 8, "eos_token_id": 1},
            vision_config={**narrow, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    prompts = ["a b c", "d", "h g f e d c b a a a a a"]
    scores = ClipScorer(tmp_path).score(images, prompts, batch=2)
    tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    for image, prompt, score in zip(images, prompts, scores, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=8, return_tensors="pt")
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)
        with torch.no_grad():
            cosine = torch.nn.functional.cosine_similarity(
                model.get_text_features(tokens.input_ids).pooler_output, model.get_image_features(pixels).pooler_output
            )
        assert score == pytest.approx(100 * max(float(cosine), 0.0), abs=1e-4)
    assert scores.max() > 0


def test_clip_score_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="not a CLIP model folder"):
        ClipScorer(tmp_path)

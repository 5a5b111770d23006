"""CLIP score: how well pictures fit their prompts, through a CLIP model folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import RefusedError


class ClipScorer:
    """A CLIP model folder as transformers saves it (safetensors only), opened."""

    def __init__(self, folder: Path) -> None:
        """Open the folder; nothing is downloaded.

        Raises:
            RefusedError: the folder does not hold a CLIP model with its tokenizer and preprocessor_config.json.
        """
        from transformers import CLIPModel, CLIPTokenizerFast

        try:
            self._config: dict[str, Any] = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self._tokenizer: Any = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises many unrelated classes for a damaged folder
            raise RefusedError(f"{folder} is not a CLIP model folder: {str(error).splitlines()[0]}") from error

    def score(self, images: np.ndarray, prompts: Sequence[str], batch: int = 16) -> np.ndarray:
        """Return 100 max(cosine(picture, prompt), 0) of every picture.

        Source: Hessel et al. 2021, arXiv 2104.08718, equation 1, with the weight 100 that reports commonly use.

        Args:
            images: uint8 (n, height, width, 3).
            prompts: n prompts.
            batch: how many pairs go through the network at once.

        Returns:
            float64 (n,).
        """
        import torch

        cosines = []
        with torch.inference_mode():
            for start in range(0, len(prompts), batch):
                tokens = self._tokenizer(
                    list(prompts[start : start + batch]),
                    padding=True,
                    truncation=True,
                    max_length=self._model.config.text_config.max_position_embeddings,
                    return_tensors="pt",
                )
                pixels = torch.from_numpy(self._pixels(images[start : start + batch]))
                output = self._model(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
                )
                cosines.append((output.image_embeds * output.text_embeds).sum(-1).double().numpy())
        scores: np.ndarray = 100.0 * np.maximum(np.concatenate(cosines), 0.0)
        return scores

    def _pixels(self, images: np.ndarray) -> np.ndarray:
        """Resize the short side, crop the centre and normalise, as preprocessor_config.json says."""
        from PIL import Image

        side = int(self._model.config.vision_config.image_size)
        average = np.array(self._config["image_mean"], np.float32)
        deviation = np.array(self._config["image_std"], np.float32)
        pixels = []
        for image in images:
            height, width = image.shape[:2]
            scale = side / min(height, width)
            size = (max(side, round(width * scale)), max(side, round(height * scale)))
            large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), np.float32)
            top, left = (large.shape[0] - side) // 2, (large.shape[1] - side) // 2
            pixels.append((large[top : top + side, left : left + side] / np.float32(255) - average) / deviation)
        return np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))

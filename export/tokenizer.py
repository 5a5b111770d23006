"""A tokenizer read from one `tokenizer.json`, without transformers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FILE = "tokenizer.json"


class TokenizerError(ValueError):
    """The tokenizer file is missing or damaged; one sentence."""


class Tokenizer:
    """Prompts to padded token ids. The padding token and side are those of `tokenizer.json`."""

    def __init__(self, text: str) -> None:
        """Read the contents of a `tokenizer.json`.

        Raises:
            TokenizerError: it cannot be read, or says nothing about padding.
        """
        self._text = text
        self._by_length: dict[int, Any] = {}
        self._lock = threading.Lock()
        if self._read().padding is None:
            raise TokenizerError(f"{FILE} does not say how to pad")

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            TokenizerError: there is none, or it is damaged.
        """
        file = Path(path)
        file = file / FILE if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"the tokenizer {file} cannot be read: {type(error).__name__}") from error
        return cls(text)

    def encode(self, prompts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize, cut and pad to `max_length`.

        Returns:
            int64 `input_ids` and `attention_mask`, each (len(prompts), max_length).
        """
        encoded = self._of_length(max_length).encode_batch(list(prompts))
        shape = (len(encoded), max_length)
        ids = np.array([row.ids for row in encoded], np.int64).reshape(shape)
        return ids, np.array([row.attention_mask for row in encoded], np.int64).reshape(shape)

    def _of_length(self, max_length: int) -> Any:
        with self._lock:
            if max_length not in self._by_length:
                tokenizer = self._read()
                padding = {**tokenizer.padding, "length": max_length}
                padding["pad_to_multiple_of"] = None
                tokenizer.enable_padding(**padding)
                side = (tokenizer.truncation or {}).get("direction", "right")
                tokenizer.enable_truncation(max_length, direction=side)
                self._by_length[max_length] = tokenizer
            return self._by_length[max_length]

    def _read(self) -> Any:
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:
            raise TokenizerError(f"{FILE} is damaged: {' '.join(str(error).split())}") from error

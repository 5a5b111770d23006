"""A transformers tokenizer written as the one `tokenizer.json` that an engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import RefusedError
from export.tokenizer import FILE, Tokenizer

_PROBES = ("", "a red square", "Two BLUE circles, left of  a thin line.", "naïve 漢字 & 100%", "word " * 200)


def portable(hf_tokenizer: Any) -> Tokenizer:
    """The same tokenizer without transformers; compared on a few prompts.

    Raises:
        RefusedError: it has no fast form, no padding token, or gives other ids.
    """
    tokenizer = Tokenizer(_json(hf_tokenizer))
    length = min(int(hf_tokenizer.model_max_length), 64)
    ids, mask = tokenizer.encode(_PROBES, length)
    theirs = hf_tokenizer(
        list(_PROBES), padding="max_length", max_length=length, truncation=True, return_attention_mask=True
    )
    if not (np.array_equal(ids, theirs["input_ids"]) and np.array_equal(mask, theirs["attention_mask"])):
        raise RefusedError(f"{type(hf_tokenizer).__name__} gives other tokens once written as {FILE}")
    return tokenizer


def save_tokenizer(hf_tokenizer: Any, folder: str | Path) -> Path:
    """Write `folder/tokenizer.json`, padding and truncation included, and return its path.

    Raises:
        RefusedError: as for `portable`.
    """
    portable(hf_tokenizer)
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_json(hf_tokenizer), encoding="utf-8")
    return path


def _json(hf_tokenizer: Any) -> str:
    from tokenizers import Tokenizer as Backend

    backend = getattr(hf_tokenizer, "backend_tokenizer", None)
    name = type(hf_tokenizer).__name__
    if backend is None:
        raise RefusedError(f"{name} is a Python tokenizer; convert it to its fast form first")
    if hf_tokenizer.pad_token_id is None:
        raise RefusedError(f"{name} has no padding token; give it one")
    copy = Backend.from_str(backend.to_str())
    length = int(min(hf_tokenizer.model_max_length, 2**20))
    copy.enable_truncation(length, direction=hf_tokenizer.truncation_side)
    copy.enable_padding(
        length=length,
        direction=hf_tokenizer.padding_side,
        pad_id=hf_tokenizer.pad_token_id,
        pad_type_id=hf_tokenizer.pad_token_type_id,
        pad_token=hf_tokenizer.pad_token,
    )
    return str(copy.to_str())

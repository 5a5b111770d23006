"""The shared tokenizer and CLIP text encoder: one word a token, pretrained to read the attributes out of a caption."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    HEADS,
    LAYOUTS,
    SHAPES,
    SIZES,
    TEXTURES,
    attribute_ids,
    caption,
)
from recipes.reference.trainer import Budget, train

TEXT_BUDGET = Budget(steps=600, rate=1e-3, warmup=50, decay=200, average=0.99, save_seconds=20.0)
TOKENS = 20
WIDTH = 128
_BATCH = 128
_START, _END = "<|startoftext|>", "<|endoftext|>"


def caption_words() -> list[str]:
    """Every word a caption can hold, sorted."""
    words = {"a", "at", "the", "on", "background", *SHAPES, *SIZES, *COLOURS, *TEXTURES, *BACKGROUNDS}
    for layout in LAYOUTS:
        words.update(layout.split())
    return sorted(words)


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair pieces of `word` under merge `ranks` (Sennrich et al. 2016, arXiv 1508.07909)."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        rank, place = min(
            (ranks.get((left, right), len(ranks) + 1), i) for i, (left, right) in enumerate(itertools.pairwise(pieces))
        )
        if rank > len(ranks):
            break
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    return pieces


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write an ordinary CLIP tokenizer whose merges make one token of every caption word, and return it.

    Later merges rank below earlier ones, so a word that is whole stays whole.
    """
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in caption_words():
        pieces = _split(word, ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            entries.append(pieces[0] + pieces[1])
            pieces = _split(word, ranks)
    entries = list(dict.fromkeys(entries))
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {entry: index for index, entry in enumerate([*entries, _START, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, indent=0) + "\n")
    merges = ["#version: 0.2", *(f"{left} {right}" for left, right in ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": _END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}, indent=2)
        + "\n"
    )
    return CLIPTokenizer.from_pretrained(folder)


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids int64 (n, 20), padded as the pipelines pad."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Untrained CLIP text encoder, 2 layers of width 128, 20 positions."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class AttributeReadout(torch.nn.Module):
    """Text encoder with linear readouts: all attributes at the pooled output, each object's own at its shape word.

    The word readouts sit on the last and on the penultimate hidden states, which SD1-type and SD3 pipelines feed to
    their denoisers.
    """

    def __init__(self, encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = torch.nn.ModuleDict({head: torch.nn.Linear(WIDTH, len(names)) for head, names in HEADS.items()})
        sizes = (*(len(HEADS[head]) for head in ("shape", "colour", "size")), 2)
        self.words = torch.nn.ModuleList([torch.nn.Linear(WIDTH, sum(sizes)) for _ in range(2)])
        self.sizes = sizes
        shape_ids = torch.tensor(tokenizer.convert_tokens_to_ids([f"{shape}</w>" for shape in SHAPES]))
        self.shape_ids: torch.Tensor
        self.register_buffer("shape_ids", shape_ids, persistent=False)

    def loss(self, tokens: torch.Tensor, attributes: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of all readouts and the share of pooled attributes read correctly."""
        out = self.encoder(tokens, output_hidden_states=True)
        total = out.text_embeds.new_zeros(())
        right, applied = total.clone(), total.clone()
        for head, layer in self.pooled.items():
            logits, target = layer(out.text_embeds), attributes[head]
            total = total + functional.cross_entropy(logits, target, ignore_index=-1)
            right = right + (logits.argmax(1) == target).sum()
            applied = applied + (target >= 0).sum()
        rows, places = torch.isin(tokens, self.shape_ids).nonzero(as_tuple=True)
        second = torch.zeros_like(rows)
        second[1:] = (rows[1:] == rows[:-1]).long()
        wanted = [
            torch.where(second == 1, attributes[f"second_{head}"][rows], attributes[head][rows])
            for head in ("shape", "colour", "size")
        ]
        states = (out.hidden_states[-2], self.encoder.text_model.final_layer_norm(out.hidden_states[-1]))
        for layer, hidden in zip(self.words, states, strict=True):
            parts = layer(hidden[rows, places]).split(self.sizes, dim=1)
            for logits, target in zip(parts, [*wanted, second], strict=True):
                total = total + functional.cross_entropy(logits, target)
        return total / (len(HEADS) + 8), right / applied


def train_text_encoder(
    path: Path,
    tokenizer: CLIPTokenizer,
    device: torch.device,
    budget: Budget = TEXT_BUDGET,
    report: Callable[[str], None] = print,
) -> CLIPTextModelWithProjection:
    """Pretrain the text encoder on attribute readout and return it frozen, in evaluation mode, on `device`."""
    torch.manual_seed(2)
    model = AttributeReadout(build_text_encoder(tokenizer), tokenizer).to(device)

    def batch(split: str, start: int, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ids = attribute_ids(split, start, count)
        tokens = tokenise(tokenizer, [caption(row) for row in ids]).to(device)
        columns = torch.from_numpy(ids).to(device)
        return tokens, {head: columns[:, i] for i, head in enumerate(HEADS)}

    def loss_at(step: int) -> torch.Tensor:
        return model.loss(*batch("train", (1 << 33) + step * _BATCH, _BATCH))[0]

    model.load_state_dict(train("text", model, loss_at, budget, path, report))
    model.eval().requires_grad_(False)
    loss, share = model.loss(*batch("heldout", 1 << 30, 1024))
    report(f"text: {100 * float(share):.2f} % of held-out attributes readable, loss {float(loss):.4f}")
    return model.encoder

"""Prompts to the conditioning tensors of a denoiser, as the diffusers pipelines make them, with numpy alone.

A specification is plain JSON data. An encoder entry is {"part": "text_encoder", "tokenizer": "tokenizer",
"max_length": 77} plus, where needed, "hidden_state" (index into the hidden states; absent is the last one after the
final norm) and "attention_mask": true (the mask is fed to the encoder).

    kind                  encoders                         further keys
    stable-diffusion      1                                -
    stable-diffusion-3    2 CLIP (both with hidden_state)  joint_attention_dim, max_sequence_length (of the T5 tokens),
                                                           and optionally t5: an encoder entry; absent gives zeros
    pixart                1 (T5, attention_mask)           -
    class                 0                                null_class, and optionally labels: {name: class}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

UNCONDITIONAL = ""
"""The prompt of the unconditional half; for class labels the null class."""


class PromptError(ValueError):
    """A prompt that the model cannot take, or a specification that cannot be followed; one sentence."""


class Encodes(Protocol):
    """What `export.tokenizer.Tokenizer` does."""

    def encode(self, prompts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int64 (prompts, max_length)."""
        ...


Functions = Mapping[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]


def unconditional(count: int) -> list[str]:
    """The prompts of the unconditional half of classifier-free guidance."""
    return [UNCONDITIONAL] * count


def encode(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Make the conditioning tensors (all but the latent and the timestep), one row per prompt.

    Args:
        spec: see the head of this file.
        tokenizers: by name.
        functions: the text encoders by part name.
        prompts: strings, or classes as numbers, digits or names.

    Raises:
        PromptError: a prompt of the wrong type, an unknown class, or an unknown kind.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise PromptError(f"the conditioning kind {kind!r} is none of {', '.join(KINDS)}")
    if kind != "class":
        wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise PromptError(f"a prompt must be text, not {wrong!r}")
    return KINDS[kind](spec, tokenizers, functions, prompts)


def _run(
    entry: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Run one encoder: its outputs, its sequence of states, and the attention mask."""
    part, tokenizer = entry["part"], entry["tokenizer"]
    if part not in functions or tokenizer not in tokenizers:
        missing = part if part not in functions else tokenizer
        raise PromptError(f"the model has no {missing!r}, so it cannot read prompts")
    ids, mask = tokenizers[tokenizer].encode(prompts, int(entry["max_length"]))
    feeds = {"input_ids": ids, "attention_mask": mask} if entry.get("attention_mask") else {"input_ids": ids}
    outputs = functions[part](feeds)
    index = entry.get("hidden_state")
    return outputs, outputs["last_hidden_state" if index is None else f"hidden_states.{index}"], mask


def _stable_diffusion(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    return {"encoder_hidden_states": _run(spec["encoders"][0], tokenizers, functions, prompts)[1]}


def _stable_diffusion_3(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """CLIP states side by side, padded to the width of T5, T5 states after them; pooled embeddings side by side."""
    clips = [_run(entry, tokenizers, functions, prompts) for entry in spec["encoders"]]
    states = np.concatenate([state for _, state, _ in clips], axis=-1)
    width = int(spec["joint_attention_dim"])
    states = np.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
    if spec.get("t5") is None:
        long = np.zeros((len(prompts), int(spec["max_sequence_length"]), width), np.float32)
    else:
        long = _run(spec["t5"], tokenizers, functions, prompts)[1]
    return {
        "encoder_hidden_states": np.concatenate([states, long], axis=1),
        "pooled_projections": np.concatenate([outputs["text_embeds"] for outputs, _, _ in clips], axis=-1),
    }


def _pixart(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Prompts in lower case, as the pipeline does without caption cleaning."""
    cleaned = [prompt.lower().strip() for prompt in prompts]
    _, states, mask = _run(spec["encoders"][0], tokenizers, functions, cleaned)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.astype(np.float32)}


def _class(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[Any]
) -> dict[str, np.ndarray]:
    null = int(spec["null_class"])
    labels = {str(name): int(number) for name, number in (spec.get("labels") or {}).items()}
    return {"class_labels": np.array([_label(prompt, labels, null) for prompt in prompts], np.int64)}


def _label(prompt: Any, labels: Mapping[str, int], null: int) -> int:
    name = str(prompt).strip()
    if name == UNCONDITIONAL:
        return null
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < null:
        return int(name)
    raise PromptError(f"there is no class {prompt!r}; classes are the numbers 0 to {null - 1} and the model's labels")


KINDS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "stable-diffusion": _stable_diffusion,
    "stable-diffusion-3": _stable_diffusion_3,
    "pixart": _pixart,
    "class": _class,
}
"""How each kind makes its tensors."""

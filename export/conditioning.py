"""Prompts to the conditioning tensors of a denoiser, as the diffusers pipelines make them, with numpy alone.

A specification is plain JSON data. An encoder entry is {"part": "text_encoder", "tokenizer": "tokenizer",
"max_length": 77}; CLIP encoders beside others also name the outputs they contribute, {"hidden": "hidden_states.11",
"pooled": "text_embeds"}.

    kind                  encoders                     further keys
    stable-diffusion      one CLIP                     -
    stable-diffusion-xl   two CLIPs                    unconditional_zeros: zeros stand for no prompt, not the empty one
    stable-diffusion-3    CLIPs, then perhaps a T5     joint_attention_dim, max_sequence_length (of the zeros that
                                                       stand for an absent T5)
    flux                  a CLIP, then a T5            guidance (scale for every picture), where it is embedded
    pixart                one T5                       -
    class                 none                         classes (the null class comes after them), and perhaps
                                                       labels: {name: class}

Where the denoiser adds residuals of a ControlNet, `residuals` is {name: [channels, pixels of the picture for one of its
own, in each direction]}; the caller gives them, for both halves of guidance alike, or none at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

UNCONDITIONAL = ""
"""What no prompt (None) is read as; for class labels the null class."""


class PromptError(ValueError):
    """A prompt that the model cannot take, or a specification that cannot be followed; one sentence."""


class Encodes(Protocol):
    """What `export.tokenizer.Tokenizer` does."""

    def encode(self, prompts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and attention mask, int64 (prompts, max_length)."""
        ...


Functions = Mapping[str, Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]]


def unconditional(count: int) -> list[None]:
    """The prompts of the unconditional half of classifier-free guidance: none."""
    return [None] * count


def of_size(
    spec: Mapping[str, Any], given: Mapping[str, np.ndarray], count: int, height: int, width: int
) -> dict[str, np.ndarray]:
    """The conditioning tensors that follow from the size of `count` pictures in pixels, where they are not given.

    They are the size itself, for an uncropped picture, and zeros for residuals of which none is given: no control.
    """
    tensors: dict[str, np.ndarray] = {}
    if spec.get("kind") == "stable-diffusion-xl":
        tensors["time_ids"] = np.tile(np.array([height, width, 0, 0, height, width], np.float32), (count, 1))
    if not residuals(spec, given):
        for name, (channels, side) in (spec.get("residuals") or {}).items():
            tensors[name] = np.zeros((count, channels, height // side, width // side), np.float32)
    return {name: tensor for name, tensor in tensors.items() if name not in given}


def residuals(spec: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the tensors that are residuals of a ControlNet."""
    return {name: given[name] for name in spec.get("residuals") or () if name in given}


def encode(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Make the conditioning tensors (all but the latent, the timestep and those of `of_size`), one row per prompt.

    Args:
        spec: see the head of this file.
        tokenizers: by name.
        functions: the text encoders by part name.
        prompts: strings, or classes as numbers, digits or names; None is no prompt.

    Raises:
        PromptError: a prompt of the wrong type, an unknown class, or an unknown kind.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise PromptError(f"the conditioning kind {kind!r} is none of {', '.join(KINDS)}")
    if kind != "class":
        wrong = next((prompt for prompt in prompts if not isinstance(prompt, str | None)), None)
        if wrong is not None:
            raise PromptError(f"a prompt must be text, not {wrong!r}")
    read = [UNCONDITIONAL if prompt is None else prompt for prompt in prompts]
    tensors = KINDS[kind](spec, tokenizers, functions, read)
    if spec.get("unconditional_zeros"):
        absent = [row for row, prompt in enumerate(prompts) if prompt is None]
        tensors = {name: _without(rows, absent) for name, rows in tensors.items()}
    return tensors


def _without(rows: np.ndarray, absent: Sequence[int]) -> np.ndarray:
    """A copy of the rows, some of them zero."""
    kept = np.array(rows)
    kept[list(absent)] = 0
    return kept


def _tokens(
    entry: Mapping[str, Any], tokenizers: Mapping[str, Encodes], prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    name = entry["tokenizer"]
    if name not in tokenizers:
        raise PromptError(f"the model has no {name!r}, so it cannot read prompts")
    return tokenizers[name].encode(prompts, int(entry["max_length"]))


def _encoded(entry: Mapping[str, Any], functions: Functions, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    name = entry["part"]
    if name not in functions:
        raise PromptError(f"the model has no {name!r}, so it cannot read prompts")
    return functions[name](feeds)


def _stable_diffusion(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    (entry,) = spec["encoders"]
    ids, _ = _tokens(entry, tokenizers, prompts)
    return {"encoder_hidden_states": _encoded(entry, functions, input_ids=ids)["last_hidden_state"]}


def _stable_diffusion_xl(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """CLIP states side by side, and the pooled embedding of the second (Podell et al. 2023, arXiv 2307.01952)."""
    outputs = []
    for entry in spec["encoders"]:
        ids, _ = _tokens(entry, tokenizers, prompts)
        outputs.append(_encoded(entry, functions, input_ids=ids))
    states = [encoded[entry["hidden"]] for entry, encoded in zip(spec["encoders"], outputs, strict=True)]
    pooled = outputs[-1][spec["encoders"][-1]["pooled"]]
    return {"encoder_hidden_states": np.concatenate(states, axis=-1), "text_embeds": pooled}


def _stable_diffusion_3(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """CLIP states side by side, padded to the width of T5, T5 states after them; pooled embeddings side by side.

    Source: Esser et al. 2024, arXiv 2403.03206, section 4. T5 sees its padding: the pipeline gives it no mask.
    """
    states, pooled, long = [], [], None
    for entry in spec["encoders"]:
        ids, mask = _tokens(entry, tokenizers, prompts)
        if "pooled" in entry:
            outputs = _encoded(entry, functions, input_ids=ids)
            states.append(outputs[entry["hidden"]])
            pooled.append(outputs[entry["pooled"]])
        else:
            seen = np.ones_like(mask)
            long = _encoded(entry, functions, input_ids=ids, attention_mask=seen)["last_hidden_state"]
    short, width = np.concatenate(states, axis=-1), int(spec["joint_attention_dim"])
    short = np.pad(short, ((0, 0), (0, 0), (0, width - short.shape[-1])))
    if long is None:
        long = np.zeros((len(prompts), int(spec["max_sequence_length"]), width), np.float32)
    return {
        "encoder_hidden_states": np.concatenate([short, long], axis=1),
        "pooled_projections": np.concatenate(pooled, axis=-1),
    }


def _flux(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """The pooled embedding of CLIP, and the states of T5, which sees its padding: the pipeline gives it no mask."""
    clip, t5 = spec["encoders"]
    ids, _ = _tokens(clip, tokenizers, prompts)
    pooled = _encoded(clip, functions, input_ids=ids)[clip["pooled"]]
    ids, mask = _tokens(t5, tokenizers, prompts)
    states = _encoded(t5, functions, input_ids=ids, attention_mask=np.ones_like(mask))["last_hidden_state"]
    tensors = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if "guidance" in spec:
        tensors["guidance"] = np.full(len(prompts), spec["guidance"], np.float32)
    return tensors


def _pixart(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Prompts in lower case, as the pipeline does without caption cleaning."""
    (entry,) = spec["encoders"]
    ids, mask = _tokens(entry, tokenizers, [prompt.lower().strip() for prompt in prompts])
    states = _encoded(entry, functions, input_ids=ids, attention_mask=mask)["last_hidden_state"]
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask.astype(np.float32)}


def _class(
    spec: Mapping[str, Any], tokenizers: Mapping[str, Encodes], functions: Functions, prompts: Sequence[Any]
) -> dict[str, np.ndarray]:
    labels = {str(name): int(number) for name, number in (spec.get("labels") or {}).items()}
    return {"class_labels": np.array([_label(prompt, labels, int(spec["classes"])) for prompt in prompts], np.int64)}


def _label(prompt: Any, labels: Mapping[str, int], classes: int) -> int:
    name = str(prompt).strip()
    if name == UNCONDITIONAL:
        return classes
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < classes:
        return int(name)
    raise PromptError(f"there is no class {prompt!r}; classes are 0 to {classes - 1} and the labels of the model")


KINDS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "stable-diffusion": _stable_diffusion,
    "stable-diffusion-xl": _stable_diffusion_xl,
    "stable-diffusion-3": _stable_diffusion_3,
    "flux": _flux,
    "pixart": _pixart,
    "class": _class,
}
"""How each kind makes its tensors."""

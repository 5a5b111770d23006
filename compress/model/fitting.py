"""Checks that the components of a pipeline come from one model: widths, channels, vocabularies, class counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from compress.errors import RefusedError
from compress.families import Network
from compress.families.unet import pooled_width
from compress.model.loader import Components

_SHORTEST = 2  # start and end of text
_LARGEST_ID = 2  # in CLIP configurations of old: the end of a text is where the token id is largest
_REFUSED = {
    "requires_aesthetics_score": "a score among its sizes",
    "latents_mean": "latents that are shifted channel by channel",
}


def check_fit(components: Components) -> None:
    """Refuse components that do not fit together.

    Raises:
        RefusedError: names both components and both numbers.
    """
    factor = components.vae.config.scaling_factor
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise RefusedError(f"scaling_factor of the VAE is {factor!r}: it must be a positive number")
    for key, meaning in _REFUSED.items():
        if components.index.get(key) or getattr(components.vae.config, key, None):
            raise RefusedError(f"the pipeline has {meaning} ({key}), which is not supported")
    for left, found, right, wanted in _pairs(components):
        if found != wanted:
            raise RefusedError(f"{left} is {found}, but {right} is {wanted}: the components are not of one model")
    for name, encoder in components.text_encoders.items():
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        _check_tokenizer(name, encoder.config, tokenizer_name, components.tokenizers[tokenizer_name])


def _pairs(components: Components) -> Iterator[tuple[str, Any, str, Any]]:
    """Yield (what, its number, what must have the same number, that number)."""
    config, vae, index = components.denoiser.config, components.vae.config, components.index
    encoders: list[Network] = [encoder.config for encoder in components.text_encoders.values()]
    taken = components.family.latent_channels(components.denoiser)
    patch = int(config.in_channels) // taken
    packed = "in_channels of the denoiser" if patch == 1 else f"in_channels / {patch} of the denoiser"
    yield "latent_channels of the VAE", vae.latent_channels, packed, taken
    match components.family.name:
        case "unet" | "controlled-unet":
            width, sized = config.cross_attention_dim, len(encoders) > 1
            if sized != (config.addition_embed_type == "text_time"):
                wanted = "'text_time'" if sized else "not 'text_time'"
                found = repr(config.addition_embed_type)
                yield "addition_embed_type of the UNet", found, f"that of a {index['_class_name']}", wanted
            states = sum(clip.hidden_size for clip in encoders)
            names = "hidden_size of both text encoders" if sized else "hidden_size of the text encoder"
            yield names, states, "cross_attention_dim of the UNet", width
            if sized:
                pooled = pooled_width(components.denoiser)
                yield "projection_dim of text_encoder_2", encoders[1].projection_dim, "text_embeds of the UNet", pooled
        case "sd3":
            clips, pooled, joint = encoders[:2], config.pooled_projection_dim, config.joint_attention_dim
            projected = sum(clip.projection_dim for clip in clips)
            yield "projection_dim of both text encoders", projected, "pooled_projection_dim of the transformer", pooled
            states = sum(clip.hidden_size for clip in clips)
            if len(encoders) > len(clips):
                yield "d_model of the T5", encoders[2].d_model, "joint_attention_dim of the transformer", joint
            if states > joint:
                yield "hidden_size of both text encoders", states, "joint_attention_dim of the transformer", joint
        case "flux":
            pooled, joint = config.pooled_projection_dim, config.joint_attention_dim
            yield "hidden_size of the CLIP", encoders[0].hidden_size, "pooled_projection_dim of the transformer", pooled
            yield "d_model of the T5", encoders[1].d_model, "joint_attention_dim of the transformer", joint
        case "pixart":
            width = config.caption_channels
            yield "d_model of the text encoder", encoders[0].d_model, "caption_channels of the transformer", width
        case "dit" if "id2label" in index:
            known, classes = len(index["id2label"] or ()), config.num_embeds_ada_norm
            yield "the number of labels in model_index.json", known, "num_embeds_ada_norm of the transformer", classes


def _check_tokenizer(name: str, config: Network, tokenizer_name: str, tokenizer: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise RefusedError(
            f"{tokenizer_name} has {len(tokenizer)} tokens, but {name} embeds {config.vocab_size}: "
            "the components are not of one model"
        )
    if tokenizer.model_max_length < _SHORTEST:
        raise RefusedError(f"model_max_length of {tokenizer_name} is {tokenizer.model_max_length}: no prompt fits")
    if not hasattr(config, "max_position_embeddings"):  # T5: relative positions, no end to them
        return
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise RefusedError(
            f"{tokenizer_name} gives up to {tokenizer.model_max_length} tokens (model_max_length), but {name} has "
            f"{config.max_position_embeddings} positions: the components are not of one model"
        )
    if config.eos_token_id not in (_LARGEST_ID, tokenizer.eos_token_id):
        raise RefusedError(
            f"{name} ends a text at token {config.eos_token_id} (eos_token_id), but {tokenizer_name} at "
            f"{tokenizer.eos_token_id}: the components are not of one model"
        )

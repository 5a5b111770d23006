"""Real diffusers pipelines at toy size: seeded random weights, tokenizers built in code, saved as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = "a of on the large small red green blue yellow circle square triangle ring left right above below".split()
PROMPT_TOKENS = 12
TEXT_WIDTH = 16
SIDE = 8  # of the latents; pictures are twice that


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which every one of `WORDS` is one token, and other words fall into letters."""
    letters = sorted({letter for word in WORDS for letter in word} | set("abcdefghijklmnopqrstuvwxyz,."))
    pieces = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=PROMPT_TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """A T5 unigram tokenizer over `WORDS` and letters."""
    letters = [(letter, -8.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz,."]
    words = [("\u2581" + word, -2.0) for word in WORDS if word != "a"]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, *letters, *words], extra_ids=0, model_max_length=PROMPT_TOKENS)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Two layers, `TEXT_WIDTH` wide, for this tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(tokenizer: T5Tokenizer) -> T5Config:
    """Two layers, `TEXT_WIDTH` wide, for this tokenizer."""
    return T5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )


def vae() -> AutoencoderKL:
    """Pictures twice as wide as their latents of 4 channels."""
    return AutoencoderKL(
        shift_factor=0.0,  # the pipeline of Stable Diffusion 3 adds it whether it is there or not
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * SIDE,
    )


def unet(**overrides: Any) -> UNet2DConditionModel:
    """Two levels, cross-attention in the lower one, pooled text conditioning: four cuts."""
    options: dict[str, Any] = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    return UNet2DConditionModel(**(options | overrides)).eval()


def sdxl(**overrides: Any) -> UNet2DConditionModel:
    """Two levels, two transformer layers in the lower one, pooled text and sizes as conditioning: four cuts."""
    options: dict[str, Any] = dict(
        cross_attention_dim=2 * TEXT_WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
    )
    return unet(**(options | overrides))


def sd3(**overrides: Any) -> SD3Transformer2DModel:
    """Four joint blocks, 32 wide, for two CLIP encoders of `TEXT_WIDTH`."""
    options: dict[str, Any] = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIDE,
    )
    return SD3Transformer2DModel(**(options | overrides)).eval()


def dit(**overrides: Any) -> DiTTransformer2DModel:
    """Three blocks, 16 wide, ten classes, learned variance."""
    options: dict[str, Any] = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        num_embeds_ada_norm=10,
    )
    return DiTTransformer2DModel(**(options | overrides)).eval()


def pixart(**overrides: Any) -> PixArtTransformer2DModel:
    """Three blocks, 16 wide, learned variance."""
    options: dict[str, Any] = dict(
        sample_size=SIDE,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=TEXT_WIDTH,
    )
    return PixArtTransformer2DModel(**(options | overrides)).eval()


def flux(**overrides: Any) -> FluxTransformer2DModel:
    """Two double and two single blocks, 32 wide, guidance embedded, latents of 4 channels."""
    options: dict[str, Any] = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxTransformer2DModel(**(options | overrides)).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    """Text to image: UNet, CLIP, v-prediction."""
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Text to image: UNet, two CLIP encoders, no prompt as zeros."""
    tokenizers = clip_tokenizer(), clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(tokenizers[0])),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizers[1])),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=sdxl(),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    """Text to image: MMDiT, two CLIP encoders, no T5, rectified flow."""
    tokenizers = clip_tokenizer(), clip_tokenizer()
    encoders = [CLIPTextModelWithProjection(clip_config(tokenizer)) for tokenizer in tokenizers]
    return StableDiffusion3Pipeline(
        transformer=sd3(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae(),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def class_conditional() -> DiTPipeline:
    """Class to image: DiT."""
    return DiTPipeline(
        transformer=dit(),
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        id2label={i: f"class {i}" for i in range(10)},
    )


def pixart_alpha() -> PixArtAlphaPipeline:
    """Text to image: PixArt, T5."""
    tokenizer = t5_tokenizer()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(t5_config(tokenizer)),
        vae=vae(),
        transformer=pixart(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def flux_dev() -> FluxPipeline:
    """Text to image: Flux with embedded guidance, CLIP, a T5 that reads longer prompts, rectified flow."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    t5.model_max_length = PROMPT_TOKENS + 4
    return FluxPipeline(
        transformer=flux(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(t5_config(t5)),
        tokenizer_2=t5,
    )


PIPELINES = {
    "unet": stable_diffusion,
    "sd3": stable_diffusion_3,
    "dit": class_conditional,
    "pixart": pixart_alpha,
    "flux": flux_dev,
    "sdxl": stable_diffusion_xl,
}
"""Family name -> the pipeline that stands for it."""


def shake(module: torch.nn.Module) -> None:
    """Give parameters that start at zero or one (adaLN gates, norms, biases) values that make them matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.min() == parameter.max():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def save(family: str, folder: Path) -> Path:
    """Write the pipeline of one family to `folder` (safetensors, float32); the same bytes at every call."""
    torch.manual_seed(0)
    pipeline: DiffusionPipeline = PIPELINES[family]()
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            shake(component)
    pipeline.save_pretrained(folder)
    return folder

"""The two denoisers and their schedulers: a Stable-Diffusion-1-type UNet and a Stable-Diffusion-3-type MMDiT."""

from __future__ import annotations

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from recipes.reference.text import WIDTH

LATENT_SIDE = 16


def build_unet() -> UNet2DConditionModel:
    """Untrained UNet of three resolution levels; its pooled text is formed inside (addition_embed_type="text")."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 144),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=8,
    )


def build_mmdit() -> SD3Transformer2DModel:
    """Untrained MMDiT of 5 joint blocks of width 192 over 8x8 patches and two 128-wide text encoders side by side."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )


def unet_scheduler() -> DPMSolverMultistepScheduler:
    """Sampler shipped with the UNet: v-prediction, sqrt(alpha_bar) = 0.016 at the last of 1000 training timesteps."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="trailing",
    )


def mmdit_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Sampler shipped with the MMDiT: rectified flow with Euler steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5)

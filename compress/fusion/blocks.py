"""Transformer blocks as they compute once fused: modulated norms and gated residuals are one operation each.

Attention, norms and feed-forward layers are called as the modules they are, so that caching still cuts there.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from kernels.operators import adaln, gated_residual


class FusedDiTBlock(BasicTransformerBlock):
    """Self-attention and feed-forward, modulated by timestep and class (adaLN-zero)."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | None = None, class_labels: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Tokens (batch, tokens, channels), timestep and class (batch,)."""
        tokens = hidden_states
        modulated, gate, shift, scale, gate_ff = self.norm1(tokens, timestep, class_labels, hidden_dtype=tokens.dtype)
        tokens = gated_residual(tokens, gate, self.attn1(modulated))
        return gated_residual(tokens, gate_ff, self.ff(adaln(tokens, shift, scale, self.norm3.eps)))


class FusedPixArtBlock(BasicTransformerBlock):
    """Self-attention, cross-attention and feed-forward, modulated by a table and one embedding for all blocks."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        **_: Any,
    ) -> Tensor:
        """Tokens (batch, tokens, channels); `timestep` is the embedding (batch, 6 * channels)."""
        tokens = hidden_states
        table = self.scale_shift_table[None] + timestep.reshape(tokens.shape[0], 6, -1)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.unbind(dim=1)
        modulated = adaln(tokens, shift, scale, self.norm1.eps)
        tokens = gated_residual(tokens, gate, self.attn1(modulated, attention_mask=attention_mask))
        state = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": encoder_attention_mask}
        tokens = self.attn2(tokens, **state) + tokens
        return gated_residual(tokens, gate_ff, self.ff(adaln(tokens, shift_ff, scale_ff, self.norm2.eps)))


class FusedJointBlock(JointTransformerBlock):
    """Image and text tokens attend to each other (MMDiT)."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Image tokens, text tokens (batch, tokens, channels) and embedding (batch, channels); text comes first out."""
        options = joint_attention_kwargs or {}
        tokens, context = hidden_states, encoder_hidden_states
        modulated, *parts = self.norm1(tokens, emb=temb)
        of_context: list[Tensor] = []
        if self.context_pre_only:
            modulated_context = self.norm1_context(context, temb)
        else:
            modulated_context, *of_context = self.norm1_context(context, emb=temb)
        image, text = self.attn(hidden_states=modulated, encoder_hidden_states=modulated_context, **options)
        tokens = gated_residual(tokens, parts[0], image)
        if self.use_dual_attention:
            modulated, gate = parts[4:]
            tokens = gated_residual(tokens, gate, self.attn2(hidden_states=modulated, **options))
        tokens = _feed_forward(tokens, parts[1:4], self.norm2, self.ff)
        if self.context_pre_only:
            return None, tokens
        context = gated_residual(context, of_context[0], text)
        return _feed_forward(context, of_context[1:], self.norm2_context, self.ff_context), tokens


class FusedFluxBlock(FluxTransformerBlock):
    """Image and text tokens attend to each other, with rotary positions."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens, text tokens (batch, tokens, channels) and embedding (batch, channels); text comes first out."""
        tokens, context = hidden_states, encoder_hidden_states
        modulated, *parts = self.norm1(tokens, emb=temb)
        modulated_context, *of_context = self.norm1_context(context, emb=temb)
        image, text = self.attn(
            hidden_states=modulated,
            encoder_hidden_states=modulated_context,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        tokens = _feed_forward(gated_residual(tokens, parts[0], image), parts[1:], self.norm2, self.ff)
        context = gated_residual(context, of_context[0], text)
        context = _feed_forward(context, of_context[1:], self.norm2_context, self.ff_context)
        return _within_half(context), tokens


class FusedFluxSingleBlock(FluxSingleTransformerBlock):
    """Attention and MLP side by side over all tokens, projected together."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image tokens, text tokens (batch, tokens, channels) and embedding (batch, channels); text comes first out."""
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        modulated, gate = self.norm(tokens, emb=temb)
        inner = self.act_mlp(self.proj_mlp(modulated))
        options = joint_attention_kwargs or {}
        attended = self.attn(hidden_states=modulated, image_rotary_emb=image_rotary_emb, **options)
        tokens = gated_residual(tokens, gate, self.proj_out(torch.cat([attended, inner], dim=2)))
        texts = encoder_hidden_states.shape[1]
        tokens = _within_half(tokens)
        return tokens[:, :texts], tokens[:, texts:]


def _feed_forward(tokens: Tensor, parts: list[Tensor], norm: nn.LayerNorm, layer: nn.Module) -> Tensor:
    """The second half of a block; `parts` are shift, scale and gate (batch, channels)."""
    shift, scale, gate = parts
    return gated_residual(tokens, gate, layer(adaln(tokens, shift, scale, norm.eps)))


def _within_half(tokens: Tensor) -> Tensor:
    """What float16 can hold, in float16."""
    return tokens.clip(-65504, 65504) if tokens.dtype == torch.float16 else tokens

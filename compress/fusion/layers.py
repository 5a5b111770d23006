"""Modules smaller than a transformer block, as they compute once fused; they keep the sub-modules of diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from kernels.operators import adaln, attention, gelu, group_norm_silu, rms_norm


class NormAndSiLU(nn.GroupNorm):
    """A group norm with the SiLU that follows it."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.weight, self.bias, self.num_groups, self.eps)


class FusedResnet(ResnetBlock2D):
    """Neither resampling nor modulated norms; a factor of 1 is left out."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
        """Features (batch, channels, height, width), and the time embedding (batch, channels)."""
        hidden = self.conv1(self.norm1(input_tensor))
        if self.time_emb_proj is not None and temb is not None:
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        total = shortcut + hidden
        return total if self.output_scale_factor == 1.0 else total / self.output_scale_factor


class FusedGEGLU(GEGLU):
    """Values and gates are split and multiplied in one operation."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """(..., channels) to (..., inner channels)."""
        return gelu(self.proj(hidden_states), gated=True)


class FusedRMSNorm(RMSNorm):
    """With a weight, without a bias."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., channels) to the same."""
        return rms_norm(hidden_states, self.weight, self.eps)


class FusedAdaLayerNormZero(AdaLayerNormZero):
    """Gives the modulated tokens, and gate, shift, scale and gate for what follows."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: Any = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Tokens (batch, tokens, channels); the embedding is given, or made of timestep and class."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return adaln(x, shift, scale, self.norm.eps), *others


class FusedAdaLayerNormZeroSingle(AdaLayerNormZeroSingle):
    """Gives the modulated tokens and one gate."""

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (batch, tokens, channels) and the embedding (batch, channels)."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return adaln(x, shift, scale, self.norm.eps), gate


class FusedAdaLayerNormZeroX(SD35AdaLayerNormZeroX):
    """Modulates the tokens twice, for two attentions."""

    def forward(self, hidden_states: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Tokens (batch, tokens, channels) and the embedding (batch, channels)."""
        parts = self.linear(self.silu(emb)).chunk(9, dim=1)
        first, second = (adaln(hidden_states, *parts[at : at + 2], self.norm.eps) for at in (0, 6))
        return first, *parts[2:6], second, parts[8]


class FusedAdaLayerNormContinuous(AdaLayerNormContinuous):
    """Gives the modulated tokens alone; its scale comes before its shift."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """Tokens (batch, tokens, channels) and the embedding (batch, channels)."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return adaln(x, shift, scale, self.norm.eps)


class _ThroughOperator(TorchFunctionMode):
    """Our attention in place of torch's, whatever processor of diffusers calls it; and no division by 1 after it."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.div and isinstance(args[1], float) and args[1] == 1.0:
            return args[0]
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        mask = named.get("attn_mask")
        # A mask of diffusers hides keys, (batch, heads, 1, keys), and is the same for all heads.
        bias = None if mask is None else mask[:, 0, 0]
        return attention(named["query"], named["key"], named["value"], bias, named.get("scale"))


class FusedAttention(Attention):
    """Its processor attends through our operator."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module of diffusers."""
        with _ThroughOperator():
            return super().forward(*args, **kwargs)


class FusedFluxAttention(FluxAttention):
    """Its processor attends through our operator."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module of diffusers."""
        with _ThroughOperator():
            return super().forward(*args, **kwargs)

"""The parts of a pipeline around the denoiser as modules with named inputs and outputs, ready to be traced."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """A component behind a fixed signature; `forward` gives a tuple in the order of `outputs`.

    Attributes:
        prefix: the attribute that holds the component, so the first name of every module path in a traced graph.
        inputs, outputs: names of the tensors.
        axes: input -> {dimension: "batch", "height", "width" or "prompt_tokens"}; other dimensions are fixed.
    """

    prefix: ClassVar[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: ClassVar[dict[str, dict[int, str]]]

    @property
    def component(self) -> nn.Module:
        """The module whose paths a quantization plan speaks of."""
        return self.get_submodule(self.prefix)

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        """Seeded inputs; height and width in latent pixels."""
        raise NotImplementedError


class VaeDecoder(Part):
    """`latent_sample` (n, c, h, w), already divided by the scaling factor, to `sample` (n, 3, H, W) in [-1, 1]."""

    prefix = "vae"
    inputs = ("latent_sample",)
    outputs = ("sample",)
    axes = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)  # type: ignore[operator]

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        channels = self.vae.config.latent_channels  # type: ignore[union-attr]
        return {"latent_sample": torch.randn(batch, channels, height, width, generator=_seeded())}  # type: ignore[arg-type]


class VaeEncoder(Part):
    """`sample` (n, 3, H, W) in [-1, 1] to `latent_parameters` (n, 2c, h, w): mean and log variance, unscaled."""

    prefix = "vae"
    inputs = ("sample",)
    outputs = ("latent_parameters",)
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}}

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(sample, return_dict=False)[0].parameters,)  # type: ignore[operator]

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        config: Any = self.vae.config
        side = 2 ** (len(config.block_out_channels) - 1)
        return {
            "sample": torch.rand(batch, config.in_channels, side * height, side * width, generator=_seeded()) * 2 - 1
        }


class TextEncoder(Part):
    """CLIPTextModel: `input_ids` (n, s) to `last_hidden_state` (n, s, d) and `pooler_output` (n, d)."""

    prefix = "text_encoder"
    inputs: tuple[str, ...] = ("input_ids",)
    outputs: tuple[str, ...] = ("last_hidden_state", "pooler_output")
    axes = {"input_ids": {0: "batch", 1: "prompt_tokens"}}

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoded = self.text_encoder(input_ids)
        return encoded.last_hidden_state, encoded.pooler_output

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        config: Any = self.text_encoder.config
        return {"input_ids": torch.randint(0, config.vocab_size, (batch, prompt_tokens), generator=_seeded())}


class ProjectedTextEncoder(TextEncoder):
    """CLIPTextModelWithProjection: `input_ids` to `text_embeds` (n, d), `last_hidden_state`, and every hidden state."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__(text_encoder)
        layers: int = text_encoder.config.num_hidden_layers  # type: ignore[union-attr, assignment]
        self.outputs = ("text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(layers + 1)))

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoded = self.text_encoder(input_ids, output_hidden_states=True)
        return encoded.text_embeds, encoded.last_hidden_state, *encoded.hidden_states


class MaskedTextEncoder(TextEncoder):
    """T5EncoderModel: `input_ids` and `attention_mask` (n, s) to `last_hidden_state` (n, s, d)."""

    inputs = ("input_ids", "attention_mask")
    outputs = ("last_hidden_state",)
    axes = {"input_ids": {0: "batch", 1: "prompt_tokens"}, "attention_mask": {0: "batch", 1: "prompt_tokens"}}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state,)

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        inputs = super().example_inputs(batch, height, width, prompt_tokens)
        mask = torch.ones_like(inputs["input_ids"])
        mask[:, prompt_tokens // 2 + 1 :] = 0
        return inputs | {"attention_mask": mask}


TEXT_ENCODERS: dict[str, type[TextEncoder]] = {
    "CLIPTextModel": TextEncoder,
    "CLIPTextModelWithProjection": ProjectedTextEncoder,
    "T5EncoderModel": MaskedTextEncoder,
}
"""transformers class -> the part it becomes."""


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)

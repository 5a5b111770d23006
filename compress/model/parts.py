"""The parts of a pipeline around the denoiser as modules with named inputs and outputs, ready to be traced."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from compress.families import Network


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
    def component(self) -> Network:
        """The network inside; module names of a quantization plan are paths in it."""
        return self.get_submodule(self.prefix)

    def over(self, component: Network) -> Part:
        """The same part over another component."""
        return type(self)(component)

    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        """Seeded inputs; height and width in latent pixels."""
        raise NotImplementedError


class VaeDecoder(Part):
    """`latent_sample` (n, c, h, w), already divided by the scaling factor, to `sample` (n, 3, H, W) in [-1, 1]."""

    prefix = "vae"
    inputs = ("latent_sample",)
    outputs = ("sample",)
    axes: ClassVar = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}

    def __init__(self, vae: Network) -> None:
        super().__init__()
        self.vae = vae

    @override
    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return (self.vae.decode(latent_sample, return_dict=False)[0],)

    @override
    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        channels = self.vae.config.latent_channels
        return {"latent_sample": torch.randn(batch, channels, height, width, generator=_seeded())}


class VaeEncoder(Part):
    """`sample` (n, 3, H, W) in [-1, 1] to `latent_parameters` (n, 2c, h, w): mean and log variance, unscaled."""

    prefix = "vae"
    inputs = ("sample",)
    outputs = ("latent_parameters",)
    axes: ClassVar = {"sample": {0: "batch", 2: "height", 3: "width"}}

    def __init__(self, vae: Network) -> None:
        super().__init__()
        self.vae = vae

    @override
    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(sample, return_dict=False)[0].parameters,)

    @override
    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        config = self.vae.config
        side = 2 ** (len(config.block_out_channels) - 1)
        return {
            "sample": torch.rand(batch, config.in_channels, side * height, side * width, generator=_seeded()) * 2 - 1
        }


class TextEncoder(Part):
    """A text encoder over token ids (n, s).

    Attributes:
        hidden: an inner state that the pipeline takes, `hidden_states.i`; None where it takes the last or many.
    """

    prefix = "text_encoder"

    def __init__(self, text_encoder: Network, hidden: str | None = None) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.hidden = hidden

    @override
    def over(self, component: Network) -> Part:
        return type(self)(component, self.hidden)

    @override
    def example_inputs(self, batch: int, height: int, width: int, prompt_tokens: int) -> dict[str, Tensor]:
        vocabulary = self.text_encoder.config.vocab_size
        mask = torch.ones(batch, prompt_tokens, dtype=torch.int64)
        mask[:, prompt_tokens // 2 + 1 :] = 0
        ids = torch.randint(0, vocabulary, (batch, prompt_tokens), generator=_seeded())
        return {name: {"input_ids": ids, "attention_mask": mask}[name] for name in self.inputs}


class ClipEncoder(TextEncoder):
    """CLIPTextModel: `input_ids` to `last_hidden_state` (n, s, d), `pooler_output` (n, d), and perhaps `hidden`."""

    inputs = ("input_ids",)
    axes: ClassVar = {"input_ids": {0: "batch", 1: "prompt_tokens"}}

    def __init__(self, text_encoder: Network, hidden: str | None = None) -> None:
        super().__init__(text_encoder, hidden)
        self.outputs = ("last_hidden_state", "pooler_output", *(() if hidden is None else (hidden,)))

    @override
    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoded = self.text_encoder(input_ids, output_hidden_states=self.hidden is not None)
        inner = () if self.hidden is None else (encoded.hidden_states[int(self.hidden.rpartition(".")[2])],)
        return encoded.last_hidden_state, encoded.pooler_output, *inner


class ClipProjectionEncoder(TextEncoder):
    """CLIPTextModelWithProjection: `input_ids` to `text_embeds` (n, d), `last_hidden_state`, and all hidden states."""

    inputs = ("input_ids",)
    axes: ClassVar = {"input_ids": {0: "batch", 1: "prompt_tokens"}}

    def __init__(self, text_encoder: Network, hidden: str | None = None) -> None:
        super().__init__(text_encoder, hidden)
        layers = text_encoder.config.num_hidden_layers
        self.outputs = ("text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(layers + 1)))

    @override
    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        encoded = self.text_encoder(input_ids, output_hidden_states=True)
        return encoded.text_embeds, encoded.last_hidden_state, *encoded.hidden_states


class T5Encoder(TextEncoder):
    """T5EncoderModel: `input_ids` and `attention_mask` (n, s) to `last_hidden_state` (n, s, d)."""

    inputs = ("input_ids", "attention_mask")
    outputs = ("last_hidden_state",)
    axes: ClassVar = {"input_ids": {0: "batch", 1: "prompt_tokens"}, "attention_mask": {0: "batch", 1: "prompt_tokens"}}

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state,)


TEXT_ENCODERS: dict[str, type[TextEncoder]] = {
    "CLIPTextModel": ClipEncoder,
    "CLIPTextModelWithProjection": ClipProjectionEncoder,
    "T5EncoderModel": T5Encoder,
}
"""transformers class -> the part it becomes."""


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)

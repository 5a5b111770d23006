"""A model as the diffusers pipeline of its folder, whose networks compute with quantized numbers in float32."""

from __future__ import annotations

from typing import Any

import diffusers

from compress.model.latent_diffusion import LatentDiffusion
from compress.model.loader import quiet
from compress.quantization.fake_quantize import fake_quantized
from compress.twin import twin

_VAE = {"vae_decoder": ("decoder", "post_quant_conv"), "vae_encoder": ("encoder", "quant_conv")}
"""Part -> its modules: the VAE is one component with a plan for either half."""


def pipeline(model: LatentDiffusion) -> Any:
    """The pipeline that model_index.json names, with fake-quantized networks where the model has a plan for them.

    It is called as any other (`pipeline(model)("a red circle", num_inference_steps=20)`), on its own scheduler: step
    plans and caches are of `LatentDiffusion.runtime`.

    Args:
        model: from `load`; its networks are not changed.
    """
    networks = {model.family.part: model.denoiser, "vae": twin(model.vae), **model.text_encoders}
    for part, plan in model.quant_plans.items():
        if part in _VAE:
            half = fake_quantized(model.vae, plan)
            for name in _VAE[part]:
                setattr(networks["vae"], name, getattr(half, name))
        else:
            name = model.family.part if part == "denoiser" else part
            networks[name] = fake_quantized(networks[name], plan)
    options = {
        name: None if isinstance(entry, list) else entry
        for name, entry in model.index.items()
        if not name.startswith("_")
    }
    config = model.scheduler_config
    with quiet():
        scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        cls: Any = getattr(diffusers, model.index["_class_name"])
        return cls(**options | networks | model.tokenizers | {"scheduler": scheduler})

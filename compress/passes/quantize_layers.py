"""What the pass `quantize` plans for each layer, and why; what it leaves open is decided after calibration."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from compress.mixed_precision import UP_TO, limit
from compress.passes.base import Edit
from compress.quantization.scheme import Scheme, computed_in_float, scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model.latent_diffusion import LatentDiffusion
    from export.quant_plan import Storage

NAME = "quantize"

SKIP = "skip"
STORE = "store "
QK = "int8-qk"
"""The scores of attention from 8-bit queries and keys; softmax and values stay in float."""

_OWN = {"vae_decoder": r"^(decoder|post_quant_conv)\b", "vae_encoder": r"^(encoder|quant_conv)\b"}
"""What belongs to a part where a component has two: the rest of the VAE is the other one's."""

_SENSITIVE = {
    "vae_decoder": r"^post_quant_conv$|^decoder\.conv_(in|out)$",
    "vae_encoder": r"^quant_conv$|^encoder\.conv_(in|out)$",
}
"""Cheap layers whose error reaches every pixel; those of a denoiser are known to its family."""


class LayerRule(BaseModel):
    """A number format for some layers.

    Attributes:
        match: a shell pattern over `<part>.<module path>`, e.g. `denoiser.*.to_out.0`.
        scheme: a number format with integer weights, or `none` to leave them in float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    match: str
    scheme: str


def plan_part(
    part: str,
    component: nn.Module,
    default: Scheme,
    special: Mapping[str, tuple[Scheme, str]],
    rules: Sequence[LayerRule],
) -> tuple[list[Edit], set[int]]:
    """The edits of one part, and the places of the rules that match something in it.

    Args:
        part: its name.
        component: the network that holds it.
        default: its scheme.
        special: layer -> the scheme it gets whatever its part gets, and why.
        rules: for some layers; the last one that matches wins.
    """
    own = _OWN.get(part, "")
    layers = {name: layer for name, layer in layers_of(component).items() if re.search(own, name)}
    width = scheme(storage_of(default)).weight.bits / 8
    edits, matched = list[Edit](), set[int]()
    for name, layer in layers.items():
        chosen, reason = default, f"{part} is {default.name}"
        if default.is_quantized and name in special:
            chosen, reason = special[name]
        for i, rule in enumerate(rules):
            if fnmatch.fnmatchcase(f"{part}.{name}", rule.match):
                chosen, reason = scheme(rule.scheme), f"layers[{i}] matches {rule.match!r}"
                matched.add(i)
        if not _plain(layer):
            chosen, reason = scheme("none"), "a convolution with groups, dilation or other padding than zeros"
        weight: Tensor = layer.weight  # type: ignore[assignment]
        numbers, channels = weight.numel(), weight.shape[0]
        after = chosen.weight.bytes_of(channels, numbers // channels) if chosen.is_quantized else numbers * width
        action = chosen.name if chosen.is_quantized else SKIP
        edits.append(Edit(NAME, f"{part}.{name}", action, 4 * numbers, int(after), reason))
    weights = {f"{name}.weight" for name in layers}
    rest = [p for path, p in component.named_parameters() if re.search(own, path) and path not in weights]
    before = 4 * sum(p.numel() for p in rest)
    halved = sum(p.numel() for p in rest if p.ndim > 1 and width < 4)
    action = f"{STORE}{storage_of(default)}"
    edits.append(Edit(NAME, part, action, before, before - 2 * halved, "norms, biases, embeddings"))
    return edits, matched


def special(
    model: LatentDiffusion, part: str, component: nn.Module, sensitive: str, modulation: str
) -> dict[str, tuple[Scheme, str]]:
    """Layer -> the scheme it gets whatever its part gets, and why.

    Args:
        model: knows the layers of its denoiser.
        part: its name.
        component: the network that holds it.
        sensitive: the scheme of cheap layers whose error is everywhere.
        modulation: the scheme of layers that read one vector per picture.
    """
    if part == "denoiser":
        errors, vectors = model.family.sensitive(component), model.family.modulation(component)
    else:
        pattern = _SENSITIVE.get(part)
        errors = [] if pattern is None else [name for name in layers_of(component) if re.search(pattern, name)]
        vectors = []
    return {
        **dict.fromkeys(errors, (scheme(sensitive), "sensitive: cheap, and its error is everywhere")),
        **dict.fromkeys(vectors, (scheme(modulation), "modulation: one vector per picture")),
    }


def rows_of(edits: Sequence[Edit]) -> dict[str, dict[str, Edit]]:
    """Part -> layer -> edit."""
    rows: dict[str, dict[str, Edit]] = {}
    for edit in edits:
        part, _, name = edit.module.partition(".")
        own = rows.setdefault(part, {})
        if name:
            own[name] = edit
    return rows


def in_float(edit: Edit, row: Scheme) -> Edit:
    """The edit of a layer that is computed in float; the bits of its weights stay up to the budget."""
    stored = computed_in_float(row)
    size = round(edit.bytes_after * stored.weight.bits / row.weight.bits)
    return replace(edit, action=(UP_TO if limit(edit) else "") + stored.name, bytes_after=size)


def layers_of(component: nn.Module) -> dict[str, nn.Module]:
    """Its linear and convolution layers."""
    from torch import nn

    return {name: layer for name, layer in component.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is linear, or a convolution of whole channels over neighbouring pixels with zeros around them."""
    from torch import nn

    if not isinstance(layer, nn.Conv2d):
        return True
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def storage_of(default: Scheme) -> Storage:
    """How the float weights of a part under this scheme are stored."""
    return "float32" if default.weight.dtype == "float32" else "float16"

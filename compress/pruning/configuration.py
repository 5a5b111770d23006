"""Which cuts of depth the configuration of a diffusers class can express, so that diffusers itself loads the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.pruning.axis import Network

_COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def expressed(network: Network, module: str, kept: Sequence[int]) -> dict[str, Any] | None:
    """The entries of the configuration that change when only these units of an axis of depth are left.

    Args:
        network: as its configuration describes it.
        module: of the axis.
        kept: units.

    Returns:
        None where no configuration describes what is left.
    """
    config = network.config
    if module in _COUNTS:
        changes: dict[str, Any] = {_COUNTS[module]: len(kept)}
        if module == "transformer_blocks" and config.get("dual_attention_layers"):
            changes["dual_attention_layers"] = [at for at, b in enumerate(kept) if b in config.dual_attention_layers]
        return changes
    if module == "mid_block":
        return {"mid_block_type": None}
    level = module.removeprefix("down_blocks.")
    if level != module and level.isdigit():
        layers = config.layers_per_block
        counts = [layers] * len(network.down_blocks) if isinstance(layers, int) else list(layers)
        counts[int(level)] = len(kept)
        return {"layers_per_block": counts}
    return None

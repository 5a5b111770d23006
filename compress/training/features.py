"""Outputs of blocks while a network runs, and how far those of two networks are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import PassError

if TYPE_CHECKING:
    from compress.families.segments import Unit


Block = nn.Module
"""One whose output counts."""


class Watched:
    """Keeps what some modules gave last."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        """Hook onto the modules.

        Args:
            network: holds them; it keeps the hooks.
            paths: of the modules.
        """
        self._found: dict[int, Tensor] = {}
        for at, path in enumerate(paths):
            network.get_submodule(path).register_forward_hook(self._keep(at))
        self._count = len(paths)

    def taken(self) -> list[Tensor]:
        """The outputs in the order of the paths, once.

        Raises:
            PassError: a module did not run, or there is none.
        """
        if not self._count or len(self._found) != self._count:
            raise PassError(
                f"features: {len(self._found)} of {self._count} blocks ran, so that their outputs cannot be compared: "
                "set recover.features to 0"
            )
        found = [self._found[at] for at in range(self._count)]
        self._found.clear()
        return found

    def _keep(self, at: int) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            # Blocks with two streams give the picture's last; stages of a UNet give what they hand on last.
            self._found[at] = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)][-1]

        return hook


def normalised_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """The mean over blocks and samples of `|found - wanted|^2 / |wanted|^2`.

    Args:
        found: of each block, (samples, ...).
        wanted: likewise.
    """
    ratios = [
        (own.float() - theirs.float()).square().flatten(1).sum(1) / theirs.float().square().flatten(1).sum(1)
        for own, theirs in zip(found, wanted, strict=True)
    ]
    return torch.stack(ratios).mean()


def blocks_of(units: Sequence[Unit], network: Any) -> dict[str, nn.Module]:
    """Path -> block of a denoiser: of every unit the last module, where that is one of a list or the middle block.

    Args:
        units: of the denoiser.
        network: the denoiser.
    """
    last = [unit.modules[-1] for unit in units if unit.modules]
    return {
        path: network.get_submodule(path) for path in last if path == "mid_block" or path.rpartition(".")[2].isdigit()
    }

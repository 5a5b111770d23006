"""A denoiser as its fusions let it compute: a twin over the same weights, whose modules keep their paths."""

from __future__ import annotations

from collections.abc import Mapping

from compress.errors import RefusedError
from compress.families import Network
from compress.fusion.patterns import pattern_of
from compress.twin import twin


def fused(network: Network, fusions: Mapping[str, str]) -> Network:
    """A twin that calls our operators.

    Linear and convolution layers stay what and where they are, so that quantization plans and cuts fit it, too.

    Args:
        network: of diffusers.
        fusions: module path (empty: the network itself) -> the name of its pattern.

    Raises:
        RefusedError: a path is not in the network, or its module does not fit the pattern.
    """
    made = twin(network)
    modules = dict(made.named_modules())
    for path, name in fusions.items():
        pattern = pattern_of(modules[path]) if path in modules else None
        if pattern is None or pattern.name != name or pattern.unfit(modules[path]) is not None:
            raise RefusedError(
                f"the fusions name {path!r} as {name!r}, which the network has not: apply the pass fuse to it"
            )
        for inner, form in pattern.forms.items():
            modules[path].get_submodule(inner).__class__ = form
    return made

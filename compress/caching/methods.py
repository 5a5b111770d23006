"""METHODS, the one table of caching methods by their recipe names."""

from __future__ import annotations

from compress.caching import block_methods, feature_methods, guidance_methods, level_methods, sublayer_methods
from compress.caching.method import Method

METHODS: dict[str, Method] = {
    "deepcache": feature_methods.DEEPCACHE,
    "encoder-propagation": feature_methods.ENCODER_PROPAGATION,
    "ddt": block_methods.DDT,
    "delta-dit": block_methods.DELTA_DIT,
    "fora": sublayer_methods.FORA,
    "smoothcache": sublayer_methods.SMOOTHCACHE,
    "teacache": block_methods.TEACACHE,
    "first-block-cache": block_methods.FIRST_BLOCK_CACHE,
    "dbcache": block_methods.DBCACHE,
    "magcache": block_methods.MAGCACHE,
    "taylorseer": sublayer_methods.TAYLORSEER,
    "hicache": sublayer_methods.HICACHE,
    "pab": sublayer_methods.PAB,
    "t-gate": sublayer_methods.T_GATE,
    "guidance-interval": guidance_methods.GUIDANCE_INTERVAL,
    "low-resolution-start": level_methods.LOW_RESOLUTION_START,
}

"""What the tests share: toy pipelines as folders, saved once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name ("unet", "sd3", "dit", "pixart") -> the folder of its toy pipeline; read only."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in folders:
            folders[family] = tiny.save(family, tmp_path_factory.mktemp("tiny") / family)
        return folders[family]

    return folder

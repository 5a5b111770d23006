"""What the tests share: toy pipelines as folders, saved once per run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from compress.store import Store
    from tests.interpreted import Interpreter


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what the command line stores away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("COMPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name (a key of `tests.tiny.PIPELINES`) -> the folder of its toy pipeline; read only."""
    folders: dict[str, Path] = {}

    def folder(family: str) -> Path:
        from tests import tiny  # brings torch, which most tests of recipes and of the command line do without

        if family not in folders:
            folders[family] = tiny.save(family, tmp_path_factory.mktemp("tiny") / family)
        return folders[family]

    return folder


@pytest.fixture(scope="session")
def engine_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Where the float graphs of `tiny_engine` are kept."""
    from compress.store import Store

    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def tiny_engine(
    tiny_folder: Callable[[str], Path], engine_store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The engine folder of `tests.tiny_engine`; read only."""
    from tests import tiny_engine

    folder = tmp_path_factory.mktemp("engine") / "engine"
    tiny_engine.build(tiny_engine.tiny_model(tiny_folder("unet")), folder, engine_store)
    return folder


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """The process of a test file in which Triton kernels are interpreted."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.interpreted import Interpreter

    worker = Interpreter()
    yield worker
    worker.close()

"""Paths of several segments run as one graph where the runtime gains by it, with the numbers of the segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.engine.export_engine import export_engine
from compress.model.latent_diffusion import load
from export.backends import available
from export.engine import Engine
from export.errors import EngineError
from export.loop import Joined, look_up
from export.runtime import Runtime
from export.step_plan import Gate, StepPlan
from export.target import TARGETS
from tests.tiny_engine import SHAPES, SIDE, cached, quantized

PROMPTS = ["a red circle", "a small blue square"]
pytestmark = pytest.mark.skipif(not available("openvino"), reason="not installed")


@pytest.fixture(scope="module")
def runtime(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A toy UNet in three segments, which the shallow path runs two of, with a quantized layer in each."""
    model = cached(load(tiny_folder("unet")), cut=1)
    names = [name for name, _ in model.denoiser.named_modules() if name.endswith("resnets.0.conv1")]
    folder = tmp_path_factory.mktemp("joined") / "engine"
    export_engine(quantized(model, "denoiser", names), [TARGETS["openvino-cpu"]], SHAPES, folder)
    return Engine.open(folder, "openvino-cpu", threads=1).runtime


def rows_of(runtime: Runtime, plan: StepPlan | None = None) -> list[Any]:
    return look_up(plan or runtime.plan, runtime.functions, runtime.joined)


def test_every_path_of_several_segments_is_one_call(runtime: Runtime) -> None:
    assert [len(row.calls) for row in rows_of(runtime)] == [3, 2, 3, 2]
    assert [len(row.fast) for row in rows_of(runtime)] == [1, 1, 1, 1]
    assert runtime.altered(functions=runtime.functions).joined == {}


def test_the_numbers_are_those_of_the_segments(runtime: Runtime) -> None:
    apart = runtime.altered(functions=runtime.functions)
    expected = apart.sample(PROMPTS, [1, 2], SIDE, SIDE)
    made = runtime.sample(PROMPTS, [1, 2], SIDE, SIDE)
    assert np.abs(made - expected).max() <= 1e-5 * np.abs(expected).max()


def test_whoever_watches_sees_every_tensor(runtime: Runtime) -> None:
    seen: list[set[str]] = []
    latents = runtime.sample(PROMPTS, [1, 2], SIDE, SIDE, on_step=lambda row, after, tensors: seen.append(set(tensors)))
    made = {name for segment in runtime.plan.segments.values() for name in segment.outputs}
    assert made <= seen[0]
    assert np.abs(latents - runtime.sample(PROMPTS, [1, 2], SIDE, SIDE)).max() <= 1e-5 * np.abs(latents).max()


def test_nothing_is_joined_that_must_be_stopped_in_between(runtime: Runtime) -> None:
    """A residual needs its base before the read, a gate its tensor; what the one graph does not give is not written."""
    slot = runtime.plan.slots["deep"]
    base = runtime.plan.segments[runtime.plan.paths["full"][0]].outputs[0]
    residual = replace(runtime.plan, slots={"deep": replace(slot, kind="residual", base=base)})
    assert [len(row.fast) for row in rows_of(runtime, residual)] == [3, 2, 3, 2]
    gated = replace(runtime.plan, gate=Gate(base, 0.1, 1))
    assert [len(row.fast) for row in rows_of(runtime, gated)] == [3, 2, 3, 2]
    poor = {path: Joined(whole.function, (runtime.plan.output,)) for path, whole in runtime.joined.items()}
    rows = look_up(runtime.plan, runtime.functions, poor)
    assert [len(row.fast) for row in rows] == [3, 1, 3, 1]


def test_graphs_that_do_not_fit_together_are_refused(runtime: Runtime) -> None:
    from export.backends import openvino

    graphs = [runtime.functions[name].loaded() for name in runtime.plan.paths["full"]]
    with pytest.raises(EngineError, match="OpenVINO cannot load"):
        openvino.joined(graphs, ["no such tensor"])

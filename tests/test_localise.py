"""The localiser: a planted fault is named, at the right stage, in the right part, at the right layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import PassError
from compress.measure.localise import (
    THRESHOLD_DB,
    Recorder,
    Shadow,
    compare_layers,
    compare_parts,
    handovers,
    worst_stage,
)
from compress.measure.quality import Workload, generate
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.prompts import Prompt
from compress.sampler import compile_sampler
from export.quant_plan import Affine, LayerQuant, QuantPlan, WeightGrid
from export.step_plan import Segment

SIDE = 16
WORK = Workload.of([Prompt("a red circle"), Prompt("a large blue square")], 0, SIDE, SIDE)
SEEN = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def original(tiny_folder: Callable[[str], Path]) -> Callable[[str], LatentDiffusion]:
    """A toy model with four steps of its own sampler."""

    @functools.cache
    def make(family: str) -> LatentDiffusion:
        model = load(tiny_folder(family))
        model.step_plan = compile_sampler(
            model.scheduler_config["_class_name"],
            model.scheduler_config,
            4,
            3.0,
            segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in model.segments()},
            paths={"full": ("denoiser",)},
        )
        return model

    return make


@pytest.fixture(scope="module")
def recorded(original: Callable[[str], LatentDiffusion]) -> Callable[[str], Recorder]:
    """What a real run feeds the parts of a toy model."""

    @functools.cache
    def record(family: str) -> Recorder:
        stage = original(family).runtime()
        recorder = Recorder(stage.functions, limit=2)
        generate(stage.altered(functions=recorder.functions), WORK, "original")
        return recorder

    return record


def int8(component: nn.Module, run: Callable[[], object]) -> QuantPlan:
    """Quantize every linear layer and convolution that runs: weights per channel, inputs by their range."""
    seen: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
            low, high = seen.get(name, (0.0, 0.0))
            seen[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        return hook

    modules = {name: m for name, m in component.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    with torch.inference_mode():
        run()
    for hook in hooks:
        hook.remove()
    layers = {}
    for name, (low, high) in seen.items():
        largest = modules[name].weight.detach().abs().flatten(1).amax(1).clamp_min(1e-6)
        op = "conv" if isinstance(modules[name], nn.Conv2d) else "linear"
        scales = tuple(float(scale) for scale in largest / 127)
        layers[name] = LayerQuant(op, "int8-w8a8", WeightGrid.per_channel(scales), Affine.of_range(low, high))  # type: ignore[arg-type]
    return QuantPlan(layers)


@pytest.fixture(scope="module")
def quantized(
    original: Callable[[str], LatentDiffusion], recorded: Callable[[str], Recorder]
) -> Callable[[str], LatentDiffusion]:
    """The toy model with its denoiser and its VAE decoder in int8."""

    @functools.cache
    def make(family: str) -> LatentDiffusion:
        model = original(family).clone()
        for part in ("denoiser", "vae_decoder"):
            whole = model.parts()[part]
            component = model.denoiser if part == "denoiser" else whole.component
            calls = recorded(family).inputs[part]

            def run(whole: nn.Module = whole, calls: list[dict[str, np.ndarray]] = calls) -> None:
                for call in calls:
                    whole(**{key: torch.from_numpy(value) for key, value in call.items()})

            model.quant_plans[part] = int8(component, run)
        return model

    return make


def with_fault(model: LatentDiffusion, part: str, layer: str, factor: float) -> LatentDiffusion:
    """The same model with one scale of one layer wrong."""
    model = model.clone()
    plan = model.quant_plans[part]
    row = plan.layers[layer]
    wrong = replace(row, weight=replace(row.weight, scale=row.weight.scale * np.float32(factor)))
    model.quant_plans[part] = QuantPlan({**plan.layers, layer: wrong})
    return model


FAULTS = [
    ("unet", "denoiser", "mid_block.resnets.0.conv1"),
    ("unet", "denoiser", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2"),
    ("unet", "denoiser", "up_blocks.1.resnets.1.conv2"),
    ("unet", "vae_decoder", "decoder.up_blocks.0.resnets.1.conv2"),
    ("sd3", "denoiser", "transformer_blocks.2.attn.to_v"),
    ("sd3", "denoiser", "transformer_blocks.0.ff.net.2"),
]


@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize(("family", "part", "layer"), FAULTS)
def test_a_wrong_scale_is_found(
    original: Callable[[str], LatentDiffusion],
    recorded: Callable[[str], Recorder],
    quantized: Callable[[str], LatentDiffusion],
    family: str,
    part: str,
    layer: str,
    factor: float,
) -> None:
    """One layer's scale is wrong by ten, either way; all others are healthy."""
    faulty = with_fault(quantized(family), part, layer, factor)
    found = compare_parts(original(family), faulty, recorded(family).inputs)
    assert found is not None
    assert found.worst().name == f"{part}.{layer}"
    assert found.worst().local_db < THRESHOLD_DB
    first = found.first_below()
    assert first is not None
    assert first.name == f"{part}.{layer}"
    assert found.ranked(3)[0].name == f"{part}.{layer}"


def test_a_healthy_network_has_no_bad_layer(
    original: Callable[[str], LatentDiffusion],
    recorded: Callable[[str], Recorder],
    quantized: Callable[[str], LatentDiffusion],
) -> None:
    found = compare_parts(original("unet"), quantized("unet"), recorded("unet").inputs)
    assert found is not None
    assert found.first_below() is None
    names = [layer.name for layer in found.layers]
    assert (
        names.index("denoiser.conv_in") < names.index("denoiser.conv_out") < names.index("vae_decoder.decoder.conv_in")
    )
    quantized_layers = set(quantized("unet").quant_plans["denoiser"].layers)
    for layer in found.layers:
        name = layer.name.removeprefix("denoiser.")
        if layer.name.startswith("denoiser.") and name not in quantized_layers:
            assert layer.local_db == 150, "a layer left in float errs only by what it is given"
            assert layer.cumulative_db is not None
    assert found.layers[0].cumulative_db == pytest.approx(found.layers[0].local_db)
    assert compare_parts(original("unet"), original("unet"), recorded("unet").inputs) is None


class Chain(nn.Module):
    """Six linear layers in a row, so that errors have one way to go."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def disturbed(places: dict[int, float]) -> Chain:
    """The same chain with noise on the weights of some layers."""
    chain = Chain()
    with torch.no_grad():
        for index, sigma in places.items():
            layer = chain.layers[index]
            assert isinstance(layer, nn.Linear)
            layer.weight += sigma * torch.randn(8, 8, generator=torch.Generator().manual_seed(index))
    return chain


@pytest.mark.parametrize("bad", [0, 3, 5])
def test_local_and_cumulative_errors_of_a_chain(bad: int) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    found = compare_layers(Chain(), disturbed({bad: 0.3}), lambda chain: chain(x))
    assert [layer.name for layer in found.layers] == [f"layers.{i}" for i in range(6)]
    for index, layer in enumerate(found.layers):
        assert layer.cumulative_db is not None
        assert (layer.local_db < 20) == (index == bad)
        assert (layer.cumulative_db < 40) == (index >= bad)
        assert index >= bad or layer.cumulative_db == 150
    assert found.worst().name == found.largest_drop().name == f"layers.{bad}"


def test_first_and_worst_may_differ() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    found = compare_layers(Chain(), disturbed({1: 0.2, 4: 1.0}), lambda chain: chain(x), prefix="toy.")
    first = found.first_below()
    assert first is not None
    assert first.name == "toy.layers.1"
    assert found.worst().name == "toy.layers.4"


def test_not_a_number_in_a_layer_is_the_worst_there_is() -> None:
    x = torch.randn(4, 8)
    broken = Chain()
    with torch.no_grad():
        dict(broken.named_parameters())["layers.2.bias"][0] = float("nan")
    found = compare_layers(Chain(), broken, lambda chain: chain(x))
    assert found.worst().name == "layers.2"
    assert found.worst().local_db == -150


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    chain, other = Chain(), Chain()

    def fail(module: nn.Module) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        compare_layers(chain, other, fail)
    compare_layers(chain, other, lambda module: module(torch.zeros(1, 8)))
    assert not any(module._forward_hooks for each in (chain, other) for module in each.modules())
    with pytest.raises(PassError, match="no layers in common"):
        compare_layers(chain, nn.Sequential(nn.Linear(2, 2)), fail)
    with pytest.raises(PassError, match="none of the layers in common ran"):
        compare_layers(chain, other, lambda module: None)


def test_a_shadow_names_the_graph_that_differs(original: Callable[[str], LatentDiffusion]) -> None:
    """The VAE decoder of the candidate is off by one percent, everything else equal."""
    stage = original("unet").runtime()
    candidate = dict(original("unet").clone().runtime().functions)
    decode = candidate["vae_decoder"]
    candidate["vae_decoder"] = lambda arrays: {name: 1.01 * value for name, value in decode(arrays).items()}
    shadow = Shadow(stage.functions, candidate)
    pictures = generate(stage.altered(functions=shadow.functions), WORK, "compressed")
    np.testing.assert_array_equal(pictures.images, generate(stage, WORK, "compressed").images)
    assert shadow.outputs[0].name == "vae_decoder: sample"
    assert shadow.outputs[0].local_db == pytest.approx(40, abs=0.01)
    assert {layer.name: layer.local_db for layer in shadow.outputs[1:]}["denoiser: out_sample"] > 100
    with pytest.raises(PassError, match="no function in common"):
        Shadow({"a": decode}, {"b": decode})


def test_the_recorder_keeps_calls_spread_over_the_run() -> None:
    recorder = Recorder({"f": lambda arrays: dict(arrays)}, limit=4)
    value = np.zeros(1)
    for call in range(20):
        value[0] = call
        recorder.functions["f"]({"x": value})
    kept = [float(call["x"][0]) for call in recorder.inputs["f"]]
    assert len(kept) <= 4
    assert kept[0] == 0
    assert kept[-1] >= 12
    assert len({after - before for before, after in pairwise(kept)}) == 1


def test_handovers_name_the_stage_that_loses_most() -> None:
    generator = np.random.default_rng(0)
    first = generator.standard_normal((4, 4, 8, 8))
    second = first + 0.01 * generator.standard_normal(first.shape)
    third = second + 0.3 * generator.standard_normal(first.shape)
    found = handovers({"original": first, "compressed": second, "exported": third, "openvino-cpu": third})
    assert [(step.before, step.after) for step in found] == [
        ("original", "compressed"),
        ("compressed", "exported"),
        ("exported", "openvino-cpu"),
    ]
    assert found[0].psnr_db == pytest.approx(52, abs=0.5)
    assert found[2].psnr_db == 150
    assert worst_stage(found) == "exported"
    assert worst_stage(handovers({"original": first, "compressed": first})) is None

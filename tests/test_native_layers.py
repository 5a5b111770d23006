"""Linear layers that multiply in 8 bits by our operators give what their fake-quantized twins give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.engine.export_engine import _execution
from compress.engine.jobs import jobs_of
from compress.engine.packages import trace_functions
from compress.model.latent_diffusion import load
from compress.quantization.fake_quantize import fake_quantized, round_layer
from compress.quantization.native import native_layer
from export.dialect import DIALECTS
from export.grids import Affine, Dynamic, WeightGrid
from export.quant_plan import LayerQuant, LowRank, QuantPlan
from export.target import target
from tests import tiny_engine as toy

CUDA = target("torch-cuda")
ON_CPU = replace(CUDA, name="torch-cpu", device="cpu")
OPERATORS = DIALECTS["operators"]


def planned(weight: torch.Tensor, element: str = "int8", given: str = "int8") -> LayerQuant:
    """A layer with a scale a channel and a scale a token."""
    largest = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}[element]
    scale = (weight.detach().abs().amax(1) / largest).numpy()
    scheme = {"e4m3": "fp8-w8a8-token", "int8": "int8-w8a8-token", "int4": "int4-w4a8-token"}[element]
    return LayerQuant("linear", scheme, WeightGrid.per_channel(scale, element), Dynamic(given))


def layer(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(48, 20)


def difference(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize(("element", "given"), [("int8", "int8"), ("int4", "int8"), ("e4m3", "e4m3")])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "with every method"])
def test_a_layer_gives_what_its_fake_quantized_twin_gives(element: str, given: str, everything: bool) -> None:
    fake, native = layer(), layer()
    quant = planned(fake.weight, element, given)
    if everything:
        random = np.random.default_rng(0)
        down, up = (random.normal(size=size).astype(np.float16) for size in ((3, 48), (20, 3)))
        smooth = np.linspace(0.5, 2.0, 48, dtype=np.float32)
        quant = replace(
            quant, smooth=smooth, rotation=16, low_rank=LowRank(down, up), bias=np.arange(20, dtype=np.float32)
        )
    form = OPERATORS.form(quant)
    assert form == given
    round_layer(fake, quant)
    native_layer(native, quant, form)
    x = torch.randn(3, 7, 48)
    assert difference(native(x), fake(x)) < 2e-3  # a number between two codes may go to either
    assert native.weight is None
    assert difference(native(x), layer()(x)) > 1e-4


def test_scales_keep_their_bits_where_the_network_computes_in_16() -> None:
    native = layer()
    quant = planned(native.weight)
    native_layer(native, quant, "int8")
    kept = native.to(torch.bfloat16).scale_bits.view(torch.float32)
    assert torch.equal(kept, torch.from_numpy(quant.weight.scale[:, 0]))
    assert native(torch.randn(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_what_has_no_operator_is_emulated() -> None:
    quant = planned(layer().weight)
    other = [
        replace(quant, op="conv"),
        replace(quant, input=Affine(0.1, 128)),
        replace(quant, input=Dynamic("int8", group=16)),
        replace(quant, input=Dynamic("e4m3")),
        replace(quant, input=None),
    ]
    assert [OPERATORS.form(one) for one in other] == [None] * 5
    assert [OPERATORS.computes(one) for one in other] == [True] * 4 + [False]
    plan = QuantPlan({"a": quant, "b": replace(quant, op="conv")})
    assert _execution(QuantPlan({"a": quant}), quant.scheme, CUDA) == "native"
    assert _execution(plan, quant.scheme, CUDA) == "simulated"


def test_a_traced_denoiser_keeps_the_8_bit_products(tiny_folder: Callable[[str], Path]) -> None:
    model = toy.sampled(load(tiny_folder("sd3")))
    names = [name for name, one in model.denoiser.named_modules() if isinstance(one, nn.Linear) and "attn.to_" in name]
    layers = {name: planned(model.denoiser.get_submodule(name).weight) for name in names}
    model.quant_plans["denoiser"] = QuantPlan(layers, inference_precision="bfloat16")
    sizes = {**toy.SHAPES, "prompt_tokens": (12, 12, 12)}
    (program,) = trace_functions(
        model, ON_CPU, [job for job in jobs_of(model, sizes) if job.part == "denoiser"]
    ).values()
    called = [str(node.target) for node in program.exported.graph.nodes]
    assert called.count("latent.gemm_w8a8.default") == called.count("latent.quantize.default") == len(names) > 0
    held = {str(value.dtype) for value in program.exported.state_dict.values()}
    assert held >= {"torch.int8", "torch.int32", "torch.bfloat16"}
    assert not [name for name in program.exported.state_dict if name.removesuffix(".weight") in names]
    twin = fake_quantized(model.denoiser, model.quant_plans["denoiser"], dialect="operators")
    assert all(model.denoiser.get_submodule(name).weight is not None for name in names)
    assert all(twin.get_submodule(name).weight is None for name in names)

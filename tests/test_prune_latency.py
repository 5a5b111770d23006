"""The budget latency_ratio: what layers and networks are timed as, what is chosen by it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import PassError, RefusedError
from compress.graph_times import Bench, Piece, calls_of, piece_of
from compress.importance import losses
from compress.model.latent_diffusion import LatentDiffusion, load
from compress.passes.base import PassContext
from compress.passes.prune import Prune
from compress.passes.prune_latency import TOLERANCE, timed_target
from compress.progress import silent
from compress.pruning.axes import axes_of
from compress.pruning.axis import KINDS
from compress.store import Store
from export.target import built_anywhere, target
from tests import tiny, tiny_engine

ORT = target("onnxruntime-cpu")
PROMPTS = ["a red circle", "a small blue square"]
Folder = Callable[[str], Path]


def context(model: LatentDiffusion, **options: Any) -> PassContext:
    prompts = PROMPTS if model.text_encoders else ["1", "7"]
    side = 2 * tiny.SIDE
    return PassContext(prompts, seed=0, height=side, width=side, targets=[ORT], **options)


def sampled(folder: Path) -> LatentDiffusion:
    return tiny_engine.sampled(load(folder), steps=2)


def by_size(layers: float = 1.0) -> Callable[[Bench, Sequence[Piece], str], dict[str, float]]:
    """A clock that tells sizes: a millisecond for a thousand numbers, and other times for layers by themselves."""

    def measured(bench: Bench, pieces: Sequence[Piece], what: str) -> dict[str, float]:
        each = (layers if what == "layers" else 1.0) / 1000
        return {piece.key: each * sum(p.numel() for p in piece.module.parameters()) for piece in pieces}

    return measured


@pytest.mark.parametrize("family", tiny.PIPELINES)
def test_a_budget_is_kept_on_every_family(
    family: str, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where times are sizes, what is predicted is what comes."""
    monkeypatch.setattr(Bench, "_measured", by_size())
    model = sampled(tiny_folder(family))
    step = Prune(latency_ratio=0.85, axes=("heads", "ffn", "resnet", "depth"), importance="magnitude", multiple=2)
    edits = step.plan(model, [ORT])
    step.apply(model, edits, context(model, store=Store(tmp_path)))
    step.check(model, edits)
    row = model.provenance[-1]["latency_ms"]
    before, after = model.provenance[-1]["parameters"]
    assert row["target"] == ORT.name
    assert row["after"] / row["before"] == pytest.approx(after / before, rel=1e-3)
    assert abs(after / before / 0.85 - 1.0) <= TOLERANCE
    assert row["predicted"] == pytest.approx(row["after"], rel=0.02)


@pytest.mark.parametrize("layers", [0.1, 3.0])
def test_layers_by_themselves_may_take_longer_or_less(
    layers: float, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One factor, found on the whole network, makes up for it."""
    monkeypatch.setattr(Bench, "_measured", by_size(layers))
    model = sampled(tiny_folder("unet"))
    step = Prune(latency_ratio=0.8, importance="magnitude", multiple=2)
    step.apply(model, step.plan(model, [ORT]), context(model))
    step.check(model, [])
    row = model.provenance[-1]["latency_ms"]
    assert row["layers"] == pytest.approx(1.0 / layers, rel=0.05)
    assert row["after"] / row["before"] == pytest.approx(0.8, rel=TOLERANCE / 2)


def test_what_the_factor_does_not_tell_is_corrected(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole takes time by the cube of its size."""

    def cubed(bench: Bench, pieces: Sequence[Piece], what: str) -> dict[str, float]:
        times = by_size()(bench, pieces, what)
        return times if what == "layers" else {key: time**3 for key, time in times.items()}

    monkeypatch.setattr(Bench, "_measured", cubed)
    model = sampled(tiny_folder("unet"))
    step = Prune(latency_ratio=0.8, importance="magnitude", multiple=2)
    step.apply(model, step.plan(model, [ORT]), context(model))
    row = model.provenance[-1]["latency_ms"]
    assert row["after"] / row["before"] == pytest.approx(0.8, rel=TOLERANCE / 2)


def test_a_result_that_misses_its_budget_is_refused(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers promised does not come: the whole takes as long as before."""

    def never_faster(bench: Bench, pieces: Sequence[Piece], what: str) -> dict[str, float]:
        told = what in ("layers", "the denoiser")
        return by_size()(bench, pieces, what) if told else {piece.key: 7.0 for piece in pieces}

    monkeypatch.setattr(Bench, "_measured", never_faster)
    model = sampled(tiny_folder("unet"))
    step = Prune(latency_ratio=0.9, importance="magnitude", multiple=2)
    edits = step.plan(model, [ORT])
    step.apply(model, edits, context(model))
    said = r"latency_ratio is 1\.000, more than 5% above 0\.9: on onnxruntime-cpu, .* took 7\.00 ms of 7\.00 ms"
    with pytest.raises(PassError, match=said):
        step.check(model, edits)


def test_a_budget_out_of_reach_is_refused(tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "_measured", by_size())
    model = sampled(tiny_folder("unet"))
    step = Prune(latency_ratio=0.1, axes=("heads",), importance="magnitude")
    with pytest.raises(RefusedError, match=r"latency_ratio: 0\.1 cannot be reached: .* takes .* ms of .* raise it"):
        step.apply(model, step.plan(model, [ORT]), context(model))


def test_its_time_is_part_of_the_estimate(tiny_folder: Folder) -> None:
    model = sampled(tiny_folder("unet"))
    found = Prune(latency_ratio=0.5, importance="magnitude").costs(model, [], context(model))
    assert found is not None
    assert [one.what for one in found] == ["timing layers"]
    assert found[0].seconds > 10.0


def test_it_needs_a_target_that_can_be_timed(tiny_folder: Folder) -> None:
    assert timed_target([target("torch-cuda"), *built_anywhere()]).device == "cpu"
    with pytest.raises(RefusedError, match="targets has none: add onnxruntime-cpu"):
        Prune(latency_ratio=0.5).plan(load(tiny_folder("unet")), [target("torch-cuda")])


def test_times_are_real_and_kept(tmp_path: Path) -> None:
    """More work takes longer, and is not measured again."""
    heard = list[str]()
    bench = Bench(ORT, Store(tmp_path), lambda what, done, total: heard.append(what))
    layers = [torch.nn.Sequential(torch.nn.Linear(size, size)) for size in (8, 1024)]
    pieces = []
    for layer, size in zip(layers, (8, 1024), strict=True):
        given = torch.randn(64, size)
        (call,) = calls_of(layer, lambda layer=layer, given=given: layer(given), ["0"]).values()  # type: ignore[misc]
        pieces.append(call.piece(layer[0]))
    times = bench.milliseconds(pieces, "layers")
    assert 0.0 < 4.0 * times[pieces[0].key] < times[pieces[1].key]
    assert {"export layers", "time layers"} == set(heard)
    heard.clear()
    assert bench.milliseconds(pieces, "layers") == times
    assert not heard


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_layers_by_themselves_compute_what_they_do_inside(family: str, tiny_folder: Folder) -> None:
    model = load(tiny_folder(family))
    part = model.parts()["denoiser"]
    inputs = model.family.example_inputs(model.denoiser, 2, 8, 8, 5)
    found = {axis.module: axis for axis in axes_of(model.denoiser, ("ffn",))}
    seen: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen.setdefault(path, output[-1] if isinstance(output, tuple) else output)

        return hook

    for path in found:
        model.denoiser.get_submodule(path).register_forward_hook(keep(path))
    for path, call in calls_of(model.denoiser, lambda: part(**inputs), list(found)).items():
        piece = call.piece(model.denoiser.get_submodule(path))
        assert torch.equal(piece.module(**piece.inputs)[-1], seen[path])


def test_equal_work_has_one_key_and_other_work_another(tiny_folder: Folder) -> None:
    model = load(tiny_folder("sd3"))
    part, inputs = model.parts()["denoiser"], model.family.example_inputs(model.denoiser, 2, 8, 8, 5)
    paths = [f"transformer_blocks.{block}.{name}" for block in (0, 1) for name in ("attn", "ff")]
    keys = [
        call.piece(model.denoiser.get_submodule(path)).key
        for path, call in calls_of(model.denoiser, lambda: part(**inputs), paths).items()
    ]
    assert len(set(keys)) == 2
    with pytest.raises(PassError, match="transformer_blocks is not called by itself"):
        calls_of(model.denoiser, lambda: part(**inputs), ["transformer_blocks"])
    model.denoiser.transformer_blocks[0].attn.heads += 1
    attention = model.denoiser.transformer_blocks[0].attn
    assert (
        piece_of(part, attention, inputs, ("y",)).key
        != piece_of(part, model.denoiser.transformer_blocks[1].attn, inputs, ("y",)).key
    )


def test_what_is_timed_holds_all_that_is_cut(tiny_folder: Folder) -> None:
    """The output projection of a Flux single block is the block's, not its attention's."""
    from compress.passes.prune_latency import _owner

    axes = {
        (axis.kind, axis.module): _owner(axis) for axis in axes_of(load(tiny_folder("flux")).denoiser, ("heads", "ffn"))
    }
    assert axes["heads", "single_transformer_blocks.0.attn"] == "single_transformer_blocks.0"
    assert axes["heads", "transformer_blocks.0.attn"] == "transformer_blocks.0.attn"
    assert axes["ffn", "transformer_blocks.0.ff"] == "transformer_blocks.0.ff"


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_every_axis_has_a_layer_that_is_exported(family: str, tiny_folder: Folder) -> None:
    """On the real runtime, one axis of each kind: savings are there for all, and none is negative."""
    from compress.passes import prune_latency

    model = sampled(tiny_folder(family))
    where = context(model)
    every = [axis for axis in axes_of(model.denoiser, KINDS) if axis.removable]
    axes = [next(axis for axis in every if axis.kind == kind) for kind in dict.fromkeys(axis.kind for axis in every)]
    found = losses(model, "denoiser", axes, 8, "magnitude", 0.0, where)
    bench = Bench(ORT, None, silent)
    savings = prune_latency._savings(model, "denoiser", model.denoiser, axes, found, bench, where)
    assert set(savings) == {(axis.kind, axis.module) for axis in axes}
    assert all(bool((unit >= 0.0).all()) for unit in savings.values())
    assert sum(float(unit.sum()) for unit in savings.values()) > 0.0

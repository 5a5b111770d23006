"""The runtime against the diffusers pipelines (text, class, image to image, inpainting) and against plain loops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor

import export.loop
from compress import compiler
from compress.model import latent_diffusion as models
from compress.model.tokenizers import portable
from compress.recipe.schema import Recipe
from compress.sampler import compile_sampler
from export.memory import Memory
from export.noise import INITIAL, noise
from export.picture import from_pictures, to_pictures
from export.runtime import LatentSpec, Runtime, RuntimeInputError
from export.step_plan import Segment, Slot, Step, StepPlan, StepPlanError
from tests import tiny
from tests.plain import (
    FUNCTIONS,
    PATHS,
    SEGMENTS,
    SLOTS,
    counting,
    given,
    over_numpy,
    plain_loop,
    random_plan,
    sampled,
    unguided,
)

Folder = Callable[[str], Path]
PROMPTS = ["a large red circle", "a small blue ring above the yellow square"]
SEEDS = (5, 6)
SHAPE = (2, 4, 8, 8)
NO_CLIP = {"clip_sample": False, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning",  # KDPM2 in diffusers
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_in(folder: Path) -> models.LatentDiffusion:
    return models.load(folder)


def runtime(folder: Path, scheduler: str, config: Mapping[str, Any], steps: int, scale: float, **more: Any) -> Runtime:
    model = model_in(folder)
    segments, paths, slots = model.family.segments(model.denoiser, None)
    plan = compile_sampler(
        scheduler,
        config,
        steps,
        scale,
        segments={segment.name: Segment(segment.inputs, segment.outputs) for segment in segments},
        paths=paths,
        slots=slots,
        **more,
    )
    plan.validate(model.family.conditioning)
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    return Runtime(plan, model.functions(), model.conditioning, LatentSpec(**model.latent), tokenizers)


@functools.cache
def saved_pipeline(folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in folder.name else {}
    return DiffusionPipeline.from_pretrained(folder, **absent)


def open_pipeline(
    folder: Path, scheduler: str | None = None, config: Mapping[str, Any] | None = None, cls: Any = None
) -> Any:
    components = dict(saved_pipeline(folder).components)
    if scheduler is not None:
        components["scheduler"] = getattr(diffusers, scheduler)(**(config or {}))
    cls = cls or type(saved_pipeline(folder))
    if "safety_checker" in components:
        components["requires_safety_checker"] = False
    pipeline = cls(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    assert np.isfinite(expected).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def give_noise(monkeypatch: pytest.MonkeyPatch, *modules: Any, offset: int = 0) -> None:
    """Every draw of diffusers becomes ours: the first is the initial noise, the k-th after it row k's."""
    drawn = iter(range(offset, 1000))

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Any:
        return torch.from_numpy(noise(SEEDS, next(drawn), tuple(shape)[1:])).to(dtype or torch.float32)

    for module in modules:
        monkeypatch.setattr(inspect.getmodule(module), "randn_tensor", randn_tensor)


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("DDIMScheduler", {**NO_CLIP, "prediction_type": "v_prediction", "steps_offset": 1}),
        ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_text_to_image_unet(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, scheduler: str, config: dict[str, Any]
) -> None:
    pipeline = open_pipeline(tiny_folder("unet"), scheduler, config)
    ours = runtime(tiny_folder("unet"), scheduler, config, 5, 3.0)
    if any(step.noise for step in ours.plan.steps):
        give_noise(monkeypatch, type(pipeline.scheduler), offset=1)
    expected = pipeline(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=3.0,
        latents=torch.from_numpy(noise(SEEDS, INITIAL, SHAPE[1:])),
        output_type="latent",
    ).images.numpy()
    got = ours.sample(PROMPTS, SEEDS, 16, 16)
    assert got.dtype == np.float32
    assert difference(got, expected) <= 1e-5
    decoded = pipeline.vae.decode(torch.from_numpy(expected) / pipeline.vae.config.scaling_factor)[0]
    pictures = pipeline.image_processor.postprocess(decoded.detach(), output_type="np")
    assert np.abs(ours.generate(PROMPTS, SEEDS, 16, 16) - 255 * pictures).max() <= 0.51


def test_text_to_image_mmdit(tiny_folder: Folder) -> None:
    pipeline = open_pipeline(tiny_folder("sd3"))
    length = model_in(tiny_folder("sd3")).conditioning["max_sequence_length"]
    expected = pipeline(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=4.0,
        height=16,
        width=16,
        max_sequence_length=length,
        latents=torch.from_numpy(noise(SEEDS, INITIAL, SHAPE[1:])),
        output_type="latent",
    ).images.numpy()
    ours = runtime(tiny_folder("sd3"), "FlowMatchEulerDiscreteScheduler", pipeline.scheduler.config, 5, 4.0)
    assert difference(ours.sample(PROMPTS, SEEDS, 16, 16), expected) <= 1e-5


@pytest.mark.parametrize("negative", [None, ["", "a green ring"]])
def test_text_to_image_sdxl(tiny_folder: Folder, negative: list[str] | None) -> None:
    """The sizes come from the picture's own; no negative prompt is zeros, an empty one is read."""
    pipeline = open_pipeline(tiny_folder("sdxl"))
    ours = runtime(tiny_folder("sdxl"), "EulerDiscreteScheduler", pipeline.scheduler.config, 5, 3.0)
    initial = noise(SEEDS, INITIAL, (4, 12, 8))
    expected = pipeline(
        PROMPTS,
        negative_prompt=negative,
        num_inference_steps=5,
        guidance_scale=3.0,
        height=24,
        width=16,
        latents=torch.from_numpy(initial),
        output_type="latent",
    ).images.numpy()
    assert difference(ours.sample(PROMPTS, SEEDS, 24, 16, negative_prompts=negative), expected) <= 1e-5
    if negative is None:
        encoded = ours.encode(PROMPTS)
        assert "time_ids" not in encoded
        assert difference(ours.sample(encoded, SEEDS, 24, 16), expected) <= 1e-5
        zoomed = ours.sample(encoded | {"time_ids": np.full((2, 6), 64.0)}, SEEDS, 24, 16)
        assert difference(zoomed, expected) > 1e-3
        whole = ours.sample(encoded, noise=initial)
        np.testing.assert_array_equal(whole, ours.sample(encoded, SEEDS, 24, 16))


@pytest.mark.parametrize("dev", [True, False])
@pytest.mark.parametrize("side", [16, 24])
def test_text_to_image_flux(tmp_path: Path, dev: bool, side: int) -> None:
    """With embedded guidance and a shift by size, as the recipe's sampler compiles it; and without, really guided."""
    torch.manual_seed(3)
    saved = tiny.flux_dev()
    if not dev:
        saved.register_modules(
            transformer=tiny.flux(guidance_embeds=False), scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
        )
    tiny.shake(saved.transformer)
    saved.save_pretrained(tmp_path / "flux")
    pipeline, model = open_pipeline(tmp_path / "flux"), models.load(tmp_path / "flux")
    if dev:
        recipe = Recipe.parse(
            f"schema_version: 1\nmodel: {tmp_path / 'flux'}\nsampler: {{steps: 5, guidance_scale: 2.5}}\n"
            f"targets: [onnxruntime-cpu]\nshapes: {{height: {side}, width: 16}}\nout: {tmp_path / 'out'}\n"
        )
        compiler.sample(model, recipe)
        ours, more = model.runtime(), {}
        assert not any(row.guidance != "none" for row in ours.plan.steps)
    else:
        told = {"options": {"even_sigmas": True}}
        ours = runtime(tmp_path / "flux", "FlowMatchEulerDiscreteScheduler", pipeline.scheduler.config, 5, 2.5, **told)
        more = {"true_cfg_scale": 2.5, "negative_prompt": ["", ""]}
    first = torch.from_numpy(noise(SEEDS, INITIAL, (4, side // 2, 8)))
    packed = pipeline(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=2.5,
        height=side,
        width=16,
        max_sequence_length=model.conditioning["max_sequence_length"],
        latents=pipeline._pack_latents(first, *first.shape),
        output_type="latent",
        **more,
    ).images
    expected = pipeline._unpack_latents(packed, side, 16, pipeline.vae_scale_factor).numpy()
    assert difference(ours.sample(PROMPTS, SEEDS, side, 16), expected) <= 1e-5


def test_text_to_image_pixart(tiny_folder: Folder) -> None:
    pipeline = open_pipeline(tiny_folder("pixart"))
    expected = pipeline(
        PROMPTS,
        num_inference_steps=5,
        guidance_scale=4.0,
        height=16,
        width=16,
        max_sequence_length=pipeline.tokenizer.model_max_length,
        clean_caption=False,
        use_resolution_binning=False,
        latents=torch.from_numpy(noise(SEEDS, INITIAL, SHAPE[1:])),
        output_type="latent",
    ).images.numpy()
    ours = runtime(tiny_folder("pixart"), "DPMSolverMultistepScheduler", pipeline.scheduler.config, 5, 4.0)
    assert difference(ours.sample(PROMPTS, SEEDS, 16, 16), expected) <= 1e-5


def test_class_to_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1000 classes, since the pipeline takes class 1000 for none."""
    torch.manual_seed(2)
    saved = tiny.class_conditional()
    saved.register_modules(transformer=tiny.dit(num_embeds_ada_norm=1000))
    for parameter in saved.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    saved.save_pretrained(tmp_path / "dit")
    pipeline = open_pipeline(tmp_path / "dit")
    ours = runtime(tmp_path / "dit", "DDIMScheduler", pipeline.scheduler.config, 5, 4.0)
    give_noise(monkeypatch, type(pipeline))
    expected = pipeline([3, 700], num_inference_steps=5, guidance_scale=4.0, output_type="np").images
    assert expected.std() > 0.05
    assert np.abs(ours.generate([3, "700"], SEEDS, 16, 16) - 255 * expected).max() <= 0.51


SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {**NO_CLIP, "steps_offset": 1}),
    ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
]


def pictures() -> np.ndarray:
    y, x = np.mgrid[0:16, 0:16]
    first = np.stack([16 * x, 16 * y, 8 * (x + y)], axis=-1)
    return np.stack([first, 255 - first[::-1]]).astype(np.uint8)


@pytest.mark.parametrize("strength", [0.45, 1.0])
@pytest.mark.parametrize(("scheduler", "config"), SCHEDULERS)
def test_image_to_image(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, scheduler: str, config: dict[str, Any], strength: float
) -> None:
    pipeline = open_pipeline(tiny_folder("unet"), scheduler, config, StableDiffusionImg2ImgPipeline)
    ours = runtime(tiny_folder("unet"), scheduler, config, 7, 3.0)
    image_latents = ours.encode_image(pictures())
    give_noise(monkeypatch, type(pipeline))
    rows = ours.plan.network_calls
    begin = int(7 - min(int(7 * strength), 7)) * int(ours.plan.key["order"])
    if any(step.noise for step in ours.plan.steps):
        give_noise(monkeypatch, type(pipeline.scheduler), offset=begin + 1)
    expected = pipeline(
        PROMPTS,
        image=torch.from_numpy(image_latents),
        strength=strength,
        num_inference_steps=7,
        guidance_scale=3.0,
        output_type="latent",
    ).images.numpy()
    seen: list[int] = []
    got = ours.sample(
        PROMPTS,
        SEEDS,
        strength=strength,
        image_latents=image_latents,
        on_step=lambda row, latents, tensors: seen.append(row),
    )
    assert seen == list(range(begin, rows))
    assert difference(got, expected) <= 1e-5


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(("scheduler", "config"), SCHEDULERS)
def test_inpainting(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, scheduler: str, config: dict[str, Any], strength: float
) -> None:
    pipeline = open_pipeline(tiny_folder("unet"), scheduler, config, StableDiffusionInpaintPipeline)
    ours = runtime(tiny_folder("unet"), scheduler, config, 5, 3.0)
    image_latents = ours.encode_image(pictures())
    mask = np.zeros((1, 1, 8, 8), np.float32)
    mask[..., 2:7, :5] = 1.0
    posterior = diffusers.models.autoencoders.vae
    monkeypatch.setattr(posterior, "randn_tensor", lambda shape, dtype=None, **_: torch.zeros(shape, dtype=dtype))
    give_noise(monkeypatch, type(pipeline))
    begin = int(5 - min(int(5 * strength), 5)) * int(ours.plan.key["order"])
    if any(step.noise for step in ours.plan.steps):
        give_noise(monkeypatch, type(pipeline.scheduler), offset=begin + 1)
    expected = pipeline(
        PROMPTS,
        image=torch.from_numpy(from_pictures(pictures())),
        mask_image=torch.from_numpy(mask.repeat(2, axis=2).repeat(2, axis=3)),
        height=16,
        width=16,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
    ).images.numpy()
    got = ours.sample(PROMPTS, SEEDS, strength=strength, image_latents=image_latents, mask=mask)
    assert difference(got, expected) <= 1e-5
    np.testing.assert_array_equal(got * (1 - mask), image_latents * (1 - mask))


def test_pictures_round_as_diffusers_does(tiny_folder: Folder) -> None:
    rng = np.random.default_rng(0)
    sample = (1.5 * rng.standard_normal((3, 3, 32, 32))).astype(np.float32)
    sample.flat[:256] = np.arange(256, dtype=np.float32) / 127.5 - 1
    processor = VaeImageProcessor()
    expected = processor.postprocess(torch.from_numpy(sample), output_type="pil")
    np.testing.assert_array_equal(to_pictures(sample), np.stack([np.asarray(image) for image in expected]))
    np.testing.assert_array_equal(from_pictures(pictures()), processor.preprocess(list(_pil(pictures()))).numpy())
    np.testing.assert_array_equal(to_pictures(from_pictures(pictures())), pictures())
    pipeline = open_pipeline(tiny_folder("unet"))
    ours = runtime(tiny_folder("unet"), "DDIMScheduler", NO_CLIP, 2, 1.0)
    with torch.inference_mode():
        encoded = pipeline.vae.encode(torch.from_numpy(from_pictures(pictures()))).latent_dist.mode()
    expected_latents = (encoded * pipeline.vae.config.scaling_factor).numpy()
    assert difference(ours.encode_image(pictures()), expected_latents) <= 1e-6
    shifted = Runtime(ours.plan, ours.functions, {}, LatentSpec(4, downscale=2, scaling_factor=2.0, shift_factor=0.5))
    np.testing.assert_allclose(shifted.encode_image(pictures()), (encoded.numpy() - 0.5) * 2, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        shifted.decode(shifted.encode_image(pictures())),
        to_pictures(ours.functions["vae_decoder"]({"latent_sample": encoded.numpy()})["sample"]),
    )


def _pil(arrays: np.ndarray) -> Iterator[Any]:
    from PIL import Image

    return (Image.fromarray(array) for array in arrays)


def test_score_oracle_and_features(tiny_folder: Folder) -> None:
    model = models.load(tiny_folder("unet"))
    model.layout = model.family.cut_layout(model.denoiser, 1)
    segments, paths, slots = model.family.segments(model.denoiser, model.layout)
    named = {segment.name: Segment(segment.inputs, segment.outputs) for segment in segments}
    plan = compile_sampler("DDIMScheduler", NO_CLIP, 2, 3.0, segments=named, paths=paths, slots=slots)
    tokenizers = {name: portable(tokenizer) for name, tokenizer in model.tokenizers.items()}
    cut = Runtime(plan, model.functions(), model.conditioning, LatentSpec(**model.latent), tokenizers)
    latents = noise(SEEDS, INITIAL, SHAPE[1:])
    text = cut.encode(PROMPTS)
    with torch.inference_mode():
        expected = model.denoiser(
            torch.from_numpy(latents),
            torch.tensor([10.0, 700.0]),
            encoder_hidden_states=torch.from_numpy(text["encoder_hidden_states"]),
            return_dict=False,
        )[0].numpy()
    np.testing.assert_allclose(cut.denoise(latents, np.array([10.0, 700.0]), PROMPTS), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        cut.denoise(latents, np.array([10.0, 700.0]), text), cut.denoise(latents, np.array([10.0, 700.0]), PROMPTS)
    )
    features = cut.features(latents, 10.0, text)
    assert set(features) == {name for segment in segments for name in segment.outputs}
    slot = next(iter(slots.values()))
    assert set(cut.features(latents, 10.0, text, [slot.tensor])) == {slot.tensor}
    with pytest.raises(RuntimeInputError, match="there is no tensor 'mid'"):
        cut.features(latents, 10.0, text, ["mid"])
    with pytest.raises(RuntimeInputError, match="latents must be"):
        cut.denoise(latents[:1], 10.0, text)
    with pytest.raises(RuntimeInputError, match="t must be"):
        cut.denoise(latents, np.arange(3), text)


# --- plans over NumPy functions, against a plain loop --------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_slots_forecasts_and_mixed_guidance(seed: int) -> None:
    plan = random_plan(seed)
    plan.validate(("sample", "timestep", "label"))
    labels, negative = given(3)
    got = over_numpy(plan).sample({"label": labels}, (1, 2, 3), 8, 8, negative_prompts={"label": negative})
    expected = plain_loop(plan, labels, negative, (1, 2, 3))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(got, expected)


def test_rows_without_guidance_run_one_half_unless_a_guided_row_reads_them() -> None:
    def modes(*rows: tuple[str, tuple[str, ...], dict[str, tuple[float, ...]]]) -> list[int]:
        steps = tuple(
            Step(
                t=1.0,
                x={0: 1.0},
                m={0: -0.1},
                path="shallow" if read else "full",
                write=write,
                read=read,
                guidance="cfg" if guidance == "cfg" else "none",
                guidance_scale=2.0,
            )
            for guidance, write, read in rows
        )
        calls: list[tuple[str, int]] = []
        sampled(over_numpy(StepPlan(SEGMENTS, PATHS, SLOTS, steps), counting(FUNCTIONS, calls)), (1, 2, 3))
        return [batch for segment, batch in calls if segment == "entry"]

    write, read = ("feature",), {"feature": (1.0,)}
    assert modes(("cfg", write, {}), ("none", (), read), ("none", write, {}), ("none", (), read)) == [6, 3, 3, 3]
    assert modes(("none", write, {}), ("cfg", (), read)) == [6, 6]
    assert modes(("none", write, {}), ("none", write, {}), ("cfg", (), read)) == [3, 6, 6]
    assert modes(("none", write, {}), ("none", write, {}), ("cfg", (), {"feature": (2.0, -1.0)})) == [6, 6, 6]
    assert modes(("none", write, {}), ("none", ("output",), read), ("cfg", (), {"output": (1.0,)})) == [6, 6]


def test_without_guidance_there_is_no_negative_prompt() -> None:
    plan = random_plan(3)
    plan = unguided(plan)
    calls: list[tuple[str, int]] = []
    labels, negative = given(2)
    got = over_numpy(plan, counting(FUNCTIONS, calls)).sample({"label": labels}, (1, 2), 8, 8)
    assert {batch for _, batch in calls} == {2}
    np.testing.assert_array_equal(got, plain_loop(plan, labels, negative, (1, 2)))


def test_samples_do_not_mix() -> None:
    """Alone, in a batch, in another order: the same bits."""
    plan = random_plan(7)
    labels, negative = given(5)
    seeds = (10, 2, 33, 4, 2**63)
    together = over_numpy(plan).sample({"label": labels}, seeds, 8, 8, negative_prompts={"label": negative})
    for order in ([0], [3], [4, 1], [2, 0, 3]):
        part = over_numpy(plan).sample(
            {"label": labels[order]},
            [seeds[i] for i in order],
            8,
            8,
            negative_prompts={"label": negative[order]},
        )
        np.testing.assert_array_equal(part, together[order])


def test_nothing_given_is_changed_and_runs_repeat() -> None:
    plan = random_plan(11)
    runtime = over_numpy(plan)
    labels, negative = given(2)
    arrays = {
        "label": labels,
        "negative": negative,
        "noise": noise((1, 2), 0, (4, 8, 8)),
        "image": noise((3, 4), 0, (4, 8, 8)),
        "mask": np.float32(noise((5, 6), 0, (1, 8, 8)) > 0),
    }
    for array in arrays.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in arrays.items()}
    seen: list[np.ndarray] = []

    def on_step(row: int, latents: np.ndarray, tensors: dict[str, np.ndarray]) -> None:
        seen.append(latents.copy())
        latents[...] = np.nan
        for tensor in tensors.values():
            tensor[...] = np.nan

    options: dict[str, Any] = {
        "negative_prompts": {"label": arrays["negative"]},
        "noise": arrays["noise"],
        "image_latents": arrays["image"],
        "mask": arrays["mask"],
    }
    first = runtime.sample({"label": arrays["label"]}, (1, 2), **options)
    second = runtime.sample({"label": arrays["label"]}, (1, 2), on_step=on_step, **options)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(seen[-1], second)
    assert len(seen) == 12
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_functions_that_hand_back_their_input() -> None:
    """An output may be the very array that came in; the history must not change under it."""
    steps = tuple(Step(t=1.0, x={0: 0.5}, m={0: 0.25, **({1: 0.125} if k else {})}) for k in range(4))
    plan = StepPlan({"denoiser": Segment(("sample",), ("out",))}, {"full": ("denoiser",)}, {}, steps)
    runtime = Runtime(plan, {"denoiser": lambda tensors: {"out": tensors["sample"]}}, {}, LatentSpec(4, downscale=1))
    got = runtime.sample({"label": np.zeros((1, 1), np.float32)}, (1,), 8, 8)
    x, m = [noise((1,), 0, (4, 8, 8)).astype(np.float64)], []
    for k in range(4):
        m.append(x[-1])
        x.append(0.5 * x[-1] + 0.25 * m[-1] + (0.125 * m[-2] if k else 0))
    assert difference(got, x[-1]) <= 1e-6


def test_slots_keep_their_own_copy() -> None:
    """A segment may hand its input on; what the slot keeps must not change with the next latent."""
    segments = {"entry": Segment(("sample",), ("skip",)), "exit": Segment(("skip",), ("out",))}
    rows = [Step(t=1.0, x={0: 0.5}, m={0: 0.25}, path="full", write=("skip",))]
    rows += [Step(t=1.0, x={0: 0.5}, m={0: 0.25}, path="shallow", read={"skip": (1.0,)}) for _ in range(2)]
    paths = {"full": ("entry", "exit"), "shallow": ("exit",)}
    plan = StepPlan(segments, paths, {"skip": Slot("skip")}, tuple(rows))
    passing = {
        "entry": lambda tensors: {"skip": tensors["sample"]},
        "exit": lambda tensors: {"out": tensors["skip"]},
    }
    got = Runtime(plan, passing, {}, LatentSpec(4, downscale=1)).sample({"label": latents(1, 1)}, (1,), 8, 8)
    first = noise((1,), 0, (4, 8, 8))
    assert difference(got, first * (0.5**3 + 0.25 * (0.5**2 + 0.5 + 1))) <= 1e-6


def test_noise_may_be_given() -> None:
    plan = random_plan(5)
    assert any(step.noise for step in plan.steps)
    labels, negative = given(2)
    options: dict[str, Any] = {"negative_prompts": {"label": negative}}
    runtime = over_numpy(plan)
    seeded = runtime.sample({"label": labels}, (1, 2), 8, 8, **options)
    initial = noise((1, 2), 0, (4, 8, 8))
    np.testing.assert_array_equal(runtime.sample({"label": labels}, (1, 2), noise=initial, **options), seeded)
    draws: list[int] = []

    def source(draw: int, shape: tuple[int, ...]) -> np.ndarray:
        draws.append(draw)
        return noise((1, 2), draw, shape[1:])

    np.testing.assert_array_equal(runtime.sample({"label": labels}, None, 8, 8, noise=source, **options), seeded)
    assert draws == [0, *(row + 1 for row, step in enumerate(plan.steps) if step.noise)]
    other = runtime.sample({"label": labels}, (7, 8), noise=initial, **options)
    assert not np.array_equal(other, seeded)


def test_histories_are_as_long_as_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    class Measured(export.loop._History):
        def __init__(self, length: int, shape: tuple[int, ...]) -> None:
            lengths.append(length)
            super().__init__(length, shape)

    monkeypatch.setattr(export.loop, "_History", Measured)
    labels, negative = given(1)
    for seed in range(5):
        plan = random_plan(seed)
        over_numpy(plan).sample({"label": labels}, (1,), 8, 8, negative_prompts={"label": negative})
        assert tuple(lengths[-2:]) == plan.history()


@pytest.mark.parametrize(("rank", "dtype"), [(0, "float32"), (1, "float32"), (1, "int64"), (0, "int64")])
def test_timesteps_come_as_the_graph_takes_them(rank: int, dtype: str) -> None:
    seen = []

    def denoiser(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append((np.ndim(tensors["timestep"]), tensors["timestep"].dtype.name, np.max(tensors["timestep"])))
        return {"out": tensors["hidden_states"] * 0}

    steps = (Step(t=7.0, x={0: 1.0}, m={0: 1.0}), Step(t=3.0, x={0: 1.0}, m={0: 1.0}))
    segments = {"denoiser": Segment(("hidden_states", "timestep"), ("out",))}
    plan = StepPlan(segments, {"full": ("denoiser",)}, {}, steps)
    runtime = Runtime(
        plan, {"denoiser": denoiser}, {}, LatentSpec(4, downscale=1), timestep_rank=rank, timestep_dtype=dtype
    )
    runtime.sample({"label": np.zeros((2, 1))}, (1, 2), 8, 8)
    runtime.denoise(np.zeros((2, 4, 8, 8)), 5, {"label": np.zeros((2, 1))})
    assert seen == [(rank, dtype, 7), (rank, dtype, 3), (rank, dtype, 5)]


def wrong(**options: Any) -> Callable[[Runtime], Any]:
    labels, negative = given(2)
    arguments: dict[str, Any] = {
        "prompts": {"label": labels},
        "seeds": (1, 2),
        "height": 8,
        "width": 8,
        "negative_prompts": {"label": negative},
    }
    return lambda runtime: runtime.sample(**(arguments | options))


def latents(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


WRONG: dict[str, tuple[Callable[[Runtime], Any], str]] = {
    "too few seeds": (wrong(seeds=(1,)), "one seed per sample"),
    "no seeds": (wrong(seeds=None), "one seed per sample"),
    "no seeds but later noise": (wrong(seeds=None, noise=latents(2, 4, 8, 8)), "one seed per sample"),
    "negative seed": (wrong(seeds=(1, -1)), "at least 0"),
    "half a seed": (wrong(seeds=(1, 1.5)), "whole number"),
    "a seed as text": (wrong(seeds=(1, "2")), "whole number"),
    "huge seed": (wrong(seeds=(1, 2**64)), "whole number"),
    "no height": (wrong(height=None), "height and width"),
    "no size": (wrong(height=None, width=None), "height and width"),
    "odd height": (wrong(height=9), "height must be a positive multiple of 2 pixels, not 9"),
    "height as text": (wrong(height="8"), "height must be a positive multiple"),
    "no width": (wrong(width=0), "width must be a positive multiple"),
    "missing conditioning": (wrong(prompts={"text": latents(2, 3)}), "lacks 'label'"),
    "conditioning of two sizes": (
        wrong(prompts={"label": latents(2, 1), "more": latents(3, 1)}),
        "same number of samples",
    ),
    "empty conditioning": (wrong(prompts={"label": latents(0, 1)}), "at least one"),
    "conditioning as a number": (wrong(prompts={"label": np.float32(1)}), "at least one"),
    "too few negatives": (wrong(negative_prompts={"label": given(1)[0]}), "2 prompts and 1 negative"),
    "negatives of another shape": (wrong(negative_prompts={"label": latents(2, 4, 1, 1)}), "has the shape"),
    "noise of another shape": (wrong(noise=latents(2, 4, 8, 7)), r"noise must have the shape \(2, 4, 8, 8\)"),
    "noise of one sample": (wrong(noise=latents(1, 4, 8, 8)), "noise must have the shape"),
    "noise function of another shape": (wrong(noise=lambda draw, shape: latents(2, 4, 8)), "noise of draw 0 must have"),
    "mask without image": (wrong(mask=latents(1, 1, 8, 8)), "a mask needs image_latents"),
    "image of another shape": (wrong(image_latents=latents(2, 4, 4, 4)), "image_latents must have the shape"),
    "image of 3 samples": (wrong(image_latents=latents(3, 4, 8, 8)), "image_latents must have the shape"),
    "mask of another shape": (
        wrong(image_latents=latents(1, 4, 8, 8), mask=latents(1, 1, 16, 16)),
        "mask must have the shape",
    ),
    "start without image": (wrong(start_step=2), "needs image_latents"),
    "strength without image": (wrong(strength=0.5), "needs image_latents"),
    "strength and start": (wrong(image_latents=latents(1, 4, 8, 8), strength=0.5, start_step=1), "not both"),
    "strength of 0": (wrong(image_latents=latents(1, 4, 8, 8), strength=0.0), "strength must be above 0"),
    "start that cannot be": (wrong(image_latents=latents(1, 4, 8, 8), start_step=3), "cannot begin at row 3"),
    "start after the end": (wrong(image_latents=latents(1, 4, 8, 8), start_step=99), "cannot begin at row 99"),
    "start before the first": (wrong(image_latents=latents(1, 4, 8, 8), start_step=-1), "cannot begin at row -1"),
    "prompts as one text": (wrong(prompts="a ring"), "non-empty list"),
    "no prompts": (wrong(prompts=[]), "non-empty list"),
    "unknown class": (wrong(prompts=["ring", 12]), "there is no class 12"),
    "latents of another depth": (lambda runtime: runtime.decode(latents(1, 3, 8, 8)), r"latents must be \(samples, 4"),
    "no decoder": (lambda runtime: runtime.decode(latents(1, 4, 8, 8)), "has no vae_decoder"),
    "no encoder": (lambda runtime: runtime.encode_image(np.zeros((1, 8, 8, 3), np.uint8)), "has no vae_encoder"),
    "pictures as floats": (lambda runtime: runtime.encode_image(np.zeros((1, 8, 8, 3))), "must be uint8"),
    "one picture": (lambda runtime: runtime.encode_image(np.zeros((8, 8, 3), np.uint8)), "must be uint8"),
    "odd picture": (lambda runtime: runtime.encode_image(np.zeros((1, 9, 8, 3), np.uint8)), "multiples of 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    ask, message = WRONG[name]
    spec = {"kind": "class", "classes": 10, "labels": {"ring": 1}}
    runtime = Runtime(random_plan(5), FUNCTIONS, spec, LatentSpec(4, downscale=1, multiple=2))
    if "picture" in name:
        runtime = Runtime(random_plan(5), FUNCTIONS, spec, LatentSpec(4, downscale=2))
    with pytest.raises(RuntimeInputError, match=message) as caught:
        ask(runtime)
    assert "\n" not in str(caught.value)


def test_functions_and_plans_that_do_not_fit_are_refused() -> None:
    plan = random_plan(5)
    with pytest.raises(RuntimeInputError, match="no function for the segment 'deep'"):
        Runtime(plan, {name: function for name, function in FUNCTIONS.items() if name != "deep"}, {}, LatentSpec(4))
    with pytest.raises(RuntimeInputError, match="no segment of the plan takes the latent 'latent'"):
        Runtime(plan, FUNCTIONS, {}, LatentSpec(4), latent_input="latent")
    with pytest.raises(StepPlanError, match="no steps"):
        Runtime(StepPlan(SEGMENTS, PATHS, SLOTS, ()), FUNCTIONS, {}, LatentSpec(4))


def test_a_broken_loop_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with the plain loop notices a slot that hands back the wrong half."""
    labels, negative = given(3)

    def worst() -> float:
        worst = 0.0
        for seed in range(12):
            plan = random_plan(seed)
            got = over_numpy(plan).sample({"label": labels}, (1, 2, 3), 8, 8, negative_prompts={"label": negative})
            worst = max(worst, difference(got, plain_loop(plan, labels, negative, (1, 2, 3))))
        return worst

    assert worst() == 0.0
    right = Memory._view
    monkeypatch.setattr(Memory, "_view", lambda self, value, *more: right(self, value[::-1], *more))
    assert worst() > 1e-2

"""Compiled samplers against diffusers' own loop on a real denoiser, for every scheduler; and what is refused."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from compress.errors import RefusedError
from compress.sampler import MAX_LAG, compile_sampler
from compress.schedulers import names
from export.noise import INITIAL, noise
from export.runtime import LatentSpec, Runtime
from export.step_plan import Segment, StepPlan

SHAPE = (2, 4, 8, 8)
SEEDS = (3, 11)
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning"
)  # KDPM2 in diffusers
GRAPH: dict[str, Any] = {
    "segments": {"denoiser": Segment(("sample", "timestep", "encoder_hidden_states"), ("out_sample",))},
    "paths": {"full": ("denoiser",)},
}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NO_CLIP = {**LATENT, "clip_sample": False}
COARSE = {**LATENT, "num_train_timesteps": 200}  # KDPM2 takes half a second to build otherwise
BOTH = ("epsilon", "v_prediction")

# scheduler, constructor and step options, predictions it supports (None: it knows one only)
CASES: list[tuple[str, dict[str, Any], tuple[str | None, ...]]] = [
    ("DDIMScheduler", {**NO_CLIP, "steps_offset": 1}, BOTH),
    ("DDIMScheduler", {**NO_CLIP, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, ("v_prediction",)),
    ("DDIMScheduler", {**NO_CLIP, "timestep_spacing": "linspace", "eta": 0.7}, BOTH),
    ("DDIMParallelScheduler", NO_CLIP, BOTH),
    ("DDIMInverseScheduler", NO_CLIP, BOTH),
    ("DDPMScheduler", NO_CLIP, BOTH),
    ("DDPMScheduler", {**NO_CLIP, "timestep_spacing": "trailing", "variance_type": "fixed_large"}, ("sample",)),
    ("DDPMParallelScheduler", NO_CLIP, BOTH),
    ("CogVideoXDDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, BOTH),
    ("DEISMultistepScheduler", LATENT, BOTH),
    ("DEISMultistepScheduler", {**LATENT, "solver_order": 3, "use_karras_sigmas": True}, ("epsilon",)),
    ("DPMSolverMultistepScheduler", LATENT, BOTH),
    ("DPMSolverMultistepScheduler", {**LATENT, "solver_order": 3, "use_karras_sigmas": True}, BOTH),
    ("DPMSolverMultistepScheduler", {**LATENT, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, BOTH),
    ("DPMSolverMultistepScheduler", {**LATENT, "algorithm_type": "sde-dpmsolver++"}, BOTH),
    ("DPMSolverMultistepScheduler", {**LATENT, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, BOTH),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, ("flow_prediction",)),
    ("DPMSolverMultistepInverseScheduler", LATENT, BOTH),
    ("DPMSolverSinglestepScheduler", {**LATENT, "lower_order_final": True}, BOTH),
    ("DPMSolverSinglestepScheduler", {**LATENT, "solver_order": 3, "lower_order_final": True}, ("epsilon",)),
    ("EDMDPMSolverMultistepScheduler", {}, BOTH),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ("epsilon",)),
    ("EDMEulerScheduler", {}, BOTH),
    ("EDMEulerScheduler", {"s_churn": 4.0, "s_noise": 1.01}, ("epsilon",)),
    ("EulerDiscreteScheduler", {**LATENT, "timestep_spacing": "leading", "steps_offset": 1}, BOTH),
    ("EulerDiscreteScheduler", {**LATENT, "timestep_spacing": "trailing", "use_karras_sigmas": True}, BOTH),
    ("EulerDiscreteScheduler", {**LATENT, "s_churn": 4.0}, ("epsilon",)),
    ("EulerAncestralDiscreteScheduler", LATENT, BOTH),
    ("HeunDiscreteScheduler", {**LATENT, "use_karras_sigmas": True}, BOTH),
    ("KDPM2DiscreteScheduler", COARSE, BOTH),
    ("KDPM2AncestralDiscreteScheduler", COARSE, BOTH),
    ("LMSDiscreteScheduler", LATENT, BOTH),
    ("PNDMScheduler", {**LATENT, "skip_prk_steps": True, "steps_offset": 1}, BOTH),
    ("PNDMScheduler", {**LATENT, "skip_prk_steps": False}, BOTH),
    ("UniPCMultistepScheduler", LATENT, BOTH),
    ("UniPCMultistepScheduler", {**LATENT, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, ("epsilon",)),
    ("UniPCMultistepScheduler", {**LATENT, "solver_order": 3, "use_karras_sigmas": True}, ("epsilon",)),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0}, ("flow_prediction",)),
    ("SASolverScheduler", LATENT, BOTH),
    ("IPNDMScheduler", {}, (None,)),
    ("LCMScheduler", LATENT, BOTH),
    ("TCDScheduler", {**LATENT, "eta": 0.8}, BOTH),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False}, (None,)),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, (None,)),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, (None,)),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "image_seq_len": 1024}, (None,)),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, (None,)),
    ("FlowMatchLCMScheduler", {"shift": 3.0}, (None,)),
    ("LTXEulerAncestralRFScheduler", {}, (None,)),
]
LISTED = {
    "DDIMScheduler DDPMScheduler DDIMInverseScheduler DDIMParallelScheduler DDPMParallelScheduler",
    "DEISMultistepScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EulerDiscreteScheduler EulerAncestralDiscreteScheduler FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler",
    "LCMScheduler LMSDiscreteScheduler PNDMScheduler SASolverScheduler TCDScheduler UniPCMultistepScheduler",
    "IPNDMScheduler CogVideoXDDIMScheduler CMStochasticIterativeScheduler LTXEulerAncestralRFScheduler",
}
# One step goes from sigma 80 to 0, which cancels in the float32 of diffusers; IPNDM divides zero by zero.
NOT_ONE_STEP = ("EDMEulerScheduler", "IPNDMScheduler")


def runs() -> Iterator[Any]:
    """A scheduler's first case at every number of steps; its further cases at one, by turns."""
    seen = set()
    for case, (name, options, predictions) in enumerate(CASES):
        for at, prediction in enumerate(predictions):
            if name in seen:
                counts: tuple[int, ...] = ((4, 10)[case % 2],)
            elif len(predictions) == 1:
                counts = (1, 4, 10, 25)
            else:
                counts = (25,) if at else (1, 4, 10)
            for steps in counts:
                if steps > 1 or name not in NOT_ONE_STEP:
                    yield pytest.param(name, options, prediction, steps, id=f"{name}-{case}-{prediction}-{steps}")
        seen.add(name)


@pytest.fixture(scope="module")
def denoiser() -> Iterator[UNet2DConditionModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=4,
    ).eval()
    torch.set_num_threads(threads)


def split(name: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of the constructor, of `set_timesteps` and of `step`, as a reader of diffusers would place them."""
    cls = getattr(diffusers, name)
    constructor = {k: v for k, v in options.items() if k in inspect.signature(cls.__init__).parameters}
    step = {k: v for k, v in options.items() if k in inspect.signature(cls.step).parameters}
    timesteps = {}
    if "image_seq_len" in options:
        mu = diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3.calculate_shift
        timesteps["mu"] = mu(options["image_seq_len"])
    return constructor, timesteps, step


def text(samples: int) -> torch.Tensor:
    return torch.linspace(-1, 1, samples * 5 * 8).reshape(samples, 5, 8)


def theirs(
    monkeypatch: pytest.MonkeyPatch, denoiser: UNet2DConditionModel, name: str, options: Mapping[str, Any], steps: int
) -> np.ndarray:
    """Diffusers' loop; its noise is ours."""
    constructor, timesteps, step = split(name, options)
    cls = getattr(diffusers, name)
    scheduler = cls(**constructor)
    scheduler.set_timesteps(steps, **timesteps)
    call = 0

    def randn_tensor(
        shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None
    ) -> Any:
        assert tuple(shape) == SHAPE
        return torch.from_numpy(noise(SEEDS, call + 1, SHAPE[1:])).to(dtype)

    module = inspect.getmodule(cls)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    x = torch.from_numpy(noise(SEEDS, INITIAL, SHAPE[1:])) * getattr(scheduler, "init_noise_sigma", 1.0)
    with torch.inference_mode():
        for row, t in enumerate(scheduler.timesteps):
            call = row
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = denoiser(scaled, t, encoder_hidden_states=text(2), return_dict=False)[0]
            x = scheduler.step(output, t, x, **step).prev_sample
    return x.numpy()


def ours(denoiser: UNet2DConditionModel, plan: StepPlan) -> np.ndarray:
    def run(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            given = {name: torch.from_numpy(value) for name, value in tensors.items()}
            return {"out_sample": denoiser(**given, return_dict=False)[0].numpy()}

    runtime = Runtime(plan, {"denoiser": run}, {}, LatentSpec(4, downscale=1))
    return runtime.sample({"encoder_hidden_states": text(2).numpy()}, SEEDS, 8, 8)


def compiled(name: str, options: Mapping[str, Any], steps: int, scale: float = 1.0, **more: Any) -> StepPlan:
    return compile_sampler(name, {}, steps, scale, **GRAPH, options=options, **more)


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(expected).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "options", "prediction", "steps"), list(runs()))
def test_agrees_with_diffusers(
    monkeypatch: pytest.MonkeyPatch,
    denoiser: UNet2DConditionModel,
    name: str,
    options: dict[str, Any],
    prediction: str | None,
    steps: int,
) -> None:
    options = options if prediction is None else {**options, "prediction_type": prediction}
    plan = compiled(name, options, steps)
    assert StepPlan.from_json(plan.to_json()) == plan
    assert max(plan.history()) <= MAX_LAG
    assert difference(ours(denoiser, plan), theirs(monkeypatch, denoiser, name, options, steps)) <= 1e-5


def test_every_listed_scheduler_is_compared() -> None:
    assert {name for line in LISTED for name in line.split()} <= {name for name, _, _ in CASES}


def test_a_wrong_coefficient_is_seen(monkeypatch: pytest.MonkeyPatch, denoiser: UNet2DConditionModel) -> None:
    plan = compiled("DPMSolverMultistepScheduler", LATENT, 4)
    expected = theirs(monkeypatch, denoiser, "DPMSolverMultistepScheduler", LATENT, 4)
    row = plan.steps[2]
    for change in ({"m": {**row.m, 1: 1.01 * row.m[1]}}, {"x": {**row.x, 0: 1.01 * row.x[0]}}, {"t": row.t + 5}):
        broken = replace(plan, steps=(*plan.steps[:2], replace(row, **change), *plan.steps[3:]))
        assert difference(ours(denoiser, broken), expected) > 1e-5


def test_windows_are_small() -> None:
    limits = {
        "DDIMScheduler": (1, 1),
        "EulerAncestralDiscreteScheduler": (1, 1),
        "DPMSolverMultistepScheduler": (2, 2),
        "HeunDiscreteScheduler": (2, 2),
        "LMSDiscreteScheduler": (1, 4),
        "UniPCMultistepScheduler": (3, 5),
        "SASolverScheduler": (3, 4),
    }
    for name, limit in limits.items():
        history = compiled(name, {"clip_sample": False} if name == "DDIMScheduler" else {}, 7).history()
        assert all(length <= most for length, most in zip(history, limit, strict=True)), name


def test_the_exact_coefficients_of_ddim() -> None:
    """Song et al. 2020, arXiv 2010.02502, equation 12 with eta = 0."""
    plan = compiled("DDIMScheduler", {**NO_CLIP, "steps_offset": 1}, 4)
    scheduler = diffusers.DDIMScheduler(**NO_CLIP, steps_offset=1)
    kept = [*scheduler.alphas_cumprod.double()[[751, 501, 251, 1]].tolist(), 1.0]
    for row, step in enumerate(plan.steps):
        a = (kept[row + 1] / kept[row]) ** 0.5
        b = (1 - kept[row + 1]) ** 0.5 - a * (1 - kept[row]) ** 0.5
        assert step.t == (751, 501, 251, 1)[row]
        assert step.x == pytest.approx({0: a}, rel=1e-6)
        assert step.m == pytest.approx({0: b}, rel=1e-6)
        assert (step.signal, step.sigma) == pytest.approx((kept[row] ** 0.5, (1 - kept[row]) ** 0.5), rel=1e-6)


def test_rows_are_network_calls_not_timesteps() -> None:
    plan = compiled("HeunDiscreteScheduler", LATENT, 5)
    assert plan.network_calls == 9
    assert plan.key["order"] == 2
    times = [step.t for step in plan.steps]
    assert times[1] == times[2]
    assert sorted(plan.starts) == [2, 4, 6, 8]


def test_guidance_and_its_interval() -> None:
    def modes(scale: float, interval: tuple[float, float] | None) -> str:
        plan = compiled("EulerDiscreteScheduler", LATENT, 10, scale, guidance_interval=interval)
        assert all(step.guidance_scale == (scale if step.guidance == "cfg" else 1.0) for step in plan.steps)
        return "".join("g" if step.guidance == "cfg" else "." for step in plan.steps)

    assert modes(7.5, None) == "gggggggggg"
    assert modes(1.0, None) == ".........."
    assert modes(7.5, (0.2, 0.8)) == "..gggggg.."
    assert modes(7.5, (0.25, 0.75)) == "...gggg..."
    assert modes(7.5, (0.0, 1.0)) == "gggggggggg"
    assert modes(7.5, (0.5, 0.5)) == ".........."
    for interval in ((0.8, 0.2), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(RefusedError, match="guidance interval"):
            modes(7.5, interval)
    for scale in (float("nan"), float("inf"), -1.0):
        with pytest.raises(RefusedError, match="guidance scale"):
            modes(scale, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample: false"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding: false"),
        ("DDIMScheduler", {"clip_sample": True, "thresholding": True}, "clip_sample: false"),
        ("DDPMScheduler", {"clip_sample": True}, "clip_sample: false"),
        ("DDIMInverseScheduler", {"clip_sample": True}, "clip_sample: false"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding: false"),
        ("DPMSolverMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}, "thresholding: false"),
        ("DPMSolverSinglestepScheduler", {"thresholding": True}, "thresholding: false"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding: false"),
        ("DEISMultistepScheduler", {"thresholding": True}, "thresholding: false"),
        ("SASolverScheduler", {"thresholding": True}, "thresholding: false"),
        ("LCMScheduler", {"clip_sample": True}, "clip_sample: false"),
        ("LCMScheduler", {"thresholding": True}, "thresholding: false"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "not finite"),
        ("HeunDiscreteScheduler", {"clip_sample": True}, "clip_sample: false"),
        ("CMStochasticIterativeScheduler", {}, "clip_denoised: false"),
        ("UnCLIPScheduler", {}, "clip_sample: false"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}, "variance_type: fixed_small"),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "image_seq_len"),
        ("DPMSolverSDEScheduler", {}, "sde-dpmsolver"),
        ("CosineDPMSolverMultistepScheduler", {}, "Brownian"),
        ("RePaintScheduler", {}, "RePaintScheduler"),
        ("VQDiffusionScheduler", {}, "VQDiffusionScheduler"),
        ("ScoreSdeVeScheduler", {}, "not a scheduler that steps a latent"),
        ("EulerDiscrete", {}, "EulerDiscreteScheduler"),
        ("DPMSolverMultistepSheduler", {}, "DPMSolverMultistepScheduler"),
        ("os", {}, "no scheduler 'os'"),
        ("EulerDiscreteScheduler", {"use_karas_sigmas": True}, "use_karras_sigmas"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "logarithmic"}, "EulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", {"prediction_type": "score"}, "EulerDiscreteScheduler"),
        ("EulerDiscreteScheduler", {"sigmas": [1.0, 0.5]}, "2 timesteps or sigmas are given for 4 steps"),
        ("DDIMScheduler", {"generator": None}, "no option 'generator'"),
    ],
)
def test_refusals_name_the_way_out(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message) as caught:
        compiled(name, options, 4)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, 5000])
def test_a_wrong_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(RefusedError, match="steps"):
        compiled("DDIMScheduler", {"clip_sample": False}, steps)


def test_options_of_the_model_are_kept_and_overridden() -> None:
    config = {**NO_CLIP, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    first = compile_sampler("DDIMScheduler", config, 4, 1.0, **GRAPH)
    assert [step.t for step in first.steps] == [751, 501, 251, 1]
    second = compile_sampler("DDIMScheduler", config, 4, 1.0, **GRAPH, options={"timestep_spacing": "trailing"})
    assert [step.t for step in second.steps] == [999, 749, 499, 249]
    third = compile_sampler(
        "DPMSolverMultistepScheduler", config, 3, 1.0, **GRAPH, options={"timesteps": [900, 500, 9]}
    )
    assert [step.t for step in third.steps] == [900, 500, 9]
    sigmas = compile_sampler("FlowMatchEulerDiscreteScheduler", {}, 2, 1.0, **GRAPH, options={"sigmas": [1.0, 0.25]})
    assert [step.sigma for step in sigmas.steps] == [1.0, 0.25]
    assert sigmas.prediction == "flow"
    assert first.prediction == "epsilon"


def test_every_scheduler_of_diffusers_compiles_or_is_refused() -> None:
    done, refused = [], []
    for name in names():
        try:
            done.append(compiled(name, {}, 3))
        except RefusedError as error:
            refused.append(str(error))
    assert len(done) >= 20
    assert not [message for message in refused if "\n" in message]


def test_compiling_leaves_randomness_alone() -> None:
    """Noise is replaced in this thread only, and only while the scheduler runs, even when it is refused."""
    torch.manual_seed(0)
    before = torch.randn(3)
    torch.manual_seed(0)
    compiled("EulerAncestralDiscreteScheduler", LATENT, 4)
    with pytest.raises(RefusedError):
        compiled("DDPMScheduler", {"clip_sample": True}, 4)
    assert torch.equal(torch.randn(3), before)
    plans: list[StepPlan] = []
    threads = [
        threading.Thread(target=lambda: plans.append(compiled("EulerAncestralDiscreteScheduler", LATENT, 4)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 3
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", NO_CLIP),
        ("DPMSolverMultistepScheduler", {**LATENT, "solver_order": 3}),
        ("DPMSolverSinglestepScheduler", LATENT),
        ("EulerAncestralDiscreteScheduler", LATENT),
        ("HeunDiscreteScheduler", LATENT),
        ("KDPM2AncestralDiscreteScheduler", COARSE),
        ("LMSDiscreteScheduler", LATENT),
        ("PNDMScheduler", {**LATENT, "skip_prk_steps": True, "steps_offset": 1}),
        ("PNDMScheduler", {**LATENT, "skip_prk_steps": False}),
        ("UniPCMultistepScheduler", LATENT),
        ("SASolverScheduler", LATENT),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("FlowMatchHeunDiscreteScheduler", {}),
    ],
)
def test_late_starts_agree_with_diffusers(
    monkeypatch: pytest.MonkeyPatch, denoiser: UNet2DConditionModel, name: str, options: dict[str, Any]
) -> None:
    """Begin at several rows as the image-to-image pipelines do: `set_begin_index`, then noise as for that row."""
    constructor, _, step = split(name, options)
    cls = getattr(diffusers, name)
    plan = compiled(name, options, 9)
    rows = sorted(plan.starts)
    image = noise((5, 6), 0, SHAPE[1:])
    call = 0
    module = inspect.getmodule(cls)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(
            module,
            "randn_tensor",
            lambda shape, dtype=None, **_: torch.from_numpy(noise(SEEDS, call + 1, SHAPE[1:])).to(dtype),
        )

    def run(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            given = {key: torch.from_numpy(value) for key, value in tensors.items()}
            return {"out_sample": denoiser(**given, return_dict=False)[0].numpy()}

    runtime = Runtime(plan, {"denoiser": run}, {}, LatentSpec(4, downscale=1))
    for begin in (rows[0], rows[len(rows) // 2], rows[-1]):
        scheduler = cls(**constructor)
        scheduler.set_timesteps(9)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        add_noise = scheduler.add_noise if hasattr(scheduler, "add_noise") else None
        start, t = torch.from_numpy(noise(SEEDS, INITIAL, SHAPE[1:])), scheduler.timesteps[begin][None]
        clean = torch.from_numpy(image)
        x = add_noise(clean, start, t) if add_noise is not None else scheduler.scale_noise(clean, t, start)
        with torch.inference_mode():
            for call in range(begin, len(scheduler.timesteps)):
                t = scheduler.timesteps[call]
                scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
                output = denoiser(scaled, t, encoder_hidden_states=text(2), return_dict=False)[0]
                x = scheduler.step(output, t, x, **step).prev_sample
        got = runtime.sample(
            {"encoder_hidden_states": text(2).numpy()}, SEEDS, start_step=begin, image_latents=image, height=8, width=8
        )
        assert difference(got, x.numpy()) <= 1e-5, begin

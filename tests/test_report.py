"""The report: its rows and gates, its JSON, its terminal tables, and the HTML page that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from compress.errors import PassError, RecipeError
from compress.measure.environment import environment, ran
from compress.measure.metrics import Estimate
from compress.measure.verdict import Findings, check_speed, refuse_gates, rows, verdict
from compress.report import plots
from compress.report.html import DIFFERENCE_GAIN, Pictures, data_uri, difference_map, render
from compress.report.report import (
    Baseline,
    Curve,
    Handover,
    Latency,
    Layer,
    Localisation,
    Plan,
    PlanRow,
    Report,
    Role,
    Size,
    latency_table,
    table,
)

GATES = {
    "attribute_accuracy": {"max_loss": 0.01},
    "latency_ms": {"min_ratio": 5.0},
    "size_mib": {"max_ratio": 0.30},
    "image_psnr_db": {"min": 25.0},
}
CALLS = 20


def estimate(value: float, half: float = 0.0, n: int = 512) -> Estimate:
    return Estimate(value, (value - half, value + half) if half else None, n)


def findings(engine_ms: float = 48.2) -> Findings:
    """Numbers of a made-up run with two passes and two targets."""
    return Findings(
        original={
            "latency_ms": Estimate(271.3, (268.0, 276.1), 15),
            "size_mib": estimate(42.93, n=1),
            "peak_rss_mib": estimate(712.0, n=1),
            "attribute_accuracy": estimate(0.9641, 0.0062),
        },
        per_pass={
            "quantize": {
                "latent_psnr_db": estimate(38.1, 0.4, 64),
                "image_psnr_db": estimate(36.9, 0.5, 64),
                "ssim": estimate(0.9871, 0.0011, 64),
                "attribute_accuracy": estimate(0.9627, 0.019, 64),
            },
            "cache": {
                "latent_psnr_db": estimate(33.0, 0.4, 64),
                "image_psnr_db": estimate(31.6, 0.5, 64),
                "ssim": estimate(0.9702, 0.0021, 64),
                "attribute_accuracy": estimate(0.9621, 0.019, 64),
            },
        },
        compressed={"latent_psnr_db": estimate(33.0, 0.4, 64), "image_psnr_db": estimate(31.6, 0.5, 64)},
        exported={"latent_psnr_db": estimate(33.0, 0.4, 64), "image_psnr_db": estimate(31.6, 0.5, 64)},
        targets={
            "openvino-cpu": {
                "latency_ms": Estimate(engine_ms, (engine_ms - 0.8, engine_ms + 1.4), 15),
                "size_mib": estimate(11.6, n=1),
                "peak_rss_mib": estimate(204.0, n=1),
                "latent_psnr_db": estimate(32.7, 0.15),
                "image_psnr_db": estimate(31.2, 0.2),
                "ssim": estimate(0.9688, 0.0009),
                "attribute_accuracy": estimate(0.9616, 0.0064),
                "frechet_distance": estimate(0.041, 0.012),
            },
            "onnxruntime-cpu": {
                "latency_ms": Estimate(63.0, (61.7, 66.2), 15),
                "size_mib": estimate(11.4, n=1),
                "peak_rss_mib": estimate(161.0, n=1),
                "latent_psnr_db": estimate(32.6, 0.15),
                "image_psnr_db": estimate(31.1, 0.2),
                "ssim": estimate(0.9684, 0.0009),
                "attribute_accuracy": estimate(0.9599, 0.0064),
                "frechet_distance": estimate(0.043, 0.012),
            },
        },
        target="openvino-cpu",
        changes={"openvino-cpu": {"attribute_accuracy": estimate(-0.0025, 0.0031)}},
    )


def timing(threads: int, scale: float) -> list[Latency]:
    found: list[tuple[str, Role, int, float]] = [
        ("diffusers pipeline, fp32", "original", 20, 271.3),
        ("diffusers pipeline, fp32, 4 steps", "fewer steps", 4, 66.1),
        ("plain onnxruntime-cpu", "plain runtime", 20, 214.8),
        ("plain openvino-cpu", "plain runtime", 20, 158.0),
        ("plain openvino-cpu, 5 steps", "fewer steps", 5, 47.5),
        ("openvino-cpu", "engine", 20, 48.2),
        ("onnxruntime-cpu", "engine", 20, 63.0),
    ]
    return [
        Latency(
            name=name,
            role=role,
            threads=threads,
            steps=steps,
            median=ms * scale,
            quartiles=(ms * scale * 0.985, ms * scale * 1.04),
            runs=15,
            evidence="ran (Toy processor, 2026-01-31)",
        )
        for name, role, steps, ms in found
    ]


def baselines() -> list[Baseline]:
    found: list[tuple[str, Role, int, float, float | None, float]] = [
        ("original", "original", 20, 271.3, None, 0.9641),
        ("openvino-cpu", "engine", 20, 48.2, 31.2, 0.9616),
        ("onnxruntime-cpu", "engine", 20, 63.0, 31.1, 0.9599),
        ("plain openvino-cpu", "plain runtime", 20, 158.0, None, 0.9641),
        ("5 steps, plain openvino-cpu", "fewer steps", 5, 47.5, 24.1, 0.9301),
        ("4 steps, original", "fewer steps", 4, 66.1, 21.8, 0.8970),
    ]
    return [
        Baseline(
            name=name,
            role=role,
            steps=steps,
            threads=1,
            latency_ms=ms,
            quality={"attribute_accuracy": accuracy} | ({} if psnr is None else {"image_psnr_db": psnr}),
            interval={"attribute_accuracy": (accuracy - 0.008, accuracy + 0.008)},
            samples=512,
        )
        for name, role, steps, ms, psnr, accuracy in found
    ]


def plan() -> Plan:
    calls = []
    for k in range(CALLS):
        full = k % 3 == 0 or k == 1
        reads: dict[str, tuple[float, ...]] = {} if full else {"deep": (1.0 + (k % 3) / 3, -(k % 3) / 3)}
        calls.append(
            PlanRow(
                t=999 - 50.0 * k,
                path="full" if full else "shallow",
                reads=reads,
                writes=("deep",) if full else (),
                guidance="cfg",
            )
        )
    return Plan(
        sampler="DPMSolverMultistepScheduler",
        steps=CALLS,
        guidance_scale=3.0,
        prediction="v_prediction",
        paths={"full": ("entry", "deep", "exit"), "shallow": ("entry", "exit")},
        rows=tuple(calls),
    )


def curve(stage: str, level: float) -> Curve:
    errors = [level * (0.15 + k / CALLS) * (1.25 if k % 3 else 0.9) for k in range(CALLS)]
    return Curve(
        stage=stage,
        relative_l2=tuple(errors),
        psnr_db=tuple(float(-20 * np.log10(e / 4)) for e in errors),
        one_step=tuple(e * 0.6 for e in errors),
    )


def sample_report(engine_ms: float = 48.2) -> Report:
    found = rows(findings(engine_ms), GATES)
    return Report(
        name="quickstart",
        created="2026-01-31 12:00",
        verdict=verdict(found, ["Frechet distances are biased upwards at n = 512."]),
        recipe={"schema_version": 1, "model": "recipes/reference/unet", "gates": GATES},
        environment={"processor": "Toy processor", "cores": "2", "torch": "2.13.0"},
        evidence={"original": "ran (Toy processor, 2026-01-31)", "compressed": "simulated"}
        | {name: "ran (Toy processor, 2026-01-31)" for name in ("openvino-cpu", "onnxruntime-cpu", "exported")},
        plan=plan(),
        rows=tuple(found),
        target="openvino-cpu",
        latency=(*timing(1, 1.0), *timing(2, 0.58)),
        sizes=(
            Size(name="original, float32", role="original", parts={"unet": 35.7, "vae": 5.8, "text_encoder": 1.4}),
            Size(name="openvino-cpu", role="engine", parts={"unet": 9.2, "vae": 1.8, "text_encoder": 0.4, "rest": 0.2}),
            Size(name="onnxruntime-cpu", role="engine", parts={"unet": 9.0, "vae": 1.8, "text_encoder": 0.4}),
        ),
        baselines=tuple(baselines()),
        curves=(curve("compressed", 0.05), curve("exported", 0.0501), curve("openvino-cpu", 0.053)),
        localisation=Localisation(
            handovers=(
                Handover(before="original", after="compressed", psnr_db=33.0),
                Handover(before="compressed", after="exported", psnr_db=96.4),
                Handover(before="exported", after="openvino-cpu", psnr_db=47.9),
            ),
            stage="compressed",
            layer="up_blocks.1.resnets.0.conv1",
            first_below="down_blocks.0.resnets.0.conv1",
            largest_drop="up_blocks.1.resnets.0.conv1",
            threshold_db=30.0,
            layers=tuple(
                Layer(name=f"up_blocks.{i}.resnets.0.conv1", local_db=29.0 + i, cumulative_db=25.0 + i)
                for i in range(5)
            ),
            graphs={"exported against compressed": (Layer(name="exit: out_sample", local_db=118.2),)},
        ),
        edits={"quantize": {"quantize": 61, "skip": 9}, "cache": {"cut": 1}},
    )


def sample_pictures(n: int = 4, side: int = 64) -> Pictures:
    """Coloured discs on coloured ground, damaged a little more at every stage."""
    y, x = np.mgrid[:side, :side] / side
    generator = np.random.default_rng(0)
    original = []
    for _ in range(n):
        ground, ink, centre = (
            generator.uniform(40, 250, 3),
            generator.uniform(0, 255, 3),
            generator.uniform(0.3, 0.7, 2),
        )
        disc = 1 / (1 + np.exp((np.hypot(x - centre[0], y - centre[1]) - 0.22) * 60))[..., None]
        original.append(ground * (1 - disc) + ink * disc)
    base = np.stack(original)
    stages = {}
    for k, name in enumerate(("original", "compressed", "exported", "engine")):
        noise = generator.normal(0, 1, (n, side // 4, side // 4, 3)).repeat(4, 1).repeat(4, 2)
        stages[name] = np.clip(base + 2.5 * k * noise, 0, 255).round().astype(np.uint8)
    prompts = ["a large red circle left of a small blue square on a striped teal background"] * n
    return Pictures(prompts, list(range(n)), stages)


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def test_rows_hold_every_stage_and_gates_are_judged() -> None:
    found = {row.metric: row for row in rows(findings(), GATES)}
    latency = found["latency_ms"]
    assert latency.engine == latency.targets["openvino-cpu"] == 48.2
    assert latency.gate[0].found == pytest.approx(271.3 / 48.2)
    assert found["size_mib"].gate[0].found == pytest.approx(11.6 / 42.93)
    assert found["image_psnr_db"].per_pass == {"quantize": 36.9, "cache": 31.6}
    assert found["image_psnr_db"].original is None
    assert all(row.ok for row in found.values() if row.gate)
    assert found["ssim"].ok is None


def test_quality_is_judged_on_the_worst_target_and_costs_on_the_picked_one() -> None:
    found = {row.metric: row for row in rows(findings(), GATES)}
    assert found["attribute_accuracy"].gate[0].target == "onnxruntime-cpu"
    assert found["attribute_accuracy"].gate[0].found == pytest.approx(0.9641 - 0.9599)
    assert found["latency_ms"].gate[0].target == "openvino-cpu"


@pytest.mark.parametrize(
    ("metric", "bound", "limit", "ok"),
    [
        ("latency_ms", "min_ratio", 5.63, False),
        ("latency_ms", "min_ratio", 5.62, True),
        ("latency_ms", "max", 48.2, True),
        ("latency_ms", "max", 48.1, False),
        ("latency_ms", "max_loss", 0.0, True),
        ("size_mib", "max_ratio", 0.27, False),
        ("size_mib", "max_ratio", 0.28, True),
        ("attribute_accuracy", "max_loss", 0.0041, False),
        ("attribute_accuracy", "max_loss", 0.0043, True),
        ("attribute_accuracy", "min", 0.96, False),
        ("frechet_distance", "max", 0.042, False),
        ("frechet_distance", "max", 0.044, True),
    ],
)
def test_every_bound_counts_in_its_own_direction(metric: str, bound: str, limit: float, ok: bool) -> None:
    found = next(row for row in rows(findings(), {metric: {bound: limit}}) if row.metric == metric)
    assert found.ok is ok


def test_a_metric_that_was_not_measured_has_no_row() -> None:
    assert "clip_score" not in {row.metric for row in rows(findings(), {})}


def test_a_gate_on_what_was_not_measured_is_never_met_in_silence() -> None:
    with pytest.raises(RecipeError, match=r"gates\.clip_score: nothing was measured"):
        rows(findings(), {"clip_score": {"min": 20.0}})


def test_gates_that_cannot_be_judged_are_refused_early() -> None:
    measured = ["latency_ms", "image_psnr_db"]
    refuse_gates({"image_psnr_db": {"min": 25.0}, "latency_ms": {"min_ratio": 2.0}}, measured)
    with pytest.raises(RecipeError, match="does not measure it"):
        refuse_gates({"clip_score": {"min": 20.0}}, measured)
    with pytest.raises(RecipeError, match="no value of its own"):
        refuse_gates({"image_psnr_db": {"max_loss": 1.0}}, measured)
    with pytest.raises(RecipeError, match="no such metric"):
        refuse_gates({"lpips": {"max": 1.0}}, measured)


def test_headline_tells_gain_and_cost() -> None:
    good, bad = sample_report().verdict, sample_report(engine_ms=60.0).verdict
    assert good.headline == (
        "5.6× faster, 27 % of the size, attribute accuracy −0.2 points, image PSNR 31.2 dB: all gates met"
    )
    assert good.ok
    assert not good.failed
    assert not bad.ok
    assert bad.headline.endswith("1 of 4 gates not met")
    assert bad.failed == ("latency: original / engine at least 5 (found 4.52) on openvino-cpu",)


def test_a_slower_engine_is_an_error_unless_allowed() -> None:
    slow = [row.model_copy(update={"median": 300.0}) if row.name == "openvino-cpu" else row for row in timing(1, 1.0)]
    with pytest.raises(PassError, match="slower than the original pipeline"):
        check_speed(slow, "openvino-cpu")
    check_speed(slow, "openvino-cpu", allow_slower=True)
    check_speed(slow, "onnxruntime-cpu")


def test_json_round_trip_and_refusals() -> None:
    report = sample_report()
    text = report.to_json()
    assert Report.from_json(text) == report
    raw = json.loads(text)
    expected = ["metric", "unit", "original", "compressed", "exported", "engine", "per_pass", "interval", "gate", "ok"]
    assert all(set(expected) <= set(row) for row in raw["rows"])
    assert {"schema_version", "recipe", "environment", "evidence", "plan", "rows"} <= set(raw)
    raw["rows"][0]["engine"] = float("nan")
    with pytest.raises(PassError, match=r"rows\.0\.engine"):
        Report.from_json(json.dumps(raw))
    with pytest.raises(PassError, match="Extra"):
        Report.from_json(text.replace('"edits":', '"unknown": 1, "edits":', 1))
    with pytest.raises(PassError, match="schema version 1"):
        Report.from_json(text.replace('"schema_version": 1', '"schema_version": 2', 1))


def test_page_is_self_contained_and_well_formed() -> None:
    text = render(sample_report(), sample_pictures())
    page = Page(text)
    assert page.open == []
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<script|<link|<iframe", text)
    assert page.tags.count("img") == 4 * 7
    assert page.tags.count("svg") == 4


def test_page_says_what_the_report_says() -> None:
    report = sample_report(engine_ms=60.0)
    words = Page(render(report, sample_pictures())).words
    for sentence in (report.verdict.failed[0], "1 of 4 gates not met", "up_blocks.1.resnets.0.conv1", "Toy processor"):
        assert sentence in words
    assert "ran (Toy processor, 2026-01-31)" in words
    assert "simulated" in words
    assert "8 × full" in words


def test_tradeoffs_are_drawn_for_one_thread_count() -> None:
    report = sample_report()
    twice = [point.model_copy(update={"threads": 2, "latency_ms": 7.0}) for point in report.baselines]
    drawn = re.findall(r'<circle class="mark.*?<title>([^<]+)<', render(report))
    both = report.model_copy(update={"baselines": (*twice, *report.baselines)})
    assert len(drawn) == 10
    assert re.findall(r'<circle class="mark.*?<title>([^<]+)<', render(both)) == drawn


def test_page_escapes_what_users_write() -> None:
    pictures = sample_pictures(1)
    evil = Pictures(["<script>alert(1)</script>"], pictures.seeds, pictures.stages)
    text = render(sample_report(), evil)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_page_without_pictures_plots_or_baselines() -> None:
    """What a run without an evaluation has: a plan, sizes, nothing else."""
    report = sample_report().model_copy(
        update={"baselines": (), "latency": (), "curves": (), "localisation": None, "rows": (), "edits": {}}
    )
    page = Page(render(report))
    assert page.open == []
    assert "svg" not in page.tags
    assert "img" not in page.tags


def test_pictures_survive_the_data_uri() -> None:
    from PIL import Image

    image = sample_pictures(1).stages["engine"][0]
    kind, _, content = data_uri(image).partition(",")
    assert kind == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), image)
    large = data_uri(np.zeros((700, 350, 3), np.uint8)).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(large))).size == (160, 320)


def test_difference_map_is_dark_where_nothing_differs() -> None:
    reference = np.full((4, 4, 3), 100, np.uint8)
    image = reference.copy()
    image[0, 0] += 255 // DIFFERENCE_GAIN // 2
    image[1, 1] += 255 // DIFFERENCE_GAIN + 1
    drawn = difference_map(reference, image).astype(int).sum(axis=2)
    assert drawn[3, 3] < drawn[0, 0] < drawn[1, 1]
    assert drawn[3, 3] == difference_map(reference, reference).astype(int).sum(axis=2)[0, 0] < 40


def test_axis_ticks_are_round_and_inside() -> None:
    linear, log = plots.Axis([0.93, 0.97], 0, 100), plots.Axis([40.0, 300.0], 0, 100, "log")
    assert log.ticks() == [50.0, 100.0, 200.0]
    assert all(0 <= linear(tick) <= 100 for tick in linear.ticks())
    assert len(linear.ticks()) >= 3
    assert plots.Axis([3.0, 3.0], 0, 100).ticks()


def test_scatter_labels_do_not_cover_each_other() -> None:
    points = [plots.Point(f"contestant {k}", 100 + 0.1 * k, 0.95, "engine") for k in range(4)]
    svg = plots.scatter([*points, plots.Point("far", 300, 0.9, "engine")], "ms", "quality")
    boxes = []
    for x, y, anchor, text in re.findall(r'class="label" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)', svg):
        width = 6.4 * len(text)
        left = float(x) - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 9, left + width, float(y)))
    assert len(boxes) == 5
    for k, one in enumerate(boxes):
        for other in boxes[:k]:
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (one, other)


def test_terminal_tables() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=220, color_system=None)
    report = sample_report(engine_ms=60.0)
    console.print(table(report))
    console.print(latency_table(report))
    text: Any = console.file
    lines = text.getvalue()
    for part in (
        "after quantize",
        "96.4 %",
        "✗ original / engine at least 5 (found 4.52)",
        "plain openvino-cpu",
        "5.71x",
    ):
        assert part in lines


def test_environment_names_the_processor() -> None:
    found = environment()
    assert found["processor"]
    assert found["numpy"] == np.__version__
    assert re.fullmatch(r"ran \(.+, \d{4}-\d\d-\d\d\)", ran())
    assert found["processor"] in ran()
    assert ran("H200").startswith("ran (H200, ")

"""Tests of the distillation benchmark: what is compared at equal calls, what is kept, how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import RefusedError
from compress.passes.distill import Distill
from compress.prompts import Prompt, read_prompts
from recipes.benchmarks.caching.bench import GUIDANCE, REFERENCE, Bench
from recipes.benchmarks.caching.results import Kept, encoded, write
from recipes.benchmarks.distillation import entries, measure, report, sheet, students
from recipes.benchmarks.distillation.entries import Entry

OWN = "DPMSolverMultistepScheduler"


def test_every_student_has_its_teacher_beside_it_at_equal_calls_and_evaluations() -> None:
    assert (Entry(4, GUIDANCE, OWN).evaluations, Entry(4, 1.0, OWN).evaluations) == (8, 4)
    for model in ("unet", "mmdit"):
        found = entries.entries(model)
        assert found[0] == Entry(50, GUIDANCE, entries.full(model).sampler)
        assert len(set(map(str, found))) == len(found)
        for student in entries.students():
            teachers = [entry for entry in found if not entry.student and not entry.scheme]
            calls = {(entry.sampler, entry.guidance) for entry in teachers if entry.steps == student.steps}
            assert {(entries.full(model).sampler, GUIDANCE), (entries.full(model).sampler, 1.0)} <= calls
            if student.steps in entries.FEW:
                assert {("UniPCMultistepScheduler", GUIDANCE), ("UniPCMultistepScheduler", 1.0)} <= calls
                if student.steps > 1:
                    assert any(
                        entry.evaluations == student.evaluations and entry.guidance == GUIDANCE for entry in teachers
                    )
        assert {entry.guidance for entry in entries.sweep(model)} == set(entries.SCALES)


def test_lessons_are_fields_of_the_pass_and_lead_to_fewer_steps() -> None:
    steps = [Distill(**fields).steps for fields in students.CHAIN.values()]
    assert steps == [None, 4, 2, 1]
    assert [dict(one)["objective"] for one in students.lessons("2 steps")] == ["guidance", "segment", "segment"]


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    corner = np.zeros((2, 3, 4), np.float32)
    corner[0, 0, 0], corner[0, 2, 1] = 3.0, 4.0  # a right triangle: sides 3, 4, 5
    found = measure.diversity(corner)
    assert found.value == pytest.approx((3 + 4 + 5) / 3 / 2)
    assert found.n == 2
    assert measure.diversity(np.repeat(corner[:, :1], 3, axis=1)).value == 0.0


def test_renders_show_what_their_prompts_say() -> None:
    from compress.measure import metrics
    from compress.measure.scorer import Scorer

    prompts = read_prompts(REFERENCE / "prompts" / "heldout.jsonl", 16)
    scorer = Scorer(REFERENCE / "recogniser")
    pictures = measure.rendered([*prompts, prompts[0]])
    assert np.array_equal(pictures[0], pictures[-1])
    hits = metrics.attribute_hits(
        scorer.score(pictures[:-1]).logits, scorer.heads, [prompt.attributes for prompt in prompts]
    )
    assert (hits[:, 0] == hits[:, 1]).all()
    with pytest.raises(RefusedError, match="no held-out scene has the caption 'a cat'"):
        measure.rendered([Prompt("a cat")])


def row(entry: Entry, model: str = "unet", samples: int = 64, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"model": model, "entry": str(entry), "steps": entry.steps, "samples": samples}
    made |= {"evaluations": entry.evaluations, "processor": "a processor", "target": "t", "date": "2026-01-02"}
    made |= {"attributes": {"value": 0.995, "interval": [0.99, 1.0], "n": samples}}
    made |= {"frechet_renders": {"value": 3.0, "interval": None, "n": samples}}
    made |= {"diversity": {"value": 1.0, "interval": [0.5, 1.5], "n": 8}}
    return made | more


def test_tables_put_the_teacher_beside() -> None:
    student = entries.students()[1]
    first = row(entries.full("unet"), frechet_renders={"value": 2.0, "interval": [1.0, 3.0], "n": 64})
    lessons = [{"trained": "distill guidance, 20 steps", "updates": 5, "seconds": 61.4}]
    time = {"ms": 12.34, "ratio": 56.78}
    no = {"refused": "no"}
    told = {"entries": [first, row(student, lessons=lessons, time=time), row(Entry(1, 1.0, OWN)) | no]}
    text = report.document(told).splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ")[1:] for line in text}
    assert cells["student, 4 steps"] == [
        "4",
        "4",
        "99.50 (99.00 to 100.00)",
        "-",
        "3.00",
        "1.50",
        "-",
        "-",
        "1.00 (0.50 to 1.50)",
        "1.00",
        "12.3",
        "56.8",
    ]
    assert cells[f"{OWN}, 1 step, scale 1"] == ["-"] * len(report.HEADS)
    assert any("distill guidance, 20 steps: 5 updates, 61 s" in line for line in text)


def test_more_samples_stay_and_equal_ones_are_replaced() -> None:
    one, other = entries.students()[:2]
    older = {"entries": [row(one, samples=512), row(other)]}
    found = report.merged(older, [row(one, samples=64, new=1), row(other, new=1)])
    assert [("new" in entry, entry["samples"]) for entry in found] == [(True, 64), (False, 512)]


def test_a_sheet_has_a_line_an_entry() -> None:
    lines = sheet.shown("unet")
    assert [entry.steps for entry in lines] == [50, 4, 4, 4, 2, 2, 2, 1, 1, 1]
    picture = sheet.sheet({entry: np.zeros((3, 8, 8, 3), np.uint8) for entry in lines[:2]})
    assert picture.size == (sheet.LABEL + 3 * (8 + sheet.GAP), 2 * (8 + sheet.GAP))
    assert picture.getpixel((sheet.LABEL, 0)) == (0, 0, 0)


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = measure.Study(Bench.of(Kept(tmp_path), "onnxruntime-cpu", ["unet"], 32, 1), tmp_path)
    first, student = entries.full("unet"), entries.students()[0]
    asked: list[str] = []

    def measured(self: measure.Study, model: str, entry: Entry) -> dict[str, Any]:
        asked.append(str(entry))
        return row(entry) | {"refused": "not now"}

    with monkeypatch.context() as patch:
        patch.setattr(measure.Study, "measure", measured)
        for _ in range(2):
            assert not measure.do(study, "unet", [first, Entry(4, 1.0, OWN)], lambda _: None)
    assert asked == [str(first), str(Entry(4, 1.0, OWN))]
    heard: list[str] = []
    assert measure.do(study, "unet", [student], heard.append) == [f"unet {student}"]
    assert heard == [
        "unet: the student of guidance is not trained yet: run python -m recipes.benchmarks.distillation.students"
    ]
    fewer = measure.Study(Bench.of(Kept(tmp_path), "onnxruntime-cpu", ["unet"], 33, 1), tmp_path)
    assert fewer.row("unet", first) is None
    assert study.inputs("unet", first) != study.inputs("unet", Entry(50, 1.0, OWN))
    file = study.file("results", "unet", first, ".json")
    write(file, encoded({"kept": 1}))
    assert json.loads(file.read_bytes()) == study.row("unet", first)

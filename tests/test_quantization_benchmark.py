"""What the quantization benchmarks say of their measurements: orders, gains at equal size, tables."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from compress.quantization.scheme import SCHEMES
from recipes.benchmarks import tables, workers
from recipes.benchmarks.quantization import mixed, report
from recipes.benchmarks.quantization.entries import ABLATED, KEY, METHODS, tasks


def row(name: str, size: float, psnr: float, predicted: float, measured: float) -> dict[str, Any]:
    quality = {"value": psnr, "interval": [psnr - 0.1, psnr + 0.1]}
    return {
        "name": name,
        "size_ratio": size,
        "latent_psnr_db": quality,
        "predicted_error": predicted,
        "measured_error": measured,
    }


ROWS = [
    row("int4-w4a8", 0.14, 32.0, 50.0, 12.0),
    row("int8-w8a8", 0.257, 36.0, 4.0, 3.0),
    row("mixed, 0.140", 0.14, 44.0, 0.5, 0.6),
    row("mixed, 0.200", 0.2, 43.5, 0.4, 0.7),
    row("mixed, 0.257", 0.2571, 60.0, 0.1, 0.1),
    row("shuffled 0, 0.140", 0.14, 39.0, 3.0, 2.0),
]


def test_gains_are_those_of_the_same_size_or_less() -> None:
    found = mixed.summary(ROWS)
    assert found["gain_db_at_equal_size"] == {"int4-w4a8": 12.0, "int8-w8a8": 8.0}
    assert 0.8 < found["rank_correlation"] < 1.0
    assert mixed.summary([ROWS[0], ROWS[1], ROWS[4]])["gain_db_at_equal_size"]["int4-w4a8"] is None


def test_the_table_has_a_line_for_each_candidate() -> None:
    study = {**mixed.summary(ROWS), "rows": ROWS}
    told = {"samples": 64, "computed": "here", "models": {"unet": {"activations in 8 bits": study}}}
    text = mixed.table(told)
    for one in ROWS:
        assert f"| {one['name']} | {one['size_ratio']:.3f} |" in text
    assert "+12.00 dB" in text
    assert "simulated" in text


def test_classes_hold_every_format_of_their_kind_once() -> None:
    tops = [top for top, _ in mixed.CLASSES.values()]
    assert tops == ["int8-w8a8-token", "int8-w8a32"]
    held = [name for _, formats in mixed.CLASSES.values() for name in formats]
    assert len(held) == len(set(held))
    assert set(held) == {name for name, one in SCHEMES.items() if one.is_quantized and one.activation.bits != 4}


@pytest.mark.parametrize("together", [False, True])
def test_every_rung_is_measured_once_with_a_seed(together: bool) -> None:
    found = list(tasks([0, 1, 2], together))
    assert len(found) == len(set(found))
    told = {(entry.scheme, entry.method) for _, entry in found}
    assert {(scheme, method) for scheme in ABLATED for method in METHODS} <= told
    for seed in (0, 1, 2):
        assert set(KEY) <= {(entry.scheme, entry.method) for at, entry in found if at == seed}
    slow = ["finetune" in entry.method for _, entry in found]
    assert slow == sorted(slow, reverse=together)


def test_the_ladder_is_told_in_the_order_of_its_rungs(tmp_path: Path) -> None:
    quality = {"value": 30.0, "interval": [29.0, 31.0]}
    for seed, scheme, method in (
        (0, "nvfp4", "nearest"),
        (0, "int8-w8a8", "ranges, bias"),
        (1, "int8-w8a8", "ranges, bias"),
    ):
        one = {"model": "unet", "seed": seed, "scheme": scheme, "method": method, "samples": 512, "computed": "here"}
        one |= {"bytes": 1, "float_bytes": 4, "latent_psnr_db": quality, "image_psnr_db": quality}
        one |= {"attributes": {"value": 1.0}, "change_points": {"value": 0.0, "interval": [0.0, 0.0]}}
        (tmp_path / f"{seed} {scheme}.json").write_text(json.dumps(one))
    rows = report.rows_of(tmp_path)
    assert [(row["scheme"], row["seed"]) for row in rows] == [("int8-w8a8", 0), ("int8-w8a8", 1), ("nvfp4", 0)]
    lines = [line for line in report.document(rows).splitlines() if line.startswith(("| int8", "| nvfp4"))]
    assert lines[0].startswith("| int8-w8a8 | ranges, bias | 0.250 | 30.00 (29.00 to 31.00) | 30.0 | - | 100.00 | ")
    assert lines[0].endswith("| 2: 30.0 to 30.0 dB |")
    assert len(lines) == 2


def test_the_int8_table_tells_every_form_and_what_is_missing() -> None:
    times = {"float32": 100.0, "int8": 25.0, "int4": 20.0, "nncf": 40.0}
    target = {"cpu_ms": times}
    network = {"parameters": 45.7e6, "latent": [64, 64], "targets": {"openvino-cpu": target}}
    text = tables.int8_table({"networks": {"unet, 64x64": network}})
    line = "| UNet, random weights, 64x64 latents | 45.7 M | openvino | 100.0 | 25.0 | 4.00x | 5.00x |  | 2.50x |"
    assert line in text


def test_a_task_is_taken_once_and_none_after_the_end() -> None:
    following = multiprocessing.get_context("spawn").Value("i", 0)
    first = workers.taken("abc", following, time.time() + 60)
    assert next(first) == (0, "a")
    assert list(workers.taken("abc", following, time.time() + 60)) == [(1, "b"), (2, "c")]
    assert list(first) == []
    assert list(workers.taken("abc", multiprocessing.get_context("spawn").Value("i", 0), time.time() - 1)) == []

"""Measures mixed precision against uniform formats of equal size, and how well predicted errors rank candidates."""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.fidelity import Fidelity
from compress.measure import metrics
from compress.mixed_precision import Budget, choose, decided, limit
from compress.model.latent_diffusion import LatentDiffusion
from compress.passes.base import Edit
from compress.passes.quantize import Quantize
from compress.prospects import Option, Prospects, prospects, rank_correlation
from compress.quantization.scheme import SCHEMES
from compress.sensitivity import sensitivities
from recipes.benchmarks import caching_tables
from recipes.benchmarks.caching.presets import SAMPLERS
from recipes.benchmarks.caching.pytorch import opened
from recipes.benchmarks.caching.results import encoded, write
from recipes.benchmarks.quantization.ladder import BUILD, STEPS, Ladder, without_outputs

STORED = tuple(name for name, row in SCHEMES.items() if row.is_quantized and not row.is_calibrated)
EIGHT = tuple(name for name, row in SCHEMES.items() if row.is_calibrated and row.activation.bits == 8)
CLASSES = {"activations in 8 bits": ("int8-w8a8-token", EIGHT), "activations in float": ("int8-w8a32", STORED)}
"""What is compared: how activations are rounded -> the scheme that stands for none chosen, and all there are."""
LESS = (0.8, 0.9)
"""Of the size of the smallest uniform format, where mixed precision is measured, too."""
NEAR = 1.015
"""Sizes that differ by less count as one, the smallest of them."""
SHUFFLED = 4
"""Candidates at each of two sizes that are the best for errors multiplied by random factors."""
_FACTOR = 2.0


class Study:
    """One model and one class of formats."""

    def __init__(self, ladder: Ladder, name: str, kind: str, folder: Path) -> None:
        self.ladder, self.name, self.folder = ladder, name, folder / name / kind.replace(" ", "-")
        self.top, self.formats = CLASSES[kind]
        self.step = Quantize(
            "none",
            parts={"denoiser": self.top},
            modulation="int8-w8a32",
            budget=Budget(size_ratio=0.5),
            float_share=0.0,
            formats=(*self.formats, *STORED),
        )
        self.model = ladder.model(name)
        self.edits = [e for e in self.step.plan(self.model, []) if e.module.partition(".")[0] == "denoiser"]
        self.tops = {e.module.partition(".")[2]: top for e in self.edits if (top := limit(e)) is not None}
        self.before = sum(edit.bytes_before for edit in self.edits)
        self.fixed = sum(edit.bytes_after for edit in self.edits if limit(edit) is None)
        self.made: dict[tuple[str, str, str], Any] = {}
        self._prepared: tuple[Any, Prospects] | None = None

    def prepared(self) -> tuple[Any, Prospects]:
        """What calibration saw, and the predictions."""
        if self._prepared is None:
            context = self.ladder.bench.context
            seen = self.step.observe(self.model, self.edits, context)
            formats = {name: self.step.choices(top, []) for name, top in self.tops.items()}
            methods = replace(self.step.methods(), rounding="nearest")
            began = time.perf_counter()
            weights = sensitivities(self.model, formats, context)
            self._prepared = seen, prospects(self.model, formats, seen, weights, methods, context)
            print(f"{self.name}: predictions took {time.perf_counter() - began:.0f} s", flush=True)
        return self._prepared

    def size(self, schemes: Mapping[str, str]) -> int:
        """Bytes of the denoiser."""
        return self.fixed + self.prepared()[1].bytes(schemes)

    def mixed(self, size: int) -> dict[str, str] | None:
        """What the pass would choose for so many bytes; None where nothing fits."""
        _, found = self.prepared()
        if found.within(size - self.fixed) is None:
            return None
        context = self.ladder.bench.context
        fidelity = Fidelity(self.model, context)

        def measure(tried: list[Edit]) -> float:
            return fidelity.psnr(self.quantized(tried))

        budget = Budget(size_ratio=(size + 0.5) / self.before)
        chosen = choose(self.edits, budget, found, measure, context.progress)
        return {
            edit.module.partition(".")[2]: edit.action for edit in chosen if edit.module.partition(".")[2] in self.tops
        }

    def quantized(self, edits: list[Edit]) -> LatentDiffusion:
        """The model with these formats; outputs of convolutions stay in float, as on the ladder."""
        model = self.model.clone(networks=False)
        self.step.quantize(model, edits, self.prepared()[0], self.ladder.bench.context, {}, self.made)
        model.quant_plans["denoiser"] = without_outputs(model.quant_plans["denoiser"])
        return model

    def candidates(self) -> Iterator[tuple[str, Callable[[], dict[str, str] | None]]]:
        """Name -> formats: the uniform ones, the best of their sizes and of smaller ones, and some that are not."""
        _, found = self.prepared()
        uniform = {
            scheme: found.uniform(scheme)
            for scheme in self.formats
            if any(scheme == option.scheme for own in found.options.values() for option in own)
        }
        for scheme, schemes in uniform.items():
            yield scheme, functools.partial(dict, schemes)
        sizes = list[int]()
        for size in sorted(self.size(schemes) for schemes in uniform.values()):
            if not sizes or size > NEAR * sizes[-1]:
                sizes.append(size)
        four = next(size for size in sizes if size / self.before > 0.13)
        for size in (*(int(share * sizes[0]) for share in LESS), *sizes):
            yield f"mixed, {size / self.before:.3f}", functools.partial(self.mixed, size)
        random = np.random.default_rng(0)
        for size in (four, sizes[-1] * 3 // 4):
            for at in range(SHUFFLED):
                changed = {
                    name: [
                        Option(o.scheme, o.bytes, o.error * float(np.exp(_FACTOR * random.standard_normal())))
                        for o in own
                    ]
                    for name, own in found.options.items()
                }
                shuffled = functools.partial(Prospects(changed, None).within, size - self.fixed)
                yield f"shuffled {at}, {size / self.before:.3f}", shuffled

    def measure(self, label: str, chosen: Callable[[], dict[str, str] | None]) -> dict[str, Any] | None:
        """Size, predicted error and quality of one candidate, kept; None where nothing is so small."""
        file = self.folder / f"{label}.json"
        if file.exists():
            return dict(json.loads(file.read_bytes()))
        schemes, (_, found) = chosen(), self.prepared()
        if schemes is None:
            return None
        model = self.quantized(decided(self.edits, schemes, found))
        latents = self.ladder.bench.latents(model.runtime())
        exact = self.ladder.full(self.name)["latents"]
        each = metrics.psnr_per_sample(exact, latents, metrics.latent_peak(exact))
        row = {
            "name": label,
            "size_ratio": self.size(schemes) / self.before,
            "predicted_error": found.error(schemes),
            "measured_error": float(np.square(exact.astype(np.float64) - latents).sum() / len(exact)),
            "latent_psnr_db": metrics.mean(each).to_dict(),
            "formats": dict(Counter(schemes.values()).most_common()),
            "rank_correlation_of_layers": found.rank_correlation,
        }
        write(file, encoded(row))
        print(f"{self.name} {label}: {row['size_ratio']:.3f}, {row['latent_psnr_db']['value']:.2f} dB", flush=True)
        return row


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one study: the rank correlation over all candidates, and what mixed precision gains at each uniform size."""
    mixed = [row for row in rows if row["name"].startswith("mixed")]
    uniform = [row for row in rows if row["name"] in SCHEMES]
    gains = {}
    for row in uniform:
        equal = max((one for one in mixed if one["size_ratio"] <= row["size_ratio"] + 1e-6), key=_psnr, default=None)
        gains[row["name"]] = None if equal is None else round(_psnr(equal) - _psnr(row), 2)
    return {
        "rank_correlation": rank_correlation(
            [row["predicted_error"] for row in rows], [row["measured_error"] for row in rows]
        ),
        "gain_db_at_equal_size": gains,
    }


def _psnr(row: Mapping[str, Any]) -> float:
    return float(row["latent_psnr_db"]["value"])


def table(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Mixed precision against uniform formats",
        "",
        f"The denoisers of the reference models, {STEPS} steps, simulated ({report['computed']}); latent PSNR on "
        f"{report['samples']} held-out prompts against the float model from the same noise. All have fitted ranges and "
        "corrected biases and round to the nearest. Layers that read the timestep keep float activations: "
        "beside formats that round them, such layers are int8-w8a32; the search chooses for them, too.",
    ]
    for model, studies in report["models"].items():
        for kind, study in studies.items():
            lines += [
                "",
                f"## {model}, {kind}",
                "",
                f"Spearman's rank correlation of predicted and measured error, {len(study['rows'])} candidates: "
                f"{study['rank_correlation']:.3f}.",
                "",
                "| candidate | size | latent PSNR, dB (95 %) | mixed precision of the same size or less |",
                "| --- | --- | --- | --- |",
            ]
            for row in sorted(study["rows"], key=lambda row: (row["size_ratio"], -_psnr(row))):
                gain = study["gain_db_at_equal_size"].get(row["name"])
                low, high = row["latent_psnr_db"]["interval"]
                lines.append(
                    f"| {row['name']} | {row['size_ratio']:.3f} | {_psnr(row):.2f} ({low:.2f} to {high:.2f}) | "
                    f"{'' if gain is None else f'{gain:+.2f} dB'} |"
                )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and write mixed_precision-DATE.json and mixed_precision.md."""
    parser = argparse.ArgumentParser(prog="python -m recipes.benchmarks.quantization.mixed", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--build", type=Path, default=BUILD, help="what is kept on the way")
    parser.add_argument("--results", type=Path, default=caching_tables.RESULTS, help="the dated reports")
    told = parser.parse_args(words)
    ladder = Ladder(opened(told.build, told.models, told.samples, told.device))
    torch.set_num_threads(told.threads)
    models: dict[str, dict[str, Any]] = {}
    for name in told.models:
        for kind in CLASSES:
            study = Study(ladder, name, kind, told.build / "mixed")
            rows = [row for label, chosen in study.candidates() if (row := study.measure(label, chosen)) is not None]
            models.setdefault(name, {})[kind] = {**summary(rows), "rows": rows}
    today = datetime.date.today().isoformat()
    report = {
        "date": today,
        "samples": told.samples,
        "computed": f"PyTorch {torch.__version__}, float32, {told.device}",
        "models": models,
    }
    write(told.results / f"mixed_precision-{today}.json", encoded(report))
    write(told.results / "mixed_precision.md", table(report).encode())


if __name__ == "__main__":
    main()

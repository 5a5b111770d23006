"""Compiles every kernel for every architecture and writes down what the machine code says.

`python -m kernels.matrix` writes; with options it only prints.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from kernels.capability import ARCHITECTURES
from kernels.language import triton
from kernels.machine_code import Case, MachineCode, assemble

FOLDER = Path(__file__).parent
TABLE, RECORD = FOLDER / "machine_code.md", FOLDER / "machine_code.json"


@dataclass(frozen=True)
class Row:
    """One case on one architecture: machine code with its faults, or why there is none."""

    case: str
    architecture: str
    code: MachineCode | None
    faults: tuple[str, ...] = ()
    refused: str | None = None

    def __str__(self) -> str:
        """As it is printed while the matrix runs."""
        if self.code is None:
            return f"{self.architecture:7} {self.case:40} refused: {self.refused}"
        code = self.code
        products = " ".join(f"{name}x{count}" for name, count in code.products.items())
        told = f"{code.registers:3} registers {code.shared_memory:6} B {code.wide_loads:3} wide loads {products}"
        return f"{self.architecture:7} {self.case:40} {told} {'; '.join(self.faults)}".rstrip()


def cases() -> dict[str, Case]:
    """Every case by name: those in the tables `CASES` of the files of this folder."""
    found: dict[str, Case] = {}
    for path in sorted(FOLDER.glob("*.py")):
        if path != Path(__file__):
            found |= getattr(importlib.import_module(f"kernels.{path.stem}"), "CASES", {})
    return found


def look(name: str, case: Case, architecture: str) -> Row:
    """Compile one case for one architecture, or say why that is refused."""
    refused = case.refusal(architecture)
    if refused is not None:
        return Row(name, architecture, None, refused=refused)
    code = assemble(case.launch(architecture), architecture)
    return Row(name, architecture, code, tuple(code.faults(architecture, case)))


def rows(wanted: Mapping[str, Case], architectures: tuple[str, ...]) -> Iterator[Row]:
    """Look at all of them, one after the other."""
    for name, case in wanted.items():
        for architecture in architectures:
            yield look(name, case, architecture)


def as_table(made: list[Row], day: str, version: str) -> str:
    """The rows as Markdown: a line a case, a column an architecture."""
    lines = [
        "# What the machine code says",
        "",
        f"Written by `make kernels` on {day} with Triton {version}; every kernel is assembled, without a GPU. A cell",
        "holds registers per thread, KiB of shared memory per program, and the tensor-core instructions.",
        "",
        "| case | " + " | ".join(ARCHITECTURES) + " |",
        "|---" * (1 + len(ARCHITECTURES)) + "|",
    ]
    by_case: dict[str, dict[str, str]] = {}
    for row in made:
        by_case.setdefault(row.case, {})[row.architecture] = "—" if row.code is None else _cell(row.code)
    for name, cells in by_case.items():
        lines.append(f"| {name} | " + " | ".join(cells[architecture] for architecture in ARCHITECTURES) + " |")
    refused = sorted({f"- {row.refused}" for row in made if row.refused})
    return "\n".join([*lines, "", "Refused (—):", "", *refused, ""])


def _cell(code: MachineCode) -> str:
    return " ".join([f"{code.registers}, {code.shared_memory / 1024:.0f}", *code.products])


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix, or a part of it that is only printed; 1 if anything is at fault."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.matrix", description="Compile every kernel for every architecture."
    )
    parser.add_argument("--only", default="", help="cases whose name has this in it; nothing is written")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="nothing is written")
    given = parser.parse_args(arguments)
    wanted = {name: case for name, case in cases().items() if given.only in name}
    architectures = (given.architecture,) if given.architecture else ARCHITECTURES
    made = []
    for row in rows(wanted, architectures):
        print(row, flush=True)
        made.append(row)
    faulty = [row for row in made if row.faults]
    if not given.only and not given.architecture and not faulty:
        day = date.today().isoformat()
        record = {"date": day, "triton": triton.__version__, "evidence": "assembled"}
        RECORD.write_text(json.dumps({**record, "rows": [asdict(row) for row in made]}, indent=1) + "\n")
        TABLE.write_text(as_table(made, day, triton.__version__))
    print(f"{len(made)} looked at, {len(faulty)} at fault")
    return 1 if faulty or not made else 0


if __name__ == "__main__":
    sys.exit(main())

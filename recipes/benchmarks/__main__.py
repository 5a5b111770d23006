"""Runs every benchmark on this machine, keeps the dated results, and writes the tables and the picture of README.md."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys

from recipes.benchmarks import int8_speed, picture, tables


def main() -> None:
    """Half an hour to an hour; the machine should do nothing else."""
    today = datetime.date.today().isoformat()
    tables.RESULTS.mkdir(exist_ok=True)
    int8_speed.main([])
    for name in tables.TITLES:
        subprocess.run([sys.executable, "-m", "compress", f"recipes/{name}.yaml"], cwd=tables.README.parent, check=True)
        report = tables.README.parent / "build" / name / "report.json"
        shutil.copyfile(report, tables.RESULTS / f"{name}-{today}.json")
    picture.main([])
    tables.main()


if __name__ == "__main__":
    main()

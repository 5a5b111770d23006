"""What the terminal shows at the end of a run: the edits and the cost of a dry run, or the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from compress.report.report import latency_table, table

if TYPE_CHECKING:
    from compress.compiler import Outcome
    from compress.estimate import Estimate
    from compress.passes.base import Edit

MIB = 2**20


def render(outcome: Outcome) -> RenderableType:
    """Lay an outcome out for people."""
    if outcome.report is None or outcome.engine is None:
        return Group(edit_table(outcome.edits), f"{need(outcome.estimate)} Nothing was written.")
    parts: list[RenderableType] = [table(outcome.report)]
    if outcome.report.latency:
        parts.append(latency_table(outcome.report))
    parts.append(f"engine: {outcome.engine}\nreport: {outcome.engine / 'report.html'}")
    return Group(*parts)


def need(cost: Estimate) -> str:
    """What a run takes, in a sentence."""
    parts = ", ".join(f"{one.what} {one.seconds / 60.0:.1f}" for one in cost.work)
    return (
        f"This needs about {cost.minutes:.1f} minutes ({parts}), {cost.memory_mib:.0f} MiB of memory and "
        f"{cost.disk_mib:.0f} MiB on disk."
    )


def edit_table(edits: Sequence[Edit]) -> Table:
    """Every edit, a row each; then how many there are of each kind and the bytes they save."""
    shown = Table("pass", "module", "action", "KiB before", "KiB after", "reason", box=None, header_style="bold")
    for edit in edits:
        sizes = (f"{size / 1024:.1f}" if size else "" for size in (edit.bytes_before, edit.bytes_after))
        shown.add_row(edit.pass_name, edit.module, edit.action, *sizes, edit.reason)
    counts = Counter(f"{edit.pass_name} {edit.action}" for edit in edits)
    saved = sum(edit.bytes_before - edit.bytes_after for edit in edits) / MIB
    shown.caption = f"{', '.join(f'{n} x {what}' for what, n in counts.items())}; {saved:.2f} MiB saved"
    return shown

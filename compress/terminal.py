"""What a command says: results on stdout (as text or one JSON object), progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 10.0
"""Between two progress lines where stderr is not a terminal."""


class Terminal:
    """The two streams of one command.

    Args:
        as_json: print nothing on stdout but the one JSON object given to `finish`.
        quiet: no progress.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stdout: TextIO = sys.stdout
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._plain: dict[str, tuple[float, float]] = {}  # what -> (when it began, when a line was last printed)

    def say(self, text: RenderableType) -> None:
        """Print a line of text, or a rich table, for people; nothing where JSON was asked for."""
        if self.as_json:
            return
        if isinstance(text, str):
            print(text, file=self.stdout, flush=True)
        else:
            self.console().print(text)

    def console(self) -> Console:
        """Return a rich console on stdout; tables are cut to the width of a terminal only."""
        from rich.console import Console

        return Console(file=self.stdout, width=None if self.stdout.isatty() else 1000, highlight=False, markup=False)

    def note(self, sentence: str) -> None:
        """Print one sentence on stderr, above the progress bars."""
        if self._bars is not None:
            self._bars.console.print(sentence, markup=False, highlight=False)
        elif not self.quiet:
            print(sentence, file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far a step is: a bar with the time left on a terminal, plain lines elsewhere."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            self._show_bar(what, done, total)
        else:
            self._show_line(what, done, total)

    def _show_bar(self, what: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self._bars is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def _show_line(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in self._plain:
            self._plain[what] = (now, now)
            if done < total:
                print(f"{what} ...", file=sys.stderr, flush=True)
        began, last = self._plain[what]
        if done >= total:
            print(f"{what}: done in {now - began:.0f} s", file=sys.stderr, flush=True)
            del self._plain[what]
        elif now - last >= PLAIN_SECONDS:
            left = f", {(now - began) / done * (total - done):.0f} s left" if done else ""
            print(f"{what}: {done}/{total}{left}", file=sys.stderr, flush=True)
            self._plain[what] = (began, now)

    def finish(self, result: dict[str, Any]) -> None:
        """Close the bars; print the result where JSON was asked for."""
        self.close()
        if self.as_json:
            print(json.dumps(result, indent=1, sort_keys=True, default=str), file=self.stdout, flush=True)

    def close(self) -> None:
        """Take the progress bars down; they may be taken down twice."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._tasks.clear()

    @contextlib.contextmanager
    def clean_stdout(self) -> Any:
        """Send what libraries print to stderr while JSON is wanted on stdout."""
        if not self.as_json:
            yield
            return
        with contextlib.redirect_stdout(sys.stderr):
            yield

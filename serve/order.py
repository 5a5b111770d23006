"""An order: all that one picture is made of, and the promise of the picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class Order:
    """One picture to draw. Equal orders give equal bytes, whatever else is drawn with them.

    Attributes:
        engine: its name at this server.
        prompt: text, or a class.
        seed: of its noise.
        height, width: pixels.
        negative: what guidance leads away from; None is no prompt.
        start: the row of the plan to begin at; above 0 only with an image.
        image: uint8 (height, width, 3) to begin from.
        mask: bool (height, width), true where to paint; needs an image.
    """

    engine: str
    prompt: str
    seed: int
    height: int
    width: int
    negative: str | None = None
    start: int = 0
    image: np.ndarray | None = None
    mask: np.ndarray | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What orders must share to be drawn together: engine, shape and plan."""
        return self.engine, self.height, self.width, self.start, self.image is not None, self.mask is not None


@dataclass(frozen=True)
class Step:
    """A row of the plan is done.

    Attributes:
        row: how many are.
        rows: how many there are in all.
        preview: uint8 (height, width, 3), what the picture is going to be, where that was asked for.
    """

    row: int
    rows: int
    preview: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """An order on its way. Cancelling the future takes it back, at any time; that is all that cancels a job.

    Attributes:
        order: what to draw.
        watch: called from the drawing thread after every row.
        previews: the rows (counted as in `Step.row`) after which a preview is drawn.
        future: of the uint8 (height, width, 3) picture.
        since: when it was made, on the monotonic clock.
    """

    order: Order
    watch: Callable[[Step], None] | None = None
    previews: Collection[int] = ()
    future: Future[np.ndarray] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def wanted(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.future.cancelled()

    def succeed(self, picture: np.ndarray) -> None:
        """Keep the promise, unless it was taken back."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(picture)

    def fail(self, error: BaseException) -> None:
        """Say why the promise cannot be kept, unless it was taken back."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

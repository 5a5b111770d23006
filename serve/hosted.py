"""An engine at a server: it draws orders together, in the sizes of batch in which that was proved to change no byte."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.engine import Engine
from export.errors import EngineError
from export.plan_rows import Step
from export.preview import clean_estimate
from serve.order import Order

_LOG = logging.getLogger("serve")

Look = Callable[[int], np.ndarray]
"""Index of a picture in the batch -> its preview, uint8 (height, width, 3)."""

Watch = Callable[[int, Look], None]
"""Called after every network call with (rows done, how to see a preview); what it raises ends the drawing."""


class Hosted:
    """One opened engine under a name; one thread at a time draws with it.

    Attributes:
        name: what requests call it.
        engine: the engine.
        sizes: the batches it draws of its best size of picture, ascending, 1 first; others are drawn alone.
    """

    def __init__(self, name: str, engine: Engine, most: int) -> None:
        """Prove the sizes of batch up to `most`, which also compiles and warms what will be used."""
        self.name, self.engine = name, engine
        shapes = engine.manifest.shapes
        self._best = shapes["height"][1], shapes["width"][1]
        self.sizes = self._proved(min(most, shapes["batch"][2]))

    def sizes_of(self, order: Order) -> tuple[int, ...]:
        """The sizes of batch in which such an order may be drawn."""
        return self.sizes if (order.height, order.width) == self._best else (1,)

    def together(self, order: Order, count: int) -> int:
        """How many of `count` such orders, one at least, are drawn as one batch."""
        return max(size for size in self.sizes_of(order) if size <= count)

    def check_side(self, name: str, asked: int) -> None:
        """Refuse a `height` or `width` in pixels that the engine was not built for.

        Raises:
            EngineError: says what is allowed.
        """
        low, best, high = self.engine.manifest.shapes[name]
        latent = self.engine.runtime.latent
        multiple = latent.downscale * latent.multiple
        if not low <= asked <= high or asked % multiple:
            allowed = f"{best}" if low == high else f"from {low} to {high}, a multiple of {multiple}"
            raise EngineError(f"this engine draws pictures of the {name} {allowed}, not {asked}")

    def rows(self, order: Order) -> int:
        """Network calls of an order."""
        return self.engine.plan.network_calls - order.start

    def draw(self, orders: Sequence[Order], watch: Watch | None = None) -> np.ndarray:
        """Draw orders of one kind together.

        Args:
            orders: at least one.
            watch: see `Watch`.

        Returns:
            uint8 (orders, height, width, 3).

        Raises:
            EngineError: an order that the engine cannot take.
        """
        first = orders[0]
        options: dict[str, Any] = {"negative_prompts": [order.negative for order in orders]}
        images = [order.image for order in orders if order.image is not None]
        if images:
            # One by one: in which batches the encoder changes no byte was not proved.
            options["image_latents"] = np.concatenate([self.engine.encode(image[None]) for image in images])
            options["start_step"] = first.start
        masks = [order.mask for order in orders if order.mask is not None]
        if masks:
            options["mask"] = self.engine.latent_mask(np.stack(masks))

        def revise(row: int, step: Step, latents: Mapping[int, np.ndarray], outputs: Mapping[int, np.ndarray]) -> Step:
            """Look at a row, and change nothing."""
            if watch is not None:
                watch(row - first.start + 1, lambda k: self._preview(step, latents[0][k], outputs[0][k]))
            return step

        latents = self.engine.sample(
            [order.prompt for order in orders],
            [order.seed for order in orders],
            first.height,
            first.width,
            revise=revise,
            **options,
        )
        return self.engine.decode(latents)

    def _preview(self, step: Step, latent: np.ndarray, output: np.ndarray) -> np.ndarray:
        picture: np.ndarray = self.engine.decode(
            clean_estimate(self.engine.plan.prediction, step, latent[None], output[None])
        )[0]
        return picture

    def _proved(self, most: int) -> tuple[int, ...]:
        """Powers of two up to `most`, as far as every picture of such a batch has the bytes it has alone."""
        if any(step.gated for step in self.engine.plan.steps):
            return (1,)  # a gate splits batches as it likes, into sizes that nobody has tried
        golden = self.engine.manifest.golden
        prompts = golden.prompts if golden is not None else ("",)
        orders = [Order(self.name, str(prompts[k % len(prompts)]), k, *self._best) for k in range(max(most, 1))]
        alone = [self.draw([order])[0] for order in orders]
        sizes = [1]
        while sizes[-1] * 2 <= most:
            size = sizes[-1] * 2
            if not np.array_equal(self.draw(orders[:size]), np.stack(alone[:size])):
                _LOG.warning("batches end early", extra={"engine": self.name, "differs_at": size})
                break
            sizes.append(size)
        return tuple(sizes)

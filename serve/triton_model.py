"""The Python model of a Triton Inference Server repository: requests of its dynamic batcher become pictures.

Triton imports `TritonPythonModel` from the file `model.py` of a version, beside which this package, `export` and the
folder `engine` lie; `compress package --for triton-server` writes all of that.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from export.backends import TensorSpec, feeds
from export.engine import Engine
from export.errors import EngineError
from serve.hosted import Hosted
from serve.limits import Limits
from serve.order import Order

_LOG = logging.getLogger("serve")

GRAPHS = "graphs.json"
"""The file that names the models that run the graphs, where the Python model does not."""

PROMPT = Limits.prompt
"""Characters that a prompt may have."""

Outcome = np.ndarray | EngineError
"""A uint8 (height, width, 3) picture, or why there is none."""


class TritonPythonModel:
    """One engine as a model: `prompt`, `seed` and optional inputs in, `picture` out, each with a batch dimension first.

    A request's pictures have the bytes they have alone: batches are drawn in the sizes for which that was proved when
    the model was loaded. What one request does wrong fails that request alone.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine and prove its batches.

        Args:
            args: `model_config` (JSON), `model_repository` (the folder of this model) and `model_version`.

        Raises:
            TritonModelException: the engine cannot be opened; the server then shows the sentence.
        """
        config = json.loads(args["model_config"])
        self._name, self._most = config["name"], config["max_batch_size"]
        self._hosted: Hosted | None = None
        folder = Path(args["model_repository"]) / args["model_version"]
        try:
            elsewhere = served(folder / GRAPHS)
            self._engine = Engine.open(folder / "engine", graphs=elsewhere)
            if elsewhere is None:  # other models answer nobody before all are loaded
                self._host()
        except EngineError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests that the server put together, one response each, in their order."""
        try:
            hosted = self._host()
        except EngineError as error:
            return [_answer([error]) for _ in requests]
        asked: list[list[Order] | EngineError] = []
        for request in requests:
            try:
                asked.append(read(request, hosted))
            except EngineError as error:
                asked.append(error)
        orders = [order for each in asked if not isinstance(each, EngineError) for order in each]
        outcomes = iter(draw(hosted, orders))
        return [_answer([each] if isinstance(each, EngineError) else [next(outcomes) for _ in each]) for each in asked]

    def _host(self) -> Hosted:
        """The engine with its batches proved; that is done once."""
        if self._hosted is None:
            self._hosted = Hosted(self._name, self._engine, self._most)
        return self._hosted


class ServedGraph:
    """A graph that is a model of the same server, with a back end of the server's own."""

    def __init__(self, model: str, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run, see `export.backends.LoadedGraph`."""
        asked = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=list(self.outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in feeds(arrays, self.inputs).items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        answer = asked.exec()
        if answer.has_error():
            raise EngineError(f"the model {self.model} did not run: {' '.join(answer.error().message().split())[:300]}")
        return {name: np.array(pb_utils.get_output_tensor_by_name(answer, name).as_numpy()) for name in self.outputs}


def served(file: Path) -> dict[str, ServedGraph] | None:
    """The graphs that other models of the server run, as the package says; None where it does not."""
    if not file.is_file():
        return None
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {
        function: ServedGraph(
            row["model"],
            *(
                {name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in row[side].items()}
                for side in ("inputs", "outputs")
            ),
        )
        for function, row in rows.items()
    }


def read(request: Any, hosted: Hosted) -> list[Order]:
    """The orders of a request, one for each entry of its batch.

    Raises:
        EngineError: an input that does not fit; says which, and what would.
    """
    prompts, seeds = _texts(request, "prompt"), _values(request, "seed")
    negatives: list[str | None] = [*_texts(request, "negative_prompt")] or [None] * len(prompts)
    height, width = (_side(request, name, hosted) for name in ("height", "width"))
    return [
        Order(hosted.name, prompt, int(seed), height, width, negative)
        for prompt, seed, negative in zip(prompts, seeds, negatives, strict=True)
    ]


def draw(hosted: Hosted, orders: Sequence[Order]) -> list[Outcome]:
    """Draw orders in the batches that are proved; where one fails, its batch-mates are drawn without it."""
    outcomes: dict[int, Outcome] = {}
    while waiting := [k for k in range(len(orders)) if k not in outcomes]:
        head = orders[waiting[0]]
        alike = [k for k in waiting if orders[k].kind == head.kind]
        batch = alike[: hosted.together(head, len(alike))]
        outcomes |= zip(batch, _draw(hosted, [orders[k] for k in batch]), strict=True)
    return [outcomes[k] for k in range(len(orders))]


def _draw(hosted: Hosted, orders: Sequence[Order]) -> list[Outcome]:
    """Draw one batch, or each of its orders alone where that fails."""
    try:
        return list(hosted.draw(orders))
    except EngineError as error:
        failure = error
    except Exception as error:
        _LOG.exception("a batch of %d failed", len(orders))
        failure = EngineError(f"the engine failed ({type(error).__name__}); the server's log says where")
    return [failure] if len(orders) == 1 else [_draw(hosted, [order])[0] for order in orders]


def _answer(outcomes: Sequence[Outcome]) -> Any:
    """The response to a request: all its pictures, or the first reason why not."""
    pictures = [one for one in outcomes if not isinstance(one, EngineError)]
    failures = [one for one in outcomes if isinstance(one, EngineError)]
    if failures:
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(str(failures[0]), pb_utils.TritonError.INVALID_ARG)
        )
    return pb_utils.InferenceResponse([pb_utils.Tensor("picture", np.stack(pictures))])


def _side(request: Any, name: str, hosted: Hosted) -> int:
    """Height or width in pixels: as asked, or the engine's own."""
    asked = {int(side) for side in _values(request, name)} or {hosted.engine.manifest.shapes[name][1]}
    if len(asked) > 1:
        raise EngineError(f"the pictures of one request have one {name}, not {min(asked)} and {max(asked)}")
    side = asked.pop()
    hosted.check_side(name, side)
    return side


def _texts(request: Any, name: str) -> list[str]:
    try:
        texts = [value.decode("utf-8") for value in _values(request, name)]
    except UnicodeDecodeError:
        raise EngineError(f"{name} is not text in UTF-8") from None
    if any(len(text) > PROMPT for text in texts):
        raise EngineError(f"{name} may have {PROMPT} characters at most")
    return texts


def _values(request: Any, name: str) -> list[Any]:
    """The entries of an input of shape (batch, 1); none where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().reshape(-1))

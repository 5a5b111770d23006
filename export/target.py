"""Target rows: a device, the runtime that serves it, the graph dialect it wants, and what is really fast there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from export.backends import BACKENDS, available, holds_machine_code
from export.errors import EngineError
from export.to_tensorrt import BuildOptions
from export.to_web import PageOptions, find_package

Execution = Literal["native", "storage only", "simulated"]
"""How a number format runs: on kernels of that format; widened when loaded; emulated in float."""


@dataclass(frozen=True)
class Target:
    """Where an engine runs.

    Attributes:
        name: what a recipe calls it.
        device: the kind of hardware.
        backend: the runtime, a key of `export.backends.BACKENDS`.
        dialect: of the quantized graphs, a key of `export.qdq.DIALECTS`; of machine code, what it rounds.
        formats: scheme name -> how it runs here; a scheme that is absent cannot be built for this target.
        operators: whether its graphs keep `torch.ops.latent.*`, which the pass `fuse` makes denoisers call.
        library: the module that builds engines from the graphs; none where the runtime reads the graphs themselves.
        since: scheme name -> the first compute capability that has it, `sm_89`.
        build: what the library is asked for.
        page: what the page is made of that runs the engine in a browser; none where no browser does.
    """

    name: str
    device: str
    backend: str
    dialect: str
    formats: Mapping[str, Execution]
    operators: bool = False
    library: str = ""
    since: Mapping[str, str] = field(default_factory=dict)
    build: BuildOptions = field(default_factory=BuildOptions)
    page: PageOptions | None = None

    @property
    def machine_code(self) -> bool:
        """Whether it is built where it runs, because its graphs are compiled there."""
        return holds_machine_code(self.backend)

    def refusal(self, scheme: str) -> str | None:
        """Why a number format cannot be built for this target, one sentence; None where it can."""
        if scheme not in self.formats:
            known = ", ".join(self.formats)
            return f"the target {self.name} does not know the number format {scheme}; it knows {known}"
        first = self.since.get(scheme)
        if first is None:
            return None
        older = [name for name in self.build.architectures if _capability(name) < _capability(first)]
        if not older:
            return None
        return (
            f"the target {self.name} has the number format {scheme} from {first} on, but is to be built for "
            f"{', '.join(older)}: name later architectures, or choose another format"
        )

    @property
    def fast_formats(self) -> tuple[str, ...]:
        """The schemes that run on kernels of their own format here."""
        return tuple(name for name, execution in self.formats.items() if execution == "native")


_INTEGER = ("int8-w8a8", "int8-w8a8-tensor", "int6-w6a8", "int5-w5a8", "int4-w4a8", "int3-w3a8")
"""Schemes of per-tensor unsigned activations and integer weights, one scale a channel: 8-bit kernels run them."""

_TOKENS = (
    *("int8-w8a8-token", "int6-w6a8-token", "int5-w5a8-token", "int4-w4a8-token", "int3-w3a8-token"),
    "fp8-w8a8-token",
)
"""Schemes whose linear layers our operators multiply in 8 bits on a GPU; convolutions are emulated there."""

_STORED = (
    *("float16", "int8-w8a32", "int6-w6a32", "int5-w5a32", "int4-w4a32", "int3-w3a32"),
    *("int4-w4a32-g32", "int4-w4a32-g64", "int4-w4a32-g128", "nvfp4-w4a32"),
    *("int8-w8a8-token", "int6-w6a8-token", "int5-w5a8-token", "int4-w4a8-token", "int3-w3a8-token"),
    *("int4-w4a8-g64", "int4-w4a4", "int4-w4a4-g64"),
    *("fp8-w8a8", "fp8-w8a8-token", "fp8-e5m2-w8a8", "mxfp8", "mxfp4", "nvfp4", "nvfp4-w4a8", "fp4-w4a8"),
    *("fp8-any-w8a8", "fp4-any-w4a8", "fp4-any-w4a4", "fp6-w6a8", "fp5-w5a8", "fp3-w3a8"),
)
"""Schemes whose weights a CPU only stores: activations stay in float32."""

_HALF: tuple[str, ...] = ("bf16", "int8-w8a32", "int6-w6a32", "int5-w5a32", "int4-w4a32", "int3-w3a32")
"""Schemes whose weights TensorRT keeps in 8 or 16 bits, beside activations in float16 (for `bf16` too)."""

_FLOATS: dict[str, Execution] = dict.fromkeys(
    ("int4-w4a32-g64", "int4-w4a32-g128", "fp8-w8a8", "nvfp4", "nvfp4-w4a32"), "native"
)
_SINCE = {"fp8-w8a8": "sm_89", "nvfp4": "sm_120", "nvfp4-w4a32": "sm_120"}

TARGETS: dict[str, Target] = {
    row.name: row
    for row in (
        Target(
            name="openvino-cpu",
            device="cpu",
            backend="openvino",
            dialect="openvino",
            formats={
                "float32": "native",
                "bf16": "native",
                "int8-qk": "native",
                **dict.fromkeys(_INTEGER, "native"),
                **dict.fromkeys(_STORED, "storage only"),
            },
        ),
        Target(
            name="onnxruntime-cpu",
            device="cpu",
            backend="onnxruntime",
            dialect="onnxruntime",
            formats={
                "float32": "native",
                "bf16": "storage only",
                **dict.fromkeys(_INTEGER, "native"),
                **dict.fromkeys(_STORED, "storage only"),
            },
        ),
        Target(
            name="web",
            device="browser",
            backend="onnxruntime-web",
            dialect="onnxruntime",
            formats={
                "float32": "native",
                "bf16": "storage only",
                **dict.fromkeys(_INTEGER, "native"),
                **dict.fromkeys(_STORED, "storage only"),
            },
            page=PageOptions(),
        ),
        Target(
            name="torch-cuda",
            device="cuda",
            backend="aotinductor",
            dialect="operators",
            formats={
                "float32": "native",
                "bf16": "native",
                **dict.fromkeys((*_INTEGER, *_STORED), "simulated"),
                **dict.fromkeys(_TOKENS, "native"),
            },
            operators=True,
        ),
        # NVIDIA's support matrix has 8-bit integers as weights alone there; whether a product of them runs in integers
        # cannot be seen in an engine, so it is not said.
        Target(
            name="tensorrt-rtx",
            device="gpu",
            backend="tensorrt-rtx",
            dialect="tensorrt",
            formats={"float16": "native", **dict.fromkeys((*_HALF, *_INTEGER), "storage only"), **_FLOATS},
            library="tensorrt_rtx_bindings",
            since=_SINCE,
            build=BuildOptions(architectures=("sm_80", "sm_86", "sm_89", "sm_120")),
        ),
        Target(
            name="tensorrt",
            device="gpu",
            backend="tensorrt",
            dialect="tensorrt",
            formats={
                "float16": "native",
                **dict.fromkeys(_HALF, "storage only"),
                **dict.fromkeys(_INTEGER, "native"),
                **_FLOATS,
            },
            library="tensorrt",
            since=_SINCE,
        ),
    )
}


def _capability(name: str) -> int:
    return int(name.removeprefix("sm_"))


def target(name: str) -> Target:
    """Look a target up.

    Raises:
        EngineError: the name is unknown; gives the nearest one and all that exist.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(str(name), TARGETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise EngineError(f"the target {name!r} is unknown{hint} known targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def device_of(names: Iterable[str]) -> str:
    """Where PyTorch competes with these targets: on the GPU that one of them runs on, or else on the processor."""
    return "cuda" if any(target(name).device == "cuda" for name in names) else "cpu"


def require_buildable(row: Target) -> None:
    """Refuse a target that is built where it runs, on a machine that cannot run it, and a page without its runtime.

    Raises:
        EngineError: says what is missing, and what to do.
    """
    if row.page is not None:
        find_package(row.page)
    if not row.machine_code:
        return
    needed = BACKENDS[row.backend]
    if row.device == needed.device and not available(row.backend):
        raise EngineError(
            f"the target {row.name} is compiled on the machine that runs it, and this one has no NVIDIA GPU that "
            f"{needed.package} could use: run the same recipe there, or leave the target out"
        )


def built_anywhere() -> list[Target]:
    """The targets that are built on any machine, with nothing but their runtime: it reads the graphs themselves."""
    return [row for row in TARGETS.values() if not row.machine_code and not row.library and row.page is None]

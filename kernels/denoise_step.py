"""One denoising step in one kernel: guidance, forecast, the linear update of any sampler, noise, the next input.

    x[k+1] = sum_i x_i * x[k-i]  +  sum_j m_j * m[k-j]  +  noise * z[k]  +  initial * x[0]

where `m[k] = uncond + guidance_scale * (cond - uncond)` (Ho and Salimans 2022, arXiv 2207.12598), and the network
output may itself be a linear combination of earlier ones. Every number comes from a `StepTable` on the device, from the
row that a counter on the device names; the kernel advances the counter. So one launch, captured once, serves all rows
of all samplers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.capability import INTERPRETER
from kernels.dispatch import Mode, choose
from kernels.errors import KernelError
from kernels.language import ceiling, jit, tl
from kernels.launch import Argument, Configuration, Launch, configuration_for
from kernels.machine_code import Case
from kernels.step_table import FIXED, INDICES, StepTable, step_table

CONFIGURATIONS = {
    "default": Configuration(warps=4, blocks={"BLOCK": 1024}),
    INTERPRETER: Configuration(warps=4, blocks={"BLOCK": 64}),
}


@dataclass
class DenoisingState:
    """The buffers of one sampler run; their addresses never change, so that a captured graph may hold them.

    Attributes:
        table: where the numbers came from.
        coefficients, indices: the table on the device.
        progress: int32 (2,): the row that comes next, and how many programs have finished it.
        latents: float32 (table.latents, samples, ...): x[k] is at k modulo their number.
        outputs: float32 (table.outputs, samples, ...): m[k] likewise.
        kept: (table.forecasts, halves, samples, ...): network outputs for forecasts, in the network's type.
        noise: float32 (draws, samples, ...): the draws of all rows that need one.
        first: float32 (samples, ...): the first latent.
        network_input: (halves * samples, ...): the scaled latent in the network's type, once per guidance half.
        timestep: float32 (1,): of the next network call.
        halves: 2 where the network's output holds the unconditional half, then the conditional one.
    """

    table: StepTable
    coefficients: torch.Tensor
    indices: torch.Tensor
    progress: torch.Tensor
    latents: torch.Tensor
    outputs: torch.Tensor
    kept: torch.Tensor
    noise: torch.Tensor
    first: torch.Tensor
    network_input: torch.Tensor
    timestep: torch.Tensor
    halves: int

    def latent(self, row: int) -> torch.Tensor:
        """x[row], float32 (samples, ...), while it is among the last `table.latents`; x[rows] is the result."""
        return self.latents[row % self.table.latents]

    def restart(self, first: torch.Tensor) -> None:
        """Begin the run again from another first latent (samples, ...), in the same buffers."""
        self.first.copy_(first)
        self.latents[0].copy_(first)
        self.progress.zero_()
        self.timestep.fill_(self.table.first_timestep)
        scaled = (self.first * self.table.first_input_scale).to(self.network_input.dtype)
        self.network_input.view(self.halves, *first.shape).copy_(scaled.expand(self.halves, *first.shape))


def begin(
    table: StepTable, first: torch.Tensor, noise: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> DenoisingState:
    """Make the buffers of a run on the device of its first latent.

    Args:
        table: of the sampler.
        first: (samples, ...) the first latent.
        noise: (draws, samples, ...) standard-normal; None where the table draws none.
        dtype: of the network.

    Raises:
        KernelError: the noise is not what the table draws.
    """
    drawn = (table.draws, *first.shape)
    noise = first.new_empty(drawn, dtype=torch.float32) if noise is None and not table.draws else noise
    if noise is None or tuple(noise.shape) != drawn:
        given = "none is given" if noise is None else f"{tuple(noise.shape)} is given"
        raise KernelError(f"the rows of the step table draw noise of the shape {drawn}; {given}")
    halves = 2 if table.indices[:, 0].any() else 1

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=first.device)

    state = DenoisingState(
        table=table,
        coefficients=torch.from_numpy(table.coefficients).to(first.device),
        indices=torch.from_numpy(table.indices).to(first.device),
        progress=buffer(2, dtype=torch.int32),
        latents=buffer(table.latents, *first.shape),
        outputs=buffer(table.outputs, *first.shape),
        kept=buffer(table.forecasts, halves, *first.shape, dtype=dtype),
        noise=noise.float().contiguous(),
        first=buffer(*first.shape),
        network_input=buffer(halves * first.shape[0], *first.shape[1:], dtype=dtype),
        timestep=buffer(1),
        halves=halves,
    )
    state.restart(first)
    return state


def denoise_step(state: DenoisingState, network_output: torch.Tensor, *, mode: Mode | None = None) -> None:
    """Make one row's update in the buffers of a run, and the input and timestep of the next network call.

    Args:
        state: of the run; its next row is made.
        network_output: (halves * samples, ...) in the network's type, the conditional half last; a row without
            guidance reads that half alone, and a forecast row reads nothing of it.
        mode: see `kernels.dispatch.choose`.

    Raises:
        KernelError: the output has another shape or type, or the kernel is insisted on where it cannot run.
    """
    expected = state.network_input
    if network_output.shape != expected.shape or network_output.dtype != expected.dtype:
        raise KernelError(
            f"the network output must be {tuple(expected.shape)} {expected.dtype}, "
            f"not {tuple(network_output.shape)} {network_output.dtype}"
        )
    unfit = None if network_output.is_contiguous() else "the network output is not contiguous"
    choice = choose("denoise_step", expected.device, expected.dtype, expected.shape, unfit=unfit, mode=mode)
    if choice.implementation == "reference":
        denoise_step_reference(state, network_output)
    else:
        _prepare(state, network_output, choice.architecture).run()


def denoise_step_reference(state: DenoisingState, network_output: torch.Tensor) -> None:
    """The definition of the step, in plain torch; see `denoise_step`."""
    table, row = state.table, int(state.progress[0])
    if row >= table.rows:
        return
    scale, noise, initial, input_scale, timestep, *windows = table.coefficients[row].tolist()
    guided, draw, read, write = table.indices[row].tolist()
    x, m = windows[: table.latents], windows[table.latents : table.latents + table.outputs]
    forecast = windows[table.latents + table.outputs :]
    halves = network_output.view(state.halves, *state.first.shape)
    if write >= 0:
        state.kept[write].copy_(halves)
    if read < 0:
        halves = halves.float()
    else:
        terms = [c * state.kept[(read - lag) % table.forecasts].float() for lag, c in enumerate(forecast) if c]
        halves = torch.stack(terms).sum(dim=0)
    output = halves[-1]
    if guided:
        output = halves[0] + scale * (halves[1] - halves[0])
    total = m[0] * output
    for lag, coefficient in enumerate(x):
        if coefficient:
            total = total + coefficient * state.latent(row - lag)
    for lag, coefficient in enumerate(m[1:], start=1):
        if coefficient:
            total = total + coefficient * state.outputs[(row - lag) % table.outputs]
    if noise:
        total = total + noise * state.noise[draw]
    if initial:
        total = total + initial * state.first
    state.outputs[row % table.outputs].copy_(output)
    state.latent(row + 1).copy_(total)
    scaled = (input_scale * total).to(state.network_input.dtype)
    state.network_input.view(state.halves, *total.shape).copy_(scaled.expand(state.halves, *total.shape))
    state.timestep.fill_(timestep)
    state.progress[0] += 1


@jit
def _denoise_step(
    network: tl.tensor,
    latents: tl.tensor,
    outputs: tl.tensor,
    kept: tl.tensor,
    noise: tl.tensor,
    first: tl.tensor,
    network_input: tl.tensor,
    timestep: tl.tensor,
    coefficients: tl.tensor,
    indices: tl.tensor,
    progress: tl.tensor,
    count: tl.tensor,
    rows: tl.tensor,
    LATENTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FORECASTS: tl.constexpr,
    HALVES: tl.constexpr,
    NOISY: tl.constexpr,
    INITIAL: tl.constexpr,
    FIXED: tl.constexpr,
    INDICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Where a coefficient is 0, nothing is loaded: what was never written there does not matter."""
    row = tl.load(progress)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (at < count) & (row < rows)
    row = tl.minimum(row, rows - 1).to(tl.int64)
    numbers = coefficients + row * (FIXED + LATENTS + OUTPUTS + FORECASTS)
    guided = tl.load(indices + row * INDICES) != 0
    read = tl.load(indices + row * INDICES + 2)
    write = tl.load(indices + row * INDICES + 3)
    of_cond = (HALVES - 1) * count + at

    fresh = inside & (read < 0)
    cond = tl.load(network + of_cond, mask=fresh, other=0.0).to(tl.float32)
    uncond = cond
    if HALVES == 2:
        uncond = tl.load(network + at, mask=fresh & (guided | (write >= 0)), other=0.0).to(tl.float32)
    if FORECASTS > 0:
        entry = kept + write.to(tl.int64) * HALVES * count
        tl.store(entry + of_cond, cond.to(kept.dtype.element_ty), mask=inside & (write >= 0))
        if HALVES == 2:
            tl.store(entry + at, uncond.to(kept.dtype.element_ty), mask=inside & (write >= 0))
        for lag in tl.static_range(FORECASTS):
            share = tl.load(numbers + FIXED + LATENTS + OUTPUTS + lag)
            used = inside & (read >= 0) & (share != 0.0)
            entry = kept + ((read + FORECASTS - lag) % FORECASTS).to(tl.int64) * HALVES * count
            cond += share * tl.load(entry + of_cond, mask=used, other=0.0).to(tl.float32)
            if HALVES == 2:
                uncond += share * tl.load(entry + at, mask=used & guided, other=0.0).to(tl.float32)

    output = cond
    if HALVES == 2:
        output = tl.where(guided, uncond + tl.load(numbers) * (cond - uncond), cond)
    total = tl.load(numbers + FIXED + LATENTS) * output
    for lag in tl.static_range(LATENTS):
        share = tl.load(numbers + FIXED + lag)
        past = latents + (row + LATENTS - lag) % LATENTS * count
        total += share * tl.load(past + at, mask=inside & (share != 0.0), other=0.0)
    for lag in tl.static_range(1, OUTPUTS):
        share = tl.load(numbers + FIXED + LATENTS + lag)
        past = outputs + (row + OUTPUTS - lag) % OUTPUTS * count
        total += share * tl.load(past + at, mask=inside & (share != 0.0), other=0.0)
    if NOISY:
        share = tl.load(numbers + 1)
        drawn = noise + tl.load(indices + row * INDICES + 1).to(tl.int64) * count
        total += share * tl.load(drawn + at, mask=inside & (share != 0.0), other=0.0)
    if INITIAL:
        share = tl.load(numbers + 2)
        total += share * tl.load(first + at, mask=inside & (share != 0.0), other=0.0)

    if OUTPUTS > 1:
        tl.store(outputs + row % OUTPUTS * count + at, output, mask=inside)
    tl.store(latents + (row + 1) % LATENTS * count + at, total, mask=inside)
    scaled = (tl.load(numbers + 3) * total).to(network_input.dtype.element_ty)
    for half in tl.static_range(HALVES):
        tl.store(network_input + half * count + at, scaled, mask=inside)

    # The last program to come here advances the row: by then every program, and every warp of it, has read it.
    tl.debug_barrier()
    finished = tl.atomic_add(progress + 1, 1)
    if finished == tl.num_programs(0) - 1:
        tl.store(timestep, tl.load(numbers + 4))
        tl.store(progress + 1, 0)
        tl.store(progress, tl.minimum(tl.load(progress) + 1, rows))


def _prepare(state: DenoisingState, network_output: torch.Tensor, architecture: str) -> Launch:
    configuration = configuration_for(CONFIGURATIONS, architecture)
    table, count = state.table, state.first.numel()
    arguments: dict[str, Argument] = {
        "network": network_output,
        "latents": state.latents,
        "outputs": state.outputs,
        "kept": state.kept,
        "noise": state.noise,
        "first": state.first,
        "network_input": state.network_input,
        "timestep": state.timestep,
        "coefficients": state.coefficients,
        "indices": state.indices,
        "progress": state.progress,
        "count": count,
        "rows": table.rows,
        "LATENTS": table.latents,
        "OUTPUTS": table.outputs,
        "FORECASTS": table.forecasts,
        "HALVES": state.halves,
        "NOISY": table.draws > 0,
        "INITIAL": table.initial,
        "FIXED": FIXED,
        "INDICES": INDICES,
    }
    grid = (ceiling(count, configuration.blocks["BLOCK"]),)
    return Launch(_denoise_step, grid, arguments, configuration)


def _launch(architecture: str, dtype: torch.dtype, outputs: int, forecasts: int) -> Launch:
    """A guided run on latents of 1024 x 1024 pixels, for its machine code."""
    rows = 20
    table = step_table(
        x=np.ones((rows, 1)),
        m=np.tril(np.ones((rows, outputs))),
        noise=np.ones(rows),
        timestep=np.ones(rows),
        input_scale=np.ones(rows),
        guidance_scale=np.full(rows, 5.0),
        forecast=[(1.0,) * forecasts if row >= forecasts else () for row in range(rows)],
        keep=[row < forecasts for row in range(rows)],
    )
    first = torch.empty(2, 4, 128, 128, device="meta")
    state = begin(table, first, torch.empty(table.draws, *first.shape, device="meta"), dtype)
    return _prepare(state, torch.empty_like(state.network_input), architecture)


CASES = {
    "denoise-step-fp16": Case(lambda architecture: _launch(architecture, torch.float16, outputs=1, forecasts=0)),
    "denoise-step-bf16-multistep": Case(lambda architecture: _launch(architecture, torch.bfloat16, 3, 0)),
    "denoise-step-fp16-forecast": Case(lambda architecture: _launch(architecture, torch.float16, 2, 2)),
}

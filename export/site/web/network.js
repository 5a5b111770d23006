// The network calls of one run for one picture: segments over named tensors, slots between calls, gated rows.

import { GateState } from "./gate.js";
import { PARTS, latentInput, output } from "./program.js";
import { concat, half, map2, tensor } from "./tensor.js";

/** Runs looked-up rows. Rows of a span run one after the other: a span only says that they could run as one batch. */
export class Network {
  /**
   * @param plan the content of step_plan.json.
   * @param rows from `lookUp`.
   * @param functions segment -> async (named tensors) -> named tensors.
   * @param conditions conditioning tensors by kind: `conditional`, and `unconditional` and `both` where rows are guided.
   * @param timestep {rank, type}: 1 feeds (batch,), 0 a scalar; the array class.
   */
  constructor(plan, rows, functions, conditions, timestep) {
    this.plan = plan;
    this.rows = rows;
    this.functions = functions;
    this.conditions = conditions;
    this.timestep = timestep;
    this.latentInput = latentInput(plan);
    this.output = output(plan);
    this.gate = plan.gate ? new GateState(plan.gate) : null;
    this.resized();
  }

  /** The latent has another shape from here on: what was kept cannot be read. */
  resized() {
    this.slots = new Map(Object.keys(this.plan.slots).map((name) => [name, []]));
    this.gate?.resized();
  }

  /** Run row `at` on a latent (1, channels, h, w): its output of the conditional half, the unconditional one first. */
  async call(at, latent) {
    const row = this.rows[at];
    const scale = Math.fround(row.step.input_scale);
    const scaled = tensor(latent.data.map((value) => value * scale), latent.shape);
    const parts = PARTS[row.halves].map((kind) => ({ kind, tensors: this.given(row, kind, scaled) }));
    if (row.step.gated) {
      await this.gated(row, parts);
    } else {
      for (const { kind, tensors } of parts) {
        await this.through(row, row.calls, row.late, tensors, kind);
      }
      this.keep(row.writes, parts);
      this.observe(row, parts);
    }
    return this.halves(parts, this.output);
  }

  /** What segments take from outside. */
  given(row, kind, scaled) {
    const size = kind === "both" ? 2 : 1;
    const { rank, type } = this.timestep;
    const time = type === BigInt64Array ? BigInt(Math.trunc(row.step.t)) : row.step.t;
    return {
      ...this.conditions[kind],
      [this.latentInput]: size === 2 ? concat([scaled, scaled], 0) : scaled,
      timestep: rank ? tensor(new type(size).fill(time), [size]) : tensor(type.of(time), []),
    };
  }

  /** Run segments; `tensors` gains what is read and computed. */
  async through(row, calls, late, tensors, kind) {
    for (const call of calls) {
      for (const read of call.reads) {
        tensors[read.tensor] = this.forecast(row, read, tensors, kind);
      }
      const inputs = Object.fromEntries(call.inputs.map((name) => [name, tensors[name]]));
      const computed = await this.functions[call.name](inputs);
      for (const name of call.outputs) {
        tensors[name] = computed[name];
      }
    }
    for (const read of late) {
      tensors[read.tensor] = this.forecast(row, read, tensors, kind);
    }
  }

  /** sum_i alphas[i] * value[i] (+ base) of the guidance halves that run. */
  forecast(row, read, tensors, kind) {
    const kept = this.slots.get(read.slot);
    if (kept.length < read.alphas.length) {
      throw new Error(`the plan reads ${read.alphas.length} values of slot ${read.slot}, which holds ${kept.length}`);
    }
    const values = read.alphas.map((_, at) => view(kept[at], row, kind, read.mean));
    let total = values[0];
    if (values.length > 1 || read.alphas[0] !== 1) {
      const data = total.data.map((value) => value * read.alphas[0]);
      values.slice(1).forEach((value, older) => {
        const alpha = read.alphas[older + 1];
        for (let at = 0; at < data.length; at += 1) {
          data[at] += Math.fround(value.data[at] * alpha);
        }
      });
      total = tensor(data, total.shape);
    }
    return read.base ? map2(tensors[read.base], total, (base, value) => base + value) : total;
  }

  /** Keep what a row writes, the newest first. */
  keep(writes, parts) {
    for (const each of writes) {
      const { history } = this.plan.slots[each.slot];
      this.slots.set(each.slot, [kept(each, parts), ...this.slots.get(each.slot)].slice(0, history));
    }
  }

  /** Run a row as far as the gate watches, and the rest of it as the gate decides. */
  async gated(row, parts) {
    for (const { kind, tensors } of parts) {
      await this.through(row, row.calls.slice(0, row.watched), [], tensors, kind);
    }
    const full = this.gate.judge(this.halves(parts, this.plan.gate.tensor));
    const calls = full ? row.full : row.calls;
    for (const { kind, tensors } of parts) {
      await this.through(row, calls.slice(row.watched), full ? [] : row.late, tensors, kind);
    }
    for (const each of full ? row.fills : []) {
      const [newest, ...older] = this.slots.get(each.slot);
      const value = kept(each, parts);
      const both = newest.shape[0] === 2 && value.shape[0] === 1;
      this.slots.set(each.slot, [both ? concat([value, value], 0) : value, ...older]);
    }
  }

  /** Tell the gate of a row that it did not decide. */
  observe(row, parts) {
    const watched = this.gate && row.watched ? this.halves(parts, this.plan.gate.tensor) : null;
    if (row.isFull && watched) {
      this.gate.ranFull(watched);
    } else {
      this.gate?.ranCached(watched);
    }
  }

  halves(parts, name) {
    const values = parts.map(({ tensors }) => tensors[name]);
    return parts[0].kind === "both" ? [half(values[0], 0), half(values[0], 1)] : values;
  }
}

/** The value that a slot keeps: a tensor, less its base, of all halves that ran. */
function kept(write, parts) {
  const values = parts.map(({ tensors }) =>
    write.base ? map2(tensors[write.tensor], tensors[write.base], (value, base) => value - base) : tensors[write.tensor],
  );
  return values.length > 1 ? concat(values, 0) : values[0];
}

/** Of a kept value the guidance halves that run; both may be kept where one does. */
function view(value, row, kind, mean) {
  if (kind === "both" || value.shape[0] === 1) {
    return value;
  }
  if (mean && row.halves === "conditional") {
    return map2(half(value, 0), half(value, 1), (first, second) => Math.fround(first + second) * 0.5);
  }
  return half(value, kind === "unconditional" ? 0 : 1);
}

// A step plan with its names looked up: what each row reads and writes, and which guidance halves it runs.

const GUIDED = { none: "conditional", cfg: "both", cfg_sequential: "sequential" };
const SCHEMA_VERSION = 1;

/** What a row runs one after the other, by how it batches its guidance halves. */
export const PARTS = { conditional: ["conditional"], both: ["both"], sequential: ["unconditional", "conditional"] };

/** The rows of a plan (the content of step_plan.json), ready to run. */
export function lookUp(plan) {
  if (plan.schema_version !== SCHEMA_VERSION) {
    throw new Error(`the step plan has schema version ${plan.schema_version}, this reads ${SCHEMA_VERSION}`);
  }
  const sources = origins(plan);
  const halves = batching(plan, sources);
  const full = plan.paths[fullPath(plan)];
  return plan.steps.map((step, at) => {
    const reads = Object.entries(step.read).map(([name, alphas]) => ({
      slot: name,
      tensor: plan.slots[name].tensor,
      base: plan.slots[name].base,
      mean: plan.slots[name].halves === "mean",
      alphas: alphas.map(Math.fround),
    }));
    const skipped = takesOutput(plan, step);
    const calls = segmentCalls(plan, skipped ? [] : plan.paths[step.path], reads);
    return {
      step,
      halves: halves[at],
      calls,
      late: reads.filter((read) => !calls.some((call) => call.reads.includes(read))),
      writes: step.write.map((name) => write(plan, name)),
      full: segmentCalls(plan, full, []),
      fills: fillable(plan).filter((name) => name in sources[at].newest).map((name) => write(plan, name)),
      rise: rises(plan, at),
      watched: watched(plan, at),
      isFull: isFull(plan, at),
    };
  });
}

/** The tensor that is the latent: `sample` where a segment takes it. */
export function latentInput(plan) {
  return Object.values(plan.segments).some((segment) => segment.inputs.includes("sample")) ? "sample" : "hidden_states";
}

/** The name of the network output: the last output of the last segment of every path. */
export function output(plan) {
  return plan.segments[Object.values(plan.paths)[0].at(-1)].outputs.at(-1);
}

/** How many latents and how many network outputs updates look back to, the current one included. */
export function history(plan) {
  const longest = (key) => 1 + Math.max(0, ...plan.steps.flatMap((step) => Object.keys(step[key]).map(Number)));
  return [longest("x"), longest("m")];
}

function fullPath(plan) {
  return "full" in plan.paths ? "full" : Object.keys(plan.paths)[0];
}

function takesOutput(plan, step) {
  return Object.keys(step.read).some((name) => plan.slots[name].kind === "output");
}

function rises(plan, at) {
  return at > 0 && plan.steps[at].level > plan.steps[at - 1].level;
}

function write(plan, name) {
  return { slot: name, tensor: plan.slots[name].tensor, base: plan.slots[name].base };
}

/** The segments of a path; a read is done before the first segment that waits for it. */
function segmentCalls(plan, path, reads) {
  let waiting = reads;
  return path.map((name) => {
    const segment = plan.segments[name];
    const now = waiting.filter((read) => segment.inputs.includes(read.tensor));
    waiting = waiting.filter((read) => !now.includes(read));
    return { name, inputs: segment.inputs, outputs: segment.outputs, reads: now };
  });
}

/** The slots whose tensor the full path computes, from a base that it knows. */
function fillable(plan) {
  const produced = new Set(Object.values(plan.segments).flatMap((segment) => segment.outputs));
  const computed = new Set(plan.paths[fullPath(plan)].flatMap((name) => plan.segments[name].outputs));
  return Object.entries(plan.slots)
    .filter(([, slot]) => computed.has(slot.tensor) && (computed.has(slot.base) || !produced.has(slot.base)))
    .map(([name]) => name);
}

/** For each row the rows that wrote what it reads, and slot -> the row of its newest value since the level rose. */
function origins(plan) {
  let writers = {};
  return plan.steps.map((step, at) => {
    if (!at || rises(plan, at)) {
      writers = Object.fromEntries(Object.keys(plan.slots).map((name) => [name, []]));
    }
    const reads = Object.entries(step.read).flatMap(([name, alphas]) => writers[name].slice(0, alphas.length));
    const newest = Object.fromEntries(Object.entries(writers).filter(([, rows]) => rows.length).map(([name, rows]) => [name, rows[0]]));
    for (const name of step.write) {
      writers[name] = [at, ...writers[name]].slice(0, plan.slots[name].history);
    }
    return { reads, newest };
  });
}

function isFull(plan, at) {
  const step = plan.steps[at];
  const same = plan.paths[step.path].join() === plan.paths[fullPath(plan)].join();
  return !step.gated && !Object.keys(step.read).length && same;
}

/** How many segments of a row's path it takes to compute the tensor that the gate watches; 0 where they do not. */
function watched(plan, at) {
  const step = plan.steps[at];
  if (!plan.gate || takesOutput(plan, step)) {
    return 0;
  }
  const path = plan.paths[step.path];
  const count = 1 + path.findIndex((name) => plan.segments[name].outputs.includes(plan.gate.tensor));
  const taken = new Set(path.slice(0, count).flatMap((name) => plan.segments[name].inputs));
  const late = Object.keys(step.read).some((name) => taken.has(plan.slots[name].tensor));
  const shared = plan.paths[fullPath(plan)].slice(0, count).join() === path.slice(0, count).join();
  return late || !shared ? 0 : count;
}

/** What each row runs: both halves where it is guided, or where such a row draws on what it leaves behind. */
function batching(plan, sources) {
  const found = plan.steps.map((step) => GUIDED[step.guidance]);
  let full = 0;
  const drawn = plan.steps.map((step, row) => {
    const rows = new Set(sources[row].reads);
    if (step.gated) {
      rows.add(full);
      for (let at = full; at < row; at += 1) {
        if (watched(plan, at)) {
          rows.add(at);
        }
      }
      Object.values(sources[row].newest).forEach((at) => rows.add(at));
    }
    if (rows.size) {
      for (let at = Math.min(...rows); at < row; at += 1) {
        if (plan.steps[at].gated) {
          rows.add(at);
        }
      }
    }
    if (isFull(plan, row)) {
      full = row;
    }
    return rows;
  });
  for (let row = found.length - 1; row >= 0; row -= 1) {
    for (const at of found[row] === "conditional" ? [] : drawn[row]) {
      if (found[at] === "conditional") {
        found[at] = found[row];
      }
    }
  }
  return found;
}

// The denoising loop: the linear updates of a step plan around its network calls, summed in float64, kept in float32.

import { Network } from "./network.js";
import { INITIAL, RISE, noise } from "./noise.js";
import { history, lookUp } from "./program.js";
import { count, map2, tensor } from "./tensor.js";

/** Classifier-free guidance: one network output from those of the guidance halves. */
function guide(halves, step) {
  if (step.guidance === "none") {
    return halves.at(-1);
  }
  const scale = Math.fround(step.guidance_scale);
  return map2(halves[0], halves[1], (uncond, cond) => Math.fround(Math.fround(cond - uncond) * scale) + uncond);
}

/** The latent after a row. */
function updated(step, latents, outputs, first, fresh) {
  const terms = [
    ...Object.entries(step.x).map(([lag, coefficient]) => [latents[lag], coefficient]),
    ...Object.entries(step.m).map(([lag, coefficient]) => [outputs[lag], coefficient]),
    ...(fresh ? [[fresh, step.noise]] : []),
    ...(step.initial ? [[first, step.initial]] : []),
  ];
  const total = new Float64Array(first.data.length);
  for (const [{ data }, coefficient] of terms) {
    for (let at = 0; at < total.length; at += 1) {
      total[at] += data[at] * coefficient;
    }
  }
  return tensor(Float32Array.from(total), first.shape);
}

/** Bilinear resampling, pixel centres at half-integers, as two matrices in float64. */
export function resample(latent, [height, width]) {
  const [, channels, oldHeight, oldWidth] = latent.shape;
  const rows = weights(oldHeight, height);
  const columns = weights(oldWidth, width);
  const data = new Float32Array(channels * height * width);
  for (let at = 0; at < data.length; at += 1) {
    const row = rows[Math.floor(at / width) % height];
    const column = columns[at % width];
    const plane = Math.floor(at / (height * width)) * oldHeight * oldWidth;
    let sum = 0;
    for (const [x, across] of column) {
      let down = 0;
      for (const [y, weight] of row) {
        down += weight * latent.data[plane + y * oldWidth + x];
      }
      sum += down * across;
    }
    data[at] = sum;
  }
  return tensor(data, [1, channels, height, width]);
}

function weights(old, size) {
  return Array.from({ length: size }, (_, at) => {
    const centre = Math.min(Math.max(((at + 0.5) * old) / size - 0.5, 0), old - 1);
    const below = Math.floor(centre);
    return [[below, 1 - (centre - below)], [Math.min(below + 1, old - 1), centre - below]];
  });
}

/** What the network takes the clean latent to be, from a row's latent and its guided output. */
export function cleanEstimate(prediction, step, latent, result) {
  const { signal, sigma } = step;
  const norm = Math.hypot(signal, sigma);
  const kinds = {
    epsilon: (x, m) => (x - sigma * m) / signal,
    v_prediction: (x, m) => (signal * x) / norm ** 2 - (sigma * m) / norm,
    flow: (x, m) => x - sigma * m,
    sample: (_, m) => m,
  };
  return prediction in kinds && signal > 0 ? map2(latent, result, kinds[prediction]) : latent;
}

/**
 * Run all rows for one picture.
 * @param plan the content of step_plan.json.
 * @param functions segment -> async (named tensors) -> named tensors.
 * @param conditions see `Network`.
 * @param options {seed, shape: (1, channels, h, w) of the last latent, timestep, onStep, draw}; `onStep` is awaited after
 *   each row with {row, rows, latent, estimate, milliseconds} and may throw to stop; `draw(number, shape)` replaces the
 *   noise of the seed.
 * @returns the last latent.
 */
export async function sample(plan, functions, conditions, { seed, shape, timestep, onStep, draw }) {
  const rows = lookUp(plan);
  const drawn = draw ?? ((number, size) => tensor(noise(seed, number, count(size)), size));
  const network = new Network(plan, rows, functions, conditions, timestep);
  const [longestX, longestM] = history(plan);
  const sized = (level) => [1, shape[1], rounded(shape[2] * level), rounded(shape[3] * level)];
  const sigma = Math.fround(plan.init_noise_sigma);
  const start = drawn(INITIAL, sized(plan.steps[0].level));
  let first = map2(start, start, (value) => sigma * value);
  let latents = [first];
  let outputs = [];
  for (const [at, row] of rows.entries()) {
    const { step } = row;
    if (row.rise) {
      first = risen(latents[0], step, at, sized(step.level), drawn);
      [latents, outputs] = [[first], []];
      network.resized();
    }
    const began = performance.now();
    const halves = await network.call(at, latents[0]);
    const milliseconds = performance.now() - began;
    outputs = [guide(halves, step), ...outputs].slice(0, longestM);
    const fresh = step.noise ? drawn(at + 1, first.shape) : null;
    const before = latents[0];
    latents = [updated(step, latents, outputs, first, fresh), ...latents].slice(0, longestX);
    await onStep?.({
      row: at,
      rows: rows.length,
      latent: latents[0],
      estimate: () => cleanEstimate(plan.prediction, step, before, outputs[0]),
      milliseconds,
    });
  }
  return latents[0];
}

/** Half to even, as Python rounds. */
function rounded(value) {
  const near = Math.round(value);
  return near - value === 0.5 && near % 2 ? near - 1 : near;
}

/** The latent of a row whose level is larger: the estimate that the row before hands over, resampled and noised. */
function risen(clean, step, row, shape, drawn) {
  const larger = resample(clean, shape.slice(2));
  const [signal, sigma] = [Math.fround(step.signal), Math.fround(step.sigma)];
  return map2(larger, drawn(RISE + row, shape), (value, fresh) => Math.fround(signal * value) + Math.fround(sigma * fresh));
}

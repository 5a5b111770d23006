// What tests of the page's modules run: toy denoisers and toy text encoders, the same as those in Python beside them.

import { encode, ofSize } from "./conditioning.js";
import { sample } from "./loop.js";

const round = Math.fround;
const squashed = (value) => round(value / round(1 + Math.abs(value)));

/** A segment that computes `output`, shaped `like` one of its inputs, element by element. */
function segment(output, like, f) {
  return async (given) => {
    const { data, shape } = given[like];
    const each = data.length / shape[0];
    const value = (name, at) => given[name].data[given[name].data.length === data.length ? at : Math.floor(at / each)];
    return { [output]: { data: data.map((_, at) => f((name) => value(name, at))), shape } };
  };
}

/** The last latents of plans over toy segments. */
export async function loops({ plans, cond, uncond, seed, shape }) {
  const size = shape.reduce((product, side) => product * side);
  const embed = async ({ label, timestep }) => {
    const value = (batch) => squashed(round(round(timestep.data[batch] / 3) + label.data[batch]));
    const data = Float32Array.from({ length: size * label.data.length }, (_, at) => value(Math.floor(at / size)));
    return { emb: { data, shape: [label.data.length, ...shape] } };
  };
  const warped = (v) => round(v("sample") * round(1 + round(v("timestep") / 7)));
  const functions = {
    entry: segment("skip", "sample", (v) => squashed(round(warped(v) + v("label")))),
    deep: segment("up", "skip", (v) => squashed(round(round(3 * v("skip")) - v("label")))),
    exit: segment("out", "up", (v) => round(round(v("up") * 1.25) - round(v("skip") * 0.5))),
    encoder: segment("mid", "sample", (v) => squashed(round(round(2 * v("sample")) + v("label")))),
    embed,
    decoder: segment("out", "mid", (v) => round(v("mid") * round(v("emb") + 0.5))),
  };
  const label = (values) => ({ label: { data: Float32Array.from(values), shape: [values.length, 1, 1, 1] } });
  const conditions = { conditional: label(cond), unconditional: label(uncond), both: label([...uncond, ...cond]) };
  const timestep = { rank: 1, type: Float32Array };
  const found = [];
  for (const plan of plans) {
    const latent = await sample(plan, functions, conditions, { seed, shape: [1, ...shape], timestep });
    found.push(Array.from(latent.data));
  }
  return found;
}

const plain = (tensors) =>
  Object.fromEntries(Object.entries(tensors).map(([name, { data, shape }]) => [name, [Array.from(data, Number), shape]]));

/** The conditioning tensors of prompts, from text encoders that tell apart everything they are given. */
export async function conditioned({ spec, prompts }) {
  const letters = {
    encode(prompt, length) {
      const ids = Array.from(prompt, (letter) => letter.codePointAt(0)).slice(0, length);
      const rest = Array(length - ids.length).fill(0);
      return { ids: [...ids, ...rest], mask: [...ids.map(() => 1), ...rest] };
    },
  };
  const spread = (ids, width, factor) =>
    Float32Array.from({ length: ids.length * width }, (_, at) => ids[Math.floor(at / width)] * ((at % width) + factor));
  const states = (ids, width, factor) => ({ data: spread(ids, width, factor), shape: [1, ids.length, width] });
  const pool = ([first], width, factor) => ({ data: spread([first], width, factor), shape: [1, width] });
  const ids = ({ input_ids: { data } }) => Array.from(data, Number);
  const marked = (given) => ids(given).map((id, at) => id + 2 * Number(given.attention_mask.data[at]));
  const functions = {
    one: async (given) => ({ states: states(ids(given), 3, 0.5), pool: pool(ids(given), 2, 1) }),
    two: async (given) => ({ states: states(ids(given), 4, 2.5), pool: pool(ids(given), 3, 4) }),
    long: async (given) => ({ last_hidden_state: states(marked(given), 9, 0.25) }),
    plain: async (given) => ({ last_hidden_state: states(ids(given), 6, 0.75) }),
  };
  const found = [];
  for (const prompt of prompts) {
    found.push(plain(await encode(spec, { short: letters, long: letters }, functions, prompt)));
  }
  return found;
}

/** The conditioning tensors that follow from a size. */
export function sized({ spec, height, width }) {
  return plain(ofSize(spec, height, width));
}

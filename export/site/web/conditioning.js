// Prompts to the conditioning tensors of a denoiser, one prompt at a time, by the kinds that an engine's manifest names.

import { concat, padLast, tensor, zeros } from "./tensor.js";

const UNCONDITIONAL = "";

function tokens(entry, tokenizers, prompt) {
  const { ids, mask } = tokenizers[entry.tokenizer].encode(prompt, entry.max_length);
  const whole = (values) => tensor(BigInt64Array.from(values, BigInt), [1, entry.max_length]);
  return { ids: whole(ids), mask: whole(mask), ones: whole(mask.map(() => 1)) };
}

async function stableDiffusion(spec, tokenizers, functions, prompt) {
  const [entry] = spec.encoders;
  const { ids } = tokens(entry, tokenizers, prompt);
  const { last_hidden_state: states } = await functions[entry.part]({ input_ids: ids });
  return { encoder_hidden_states: states };
}

/** CLIP states side by side, and the pooled embedding of the second (Podell et al. 2023, arXiv 2307.01952). */
async function stableDiffusionXl(spec, tokenizers, functions, prompt) {
  const outputs = [];
  for (const entry of spec.encoders) {
    outputs.push(await functions[entry.part]({ input_ids: tokens(entry, tokenizers, prompt).ids }));
  }
  const states = spec.encoders.map((entry, at) => outputs[at][entry.hidden]);
  return { encoder_hidden_states: concat(states, -1), text_embeds: outputs.at(-1)[spec.encoders.at(-1).pooled] };
}

/** CLIP states side by side, padded to the width of T5, T5 states after them (Esser et al. 2024, arXiv 2403.03206). */
async function stableDiffusion3(spec, tokenizers, functions, prompt) {
  const states = [];
  const pooled = [];
  let long = zeros([1, spec.max_sequence_length, spec.joint_attention_dim]);
  for (const entry of spec.encoders) {
    const { ids, ones } = tokens(entry, tokenizers, prompt);
    if (entry.pooled) {
      const outputs = await functions[entry.part]({ input_ids: ids });
      states.push(outputs[entry.hidden]);
      pooled.push(outputs[entry.pooled]);
    } else {
      long = (await functions[entry.part]({ input_ids: ids, attention_mask: ones })).last_hidden_state;
    }
  }
  const short = padLast(concat(states, -1), spec.joint_attention_dim);
  return { encoder_hidden_states: concat([short, long], 1), pooled_projections: concat(pooled, -1) };
}

async function flux(spec, tokenizers, functions, prompt) {
  const [clip, t5] = spec.encoders;
  const outputs = await functions[clip.part]({ input_ids: tokens(clip, tokenizers, prompt).ids });
  const { ids, ones } = tokens(t5, tokenizers, prompt);
  const { last_hidden_state: states } = await functions[t5.part]({ input_ids: ids, attention_mask: ones });
  const made = { encoder_hidden_states: states, pooled_projections: outputs[clip.pooled] };
  return "guidance" in spec ? { ...made, guidance: tensor(Float32Array.of(spec.guidance), [1]) } : made;
}

/** Prompts in lower case, as the pipeline does without caption cleaning. */
async function pixart(spec, tokenizers, functions, prompt) {
  const [entry] = spec.encoders;
  const { ids, mask } = tokens(entry, tokenizers, prompt.toLowerCase().trim());
  const { last_hidden_state: states } = await functions[entry.part]({ input_ids: ids, attention_mask: mask });
  return { encoder_hidden_states: states, encoder_attention_mask: tensor(Float32Array.from(mask.data, Number), mask.shape) };
}

async function classLabel(spec, _tokenizers, _functions, prompt) {
  const name = prompt.trim();
  const labels = spec.labels ?? {};
  let label = spec.classes;
  if (Object.hasOwn(labels, name)) {
    label = labels[name];
  } else if (/^\d+$/.test(name) && Number(name) < spec.classes) {
    label = Number(name);
  } else if (name !== UNCONDITIONAL) {
    throw new Error(`there is no class "${name}"; classes are 0 to ${spec.classes - 1} and the labels of the model`);
  }
  return { class_labels: tensor(BigInt64Array.of(BigInt(label)), [1]) };
}

const KINDS = {
  "stable-diffusion": stableDiffusion,
  "stable-diffusion-xl": stableDiffusionXl,
  "stable-diffusion-3": stableDiffusion3,
  flux,
  pixart,
  class: classLabel,
};

/** The conditioning tensors of one prompt; null is no prompt. */
export async function encode(spec, tokenizers, functions, prompt) {
  const made = await KINDS[spec.kind](spec, tokenizers, functions, prompt ?? UNCONDITIONAL);
  if (prompt !== null || !spec.unconditional_zeros) {
    return made;
  }
  return Object.fromEntries(Object.entries(made).map(([name, value]) => [name, zeros(value.shape)]));
}

/** The conditioning tensors that follow from the size of the picture in pixels: that size, and no control. */
export function ofSize(spec, height, width) {
  const made = {};
  if (spec.kind === "stable-diffusion-xl") {
    made.time_ids = tensor(Float32Array.of(height, width, 0, 0, height, width), [1, 6]);
  }
  for (const [name, [channels, side]] of Object.entries(spec.residuals ?? {})) {
    made[name] = zeros([1, channels, Math.floor(height / side), Math.floor(width / side)]);
  }
  return made;
}

// The worker: opens an engine, and generates pictures away from the page, one at a time.

import { encode, ofSize } from "./conditioning.js";
import { Files } from "./files.js";
import { sample } from "./loop.js";
import { toPicture, unscaled } from "./picture.js";
import { Graph, binary, devices, graphFiles, openRuntime } from "./sessions.js";
import { concat } from "./tensor.js";
import { Tokenizer } from "./tokenizer.js";

const TARGET = "web";
const PLAN = "step_plan.json";
const UNUSED = "vae_encoder";
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

/** What is open: files, plan, tokenizers, graphs. */
let opened = null;
/** Calls that the page has asked to stop. */
const stopped = new Set();

/** Let messages in. */
const breathe = () =>
  new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => resolve(port1.close());
    port2.postMessage(null);
  });

async function open({ url, device: asked }, tell) {
  const began = performance.now();
  const files = await Files.open(url);
  const { manifest } = files;
  const target = manifest.targets[TARGET];
  if (!target) {
    throw new Error(`this engine was not built for the target ${TARGET}, but for ${Object.keys(manifest.targets).join(", ")}`);
  }
  const present = await devices(files);
  const device = asked === "auto" ? present[0] : asked;
  if (!present.includes(device)) {
    throw new Error(`this browser offers no ${device}; it has ${present.join(", ")}`);
  }
  const graphs = Object.entries(target.graphs).filter(([name]) => name !== UNUSED);
  const tokenizerFiles = Object.entries(manifest.tokenizers).map(([name, folder]) => [name, `${folder}/tokenizer.json`]);
  const wanted = new Set([PLAN, binary(device), ...tokenizerFiles.map(([, path]) => path), ...graphs.flatMap(([, path]) => graphFiles(files, path))]);
  const total = [...wanted].reduce((sum, path) => sum + files.size(path), 0);
  let done = 0;
  files.onBytes = (count) => {
    done = Math.min(total, done + count);
    tell({ done, total });
  };
  const plan = await files.json(PLAN);
  const runtime = await openRuntime(files, device);
  const tokenizers = {};
  for (const [name, path] of tokenizerFiles) {
    tokenizers[name] = new Tokenizer(await files.json(path));
  }
  const functions = {};
  let timestep = null;
  for (const [name, path] of graphs) {
    const graph = await Graph.open(runtime, files, path);
    functions[name] = (tensors) => graph.run(tensors);
    if (name in plan.segments && "timestep" in graph.inputs) {
      const { type, shape } = graph.inputs.timestep;
      timestep = { rank: shape.length, type: ARRAYS[type] };
    }
  }
  await files.tidy();
  opened = { manifest, plan, tokenizers, functions, timestep };
  return {
    manifest,
    plan,
    device,
    devices: present,
    threads: runtime.threads,
    fetched: files.fetched,
    reused: files.reused,
    notKept: files.notKept,
    milliseconds: performance.now() - began,
  };
}

/** The tensors that the denoiser takes for one prompt. */
async function conditioned(prompt, height, width) {
  const { manifest, plan, tokenizers, functions } = opened;
  const spec = manifest.conditioning;
  const made = { ...(await encode(spec, tokenizers, functions, prompt)), ...ofSize(spec, height, width) };
  const taken = new Set(Object.values(plan.segments).flatMap((segment) => segment.inputs));
  return Object.fromEntries(Object.entries(made).filter(([name]) => taken.has(name)));
}

async function decode(latent) {
  const { manifest, functions } = opened;
  return toPicture((await functions.vae_decoder({ latent_sample: unscaled(latent, manifest.latent) })).sample);
}

async function generate({ prompt, negativePrompt, seed, height, width, previews }, tell, halted) {
  const { manifest, plan, functions, timestep } = opened;
  const { channels, downscale } = manifest.latent;
  const began = performance.now();
  const conditional = await conditioned(prompt, height, width);
  const conditions = { conditional };
  if (plan.steps.some((step) => step.guidance !== "none")) {
    const unconditional = await conditioned(negativePrompt, height, width);
    const names = Object.keys(conditional);
    const both = names.map((name) => [name, concat([unconditional[name], conditional[name]], 0)]);
    Object.assign(conditions, { unconditional, both: Object.fromEntries(both) });
  }
  const encoded = performance.now() - began;
  const steps = [];
  let watched = 0;
  const onStep = async ({ row, rows, estimate, milliseconds }) => {
    steps.push(milliseconds);
    const shown = performance.now();
    const preview = previews && row + 1 < rows ? await decode(estimate()) : null;
    watched += performance.now() - shown;
    tell({ step: row + 1, steps: rows, milliseconds, preview }, preview ? [preview.pixels.buffer] : []);
    await breathe();
    halted();
  };
  const shape = [1, channels, height / downscale, width / downscale];
  const latent = await sample(plan, functions, conditions, { seed, shape, timestep, onStep });
  const looped = performance.now() - began - encoded - watched;
  const picture = await decode(latent);
  const whole = performance.now() - began;
  const timing = { encode: encoded, loop: looped, steps, decode: whole - encoded - looped - watched, previews: watched, total: whole };
  return { ...picture, latent: latent.data, timing };
}

const METHODS = { open, generate };
/** Calls wait for each other. */
let queue = Promise.resolve();

self.onmessage = ({ data: { id, method, options } }) => {
  if (method === "stop") {
    stopped.add(id);
    return;
  }
  const tell = (progress, transfer = []) => self.postMessage({ id, progress }, transfer);
  const halted = () => {
    if (stopped.has(id)) {
      throw new DOMException("the picture was cancelled", "AbortError");
    }
  };
  queue = queue.then(async () => {
    try {
      halted();
      self.postMessage({ id, result: await METHODS[method](options, tell, halted) });
    } catch (error) {
      self.postMessage({ id, error: { name: error?.name ?? "Error", message: error?.message ?? String(error) } });
    } finally {
      stopped.delete(id);
    }
  });
};

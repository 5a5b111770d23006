// Graphs of an engine on ONNX Runtime Web: WebAssembly with SIMD, or WebGPU.

import { tensor } from "./tensor.js";

export const FOLDER = "web/onnxruntime";
const POOL = "weights.bin";
const MODULES = { cpu: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"], gpu: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"] };
const PROVIDERS = { cpu: "wasm", gpu: "webgpu" };
const MOST_THREADS = 4;

/** The devices that this browser and this folder have, the one to prefer first. */
export async function devices(files) {
  const built = `${FOLDER}/${MODULES.gpu[0]}` in files.manifest.files;
  const adapter = built && "gpu" in navigator ? await navigator.gpu.requestAdapter() : null;
  return adapter ? ["gpu", "cpu"] : ["cpu"];
}

/** The runtime's own file to fetch for a device. */
export function binary(device) {
  return `${FOLDER}/${MODULES[device][1]}`;
}

/** ONNX Runtime for a device, from the folder of the page alone. */
export async function openRuntime(files, device) {
  const folder = new URL(`${FOLDER}/`, files.url);
  const ort = await import(new URL(MODULES[device][0], folder));
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = folder.href;
  ort.env.wasm.wasmBinary = (await files.bytes(binary(device))).buffer;
  // Threads need memory that workers share, which a browser gives only to isolated pages.
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MOST_THREADS) : 1;
  return { ort, device, threads: ort.env.wasm.numThreads };
}

/** The files of a graph: itself, and the weights beside it. */
export function graphFiles(files, path) {
  const pool = `${path.slice(0, path.lastIndexOf("/") + 1)}${POOL}`;
  return pool in files.manifest.files ? [path, pool] : [path];
}

/** One function of the engine. */
export class Graph {
  static async open(runtime, files, path) {
    const [graph, weights] = await Promise.all(graphFiles(files, path).map((name) => files.bytes(name)));
    const session = await runtime.ort.InferenceSession.create(graph, {
      executionProviders: [PROVIDERS[runtime.device]],
      graphOptimizationLevel: "all",
      logSeverityLevel: 3, // errors
      externalData: weights ? [{ path: POOL, data: weights }] : [],
      // This fusion turns products of 8-bit numbers with a float bias into what no integer kernel computes.
      extra: { optimization: { disable_specified_optimizers: "MatMulAddFusion" } },
    });
    return new Graph(runtime.ort, session);
  }

  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
  }

  /** Name -> {type, shape} of what the graph takes. */
  get inputs() {
    return Object.fromEntries(this.session.inputMetadata.map(({ name, type, shape }) => [name, { type, shape }]));
  }

  /** Named tensors in, named tensors out. */
  async run(given) {
    const feeds = {};
    for (const [name, { type }] of Object.entries(this.inputs)) {
      feeds[name] = new this.ort.Tensor(type, given[name].data, given[name].shape);
    }
    const computed = await this.session.run(feeds);
    const found = {};
    for (const [name, value] of Object.entries(computed)) {
      found[name] = tensor(await value.getData(), [...value.dims]);
    }
    return found;
  }
}

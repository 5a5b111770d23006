// The engine as a module: open a folder, generate pictures; the work is done in a worker.
//
//   import { Engine } from "./web/engine.js";
//   const engine = await Engine.open();
//   const picture = await engine.generate("a red circle", { seed: 7, onStep: ({ step, steps }) => ... });
//   context.putImageData(new ImageData(picture.pixels, picture.width, picture.height), 0, 0);

/** An opened engine; see `Engine.open`. */
export class Engine {
  /**
   * Open an engine folder.
   * @param {object} [options]
   * @param {string|URL} [options.url] of the folder, ending in a slash; that of this module's engine by default.
   * @param {"auto"|"gpu"|"cpu"} [options.device] `auto` takes WebGPU where there is one.
   * @param {(progress: {done: number, total: number}) => void} [options.onProgress] bytes so far, and of all.
   */
  static async open({ url = new URL("../", import.meta.url), device = "auto", onProgress } = {}) {
    const engine = new Engine();
    try {
      Object.assign(engine, await engine.#call("open", { url: String(url), device }, { onProgress }));
    } catch (error) {
      engine.close();
      throw error;
    }
    return engine;
  }

  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #calls = new Map();
  #next = 0;
  #failed = null;

  constructor() {
    this.#worker.onmessage = ({ data: { id, progress, result, error } }) => {
      const call = this.#calls.get(id);
      if (!call) {
        return;
      }
      if (progress) {
        call.onProgress?.(progress);
        return;
      }
      this.#calls.delete(id);
      if (error) {
        call.reject(error.name === "AbortError" ? new DOMException(error.message, error.name) : new Error(error.message));
      } else {
        call.resolve(result);
      }
    };
    this.#worker.onerror = (event) => this.#fail(new Error(event.message || "the worker could not be started"));
  }

  /** Whether rows are guided, so that a negative prompt has a meaning. */
  get guided() {
    return this.plan.steps.some((step) => step.guidance !== "none");
  }

  /**
   * Generate one picture. Equal arguments give equal pictures.
   * @param {string} prompt or the name or number of a class, where the model knows classes.
   * @param {object} [options]
   * @param {bigint|number|string} [options.seed] a whole number from 0 to 2^64 - 1; 0 by default.
   * @param {string|null} [options.negativePrompt] what guidance leads away from; null is no prompt.
   * @param {number} [options.height] in pixels; what the engine was built for by default.
   * @param {number} [options.width] likewise.
   * @param {boolean} [options.previews] whether each step is decoded to a preview, which takes time.
   * @param {(progress: {step: number, steps: number, milliseconds: number, preview: object|null}) => void} [options.onStep]
   * @param {AbortSignal} [options.signal] stops the picture after the step that runs.
   * @returns {Promise<{width: number, height: number, pixels: Uint8ClampedArray, latent: Float32Array, timing: object}>}
   *   RGBA pixels, the last latent (channels, h, w), and milliseconds.
   */
  async generate(prompt, { seed = 0, negativePrompt = null, height, width, previews = false, onStep, signal } = {}) {
    const options = { prompt: String(prompt), negativePrompt, seed: String(wholeSeed(seed)), previews };
    options.height = this.#side("height", height);
    options.width = this.#side("width", width);
    signal?.throwIfAborted();
    return this.#call("generate", options, { onProgress: onStep, signal });
  }

  /** Stop the worker; calls that have not ended fail. */
  close() {
    this.#worker.terminate();
    this.#fail(new Error("the engine was closed"));
  }

  #side(name, asked) {
    const [least, best, most] = this.manifest.shapes[name];
    const side = asked ?? best;
    const step = this.manifest.latent.downscale * this.manifest.latent.multiple;
    if (!Number.isInteger(side) || side < least || side > most || side % step) {
      const allowed = least === most ? `${best} pixels` : `a multiple of ${step} from ${least} to ${most} pixels`;
      throw new RangeError(`the ${name} of this engine is ${allowed}, not ${side}`);
    }
    return side;
  }

  #call(method, options, { onProgress, signal } = {}) {
    if (this.#failed) {
      return Promise.reject(this.#failed);
    }
    const id = this.#next;
    this.#next += 1;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject, onProgress });
      signal?.addEventListener("abort", () => this.#worker.postMessage({ id, method: "stop" }), { once: true });
      this.#worker.postMessage({ id, method, options });
    });
  }

  /** Calls that wait fail, and all later ones. */
  #fail(error) {
    this.#failed = error;
    for (const call of this.#calls.values()) {
      call.reject(error);
    }
    this.#calls.clear();
  }
}

function wholeSeed(seed) {
  const text = String(seed).trim();
  if (!/^\d{1,20}$/.test(text) || BigInt(text) >= 1n << 64n) {
    throw new RangeError(`a seed is a whole number from 0 to 18446744073709551615, not "${seed}"`);
  }
  return BigInt(text);
}

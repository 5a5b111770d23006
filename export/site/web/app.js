// The page: a form for one picture, its preview while it is made, its times, and what the engine says of itself.

import { Engine } from "./engine.js";

const MIB = 2 ** 20;
const part = (id) => document.getElementById(id);
const form = part("form");
const canvas = part("picture");

let engine = null;
let running = null;

function say(text) {
  part("status").textContent = text;
}

function complain(error) {
  part("error").textContent = error ? `${error.message}` : "";
  part("error").hidden = !error;
}

function milliseconds(value) {
  return value < 100 ? `${value.toFixed(1)} ms` : `${Math.round(value)} ms`;
}

function mebibytes(bytes) {
  return `${(bytes / MIB).toFixed(1)} MiB`;
}

function draw({ width, height, pixels }) {
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

/** Fill a list of terms; values are text, never markup. */
function describe(list, rows) {
  list.replaceChildren(
    ...rows.flatMap(([term, value]) => {
      const name = document.createElement("dt");
      const said = document.createElement("dd");
      name.textContent = term;
      said.textContent = value;
      return [name, said];
    }),
  );
}

function aboutRows() {
  const { manifest, plan } = engine;
  const recipe = manifest.provenance.recipe ?? {};
  const calls = (count) => `${count} network ${count === 1 ? "call" : "calls"}`;
  const formats = Object.entries(manifest.targets.web.formats).map(
    ([name, schemes]) => `${name}: ${Object.entries(schemes).map(([scheme, how]) => `${scheme} (${how})`).join(", ")}`,
  );
  const passes = (recipe.passes ?? []).flatMap((step) => Object.keys(step));
  const [, bestHeight] = manifest.shapes.height;
  const [, bestWidth] = manifest.shapes.width;
  return [
    ["Model", `${recipe.model ?? "unnamed"} (${manifest.family})`],
    ["Picture", `${bestWidth} x ${bestHeight} pixels`],
    ["Steps", `${calls(plan.steps.length)}, fixed when the engine was built`],
    ["Sampler", plan.key.scheduler ?? recipe.sampler?.scheduler ?? "the model's own"],
    ...(passes.length ? [["Changed by", passes.join(", ")]] : []),
    ["Number formats", formats.join("; ") || "float32"],
    ["Engine hash", manifest.engine_hash],
    ["Evidence", manifest.targets.web.evidence],
    ["Runs on", engine.device === "gpu" ? "WebGPU" : `the processor, WebAssembly with SIMD, ${engine.threads} ${engine.threads === 1 ? "thread" : "threads"}`],
    ["Runtime", `${manifest.targets.web.build.runtime} (${manifest.targets.web.build.licence})`],
    ["Loaded", `${mebibytes(engine.fetched)} fetched, ${mebibytes(engine.reused)} from this browser, in ${milliseconds(engine.milliseconds)}`],
    ["Kept for next time", engine.notKept ? `no: ${engine.notKept}` : "yes"],
  ];
}

/** Show only the fields that this engine has a use for. */
function fit() {
  const { manifest } = engine;
  part("negative-field").hidden = !engine.guided || manifest.conditioning.kind === "class";
  for (const name of ["height", "width"]) {
    const [least, best, most] = manifest.shapes[name];
    const input = form.elements[name];
    const step = manifest.latent.downscale * manifest.latent.multiple;
    Object.assign(input, { min: least, max: most, step, value: input.value || best });
    part(`${name}-field`).hidden = least === most;
    part("size-fields").hidden &&= least === most;
  }
  if (manifest.conditioning.kind === "class") {
    part("prompt-label").textContent = "Class, by name or number";
  }
  const golden = manifest.golden?.prompts[0];
  if (golden !== undefined && !form.elements.prompt.value) {
    form.elements.prompt.value = String(golden);
  }
  const device = form.elements.device;
  device.value = engine.device;
  for (const option of device.options) {
    option.disabled = !engine.devices.includes(option.value);
  }
  part("device-field").hidden = engine.devices.length < 2;
  canvas.width = manifest.shapes.width[1];
  canvas.height = manifest.shapes.height[1];
  part("generate").textContent = `Generate in ${engine.plan.steps.length} steps`;
}

async function open(device) {
  engine?.close();
  engine = null;
  part("generate").disabled = true;
  complain(null);
  say("Loading the engine");
  const bar = part("progress");
  try {
    engine = await Engine.open({
      device,
      onProgress: ({ done, total }) => {
        Object.assign(bar, { max: total, value: done });
        part("figures").textContent = `${mebibytes(done)} of ${mebibytes(total)}`;
      },
    });
  } catch (error) {
    complain(error);
    say("The engine could not be opened");
    return;
  }
  fit();
  describe(part("about"), aboutRows());
  part("figures").textContent = "";
  bar.value = 0;
  part("generate").disabled = false;
  say("Ready");
}

function times({ steps, encode, decode, previews, total }) {
  const mean = steps.reduce((sum, each) => sum + each, 0) / steps.length;
  return [
    ["Whole picture", milliseconds(total)],
    ["Each step", `${milliseconds(mean)} (${steps.length} steps)`],
    ["Prompt", milliseconds(encode)],
    ["Decoding", milliseconds(decode)],
    ...(previews ? [["Previews", milliseconds(previews)]] : []),
  ];
}

async function generate() {
  const { prompt, negative, seed, previews, height, width } = form.elements;
  const bar = part("progress");
  running = new AbortController();
  part("generate").disabled = true;
  part("cancel").disabled = false;
  part("save").hidden = true;
  complain(null);
  canvas.setAttribute("aria-busy", "true");
  say("Generating");
  try {
    const picture = await engine.generate(prompt.value, {
      seed: seed.value,
      negativePrompt: negative.value || null,
      height: Number(height.value),
      width: Number(width.value),
      previews: previews.checked,
      signal: running.signal,
      onStep: ({ step, steps, milliseconds: took, preview }) => {
        Object.assign(bar, { max: steps, value: step });
        part("figures").textContent = `step ${step} of ${steps}, ${milliseconds(took)}`;
        if (preview) {
          draw(preview);
        }
      },
    });
    draw(picture);
    canvas.setAttribute("aria-label", `Picture of: ${prompt.value}, seed ${seed.value}`);
    describe(part("times"), times(picture.timing));
    part("save").hidden = false;
    part("save").download = `seed-${seed.value}.png`;
    part("save").href = canvas.toDataURL("image/png");
    part("figures").textContent = "";
    say(`Done in ${milliseconds(picture.timing.total)}`);
  } catch (error) {
    if (error.name === "AbortError") {
      say("Cancelled");
    } else {
      complain(error);
      say("No picture was made");
    }
  }
  canvas.removeAttribute("aria-busy");
  part("cancel").disabled = true;
  part("generate").disabled = false;
  running = null;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (engine && !running) {
    generate();
  }
});
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
form.elements.device.addEventListener("change", () => open(form.elements.device.value));
part("cancel").addEventListener("click", () => running?.abort());
part("dice").addEventListener("click", () => {
  form.elements.seed.value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    running?.abort();
  }
});

open("auto");

// Latents as the VAE takes them, and its floats as pixels, rounded as Python's runtime rounds them.

import { tensor } from "./tensor.js";

/** What the VAE decodes: latent / scaling_factor + shift_factor. */
export function unscaled(latent, { scaling_factor: scaling, shift_factor: shift }) {
  const [factor, offset] = [Math.fround(scaling), Math.fround(shift)];
  return tensor(latent.data.map((value) => Math.fround(value / factor) + offset), latent.shape);
}

/** Floats (1, 3, height, width) in [-1, 1] to {width, height, pixels: RGBA}. */
export function toPicture({ data, shape: [, , height, width] }) {
  const area = height * width;
  const pixels = new Uint8ClampedArray(4 * area).fill(255);
  for (let channel = 0; channel < 3; channel += 1) {
    for (let at = 0; at < area; at += 1) {
      const unit = Math.fround(Math.fround(data[channel * area + at] * 0.5) + 0.5);
      pixels[4 * at + channel] = Math.fround(Math.min(Math.max(unit, 0), 1) * 255); // a clamped array rounds half to even
    }
  }
  return { width, height, pixels };
}

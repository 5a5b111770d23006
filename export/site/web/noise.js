// Standard-normal noise that depends on (seed, row) alone, the numbers that NumPy's generator gives for them.
//
// Source: Salmon et al. 2011 (Philox4x64-10) for the bits, Marsaglia and Tsang 2000 (ziggurat of 256 layers) for the
// normal distribution. Only the tail beyond R, which about one value in 3700 reaches, takes a logarithm that C libraries
// round in their own ways: there the last bit may differ.

/** The draw of the initial latent; the noise after network call k is draw k + 1. */
export const INITIAL = 0;
/** The fresh noise of a level that rises at row k is draw RISE + k. */
export const RISE = 2 ** 32;

const MASK = (1n << 64n) - 1n;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const KEY_STEPS = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;

/** 32-bit numbers of the stream of a key, the lower half of each 64-bit number first. */
class Philox {
  constructor(seed, row) {
    this.key = [BigInt.asUintN(64, BigInt(seed)), BigInt.asUintN(64, BigInt(row))];
    this.counter = 0n;
    this.words = new Uint32Array(8);
    this.at = 8;
  }

  next32() {
    if (this.at === 8) {
      this.counter += 1n;
      this.refill();
      this.at = 0;
    }
    this.at += 1;
    return this.words[this.at - 1];
  }

  /** A float in [0, 1) of 24 bits. */
  nextFloat() {
    return (this.next32() >>> 8) / 2 ** 24;
  }

  refill() {
    let [a, b, c, d] = [this.counter & MASK, this.counter >> 64n, 0n, 0n];
    let [left, right] = this.key;
    for (let round = 0; round < ROUNDS; round += 1) {
      const first = MULTIPLIERS[0] * a;
      const second = MULTIPLIERS[1] * c;
      [a, b, c, d] = [(second >> 64n) ^ b ^ left, second & MASK, (first >> 64n) ^ d ^ right, first & MASK];
      left = (left + KEY_STEPS[0]) & MASK;
      right = (right + KEY_STEPS[1]) & MASK;
    }
    [a, b, c, d].forEach((word, place) => {
      this.words[2 * place] = Number(word & 0xffffffffn);
      this.words[2 * place + 1] = Number(word >> 32n);
    });
  }
}

const R = 3.6541528853610088;
const LAYERS = 256;
const BITS = 2 ** 23;
const TABLES = layers();

/** Layers of equal area under exp(-x^2 / 2): how wide each is, how far in it is safe, and its height. */
function layers() {
  const height = (x) => Math.exp(-0.5 * x * x);
  const area = 4.92867323399e-3;
  const edges = new Float64Array(LAYERS);
  edges[LAYERS - 1] = R;
  for (let at = LAYERS - 2; at > 0; at -= 1) {
    edges[at] = Math.sqrt(-2 * Math.log(area / edges[at + 1] + height(edges[at + 1])));
  }
  const base = area / height(R); // the lowest layer as a rectangle, tail included
  const width = new Float32Array(LAYERS);
  const safe = new Uint32Array(LAYERS);
  const heights = new Float32Array(LAYERS);
  for (let at = 0; at < LAYERS; at += 1) {
    width[at] = (at ? edges[at] : base) / BITS;
    safe[at] = Math.round((at ? edges[at - 1] / edges[at] : R / base) * BITS);
    heights[at] = at ? height(edges[at]) : 1;
  }
  return { width, safe, heights };
}

/** One standard-normal float32. */
function normal(bits) {
  const { width, safe, heights } = TABLES;
  const round = Math.fround;
  for (;;) {
    const word = bits.next32();
    const layer = word & 0xff;
    const whole = (word >>> 9) & 0x7fffff;
    const size = round(whole * width[layer]);
    const value = word & 0x100 ? -size : size;
    if (whole < safe[layer]) {
      return value;
    }
    if (layer === 0) {
      for (;;) {
        const beyond = round(round(-1 / R) * round(Math.log1p(-bits.nextFloat())));
        const depth = -round(Math.log1p(-bits.nextFloat()));
        if (round(depth + depth) > round(beyond * beyond)) {
          const far = round(round(R) + beyond);
          return (whole >>> 8) & 1 ? -far : far;
        }
      }
    }
    const rise = round(heights[layer - 1] - heights[layer]);
    if (round(round(rise * bits.nextFloat()) + heights[layer]) < Math.exp(-0.5 * value * value)) {
      return value;
    }
  }
}

/**
 * Standard-normal noise.
 * @param {bigint|number|string} seed a whole number from 0 to 2^64 - 1.
 * @param {number} draw see INITIAL and RISE.
 * @param {number} length how many numbers.
 * @returns {Float32Array}
 */
export function noise(seed, draw, length) {
  const bits = new Philox(seed, draw);
  return Float32Array.from({ length }, () => normal(bits));
}

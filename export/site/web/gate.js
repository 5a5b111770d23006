// The gate of a plan for one picture: how far the watched tensor has moved, and whether that calls for a full run.

/** What the gate remembers during one run. */
export class GateState {
  constructor(gate) {
    this.gate = gate;
    this.reference = null;
    this.accumulated = 0;
    this.cached = 0;
  }

  /** Decide a gated row by its watched halves; a value that is no number is a reason for the full path. */
  judge(watched) {
    const value = this.value(watched);
    const full = !(value < this.gate.threshold && this.cached < this.gate.max_run);
    this.cached = full ? 0 : this.cached + 1;
    if (this.gate.reference === "previous") {
      this.accumulated = full ? 0 : value;
    }
    if (full || this.gate.reference === "previous") {
      this.reference = watched;
    }
    return full;
  }

  ranFull(watched) {
    this.accumulated = 0;
    this.cached = 0;
    this.reference = watched;
  }

  ranCached(watched) {
    this.cached += 1;
    if (watched && this.gate.reference === "previous") {
      this.accumulated = this.value(watched);
      this.reference = watched;
    }
  }

  resized() {
    this.reference = null;
  }

  value(watched) {
    if (this.reference === null || this.reference.length < watched.length) {
      return NaN;
    }
    let moved = 0;
    let size = 0;
    watched.forEach((now, at) => {
      const then = this.reference.at(at - watched.length);
      for (let place = 0; place < now.data.length; place += 1) {
        moved += Math.abs(Math.fround(now.data[place] - then.data[place]));
        size += Math.abs(then.data[place]);
      }
    });
    const metric = size ? moved / size : NaN;
    const value = this.gate.polynomial.reduce((sum, coefficient) => sum * metric + coefficient, 0);
    return this.gate.reference === "previous" ? value + this.accumulated : value;
  }
}

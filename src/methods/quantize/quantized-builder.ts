/** A QuantizedLinear while its groups are being quantized, in any order of groups and columns. */
import type { Grid } from '../../compute/kernels/kernels.ts';
import { UnsupportedError } from '../../errors.ts';
import type { LinearSite } from '../../model/model.ts';
import { storedGrid } from './grid.ts';
import type { QuantizedLinear } from './quantized-linear.ts';
import type { SitePlan } from './quantizer.ts';

/** Rows written together: the codes of a tile stay in cache while they are transposed. */
const TILE = 64;

export class QuantizedBuilder {
  readonly #site: LinearSite;
  readonly #groupSize: number;
  readonly #bits: Uint8Array;
  readonly #codes: Uint8Array;
  readonly #scales: Float32Array;
  readonly #zeroPoints: Uint8Array;
  readonly #offsets: Float32Array | undefined;
  #scaleDtype: 'F16' | 'F32' = 'F16';

  constructor(site: LinearSite, plan: SitePlan) {
    const { outFeatures, inFeatures } = site;
    const groups = plan.bits.length;
    this.#site = site;
    this.#groupSize = plan.groupSize;
    this.#bits = Uint8Array.from(plan.bits);
    this.#codes = new Uint8Array(outFeatures * inFeatures);
    this.#scales = new Float32Array(outFeatures * groups);
    this.#zeroPoints = new Uint8Array(outFeatures * groups);
    this.#offsets = plan.bits.includes(1) ? new Float32Array(outFeatures * groups) : undefined;
  }

  /** Keeps a group's fitted grid and returns it as stored: codes must be chosen on that. */
  setGrid(group: number, fitted: Grid): Grid {
    const bits = this.#bits[group];
    const { grid, fitsF16 } = storedGrid(fitted, bits);
    if (!fitsF16) this.#scaleDtype = 'F32';
    const shifts = bits === 1 ? this.#offsets! : this.#zeroPoints;
    const groups = this.#bits.length;
    for (let row = 0; row < grid.scale.length; row++) {
      if (!Number.isFinite(grid.scale[row])) {
        throw new UnsupportedError(`${this.#site.name}.weight: the scale of row ${row} in group ${group} overflows float32.`);
      }
      this.#scales[row * groups + group] = grid.scale[row];
      shifts[row * groups + group] = grid.shift[row];
    }
    return grid;
  }

  /** Codes (columns.length, outFeatures) of the given columns of W. */
  setCodes(columns: Uint32Array, codes: Uint8Array): void {
    const { outFeatures, inFeatures } = this.#site;
    const target = this.#codes;
    for (let start = 0; start < outFeatures; start += TILE) {
      const end = Math.min(start + TILE, outFeatures);
      for (let j = 0; j < columns.length; j++) {
        const column = columns[j];
        for (let row = start; row < end; row++) target[row * inFeatures + column] = codes[j * outFeatures + row];
      }
    }
  }

  finish(): QuantizedLinear {
    return {
      outFeatures: this.#site.outFeatures,
      inFeatures: this.#site.inFeatures,
      groupSize: this.#groupSize,
      bits: this.#bits,
      codes: this.#codes,
      scales: this.#scales,
      zeroPoints: this.#zeroPoints,
      ...(this.#offsets && { offsets: this.#offsets }),
      scaleDtype: this.#scaleDtype,
    };
  }
}

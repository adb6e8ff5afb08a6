/** Arcee Fusion: copy from the expert only what matters most, by the size of the change times how far its row's distribution moved. */
import { defineMerger, type MergeBlock } from './merger.ts';
import { MagnitudeSelection, magnitudeOf } from './selection.ts';
import { allocateStretch } from './stretch.ts';
import { columnCount, elementCount } from './tensor-size.ts';

/** Added to each probability. */
const EPSILON = 1e-8;
/** Tukey's fence: this many interquartile ranges above the median. */
const FENCE = 1.5;
const QUANTILES = [0.25, 0.5, 0.75];

export const arceeFusion = defineMerger({
  name: 'arcee-fusion',
  formula:
    'theta_1 where I >= Q(.5) + 1.5 (Q(.75) - Q(.25)), else theta_0; I = |delta| KL(softmax(theta_1 row) || softmax(theta_0 row))',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'selection',
  base: 'required',
  experts: { min: 1, max: 1 },
  parameters: {},
  prepare(tensor) {
    const n = elementCount(tensor);
    const columns = columnCount(tensor);
    const importance = allocateStretch(columns);
    const p = new Float64Array(columns);
    const q = new Float64Array(columns);
    // One number per row, so that the exponentials are computed in the first pass only.
    const divergences = new Float64Array(columns === 0 ? 0 : n / columns);
    const selection = new MagnitudeSelection(n);

    const eachRow = (block: MergeBlock, look: (row: number) => void): void => {
      const expert = block.experts[0];
      const base = block.base!;
      for (let row = 0; row < block.length; row += columns) {
        const divergence = divergences[(block.start + row) / columns];
        for (let i = 0; i < columns; i++) importance.values[i] = Math.abs(expert[row + i] - base[row + i]) * divergence;
        look(row);
      }
    };
    const scanHigh = (block: MergeBlock): void => {
      for (let row = 0; row < block.length; row += columns) {
        writeSoftmax(block.experts[0], row, p);
        writeSoftmax(block.base!, row, q);
        divergences[(block.start + row) / columns] = divergenceOf(p, q);
      }
      eachRow(block, () => selection.countHigh(importance, columns));
    };
    const scanLow = (block: MergeBlock): void => {
      // The element of rank r from below is the last of the n - r largest.
      if (block.start === 0) selection.choose(QUANTILES.map((z) => n - Math.floor(z * (n - 1))));
      eachRow(block, () => selection.countLow(importance, columns));
    };
    let fence: number | undefined;
    const merge = (block: MergeBlock): Float32Array => {
      if (fence === undefined) {
        const [lower, median, upper] = selection.thresholds().map(magnitudeOf);
        fence = median + FENCE * (upper - lower);
      }
      const least = fence;
      const expert = block.experts[0];
      const result = block.base!.slice();
      eachRow(block, (row) => {
        for (let i = 0; i < columns; i++) if (importance.values[i] >= least) result[row + i] = expert[row + i];
      });
      return result;
    };
    return { scans: [{ look: scanHigh }, { look: scanLow }], merge };
  },
});

function writeSoftmax(x: Float32Array, from: number, out: Float64Array): void {
  let largest = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < out.length; i++) largest = Math.max(largest, x[from + i]);
  let total = 0;
  for (let i = 0; i < out.length; i++) {
    out[i] = Math.exp(x[from + i] - largest);
    total += out[i];
  }
  for (let i = 0; i < out.length; i++) out[i] = out[i] / total + EPSILON;
}

function divergenceOf(p: Float64Array, q: Float64Array): number {
  let total = 0;
  for (let i = 0; i < p.length; i++) total += p[i] * Math.log(p[i] / q[i]);
  return Math.max(0, total); // rounding can take a divergence of nothing below 0
}

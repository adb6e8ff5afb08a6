/** Spherical interpolation between two experts, or between their task vectors where there is a base; per tensor, row or column. */
import { arc, cosineOf, GramScan } from './gram.ts';
import { defineMerger, type MergeBlock, type TensorMerge } from './merger.ts';
import { columnCount, elementCount } from './tensor-size.ts';
import { baseAndTaskVectors, weightedSum } from './weighted-sum.ts';
import { sum, WEIGHT } from './weights.ts';

/** Below this |sin phi| the two are taken for parallel: straight interpolation. */
const PARALLEL = 1e-6;
/** Below this |w_1 + w_2| the position is the middle. */
const NO_WEIGHT = 1e-6;

type Ends = (product: number, square0: number, square1: number) => readonly [number, number];

export const nuslerp = defineMerger({
  name: 'nuslerp',
  formula: 'slerp(theta_1, theta_2; t = w_2 / (w_1 + w_2)), or theta_0 + slerp(delta_1, delta_2)',
  reference: 'https://github.com/arcee-ai/mergekit',
  access: 'gram',
  base: 'optional',
  experts: { min: 2, max: 2 },
  parameters: {
    weight: WEIGHT,
    flatten: { type: 'boolean', summary: 'the tensor is one vector; false: many, see row_wise', default: true },
    row_wise: {
      type: 'boolean',
      summary:
        'with flatten false: vectors along the first axis, that is columns (the name is from mergekit); false: along the last',
      default: false,
    },
  },
  prepare(tensor, { weight, flatten, row_wise }, { compat }) {
    const total = sum(weight);
    const t = Math.abs(total) < NO_WEIGHT ? 0.5 : weight[1] / total;
    const ends: Ends = (product, square0, square1) => {
      // mergekit takes a zero vector for one at a right angle.
      const cosine = cosineOf(product, square0, square1) ?? (compat === 'mergekit' ? 0 : 1);
      const phi = Math.acos(cosine);
      return Math.abs(Math.sin(phi)) < PARALLEL ? [1 - t, t] : arc(t, phi);
    };
    if (flatten) return wholeTensor(ends);
    if (!row_wise) return byRow(columnCount(tensor), ends);
    return byColumn(tensor.shape.length === 0 ? 1 : elementCount(tensor) / Math.max(1, tensor.shape[0]), ends);
  },
});

function wholeTensor(ends: Ends): TensorMerge {
  const gram = new GramScan(2);
  let coefficients: readonly number[] | undefined;
  const solve = (): readonly number[] => {
    const [square0, product, , square1] = gram.matrix();
    return ends(product, square0, square1);
  };
  return {
    scans: [{ look: (block) => gram.addExperts(block.experts, block.base) }],
    merge(block) {
      coefficients ??= solve();
      return block.base
        ? baseAndTaskVectors(block.base, block.experts, coefficients, block.output)
        : weightedSum(block.experts, coefficients, block.output);
    },
  };
}

function byRow(columns: number, ends: Ends): TensorMerge {
  const merge = ({ base, experts, length }: MergeBlock): Float32Array => {
    const [x, y] = experts;
    const result = new Float32Array(length);
    for (let row = 0; row < length; row += columns) {
      let product = 0;
      let square0 = 0;
      let square1 = 0;
      for (let i = row; i < row + columns; i++) {
        const origin = base ? base[i] : 0;
        const a = x[i] - origin;
        const b = y[i] - origin;
        product += a * b;
        square0 += a * a;
        square1 += b * b;
      }
      const [c0, c1] = ends(product, square0, square1);
      for (let i = row; i < row + columns; i++) {
        const origin = base ? base[i] : 0;
        result[i] = origin + c0 * (x[i] - origin) + c1 * (y[i] - origin);
      }
    }
    return result;
  };
  return { scans: [], merge };
}

/** @param columns elements of one step along the first axis */
function byColumn(columns: number, ends: Ends): TensorMerge {
  const products = new Float64Array(columns);
  const squares0 = new Float64Array(columns);
  const squares1 = new Float64Array(columns);
  let coefficients: (readonly [number, number])[] | undefined;
  const scan = ({ start, length, base, experts: [x, y] }: MergeBlock): void => {
    for (let i = 0, j = start % columns; i < length; i++, j = j + 1 === columns ? 0 : j + 1) {
      const origin = base ? base[i] : 0;
      const a = x[i] - origin;
      const b = y[i] - origin;
      products[j] += a * b;
      squares0[j] += a * a;
      squares1[j] += b * b;
    }
  };
  const merge = ({ start, length, base, experts: [x, y] }: MergeBlock): Float32Array => {
    coefficients ??= Array.from(products, (product, j) => ends(product, squares0[j], squares1[j]));
    const result = new Float32Array(length);
    for (let i = 0, j = start % columns; i < length; i++, j = j + 1 === columns ? 0 : j + 1) {
      const origin = base ? base[i] : 0;
      const [c0, c1] = coefficients[j];
      result[i] = origin + c0 * (x[i] - origin) + c1 * (y[i] - origin);
    }
    return result;
  };
  return { scans: [{ look: scan }], merge };
}

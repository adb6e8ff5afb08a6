/**
 * An update with few non-zeros, learned through a kernel of few parameters (SNELL, arXiv 2411.01800; SNELLA, arXiv 2510.24037; adapters.md 8.6): inputs and
 * outputs are points, the distances between them make a matrix of full rank, and its largest entries are the update.
 */
import type { Blas, Matrix } from '../../compute/blas.ts';
import { vectors } from '../../compute/kernels/vectors.ts';
import { MagnitudeSelection } from '../merge/selection.ts';
import type { SparseDelta, TrainedModule } from './training/schedule.ts';

/** How the kernel of a layer is cut. */
export interface KernelShape {
  /** Non-zeros; absent: all. */
  kept?: number | undefined;
  /** As published: entries times their own magnitude, which counts as a constant in the gradient; else less what they were at the start. */
  readonly published: boolean;
}

/** H: distances that are summed with alternating signs. */
export const KERNEL_HEADS = 2;
/** Factor on distances. */
const KERNEL_FACTOR = 0.1;
/** The least squared distance. */
const LEAST_SQUARE = 1e-12;

/** Points of a layer: `ins` (H, n, width), `outs` (H, m, width), and the three numbers of the softmax term. */
export interface KernelPoints {
  readonly ins: Float32Array;
  readonly outs: Float32Array;
  readonly alpha: number;
  readonly gamma: number;
  readonly beta: number;
}

interface Sizes {
  readonly outFeatures: number;
  readonly inFeatures: number;
}

/** All that the kernel of a layer comes to; every matrix is (m, n), a column an input. */
export interface Kernel {
  /** `0.1 sum_h (-1)^h D^h` */
  readonly distance: Float32Array;
  /** D^h */
  readonly heads: readonly Float32Array[];
  /** Of `distance / gamma`, over the outputs of each input. */
  readonly softmax: Float32Array;
  /** `distance + alpha softmax + beta` */
  readonly values: Float32Array;
}

export async function kernelOf(blas: Blas, points: KernelPoints, { outFeatures: m, inFeatures: n }: Sizes): Promise<Kernel> {
  const { alpha, gamma, beta } = points;
  const distance = new Float32Array(m * n);
  const heads: Float32Array[] = [];
  for (let h = 0; h < KERNEL_HEADS; h++) {
    const [ins, outs] = [headOf(points.ins, h, n), headOf(points.outs, h, m)];
    const { data } = await blas.gemm(outs, ins, { transposeB: true, alpha: -2 });
    const [ofIns, ofOuts] = [squares(ins), squares(outs)];
    const factor = factorOf(h);
    for (let j = 0, at = 0; j < m; j++) {
      for (let i = 0; i < n; i++, at++) {
        const length = Math.sqrt(Math.max(LEAST_SQUARE, ofIns[i] + ofOuts[j] + data[at]));
        data[at] = length;
        distance[at] += factor * length;
      }
    }
    heads.push(data);
  }
  const softmax = softmaxOfColumns(distance, m, n, gamma);
  const values = new Float32Array(m * n);
  for (let at = 0; at < values.length; at++) values[at] = distance[at] + alpha * softmax[at] + beta;
  return { distance, heads, softmax, values };
}

/** Heads are summed with alternating signs. */
function factorOf(h: number): number {
  return h % 2 === 0 ? KERNEL_FACTOR : -KERNEL_FACTOR;
}

function softmaxOfColumns(values: Float32Array, rows: number, columns: number, temperature: number): Float32Array {
  const most = new Float64Array(columns).fill(-Infinity);
  for (let j = 0, at = 0; j < rows; j++)
    for (let i = 0; i < columns; i++, at++) most[i] = Math.max(most[i], values[at] / temperature);
  const sums = new Float64Array(columns);
  const result = new Float32Array(rows * columns);
  for (let j = 0, at = 0; j < rows; j++) {
    for (let i = 0; i < columns; i++, at++) {
      const value = Math.exp(values[at] / temperature - most[i]);
      result[at] = value;
      sums[i] += value;
    }
  }
  for (let j = 0, at = 0; j < rows; j++) for (let i = 0; i < columns; i++, at++) result[at] /= sums[i];
  return result;
}

/** What a layer's kernel comes to at its start, (m, n), which its update is counted from; undefined for the published form. */
export async function kernelStart(blas: Blas, module: TrainedModule): Promise<Float32Array | undefined> {
  if (module.kernel!.published) return undefined;
  return (await kernelOf(blas, { ...startOf(module), alpha: 1, gamma: 1, beta: 0 }, module)).values;
}

/** The update, (outFeatures, inFeatures). @param start as `kernelStart` */
export async function kernelDelta(blas: Blas, module: TrainedModule, start: Float32Array | undefined): Promise<Float32Array> {
  return (await cutKernel(blas, module, start)).delta;
}

/** An update as its non-zeros. */
export function nonZeros(delta: Float32Array): SparseDelta {
  let count = 0;
  for (let at = 0; at < delta.length; at++) if (delta[at] !== 0) count++;
  const [indices, values] = [new Int32Array(count), new Float32Array(count)];
  for (let at = 0, to = 0; at < delta.length; at++) {
    if (delta[at] === 0) continue;
    indices[to] = at;
    values[to++] = delta[at];
  }
  return { indices, values };
}

/** Adds the gradients of a layer's points that follow from that of its weight, (outFeatures, inFeatures), which is overwritten. */
export async function kernelGradients(
  blas: Blas,
  module: TrainedModule,
  gradient: Float32Array,
  start: Float32Array | undefined,
): Promise<void> {
  const { parameters, kernel: shape } = module;
  const { kernel, delta } = await cutKernel(blas, module, start);
  const cut = shape!.kept !== undefined;
  for (let at = 0; at < gradient.length; at++) {
    if (shape!.published) gradient[at] *= delta[at] === 0 ? 0 : Math.abs(kernel.values[at]);
    else if (cut && delta[at] === 0) gradient[at] = 0;
  }
  const of = await pointGradients(blas, pointsOf(module), kernel, module, gradient);
  for (const key of POINTS) {
    const sum = parameters.get(key)!.gradient;
    const own = of[key];
    for (let i = 0; i < sum.length; i++) sum[i] += own[i];
  }
}

/** What a kernel is made of, as parameters of a layer. */
const POINTS = ['kernelIn', 'kernelOut', 'alpha', 'gamma', 'beta'] as const;

/** Gradients of the points, for a gradient of the kernel's values (m, n). */
export async function pointGradients(
  blas: Blas,
  { ins, outs, alpha, gamma }: KernelPoints,
  { distance, heads, softmax }: Kernel,
  { outFeatures: m, inFeatures: n }: Sizes,
  gradient: Float32Array,
): Promise<Record<(typeof POINTS)[number], Float32Array>> {
  const along = new Float64Array(n);
  const mean = new Float64Array(n);
  let [ofAlpha, ofBeta] = [0, 0];
  for (let j = 0, at = 0; j < m; j++) {
    for (let i = 0; i < n; i++, at++) {
      const weighed = gradient[at] * softmax[at];
      along[i] += weighed;
      mean[i] += softmax[at] * distance[at];
      ofAlpha += weighed;
      ofBeta += gradient[at];
    }
  }
  let ofGamma = 0;
  const ofDistance = new Float32Array(gradient.length);
  for (let j = 0, at = 0; j < m; j++) {
    for (let i = 0; i < n; i++, at++) {
      ofDistance[at] = gradient[at] + (alpha / gamma) * softmax[at] * (gradient[at] - along[i]);
      ofGamma -= (alpha / gamma ** 2) * gradient[at] * softmax[at] * (distance[at] - mean[i]);
    }
  }
  const kernelIn = new Float32Array(ins.length);
  const kernelOut = new Float32Array(outs.length);
  const least = Math.sqrt(LEAST_SQUARE);
  for (let h = 0; h < KERNEL_HEADS; h++) {
    const [factor, lengths] = [factorOf(h), heads[h]];
    // H of the equations: the gradient over the distance.
    const slope: Matrix = { rows: m, columns: n, data: new Float32Array(m * n) };
    const [ofInputs, ofOutputs] = [new Float64Array(n), new Float64Array(m)];
    for (let j = 0, at = 0; j < m; j++) {
      for (let i = 0; i < n; i++, at++) {
        if (lengths[at] <= least) continue;
        const value = (factor * ofDistance[at]) / lengths[at];
        slope.data[at] = value;
        ofInputs[i] += value;
        ofOutputs[j] += value;
      }
    }
    const [a, b] = [headOf(ins, h, n), headOf(outs, h, m)];
    pull(kernelIn, h, a, ofInputs, (await blas.gemm(slope, b, { transposeA: true })).data);
    pull(kernelOut, h, b, ofOutputs, (await blas.gemm(slope, a)).data);
  }
  return {
    kernelIn,
    kernelOut,
    alpha: Float32Array.of(ofAlpha),
    gamma: Float32Array.of(ofGamma),
    beta: Float32Array.of(ofBeta),
  };
}

/** `diag(H 1) a - H b` into the head's part of `gradient`. */
function pull(gradient: Float32Array, h: number, { columns, data }: Matrix, sums: Float64Array, other: Float32Array): void {
  const start = h * data.length;
  for (let i = 0; i < data.length; i++) gradient[start + i] = sums[Math.floor(i / columns)] * data[i] - other[i];
}

async function cutKernel(
  blas: Blas,
  module: TrainedModule,
  start: Float32Array | undefined,
): Promise<{ readonly kernel: Kernel; readonly delta: Float32Array }> {
  const kernel = await kernelOf(blas, pointsOf(module), module);
  const { kept, published } = module.kernel!;
  const delta = kernel.values.slice();
  if (start) for (let at = 0; at < delta.length; at++) delta[at] -= start[at];
  if (kept !== undefined) keepLargest(delta, kept);
  if (published) for (let at = 0; at < delta.length; at++) delta[at] *= Math.abs(delta[at]);
  return { kernel, delta };
}

/** Sets all but the `count` largest magnitudes to 0, exactly; of equal ones the first are kept. */
export function keepLargest(values: Float32Array, count: number): void {
  if (count >= values.length) return;
  using _ = vectors().open();
  const bits = new Int32Array(values.buffer, values.byteOffset, values.length);
  const selection = new MagnitudeSelection(values.length);
  selection.countHigh({ values, bits }, values.length);
  selection.choose([count]);
  selection.countLow({ values, bits }, values.length);
  const [{ bits: least, ties }] = selection.thresholds();
  let left = ties;
  for (let at = 0; at < values.length; at++) {
    const magnitude = bits[at] & 0x7fffffff;
    if (magnitude > least || (magnitude === least && left-- > 0)) continue;
    values[at] = 0;
  }
}

function pointsOf({ parameters }: TrainedModule): KernelPoints {
  const [ins, outs, alpha, gamma, beta] = POINTS.map((key) => parameters.get(key)!.values);
  return { ins, outs, alpha: alpha[0], gamma: gamma[0], beta: beta[0] };
}

function startOf({ parameters }: TrainedModule): Pick<KernelPoints, 'ins' | 'outs'> {
  return { ins: parameters.get('initialIn')!.values, outs: parameters.get('initialOut')!.values };
}

function headOf(points: Float32Array, h: number, rows: number): Matrix {
  const length = points.length / KERNEL_HEADS;
  return { rows, columns: length / rows, data: points.subarray(h * length, (h + 1) * length) };
}

function squares({ rows, columns, data }: Matrix): Float64Array {
  const sums = new Float64Array(rows);
  for (let i = 0; i < data.length; i++) sums[Math.floor(i / columns)] += data[i] * data[i];
  return sums;
}

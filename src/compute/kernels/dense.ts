/** Inner loops of dense float64 matrices as WASM SIMD (assembly/dense/), each user with memory of its own. */
import { UnsupportedError } from '../../errors.ts';
import { DENSE_WASM } from './dense.generated.ts';
import { roundUp } from './round-up.ts';
import { instantiate, MOST_PAGES, PAGE_BYTES } from './wasm.ts';

/** What the module exports, with addresses; assembly/dense/ says what each does. */
export interface DenseExports {
  readonly memory: { readonly buffer: ArrayBuffer; grow(pages: number): number };
  memoryStart(): number;
  multiplyPacked(a: number, b: number, c: number, rows: number, inner: number, columns: number): void;
  updateAndMultiply(matrix: number, stride: number, n: number, v: number, w: number, u: number, y: number): void;
}

const MOST_BYTES = MOST_PAGES * PAGE_BYTES;
/** The module's own data, and what arrays lose to where they begin. */
const SPARE_BYTES = 65_536;

/** An instance whose memory has room for arrays of these lengths, and the arrays. The memory goes when the instance does. Throws UnsupportedError for 4 GiB. */
export function denseKernels(lengths: readonly number[]): { kernels: DenseExports; arrays: Float64Array[] } {
  const bytes = 8 * lengths.reduce((sum, length) => sum + length, 0);
  if (bytes > MOST_BYTES - SPARE_BYTES)
    throw new UnsupportedError(`a matrix needs ${bytes} bytes in float64, but a kernel addresses ${MOST_BYTES} at most`);
  const kernels = instantiate<DenseExports>(DENSE_WASM);
  let at = roundUp(kernels.memoryStart(), 64);
  const offsets = lengths.map((length) => {
    const offset = at;
    at += roundUp(8 * length, 64);
    return offset;
  });
  const missing = at - kernels.memory.buffer.byteLength;
  if (missing > 0) kernels.memory.grow(Math.ceil(missing / PAGE_BYTES));
  const { buffer } = kernels.memory;
  return { kernels, arrays: lengths.map((length, i) => new Float64Array(buffer, offsets[i], length)) };
}

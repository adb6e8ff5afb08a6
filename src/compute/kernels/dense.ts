/** Inner loops of dense float64 matrices as WASM SIMD (assembly/dense/), each user with memory of its own. */
import { DENSE_WASM } from './dense.generated.ts';

// The compiler's library knows WebAssembly only together with the browser's DOM.
declare const WebAssembly: {
  readonly Module: new (bytes: Uint8Array) => object;
  readonly Instance: new (module: object, imports: object) => { readonly exports: object };
};

/** What the module exports, with addresses; assembly/dense/ says what each does. */
export interface DenseExports {
  readonly memory: { readonly buffer: ArrayBuffer; grow(pages: number): number };
  memoryStart(): number;
  multiplyPacked(a: number, b: number, c: number, rows: number, inner: number, columns: number): void;
  updateAndMultiply(matrix: number, stride: number, n: number, v: number, w: number, u: number, y: number): void;
}

const PAGE_BYTES = 65_536;

let module: object | undefined;

/** An instance whose memory has room for arrays of these lengths, and the arrays. The memory goes when the instance does. */
export function denseKernels(lengths: readonly number[]): { kernels: DenseExports; arrays: Float64Array[] } {
  module ??= new WebAssembly.Module(Buffer.from(DENSE_WASM, 'base64'));
  const kernels = new WebAssembly.Instance(module, { env: { abort: () => undefined } }).exports as DenseExports;
  let at = (kernels.memoryStart() + 63) & ~63;
  const offsets = lengths.map((length) => {
    const offset = at;
    at += (8 * length + 63) & ~63;
    return offset;
  });
  kernels.memory.grow(Math.ceil(at / PAGE_BYTES));
  const { buffer } = kernels.memory;
  return { kernels, arrays: lengths.map((length, i) => new Float64Array(buffer, offsets[i], length)) };
}

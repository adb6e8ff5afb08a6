/** Where arithmetic happens: an Engine compiles a graph for a device, a Program runs it on typed arrays. */

import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { DType } from '../../formats/tensor.ts';

export const DEVICES = ['cpu', 'auto', 'webgpu', 'cuda', 'dml', 'coreml'] as const;
/** What the user may ask for. */
export type DeviceRequest = (typeof DEVICES)[number];
/** What a run ends up on. */
export type Device = Exclude<DeviceRequest, 'auto'>;

export type TypedArray = Float64Array | Float32Array | Uint16Array | Int32Array | BigInt64Array | Uint8Array | Int8Array;

/** A host tensor: row-major, `data.length` = product of `shape`. F16 and BF16 are held as their bits in a Uint16Array. */
export interface NdArray {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: TypedArray;
}

/** An array whose elements the device holds as well, by `Engine.upload`: fed to a program of that engine, nothing is copied. */
export interface ResidentArray extends NdArray, AsyncDisposable {}

export interface Program extends AsyncDisposable {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /**
   * Runs once. Feeds are read in place. An array given in `into` receives that output in place (it may be the same memory
   * as Gemm's C or an accumulator, and nothing else). Only `outputs` are computed and returned when given.
   */
  run(
    feeds: Readonly<Record<string, NdArray>>,
    options?: { readonly outputs?: readonly string[]; readonly into?: Readonly<Record<string, NdArray>> },
  ): Promise<Record<string, NdArray>>;
}

export interface CompileOptions {
  /** Graph optimization; default 'all'. */
  readonly optimization?: 'all' | 'disabled';
  /** Cache key of a graph that is compiled often: the program is then shared, and released with the engine. */
  readonly key?: string;
  /** `false` for a large graph that runs once: about half the peak memory, up to twice as slow. Default true. */
  readonly memoryArena?: boolean;
}

export interface Engine extends AsyncDisposable {
  readonly name: 'ort' | 'tfjs' | 'plain';
  readonly device: Device;
  readonly threads: number;
  /** Name and version of the runtime, for manifests. */
  readonly runtime: string;
  /** Compiles a graph held in memory. */
  compile(model: OnnxModel, options?: CompileOptions): Promise<Program>;
  /** Opens a model file by path (external data beside it is mapped by the runtime). */
  open(path: string, options?: CompileOptions): Promise<Program>;
  /**
   * Copies an array to the device, to be fed again and again; dispose of it afterwards. Its elements must not change meanwhile.
   * Absent where feeds are read in place, or where the runtime keeps nothing on the device between runs.
   */
  upload?(array: NdArray): Promise<ResidentArray>;
  /** An engine that computes in fp64: absent where this one does, else a companion on the CPU, released with this one. */
  doublePrecision?(): Promise<Engine>;
}

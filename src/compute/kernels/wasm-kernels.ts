/** The kernels as WASM SIMD. A group is copied in by slices of rows, so the module's memory stays small whatever the layer. */
import { KERNELS_WASM } from './kernels.generated.ts';
import type { AsyncKernels, Compensated, Fitted, Grid, Group, Kernels } from './kernels.ts';
import { roundUp } from './round-up.ts';
import { instantiate, PAGE_BYTES } from './wasm.ts';
import type { KernelExports } from './wasm-exports.ts';

/** Rows handled per call into the module: 128 columns of them fit a second-level cache. */
const SLICE_ROWS = 512;
/** Rows the module handles at once; slices are padded to it. */
const LANES = 16;

let shared: Kernels | undefined;

/** The kernels, compiled on first use. They hold no state between calls. */
export function wasmKernels(): Kernels {
  shared ??= new WasmKernels();
  return shared;
}

/** The kernels on the calling thread, as promises. */
export function inlineKernels(): AsyncKernels {
  const kernels = wasmKernels();
  return {
    minMaxGrid: async (...args) => kernels.minMaxGrid(...args),
    twoLevelGrid: async (...args) => kernels.twoLevelGrid(...args),
    searchScales: async (...args) => kernels.searchScales(...args),
    roundCodes: async (...args) => kernels.roundCodes(...args),
    compensate: async (...args) => kernels.compensate(...args),
    fitWeighted: async (...args) => kernels.fitWeighted(...args),
    polish: async (...args) => kernels.polish(...args),
  };
}

/** Where a slice of a group lies in memory. */
interface Slice {
  /** First row of the group, and how many. */
  readonly from: number;
  readonly count: number;
  /** `count` padded to whole lanes. */
  readonly rows: number;
  /** Floats from one column to the next: never a large power of two, so that columns do not fight for the same cache sets. */
  readonly stride: number;
}

class WasmKernels implements Kernels {
  readonly #exports: KernelExports;
  #floats: Float32Array;
  #bytes: Uint8Array;
  #next = 0;

  constructor() {
    this.#exports = instantiate(KERNELS_WASM);
    this.#floats = new Float32Array(this.#exports.memory.buffer);
    this.#bytes = new Uint8Array(this.#exports.memory.buffer);
  }

  minMaxGrid(group: Group, bits: number, symmetric: boolean): Grid {
    const grid = emptyGrid(group.rows);
    for (const slice of slices(group.rows)) {
      const values = this.#begin(group, slice);
      const scale = this.#reserve(slice.rows * 4);
      const shift = this.#reserve(slice.rows * 4);
      this.#exports.minMaxGrid(values, group.columns, slice.stride, slice.rows, levelsOf(bits), symmetric ? 1 : 0, scale, shift);
      this.#readGrid(grid, slice, scale, shift);
    }
    return grid;
  }

  twoLevelGrid(group: Group, symmetric: boolean): Grid {
    const grid = emptyGrid(group.rows);
    for (const slice of slices(group.rows)) {
      const values = this.#begin(group, slice);
      const scale = this.#reserve(slice.rows * 4);
      const shift = this.#reserve(slice.rows * 4);
      this.#exports.twoLevelGrid(values, group.columns, slice.stride, slice.rows, symmetric ? 1 : 0, scale, shift);
      this.#readGrid(grid, slice, scale, shift);
    }
    return grid;
  }

  searchScales(group: Group, bits: number, grid: Grid, weights?: Float32Array): Float32Array {
    const scales = new Float32Array(group.rows);
    const { columns } = group;
    const levels = levelsOf(bits);
    for (const slice of slices(group.rows)) {
      const values = this.#begin(group, slice);
      const scale = this.#write(grid.scale, slice);
      const zero = this.#write(grid.shift, slice);
      const scratch = this.#reserve(columns * 16 * 2);
      if (weights) {
        const weightsAt = this.#writeColumns(weights, columns, group.rows, slice);
        this.#exports.searchWeightedGrid(values, columns, slice.stride, slice.rows, levels, scale, zero, weightsAt, scratch);
      } else {
        this.#exports.searchGrid(values, columns, slice.stride, slice.rows, levels, scale, zero, scratch);
      }
      scales.set(this.#view(scale, slice.count), slice.from);
    }
    return scales;
  }

  roundCodes(group: Group, bits: number, grid: Grid): Uint8Array {
    const codes = new Uint8Array(group.columns * group.rows);
    for (const slice of slices(group.rows)) {
      const values = this.#begin(group, slice);
      const scale = this.#write(grid.scale, slice);
      const shift = this.#write(grid.shift, slice);
      const out = this.#reserve(group.columns * slice.stride);
      this.#exports.roundCodes(values, group.columns, slice.stride, slice.rows, levelsOf(bits), scale, shift, out);
      this.#readCodes(codes, group, slice, out);
    }
    return codes;
  }

  compensate(group: Group, upper: Float32Array, bits: Uint8Array, grid: Grid): Compensated {
    const { columns, rows } = group;
    const perColumn = grid.scale.length !== rows;
    const codes = new Uint8Array(columns * rows);
    const errors = new Float32Array(columns * rows);
    const transposed = new Float32Array(columns * columns);
    for (let k = 0; k < columns; k++) {
      for (let j = k; j < columns; j++) transposed[j * columns + k] = upper[k * columns + j];
    }
    const levels = Float32Array.from(bits, levelsOf);
    for (const slice of slices(rows)) {
      const values = this.#begin(group, slice);
      const upperAt = this.#copy(transposed);
      const levelsAt = this.#copy(levels);
      const scale = perColumn ? this.#writeColumns(grid.scale, columns, rows, slice) : this.#write(grid.scale, slice);
      const shift = perColumn ? this.#writeColumns(grid.shift, columns, rows, slice) : this.#write(grid.shift, slice);
      const codesAt = this.#reserve(columns * slice.stride);
      const errorsAt = this.#reserve(columns * slice.stride * 4);
      const gridStride = perColumn ? slice.stride : 0;
      this.#exports.compensate(
        values,
        columns,
        slice.stride,
        slice.rows,
        upperAt,
        levelsAt,
        gridStride,
        scale,
        shift,
        codesAt,
        errorsAt,
      );
      this.#readCodes(codes, group, slice, codesAt);
      this.#readColumns(errors, group, slice, errorsAt);
    }
    return { codes, errors };
  }

  fitWeighted(group: Group, bits: number, weights: Float32Array): Fitted {
    const { columns, rows } = group;
    const grid = emptyGrid(rows);
    const losses = new Float32Array(rows);
    for (const slice of slices(rows)) {
      const values = this.#begin(group, slice);
      const weightsAt = this.#copy(weights);
      const scale = this.#reserve(slice.rows * 4);
      const shift = this.#reserve(slice.rows * 4);
      const loss = this.#reserve(slice.rows * 4);
      if (bits === 1) {
        this.#exports.fitTwoLevels(values, columns, slice.stride, slice.rows, weightsAt, scale, shift, loss);
      } else {
        const scratch = this.#reserve(columns * 16);
        const levels = levelsOf(bits);
        this.#exports.fitWeighted(values, columns, slice.stride, slice.rows, levels, weightsAt, scale, shift, loss, scratch);
      }
      this.#readGrid(grid, slice, scale, shift);
      losses.set(this.#view(loss, slice.count), slice.from);
    }
    return { grid, losses };
  }

  polish(decoded: Float32Array, gradient: Float32Array, hessian: Float32Array, bits: number, grid: Grid) {
    const rows = grid.scale.length;
    const columns = decoded.length / rows;
    const codes = new Uint8Array(decoded.length);
    const changes = new Float32Array(decoded.length);
    const group = { columns, rows, values: decoded };
    for (const slice of slices(rows)) {
      const decodedAt = this.#begin(group, slice);
      const gradientAt = this.#writeColumns(gradient, columns, rows, slice);
      const hessianAt = this.#copy(hessian);
      const scale = this.#write(grid.scale, slice);
      const shift = this.#write(grid.shift, slice);
      const codesAt = this.#reserve(columns * slice.stride);
      const changesAt = this.#reserve(columns * slice.stride * 4);
      this.#exports.polish(
        decodedAt,
        gradientAt,
        columns,
        slice.stride,
        slice.rows,
        hessianAt,
        levelsOf(bits),
        scale,
        shift,
        codesAt,
        changesAt,
      );
      this.#readColumns(decoded, group, slice, decodedAt);
      this.#readColumns(gradient, group, slice, gradientAt);
      this.#readColumns(changes, group, slice, changesAt);
      this.#readCodes(codes, group, slice, codesAt);
    }
    return { codes, changes };
  }

  /** Forgets the previous slice and copies this one in. */
  #begin(group: Group, slice: Slice): number {
    this.#next = this.#exports.memoryStart();
    return this.#writeColumns(group.values, group.columns, group.rows, slice);
  }

  /** Byte offset of fresh, 16-byte aligned room. Views taken earlier are stale afterwards. */
  #reserve(byteLength: number): number {
    const at = roundUp(this.#next, 16);
    this.#next = at + byteLength;
    const { memory } = this.#exports;
    const missing = this.#next - memory.buffer.byteLength;
    if (missing > 0) memory.grow(Math.ceil(missing / PAGE_BYTES));
    if (this.#floats.buffer !== memory.buffer) {
      this.#floats = new Float32Array(memory.buffer);
      this.#bytes = new Uint8Array(memory.buffer);
    }
    return at;
  }

  #view(at: number, length: number): Float32Array {
    return this.#floats.subarray(at / 4, at / 4 + length);
  }

  /** Copies values that all rows share. */
  #copy(values: Float32Array): number {
    const at = this.#reserve(values.byteLength);
    this.#view(at, values.length).set(values);
    return at;
  }

  #write(values: Float32Array, slice: Slice): number {
    return this.#writeColumns(values, 1, values.length, slice);
  }

  /** Copies the slice's rows of (columns, rows) values; rows of padding become 1, a value harmless as weight, scale or zero. */
  #writeColumns(values: Float32Array, columns: number, rows: number, slice: Slice): number {
    const { from, count, stride } = slice;
    const at = this.#reserve(columns * stride * 4);
    const floats = this.#floats;
    for (let j = 0; j < columns; j++) {
      const start = at / 4 + j * stride;
      floats.set(values.subarray(j * rows + from, j * rows + from + count), start);
      if (count < slice.rows) floats.fill(1, start + count, start + slice.rows);
    }
    return at;
  }

  #readGrid(grid: Grid, slice: Slice, scale: number, shift: number): void {
    grid.scale.set(this.#view(scale, slice.count), slice.from);
    grid.shift.set(this.#view(shift, slice.count), slice.from);
  }

  #readColumns(values: Float32Array, group: Group, slice: Slice, at: number): void {
    for (let j = 0; j < group.columns; j++) {
      values.set(this.#view(at + j * slice.stride * 4, slice.count), j * group.rows + slice.from);
    }
  }

  #readCodes(codes: Uint8Array, group: Group, slice: Slice, at: number): void {
    for (let j = 0; j < group.columns; j++) {
      const start = at + j * slice.stride;
      codes.set(this.#bytes.subarray(start, start + slice.count), j * group.rows + slice.from);
    }
  }
}

function* slices(rows: number): Iterable<Slice> {
  for (let from = 0; from < rows; from += SLICE_ROWS) {
    const count = Math.min(SLICE_ROWS, rows - from);
    const padded = Math.ceil(count / LANES) * LANES;
    yield { from, count, rows: padded, stride: padded + LANES };
  }
}

function emptyGrid(rows: number): Grid {
  return { scale: new Float32Array(rows), shift: new Float32Array(rows) };
}

/** Highest code of a width. */
function levelsOf(bits: number): number {
  return 2 ** bits - 1;
}

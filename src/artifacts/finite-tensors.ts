/** Finds a weight that is not a number before anything is made of it: hours later it would spoil a Hessian, or be what a layer is refused for. */
import { areFinite, toFloat32, widenInto } from '../../formats/dtype.ts';
import type { DType, Tensor, TensorInfo, TensorSource } from '../../formats/tensor.ts';
import { UnsupportedError } from '../errors.ts';

/** Tensors are read in whole rows of about so many bytes. */
const PIECE_BYTES = 16 * 1024 * 1024;
const FLOATS: ReadonlySet<DType> = new Set(['F64', 'F32', 'F16', 'BF16', 'F8_E4M3', 'F8_E5M2']);

/**
 * Reads every float tensor but those in `except`. Throws UnsupportedError for the first NaN or infinity, with its place; `float32` is what the
 * tensors will be read as, so an F64 beyond it counts as infinite.
 */
export async function assertFiniteTensors(
  source: TensorSource,
  except: ReadonlySet<string>,
  signal: AbortSignal | undefined,
): Promise<void> {
  const memory = new Float32Array(PIECE_BYTES / 2);
  for (const info of source.tensors.values()) {
    if (!FLOATS.has(info.dtype) || except.has(info.name) || info.byteLength === 0) continue;
    const [rows = 1] = info.shape;
    const step = info.shape.length === 0 ? 1 : Math.max(1, Math.floor(PIECE_BYTES / (info.byteLength / rows)));
    for (let row = 0; row < rows; row += step) {
      signal?.throwIfAborted();
      const whole = info.shape.length === 0 || step >= rows;
      const piece = whole ? await source.read(info.name) : await source.readRows(info.name, row, Math.min(row + step, rows));
      if (!isFinitePiece(piece, memory)) throw refusal(source.path, info, row, toFloat32(piece.dtype, piece.data));
    }
  }
}

function isFinitePiece({ dtype, data }: Tensor, memory: Float32Array): boolean {
  const length = dtype === 'F16' || dtype === 'BF16' ? data.byteLength / 2 : data.byteLength / 4;
  if (dtype === 'F32' || dtype === 'F16' || dtype === 'BF16') {
    return widenInto(dtype, data, length <= memory.length ? memory.subarray(0, length) : new Float32Array(length));
  }
  return areFinite(new Int32Array(toFloat32(dtype, data).buffer));
}

function refusal(path: string, { name, shape }: TensorInfo, firstRow: number, values: Float32Array): UnsupportedError {
  const at = values.findIndex((value) => !Number.isFinite(value));
  const rowLength = shape.slice(1).reduce((product, size) => product * size, 1);
  const place: number[] = [];
  let left = firstRow * rowLength + at;
  for (const size of [...shape].reverse()) {
    place.unshift(left % size);
    left = Math.floor(left / size);
  }
  return new UnsupportedError(
    `${path}: tensor "${name}" holds ${values[at]} at [${place.join(', ')}]; only finite weights can be quantized`,
  );
}

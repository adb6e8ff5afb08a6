/** Updates of few non-zeros on disk: their values, and where they stand as flat places or as a bitmap, whichever is smaller (adapters.md 9.3). */
import { join } from 'node:path';
import { quote } from '../../formats/safetensors/header.ts';
import { createSafetensorsSink } from '../../formats/safetensors/writer.ts';
import type { TensorSource } from '../../formats/tensor.ts';
import { FormatError } from '../errors.ts';
import { writeJson } from './manifest.ts';
import { transpose } from './transpose.ts';

/** The update of one linear layer. */
export interface DeltaModule {
  readonly name: string;
  readonly outFeatures: number;
  readonly inFeatures: number;
  /** Flat places in the (outFeatures, inFeatures) weight, ascending. */
  readonly indices: Int32Array;
  readonly values: Float32Array;
}

export interface DeltaFolder {
  /** As `base_model_name_or_path`. */
  readonly base: string;
  readonly deltas: readonly DeltaModule[];
  /** Layers of the base are stored (in, out). */
  readonly transposed: boolean;
}

const VALUES = '.delta.values';

interface StoredPart {
  readonly name: string;
  readonly dtype: 'F32' | 'I32' | 'U8';
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

export function isDelta(names: Iterable<string>): boolean {
  for (const name of names) if (name.endsWith(VALUES)) return true;
  return false;
}

/** Writes tensors and adapter_config.json into `folder`. */
export async function writeDelta(folder: string, { base, deltas, transposed }: DeltaFolder): Promise<void> {
  const used = deltas.filter(({ values }) => values.length > 0);
  const tensors = used.flatMap<StoredPart>(({ name, outFeatures, inFeatures, indices, values }) => {
    const size = outFeatures * inFeatures;
    const dense = values.length * 32 > size;
    return [
      { name: `${name}${VALUES}`, dtype: 'F32', shape: [values.length], bytes: bytesOf(values) },
      dense
        ? { name: `${name}.delta.bitmap`, dtype: 'U8', shape: [Math.ceil(size / 8)], bytes: bitmapOf(indices, size) }
        : { name: `${name}.delta.indices`, dtype: 'I32', shape: [indices.length], bytes: bytesOf(indices) },
    ];
  });
  await using sink = await createSafetensorsSink(
    join(folder, 'adapter_model.safetensors'),
    tensors.map(({ name, dtype, shape }) => ({ name, dtype, shape })),
  );
  for (const { name, bytes } of tensors) await sink.write(name, bytes);
  await sink.finalize();
  await writeJson(join(folder, 'adapter_config.json'), {
    peft_type: 'SPARSE_DELTA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: base,
    fan_in_fan_out: transposed,
    inference_mode: true,
    target_modules: used.map(({ name }) => name),
    shapes: Object.fromEntries(used.map(({ name, outFeatures, inFeatures }) => [name, [outFeatures, inFeatures]])),
  });
}

/** Writes the same as whole tensors, in the layout of the base, for a merge: one in memory at a time. */
export async function writeDense(folder: string, deltas: readonly DeltaModule[], transposed: boolean): Promise<void> {
  await using sink = await createSafetensorsSink(
    join(folder, 'adapter_model.safetensors'),
    deltas.map(({ name, outFeatures, inFeatures }) => ({
      name: `base_model.model.${name}.delta_weight`,
      dtype: 'F32',
      shape: transposed ? [inFeatures, outFeatures] : [outFeatures, inFeatures],
    })),
  );
  for (const { name, outFeatures, inFeatures, indices, values } of deltas) {
    const whole = new Float32Array(outFeatures * inFeatures);
    for (const [i, at] of indices.entries()) whole[at] = values[i];
    const stored = transposed ? transpose(whole, outFeatures, inFeatures) : whole;
    await sink.write(`base_model.model.${name}.delta_weight`, bytesOf(stored));
  }
  await sink.finalize();
  await writeJson(join(folder, 'adapter_config.json'), { peft_type: 'LORA', fan_in_fan_out: transposed });
}

function bytesOf({ buffer, byteOffset, byteLength }: Float32Array | Int32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

/** Bit `i % 8` of byte `i / 8` is set for place i. */
function bitmapOf(indices: Int32Array, size: number): Uint8Array {
  const bits = new Uint8Array(Math.ceil(size / 8));
  for (const at of indices) bits[at >> 3] |= 1 << (at & 7);
  return bits;
}

/** Throws FormatError for tensors that do not fit together or their shapes. */
export async function readDeltas(
  path: string,
  config: Readonly<Record<string, unknown>>,
  source: TensorSource,
): Promise<DeltaModule[]> {
  const refuse = (name: string, detail: string): never => {
    throw new FormatError(path, 'sparse-delta', `module ${quote(name)} ${detail}`);
  };
  const shapes = (config['shapes'] ?? {}) as Readonly<Record<string, unknown>>;
  const names = [...source.tensors.keys()];
  const deltas: DeltaModule[] = [];
  for (const tensor of names.filter((one) => one.endsWith(VALUES)).toSorted()) {
    const name = tensor.slice(0, -VALUES.length);
    const shape = shapes[name];
    if (!Array.isArray(shape) || shape.length !== 2 || !shape.every((size) => Number.isInteger(size) && size > 0))
      return refuse(name, 'has no shape in adapter_config.json');
    const [outFeatures, inFeatures] = shape as [number, number];
    const read = async (part: string, dtype: string): Promise<Uint8Array> => {
      const found = await source.read(part);
      if (found.dtype !== dtype) return refuse(name, `has ${quote(part)} as ${found.dtype}, and ${dtype} is expected`);
      return found.data.slice();
    };
    const values = new Float32Array((await read(tensor, 'F32')).buffer);
    const [flat, bitmap] = [`${name}.delta.indices`, `${name}.delta.bitmap`];
    const indices = source.tensors.has(flat)
      ? new Int32Array((await read(flat, 'I32')).buffer)
      : source.tensors.has(bitmap)
        ? placesOf(await read(bitmap, 'U8'))
        : refuse(name, 'has values, and nothing that says where they stand');
    if (indices.length !== values.length) refuse(name, `has ${values.length} values for ${indices.length} places`);
    for (let i = 0; i < indices.length; i++) {
      if (indices[i] < (i === 0 ? 0 : indices[i - 1] + 1) || indices[i] >= outFeatures * inFeatures)
        refuse(name, `has place ${indices[i]}, and places rise from 0 to ${outFeatures * inFeatures - 1}`);
    }
    deltas.push({ name, outFeatures, inFeatures, indices, values });
  }
  const stray = names.find((one) => !/\.delta\.(values|indices|bitmap)$/.test(one));
  if (stray !== undefined) refuse(stray, 'is no part of a sparse update');
  return deltas;
}

function placesOf(bits: Uint8Array): Int32Array {
  const places: number[] = [];
  for (const [byte, value] of bits.entries())
    for (let bit = 0; bit < 8; bit++) if (value & (1 << bit)) places.push(byte * 8 + bit);
  return Int32Array.from(places);
}

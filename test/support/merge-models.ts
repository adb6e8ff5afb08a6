/** Small experts of one base on the disk, in every form that a merge takes, and what they hold as plain numbers. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { openCheckpoint } from '../../formats/checkpoint.ts';
import { type FloatDType, fromFloat32, toFloat32 } from '../../formats/dtype.ts';
import { createSafetensorsSink } from '../../formats/safetensors/writer.ts';
import { randomSource, randomValues } from './random.ts';
import type { TinyModel } from './tiny-models.ts';

export interface NamedTensor {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** A checkpoint in memory, as float32. */
export type Weights = ReadonlyMap<string, NamedTensor>;

/** Everything a file or folder holds, as float32. */
export async function readWeights(path: string): Promise<Map<string, NamedTensor>> {
  await using source = await openCheckpoint(path);
  const weights = new Map<string, NamedTensor>();
  for (const [name, { dtype, shape }] of source.tensors) {
    weights.set(name, { shape, values: toFloat32(dtype, (await source.read(name)).data) });
  }
  return weights;
}

/** As float32, from a model in memory. */
export function weightsOf({ source }: TinyModel): Map<string, NamedTensor> {
  return new Map([...source.tensors].map(([name, { dtype, shape, data }]) => [name, { shape, values: toFloat32(dtype, data) }]));
}

/** The weights of a model moved a little: an expert that was trained from it. */
export function nudged(base: Weights, seed: number, spread = 0.05): Map<string, NamedTensor> {
  const random = randomSource(seed);
  return new Map(
    [...base].map(([name, { shape, values }]) => {
      const change = randomValues(random, values.length, spread);
      return [name, { shape, values: values.map((value, i) => value + change[i]) }];
    }),
  );
}

/** Writes weights as one `.safetensors` file, and returns its path. */
export async function saveFile(path: string, weights: Weights, dtype: FloatDType = 'F32'): Promise<string> {
  await using sink = await createSafetensorsSink(
    path,
    [...weights].map(([name, { shape }]) => ({ name, dtype, shape })),
  );
  for (const [name, { values }] of weights) await sink.write(name, fromFloat32(dtype, values));
  await sink.finalize();
  return path;
}

/** Writes weights as a folder with a configuration, and returns its path. */
export async function saveFolder(
  folder: string,
  weights: Weights,
  config: Readonly<Record<string, unknown>>,
  dtype: FloatDType = 'F32',
): Promise<string> {
  mkdirSync(folder, { recursive: true });
  await saveFile(join(folder, 'model.safetensors'), weights, dtype);
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  return folder;
}

/** Writes an adapter as PEFT does, and returns its folder. */
export async function saveAdapter(
  folder: string,
  tensors: Weights,
  config: Readonly<Record<string, unknown>> = {},
): Promise<string> {
  mkdirSync(folder, { recursive: true });
  await saveFile(join(folder, 'adapter_model.safetensors'), tensors);
  const defaults = { peft_type: 'LORA', r: 2, lora_alpha: 4, fan_in_fan_out: false, use_rslora: false };
  writeFileSync(join(folder, 'adapter_config.json'), JSON.stringify({ ...defaults, ...config }));
  return folder;
}

/** A random tensor. */
export function randomTensor(shape: readonly number[], seed: number, spread = 0.3): NamedTensor {
  const count = shape.reduce((product, size) => product * size, 1);
  return { shape, values: randomValues(randomSource(seed), count, spread) };
}

/** `factor B A`, (out, in), by the definition. @param a (rank, in), @param b (out, rank) */
export function product(a: NamedTensor, b: NamedTensor, factor: number): Float64Array {
  const [rank, columns] = a.shape;
  const [rows] = b.shape;
  const result = new Float64Array(rows * columns);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      for (let r = 0; r < rank; r++) result[i * columns + j] += factor * b.values[i * rank + r] * a.values[r * columns + j];
    }
  }
  return result;
}

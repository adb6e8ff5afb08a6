/** What adapter tensors start as. */
import { Parameter } from '../../../compute/optim/parameter.ts';
import { Random } from '../../../compute/random.ts';
import type { TrainedModule } from './schedule.ts';

/** Uniform within +-1/sqrt(columns): Kaiming's with a slope of sqrt(5). A stream of its own for every layer. */
export function kaimingUniform(rows: number, columns: number, seed: number, name: string): Float32Array {
  const random = new Random(seed, name);
  const bound = 1 / Math.sqrt(columns);
  return Float32Array.from({ length: rows * columns }, () => (2 * random.nextFloat() - 1) * bound);
}

/** Normal with standard deviation `spread`, by Box and Muller. */
export function normal(length: number, spread: number, seed: number, name: string): Float32Array {
  const random = new Random(seed, name);
  return Float32Array.from({ length }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - random.nextFloat()));
    return spread * radius * Math.cos(2 * Math.PI * random.nextFloat());
  });
}

/** Puts a new tensor among those of a layer. */
export function place(module: TrainedModule, name: string, shape: readonly number[], values: Float32Array, frozen = false): void {
  const parameter = new Parameter(shape, values);
  if (frozen) parameter.frozen = new Uint8Array(values.length).fill(1);
  module.parameters.set(name, parameter);
}

/** Sums of gradients over batches, in memory that serves one sum after the other: fresh memory for each costs as much as a tenth of its products. */
import type { NdArray } from '../compute/engine.ts';

export class GradientSums {
  readonly #sums = new Map<string, Float32Array>();
  readonly #parts = new Map<string, Float32Array>();

  /** Where a batch writes the gradient of that name: the first one begins the sum, another is to be added. */
  room(name: string, shape: readonly number[], first: boolean): NdArray {
    const memory = first ? this.#sums : this.#parts;
    const length = shape.reduce((product, size) => product * size, 1);
    let data = memory.get(name);
    if (data?.length !== length) {
      data = new Float32Array(length);
      memory.set(name, data);
    }
    return { dtype: 'F32', shape, data };
  }

  /** Adds what a later batch wrote. */
  add(names: Iterable<string>): void {
    for (const name of names) {
      const [sum, part] = [this.of(name), this.#parts.get(name)!];
      for (let i = 0; i < sum.length; i++) sum[i] += part[i];
    }
  }

  /** Good until the next sum is begun. */
  of(name: string): Float32Array {
    return this.#sums.get(name)!;
  }
}

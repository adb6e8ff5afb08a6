/**
 * What the present components of a layer cannot express, seen through a small random window: the smoothed `P_B^T (dL/dW) P_A`, whose norm is large where
 * the loss still pulls (adapters.md 8.2). Costs 16 (m + n) multiplications a token and keeps 8 x 8 numbers a layer.
 */
import type { Blas } from '../../../compute/blas.ts';
import { normal } from './initial.ts';
import type { TrainedModule } from './schedule.ts';

/** Directions on either side. */
const SIZE = 8;
const DECAY = 0.95;

/** A probe as plain data. */
export interface ProbeState {
  readonly drawn: number;
  readonly means: Readonly<Record<string, Float64Array>>;
}

export class GradientProbe {
  readonly #seed: number;
  /** Draws of the directions so far: after each growth they are new, and the mean starts over. */
  #drawn = 0;
  readonly #means = new Map<string, Float64Array>();
  /** Of the step that is on its way. */
  readonly #coming = new Map<string, Float32Array>();
  readonly #sides = new Map<string, { readonly left: Float32Array; readonly right: Float32Array }>();

  constructor(seed: number) {
    this.#seed = seed;
  }

  /** @param gradient dL/dW, (m, n) */
  async observe({ name, outFeatures: m, inFeatures: n }: TrainedModule, gradient: Float32Array, blas: Blas): Promise<void> {
    let sides = this.#sides.get(name);
    if (sides === undefined) {
      const draw = (length: number, side: string) =>
        normal(length * SIZE, 1 / Math.sqrt(length), this.#seed, `${name} ${side} ${this.#drawn}`);
      sides = { left: draw(m, 'probe left'), right: draw(n, 'probe right') };
      this.#sides.set(name, sides);
    }
    const left = { rows: m, columns: SIZE, data: sides.left };
    const inner = await blas.gemm(left, { rows: m, columns: n, data: gradient }, { transposeA: true });
    this.#coming.set(name, (await blas.gemm(inner, { rows: n, columns: SIZE, data: sides.right })).data);
  }

  /** Takes in what the step saw. */
  commit(): void {
    for (const [name, seen] of this.#coming) {
      const mean = this.#means.get(name) ?? new Float64Array(SIZE * SIZE);
      for (let i = 0; i < mean.length; i++) mean[i] = DECAY * mean[i] + (1 - DECAY) * seen[i];
      this.#means.set(name, mean);
    }
    this.#coming.clear();
  }

  /** Frobenius norm of the mean. */
  score(name: string): number {
    return Math.hypot(...(this.#means.get(name) ?? []));
  }

  redraw(): void {
    this.#drawn++;
    this.#means.clear();
    this.#sides.clear();
  }

  state(): ProbeState {
    return { drawn: this.#drawn, means: Object.fromEntries(this.#means) };
  }

  restore({ drawn, means }: ProbeState): void {
    this.#drawn = drawn;
    this.#sides.clear();
    this.#means.clear();
    for (const [name, mean] of Object.entries(means)) this.#means.set(name, mean.slice());
  }
}

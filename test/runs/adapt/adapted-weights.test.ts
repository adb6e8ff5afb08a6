/** Weights with trainable updates: what a forward pass reads, and the gradients of the factors against differences, for every form. */
import { describe, expect, it } from 'vitest';
import { Parameter } from '../../../src/compute/optim/parameter.ts';
import { normal } from '../../../src/methods/rank/training/initial.ts';
import type { TrainedModule } from '../../../src/methods/rank/training/schedule.ts';
import type { LinearSite, WeightReader } from '../../../src/model/model.ts';
import { AdaptedWeights } from '../../../src/runs/adapt/adapted-weights.ts';
import { naiveBlas } from '../../support/naive-blas.ts';

const [M, N, R, SCALE] = [5, 7, 3, 1.5];
const site = { name: 'layer', outFeatures: M, inFeatures: N } as LinearSite;
const WEIGHT = normal(M * N, 1, 1, 'weight');
const base = { loadSite: async () => WEIGHT } as unknown as WeightReader;

const SHAPES: Readonly<Record<string, readonly number[]>> = {
  loraA: [R, N],
  loraB: [M, R],
  e: [R],
  core: [R, R],
  initialA: [R, N],
  initialB: [M, R],
  magnitude: [M],
};

function moduleOf(keys: readonly string[]): TrainedModule {
  const parameters = new Map(
    keys.map((key) => {
      const values = normal(
        SHAPES[key].reduce((product, dim) => product * dim, 1),
        0.5,
        2,
        key,
      );
      return [key, new Parameter(SHAPES[key], values)];
    }),
  );
  return { name: 'layer', block: 0, outFeatures: M, inFeatures: N, scale: SCALE, rank: R, parameters };
}

/** The definition, entry by entry; `norms` of the rows where they count as constants. */
function defined({ parameters }: TrainedModule, norms?: readonly number[]): { weight: number[]; norms: number[] } {
  const [a, b, e, core, initialA, initialB, magnitude] = Object.keys(SHAPES).map((key) => parameters.get(key)?.values);
  const weight: number[] = [];
  for (let i = 0; i < M; i++) {
    for (let j = 0; j < N; j++) {
      let sum = WEIGHT[i * N + j];
      for (let k = 0; k < R; k++) {
        for (let l = 0; l < R; l++) {
          const between = core ? core[k * R + l] : k === l ? (e ? e[k] : 1) : 0;
          sum += SCALE * b![i * R + k] * between * a![l * N + j];
        }
        if (initialA) sum -= SCALE * initialB![i * R + k] * initialA[k * N + j];
      }
      weight.push(sum);
    }
  }
  const own = norms ?? Array.from({ length: M }, (_, i) => Math.hypot(...weight.slice(i * N, (i + 1) * N)));
  const scaled = magnitude
    ? weight.map((value, at) => (value * magnitude[Math.floor(at / N)]) / own[Math.floor(at / N)])
    : weight;
  return { weight: scaled, norms: own as number[] };
}

describe.each([
  ['lora', ['loraA', 'loraB']],
  ['svd', ['loraA', 'loraB', 'e']],
  ['core', ['loraA', 'loraB', 'core']],
  ['lora less its start', ['loraA', 'loraB', 'initialA', 'initialB']],
  ['magnitude and direction', ['loraA', 'loraB', 'magnitude']],
] as const)('%s', (_, keys) => {
  const module = moduleOf(keys);
  const weights = new AdaptedWeights({ base, modules: new Map([['layer', module]]), blas: naiveBlas(), keptBytes: 0 });

  it('is read as it is defined', async () => {
    const read = await weights.loadSite(site);
    for (const [at, value] of defined(module).weight.entries()) expect(Math.abs(read[at] - value)).toBeLessThan(1e-5);
  });

  it('has the gradients that differences find', async () => {
    const pulled = normal(M * N, 1, 3, 'gradient');
    // The published magnitude-and-direction update takes the norms of rows as constants.
    const { norms } = defined(module);
    const loss = () => defined(module, norms).weight.reduce((sum, value, at) => sum + value * pulled[at], 0);
    await weights.pullBack(site, pulled.slice());
    for (const [key, { values, gradient }] of module.parameters) {
      if (key.startsWith('initial')) continue;
      for (let i = 0; i < values.length; i++) {
        const [kept, step] = [values[i], 1e-2];
        values[i] = kept + step;
        const above = loss();
        values[i] = kept - step;
        const below = loss();
        values[i] = kept;
        expect(Math.abs((above - below) / (2 * step) - gradient[i]), `${key} ${i}`).toBeLessThan(
          1e-3 * Math.max(1, Math.abs(gradient[i])),
        );
      }
    }
  });
});

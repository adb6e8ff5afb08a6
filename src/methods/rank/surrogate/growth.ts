/** IncreLoRA and TriAdaptLoRA without training: their rounds of growth, over frozen components in place of learned ones (adapters.md 5.5). */
import type { Blas } from '../../../compute/blas.ts';
import type { AdaptedShape } from '../rank-budget.ts';
import { grownByThreshold, grownExactly, layersAtATime, requireStart } from '../training/growth.ts';
import { updateSensitivity } from '../training/increlora.ts';
import type { TraceEntry } from '../training/schedule.ts';
import { GROWN_AFTER, growingLayers } from '../training/triadaptlora.ts';
import { type CandidateLayer, rankBounds, type Surrogate, type SurrogateChoice, type SurrogateOptions } from './surrogate.ts';

/** Rounds that TriAdaptLoRA's law of growth is spread over; after them it stays where it ends, until the budget is spent. */
const ROUNDS = 16;

/** `best` scores a layer by what its next component changes, to first order; `paper` by what the loss depends on in those it has, over the windows. */
export function increlora(options: SurrogateOptions, layers: readonly AdaptedShape[]): Surrogate {
  const paper = options.preset === 'paper';
  const { mean, most } = rankBounds(options, layers);
  const first = options.startRank ?? (paper ? 1 : 0);
  requireStart('increlora', first, options.budget, layers);
  const each = Math.max(1, Math.floor(mean / 2));
  /** Of every rank that growth may come to, by layer: the published score of each window. */
  const windows = new Map<string, number[][]>();
  return {
    mostOf: ({ outFeatures, inFeatures }) => Math.min(most, outFeatures, inFeatures),
    ...(paper
      ? {
          observe: async (layer: CandidateLayer, gradient: Float32Array, blas: Blas) => {
            const levels = levelsOf(first, each, layer.components.count);
            const own = await sensitivities(layer, levels, gradient, blas);
            windows.set(layer.name, [...(windows.get(layer.name) ?? []), own]);
          },
        }
      : {}),
    choose(layers) {
      const scores = new Map(
        layers.map(({ name, mean }) => [name, paper ? spreadScores(windows.get(name) ?? []) : mean.gains] as const),
      );
      const at = ({ name, components }: CandidateLayer, rank: number) =>
        scores.get(name)![paper ? levelsOf(first, each, components.count).indexOf(rank) : rank] ?? 0;
      return {
        ...grow(options, layers, {
          first,
          each,
          threshold: paper,
          score: at,
          growing: (_, { cheapest }) => Math.min(layersAtATime(layers.length), cheapest),
        }),
        scores,
      };
    },
  };
}

/** `best` scores a layer as IncreLoRA's does; `paper` by the norm of the square core after one step along the mean gradient, over the times it has grown. */
export function triadaptlora(options: SurrogateOptions, layers: readonly AdaptedShape[]): Surrogate {
  const { preset, growth = 'linear' } = options;
  const paper = preset === 'paper';
  const { mean, most } = rankBounds(options, layers);
  const first = options.startRank ?? (paper ? 1 : 0);
  requireStart('triadaptlora', first, options.budget, layers);
  const each = Math.max(1, Math.floor(mean / 2));
  const lastRound = GROWN_AFTER[preset] * ROUNDS;
  return {
    mostOf: ({ outFeatures, inFeatures }) => Math.min(most, outFeatures, inFeatures),
    choose(layers) {
      const coreNorm = ({ components: { count }, mean: { core } }: CandidateLayer, rank: number): number => {
        let square = 0;
        const size = Math.min(rank, count);
        for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) square += core[i * count + j] ** 2;
        const blocks = Math.max(1, Math.ceil((rank - first) / each) + (first > 0 ? 1 : 0));
        return Math.sqrt(square) / blocks;
      };
      const scores = new Map(
        layers.map((layer) => [
          layer.name,
          paper ? Float64Array.from({ length: layer.components.count }, (_, k) => coreNorm(layer, k + 1)) : layer.mean.gains,
        ]),
      );
      return {
        ...grow(options, layers, {
          first,
          each,
          threshold: false,
          score: (layer, rank) => (paper ? coreNorm(layer, rank) : (layer.mean.gains[rank] ?? 0)),
          growing: (round, { usual }) => growingLayers(growth, usual, Math.min(1, round / lastRound), layers.length),
        }),
        scores,
      };
    },
  };
}

interface Rules {
  readonly first: number;
  readonly each: number;
  /** Every layer as good as the last that grows, ties and all. */
  readonly threshold: boolean;
  score(layer: CandidateLayer, rank: number): number;
  /** Layers that grow in a round; `left` are the ranks that there is room for, of the usual cost and, in whole ones, of the cheapest layer. */
  growing(round: number, left: { readonly usual: number; readonly cheapest: number }): number;
}

function grow(
  options: SurrogateOptions,
  layers: readonly CandidateLayer[],
  { first, each, threshold, score, growing }: Rules,
): Omit<SurrogateChoice, 'scores'> {
  const { budget } = options;
  const ranks = new Map(layers.map(({ name, components }) => [name, Math.min(first, components.count)]));
  const trace: TraceEntry[] = [];
  const { most } = rankBounds(options, layers);
  const cost = layers.reduce((sum, layer) => sum + budget.cost(layer), 0) / layers.length;
  const least = Math.min(...layers.map((layer) => budget.cost(layer)));
  for (let round = 1; ; round++) {
    const spent = layers.reduce((sum, layer) => sum + ranks.get(layer.name)! * budget.cost(layer), 0);
    if (spent + least > budget.total + 1e-9) break;
    const left = budget.total - spent;
    const rules = {
      ranks,
      most: growing(round, { usual: left / cost, cheapest: Math.floor(left / least + 1e-9) }),
      each,
      mostOf: ({ components }: CandidateLayer) => Math.min(most, components.count),
      score: (layer: CandidateLayer) => score(layer, ranks.get(layer.name)!),
    };
    const grown = threshold ? grownByThreshold(layers, rules) : grownExactly(layers, { ...rules, budget });
    if (grown.size === 0) break;
    for (const [{ name }, count] of grown) ranks.set(name, ranks.get(name)! + count);
    const totalRank = [...ranks.values()].reduce((sum, rank) => sum + rank, 0);
    trace.push({ step: round, totalRank, changed: [...grown.keys()].map(({ name }) => name) });
  }
  return { kept: new Map([...ranks].map(([name, rank]) => [name, Array.from({ length: rank }, (_, k) => k)])), trace };
}

/** Ranks that a layer comes to: the first, and then so many more each time. */
function levelsOf(first: number, each: number, most: number): number[] {
  const levels = [Math.min(first, most)];
  while (levels.at(-1)! < most) levels.push(Math.min(most, levels.at(-1)! + each));
  return levels;
}

/** The published score of a layer's update at each of its ranks, by one window's gradient. */
async function sensitivities(
  { components: { count, values, left, right }, outFeatures: m, inFeatures: n }: CandidateLayer,
  levels: readonly number[],
  gradient: Float32Array,
  blas: Blas,
): Promise<number[]> {
  if (count === 0) return levels.map(() => 0);
  const update = { rows: m, columns: n, data: new Float32Array(m * n) };
  const own: number[] = [];
  let rank = 0;
  for (const level of levels) {
    if (level > rank) {
      const scaled = left.subarray(rank * m, level * m).map((value, i) => value * values[rank + Math.floor(i / m)]);
      await blas.gemm(
        { rows: level - rank, columns: m, data: scaled },
        { rows: level - rank, columns: n, data: right.subarray(rank * n, level * n) },
        { transposeA: true, beta: 1, out: update },
      );
      rank = level;
    }
    own.push(updateSensitivity(update.data, gradient));
  }
  return own;
}

/** Mean over windows times mean distance from it, level by level. */
function spreadScores(windows: readonly (readonly number[])[]): Float64Array {
  return Float64Array.from(windows[0] ?? [], (_, level) => {
    const own = windows.map((window) => window[level]);
    const mean = own.reduce((sum, value) => sum + value, 0) / own.length;
    return mean * own.reduce((sum, value) => sum + Math.abs(value - mean) / own.length, 0);
  });
}

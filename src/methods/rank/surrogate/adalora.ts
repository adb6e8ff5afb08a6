/** AdaLoRA without training: sensitivity times uncertainty of frozen components, over the windows of a text (adapters.md 5.5). */
import { RecipeError } from '../../../errors.ts';
import { type Component, keepBest } from '../keep-best.ts';
import type { AdaptedShape } from '../rank-budget.ts';
import { cubicBudget, cutTimes, START_RATIO } from '../training/adalora.ts';
import type { TraceEntry } from '../training/schedule.ts';
import { Sensitivity } from '../training/sensitivity.ts';
import { type CandidateLayer, rankBounds, type Surrogate, type SurrogateOptions } from './surrogate.ts';

/** One window's `|w dL/dw|` of everything that a layer's components consist of: their values, the entries of a, and those of u. */
interface Entries {
  readonly values: Float32Array;
  readonly right: Float32Array;
  readonly left: Float32Array;
}

/**
 * `paper`: moving averages from nothing and the cubic law, with windows for steps, from 1.5 times the mean rank. `best`: plain means and mean deviations, for a sample
 * has no past to forget, and one cut, by score over cost.
 */
export function adalora(options: SurrogateOptions, layers: readonly AdaptedShape[]): Surrogate {
  const { budget, preset, startRank } = options;
  const paper = preset === 'paper';
  const bounds = rankBounds(options, layers);
  if (paper && startRank !== undefined && startRank < bounds.mean)
    throw new RecipeError(
      `--budget: allows ${bounds.mean.toFixed(2)} ranks a layer, and adalora starts with ${startRank}, which it only cuts; use a smaller budget or a larger --start-rank`,
    );
  const most = paper ? Math.min(bounds.most, startRank ?? Math.ceil(START_RATIO * bounds.mean)) : bounds.most;
  /** Of the layers at hand, window by window. */
  const seen = new Map<string, Entries[]>();
  const moving = new Map<string, { readonly [Part in keyof Entries]: Sensitivity }>();
  /** `paper`: of every window; `best`: of all of them together. */
  const scores = new Map<string, Float64Array[]>();

  return {
    mostOf: ({ outFeatures, inFeatures }) => Math.min(most, outFeatures, inFeatures),
    async observe(layer, gradient, blas) {
      const { name, components, outFeatures: m, inFeatures: n } = layer;
      const { count, values, left, right } = components;
      if (count === 0) return;
      const g = { rows: m, columns: n, data: gradient };
      // dL/da_k = value_k G^T u_k, dL/du_k = value_k G a_k, dL/dvalue_k = u_k^T G a_k.
      const ofRight = (await blas.gemm({ rows: count, columns: m, data: left }, g)).data;
      const ofLeft = (await blas.gemm({ rows: count, columns: n, data: right }, g, { transposeB: true })).data;
      const own: Entries = {
        values: new Float32Array(count),
        right: right.map((value, i) => Math.abs(value * values[Math.floor(i / n)] * ofRight[i])),
        left: left.map((value, i) => Math.abs(value * values[Math.floor(i / m)] * ofLeft[i])),
      };
      for (let k = 0; k < count; k++) {
        let slope = 0;
        for (let i = k * m; i < (k + 1) * m; i++) slope += left[i] * ofLeft[i];
        own.values[k] = Math.abs(values[k] * slope);
      }
      if (!paper) {
        seen.set(name, [...(seen.get(name) ?? []), own]);
        return;
      }
      const tracked = moving.get(name) ?? {
        values: new Sensitivity(own.values.length),
        right: new Sensitivity(own.right.length),
        left: new Sensitivity(own.left.length),
      };
      moving.set(name, tracked);
      for (const part of ['values', 'right', 'left'] as const) tracked[part].addImportance(own[part]);
      scores.set(name, [...(scores.get(name) ?? []), componentScores(layer, (part, i) => tracked[part].at(i))]);
    },
    finish(layer) {
      const windows = seen.get(layer.name);
      moving.delete(layer.name);
      if (windows === undefined) return;
      seen.delete(layer.name);
      const spread = { values: products(windows, 'values'), right: products(windows, 'right'), left: products(windows, 'left') };
      scores.set(layer.name, [componentScores(layer, (part, i) => spread[part][i])]);
    },
    choose(layers) {
      const candidates = (window: number): Component<CandidateLayer>[] =>
        layers.flatMap((layer) =>
          Array.from({ length: layer.components.count }, (_, k) => ({
            layer,
            k,
            cost: budget.cost(layer),
            value: scores.get(layer.name)?.at(window)?.[k] ?? 0,
          })),
        );
      const last = new Map(layers.map(({ name }) => [name, scores.get(name)?.at(-1) ?? new Float64Array()]));
      if (!paper) return { kept: keepBest(candidates(-1), budget.total), scores: last, trace: [] };
      const windows = Math.max(...[...scores.values()].map(({ length }) => length));
      const { start, end } = cutTimes(windows);
      const from = layers.reduce((sum, layer) => sum + layer.components.count * budget.cost(layer), 0);
      const trace: TraceEntry[] = [];
      let kept = keepBest(candidates(0), from);
      for (let window = start + 1; window <= end; window++) {
        const before = kept;
        kept = keepBest(
          candidates(window - 1),
          Math.floor(cubicBudget(window, { from, to: Math.min(from, budget.total), start, end }) + 1e-9),
        );
        const of = (all: typeof kept, name: string) => (all.get(name) ?? []).join();
        const changed = layers.filter(({ name }) => of(before, name) !== of(kept, name)).map(({ name }) => name);
        const totalRank = [...kept.values()].reduce((sum, { length }) => sum + length, 0);
        if (changed.length > 0) trace.push({ step: window, totalRank, changed });
      }
      return { kept, scores: last, trace };
    },
  };
}

/** `S_k = s(value_k) + mean_j s(a_kj) + mean_i s(u_ki)`. */
function componentScores(
  { components: { count }, inFeatures: n, outFeatures: m }: CandidateLayer,
  at: (part: keyof Entries, i: number) => number,
): Float64Array {
  return Float64Array.from({ length: count }, (_, k) => {
    let ofRight = 0;
    for (let j = k * n; j < (k + 1) * n; j++) ofRight += at('right', j);
    let ofLeft = 0;
    for (let i = k * m; i < (k + 1) * m; i++) ofLeft += at('left', i);
    return at('values', k) + ofRight / n + ofLeft / m;
  });
}

/** Mean over windows times mean distance from it, entry by entry. */
function products(windows: readonly Entries[], part: keyof Entries): Float64Array {
  return Float64Array.from(windows[0][part], (_, i) => {
    let mean = 0;
    for (const window of windows) mean += window[part][i] / windows.length;
    let deviation = 0;
    for (const window of windows) deviation += Math.abs(window[part][i] - mean) / windows.length;
    return mean * deviation;
  });
}

/** Experts beside the layers of a whole model: gradients of their tensors against differences, with pads, and of how evenly they are picked. */
import { afterAll, beforeAll, expect, it } from 'vitest';
import { ModelGradient } from '../../src/calibration/model-gradient.ts';
import { Spool } from '../../src/calibration/state-store.ts';
import type { Engine, NdArray } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { ROUTED_TENSORS, type RoutedShape, routedSizes } from '../../src/graph/routed-branch.ts';
import { normal } from '../../src/methods/rank/training/initial.ts';
import { createModel } from '../../src/model/architectures/index.ts';
import type { LinearSite, Model, WeightReader } from '../../src/model/model.ts';
import { tinyLlama } from '../support/tiny-models.ts';

/** Differences of float32 sums. */
const TOLERANCE = 1e-2;
const WINDOWS = [7, 4, 7].map((length, w) => Int32Array.from({ length }, (_, i) => (w * 13 + i * 7 + 3) % 41));
const TOPK: RoutedShape = { routing: 'topk', experts: 4, topK: 2, rank: 2, sharedA: false, sharedExpert: false };
const SOFT: RoutedShape = { routing: 'soft', experts: 3, topK: 3, rank: 2, sharedA: true, sharedExpert: true };

let engine: Engine;
beforeAll(async () => {
  engine = await createEngine({ threads: 1 });
});
afterAll(() => engine[Symbol.asyncDispose]());

const tiny = tinyLlama('routed');
const model: Model = createModel(tiny.config, 'config.json', tiny.source);
/** Experts at two kinds of layers. */
const routed = ({ name }: LinearSite) => (/v_proj|down_proj/.test(name) ? TOPK : /up_proj/.test(name) ? SOFT : undefined);
const experts = new Map<string, Float32Array>(
  model.blocks.flatMap(({ sites }) =>
    sites.flatMap((site) => {
      const shape = routed(site);
      if (!shape) return [];
      const sizes = routedSizes(shape, site);
      return ROUTED_TENSORS.map((key) => {
        const [rows, columns] = sizes[key];
        return [`${site.name}.${key}`, normal(rows * columns, 0.4, 3, `${site.name} ${key}`)] as const;
      });
    }),
  ),
);
const weights: WeightReader = {
  load: async (name) => experts.get(name) ?? tiny.source.values(name)!,
  loadRows: async (name, start, end) => {
    const columns = tiny.source.tensors.get(name)!.shape[1];
    return tiny.source.values(name)!.slice(start * columns, end * columns);
  },
  loadSite: async (site) => tiny.source.values(`${site.name}.weight`)!,
  info: (name) => tiny.source.tensors.get(name),
  routed,
};
const wave = (length: number, seed: number) => Float32Array.from({ length }, (_, i) => Math.sin(12.9898 * (i + 1) + seed));

/** A loss that is linear in the last hidden states, and its gradients. */
async function gradients(on?: (name: string, gradient: Float32Array) => void): Promise<number> {
  await using spool = new Spool();
  await using pass = new ModelGradient({ model, engine, path: 'tiny', spool, windows: WINDOWS, batchTokens: 16 });
  const { hiddenSize } = model.shape;
  const hidden = await (await pass.forward(weights)).read(0, pass.tokenCount);
  const slope = wave(hidden.length, 1);
  const loss = hidden.reduce((sum, value, i) => sum + value * slope[i], 0);
  await using cotangent = spool.allocate(pass.tokenCount, hiddenSize);
  await cotangent.write(0, slope);
  if (on)
    await pass.backward(weights, cotangent, async (_, sites, found) => {
      for (const { name } of sites.keys()) expect(routed({ name } as LinearSite)).toBeUndefined();
      for (const [name, gradient] of found) on(name, gradient.slice());
    });
  return loss;
}

it('a model with experts has the gradients of their tensors that differences give', async () => {
  const found = new Map<string, Float32Array>();
  await gradients((name, gradient) => found.set(name, gradient));
  expect([...found.keys()].sort()).toEqual([...experts.keys()].sort());
  for (const [name, values] of experts) {
    const own = found.get(name)!;
    const length = Math.hypot(...own);
    const kept = values.slice();
    const at = async (step: number) => {
      for (let i = 0; i < values.length; i++) values[i] = kept[i] + (step * own[i]) / length;
      return await gradients();
    };
    const step = 5e-3;
    const measured = ((await at(step)) - (await at(-step))) / (2 * step);
    values.set(kept);
    expect(Math.abs(measured - length), name).toBeLessThan(TOLERANCE * Math.max(1, length));
  }
}, 60_000);

it('how evenly a block picks is differentiated by its routers, pads left out', async () => {
  const [block] = model.blocks;
  const { model: graph, key, weights: sources, experts: outputs } = model.blockGradient(block, { batch: 2, sequence: 5 }, routed);
  const program = await engine.compile(graph, { key });
  const run = async (hidden: Float32Array) => {
    const { hiddenSize } = model.shape;
    const feeds: Record<string, NdArray> = {
      hidden: { dtype: 'F32', shape: [2, 5, hiddenSize], data: hidden },
      lengths: { dtype: 'I32', shape: [2], data: Int32Array.of(5, 3) },
      cotangent: { dtype: 'F32', shape: [2, 5, hiddenSize], data: new Float32Array(hidden.length) },
      balance: { dtype: 'F32', shape: [1], data: Float32Array.of(1) },
    };
    for (const { name, shape } of graph.graph.inputs) {
      const source = sources.get(name);
      if (source === undefined) continue;
      const data = typeof source === 'string' ? await weights.load(source) : await weights.loadSite(source);
      feeds[name] = { dtype: 'F32', shape: shape!.map(Number), data };
    }
    return await program.run(Object.fromEntries(program.inputNames.map((name) => [name, feeds[name]])));
  };
  const hidden = wave(10 * model.shape.hiddenSize, 2);
  const first = await run(hidden);
  const loss = (made: typeof first) => made['balance_loss'].data[0] as number;
  expect(loss(first)).toBeGreaterThan(0.9);
  const padded = hidden.slice();
  padded.fill(7, 8 * model.shape.hiddenSize);
  expect(loss(await run(padded))).toBeCloseTo(loss(first), 5);
  const name = [...outputs.keys()].find((tensor) => /v_proj\.router/.test(tensor))!;
  const own = (first[outputs.get(name)!].data as Float32Array).slice();
  const values = experts.get(name)!;
  const kept = values.slice();
  const length = Math.hypot(...own);
  expect(length).toBeGreaterThan(0);
  const at = async (step: number) => {
    for (let i = 0; i < values.length; i++) values[i] = kept[i] + (step * own[i]) / length;
    return loss(await run(hidden));
  };
  const measured = ((await at(2e-3)) - (await at(-2e-3))) / 4e-3;
  values.set(kept);
  expect(Math.abs(measured - length)).toBeLessThan(TOLERANCE * length);
}, 60_000);

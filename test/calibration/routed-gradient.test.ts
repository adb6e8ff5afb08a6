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

/** Central differences of `loss` over `values`, along the gradient and across it, where entries that are missing from it show. */
async function expectSlopes(name: string, values: Float32Array, own: Float32Array, step: number, loss: () => Promise<number>) {
  const length = Math.hypot(...own);
  expect(length, name).toBeGreaterThan(0);
  const kept = values.slice();
  for (const direction of [own, ...[1, 2].map((seed) => normal(own.length, 1, seed, name))]) {
    const norm = Math.hypot(...direction);
    const at = async (to: number) => {
      for (let i = 0; i < values.length; i++) values[i] = kept[i] + (to * direction[i]) / norm;
      return await loss();
    };
    const measured = ((await at(step)) - (await at(-step))) / (2 * step);
    const expected = own.reduce((sum, value, i) => sum + (value * direction[i]) / norm, 0);
    expect(Math.abs(measured - expected) / length, name).toBeLessThan(TOLERANCE);
  }
  values.set(kept);
}

it('a model with experts has the gradients of their tensors that differences give', async () => {
  const found = new Map<string, Float32Array>();
  await gradients((name, gradient) => found.set(name, gradient));
  expect([...found.keys()].sort()).toEqual([...experts.keys()].sort());
  for (const [name, values] of experts) {
    const own = found.get(name)!;
    await expectSlopes(name, values, own, 5e-3, () => gradients());
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
  await expectSlopes(name, values, own, 2e-3, async () => loss(await run(hidden)));
}, 60_000);

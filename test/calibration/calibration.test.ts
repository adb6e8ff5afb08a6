/** The calibration pass on a network that is computed by hand. */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { Calibration, type CalibrationOptions, type CalibrationProgress } from '../../src/calibration/calibration.ts';
import { FormatError, RecipeError } from '../../src/errors.ts';
import { FEATURES, HIDDEN, ToyEngine, ToyWeights, toyBlas, toyBlock, toyModel } from './doubles.ts';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'calibration-test-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

const WINDOWS = [
  [1, 2, 3, 4],
  [5, 6],
  [7, 8, 9],
  [10, 1, 2, 3],
].map((ids) => Int32Array.from(ids));
const INPUT = 'model.layers.0.mix';

function calibration(options: Partial<CalibrationOptions> = {}): Calibration {
  const model = options.model ?? toyModel();
  return new Calibration({
    model,
    engine: new ToyEngine().asEngine(),
    blas: toyBlas,
    windows: WINDOWS,
    path: 'toy',
    batchTokens: 8,
    folder,
    ...options,
  });
}

/** Hidden states of each window before block `depth`, without batches. */
async function statesByHand(windows: readonly Int32Array[], depth: number, scale = 1): Promise<Float32Array[]> {
  const model = toyModel(Math.max(depth, 1));
  const weights = new ToyWeights(scale);
  let states: Float32Array[] = windows.map((window) =>
    Float32Array.from([...window].flatMap((id) => ToyWeights.row('embed.weight', id))),
  );
  for (const block of model.blocks.slice(0, depth)) {
    const w = await weights.loadSite(block.sites[0]);
    states = states.map((state) => toyBlock(state, w).hiddenOut);
  }
  return states;
}

async function collect<T>(items: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const item of items) all.push(item);
  return all;
}

describe('measure', () => {
  it.each([1, 4, 8, 1000])(
    'gives the mean of x x^T over real tokens, whatever the padding (%i tokens at once)',
    async (batchTokens) => {
      await using pass = calibration({ batchTokens });
      const weights = new ToyWeights();
      await pass.start(weights);
      await using measured = await pass.measure(toyModel().blocks[0], weights);
      const stats = measured.get(INPUT)!;

      const w = await weights.loadSite(toyModel().blocks[0].sites[0]);
      const rows = (await statesByHand(WINDOWS, 0)).flatMap((state) => [...toyBlock(state, w).mix]);
      expect(stats.tokenCount).toBe(13);
      expect(stats.features).toBe(FEATURES);
      for (let i = 0; i < FEATURES; i++) {
        for (let j = 0; j < FEATURES; j++) {
          let sum = 0;
          for (let t = 0; t < 13; t++) sum += rows[t * FEATURES + i] * rows[t * FEATURES + j];
          expect(stats.hessian[i * FEATURES + j]).toBeCloseTo(sum / 13, 9);
        }
      }
      const replayed = await collect(stats.batches());
      expect(replayed.flatMap(({ data }) => [...data])).toEqual(rows);
      expect(replayed.every(({ rows, columns, data }) => columns === FEATURES && data.length === rows * columns)).toBe(true);
      expect((await collect(stats.batches())).length).toBe(replayed.length);
    },
  );

  it('leaves the hidden states as they are, so that it may be repeated', async () => {
    await using pass = calibration();
    const weights = new ToyWeights();
    await pass.start(weights);
    const [block] = toyModel().blocks;
    await using first = await pass.measure(block, weights);
    await using again = await pass.measure(block, weights);
    expect(again.get(INPUT)!.hessian).toEqual(first.get(INPUT)!.hessian);
  });

  it('reads the weights that a pass needs, once', async () => {
    await using pass = calibration({ batchTokens: 4 });
    const weights = new ToyWeights();
    await pass.start(weights);
    weights.loads.length = 0;
    const [block] = toyModel().blocks;
    await using _ = await pass.measure(block, weights);
    await pass.advance(block, weights);
    // What enters the layer does not depend on its weight; what leaves the block does.
    expect(weights.loads).toEqual(['model.layers.0.mix.proj']);
  });

  it('gives the same bits from a file as from memory, and the file goes away', async () => {
    const weights = new ToyWeights();
    const [first, second] = toyModel().blocks;
    const results: { hessian: Float64Array; batches: number[][]; hidden: number[][] }[] = [];
    for (const ramBytes of [1e6, 100, 0]) {
      const own = mkdtempSync(join(folder, 'spool-'));
      {
        await using pass = calibration({ ramBytes, folder: own });
        await pass.start(weights);
        await pass.advance(first, weights);
        await using measured = await pass.measure(second, weights);
        const stats = measured.get(second.inputs[0])!;
        results.push({
          hessian: stats.hessian,
          batches: (await collect(stats.batches())).map(({ data }) => [...data]),
          hidden: (await collect(pass.hiddenStates())).map(({ hidden }) => [...hidden]),
        });
        expect(readdirSync(own).length).toBe(ramBytes === 1e6 ? 0 : 1);
        await measured.release(second.inputs[0]);
        expect(measured.size).toBe(0);
      }
      expect(readdirSync(own)).toEqual([]);
    }
    expect(results[1]).toEqual(results[0]);
    expect(results[2]).toEqual(results[0]);
  });

  it('names the input and the sample of an activation that is not finite', async () => {
    const weights = new ToyWeights();
    weights.loadRows = async (_, start, end) =>
      Float32Array.from({ length: (end - start) * HIDDEN }, (_, i) => (start + Math.floor(i / HIDDEN) === 8 ? Number.NaN : 1));
    await using pass = calibration();
    await pass.start(weights);
    const failure = pass.measure(toyModel().blocks[0], weights);
    await expect(failure).rejects.toThrow(FormatError);
    await expect(failure).rejects.toThrow(/model\.layers\.0\.mix is NaN at token 1 of sample 2 .*\[non-finite-activation\]/);
  });

  it('refuses an input that the block does not have', async () => {
    await using pass = calibration();
    await expect(pass.measure(toyModel().blocks[0], new ToyWeights(), { inputs: ['nowhere'] })).rejects.toThrow(
      /no site input "nowhere"/,
    );
  });
});

describe('advance', () => {
  it.each([4, 8, 1000])('moves every window through every block as if it were alone (%i tokens at once)', async (batchTokens) => {
    const model = toyModel(3);
    await using pass = calibration({ model, batchTokens });
    const weights = new ToyWeights();
    await pass.start(weights);
    for (const block of model.blocks) await pass.advance(block, weights);
    const windows = await collect(pass.hiddenStates());
    expect(windows.map(({ windowIndex, rowCount }) => [windowIndex, rowCount])).toEqual([
      [0, 4],
      [1, 2],
      [2, 3],
      [3, 4],
    ]);
    expect(windows.map(({ hidden }) => [...hidden])).toEqual((await statesByHand(WINDOWS, 3)).map((state) => [...state]));
  });

  it('uses the weights it is given, not those of the measurement', async () => {
    const model = toyModel(1);
    await using pass = calibration({ model });
    await pass.start(new ToyWeights());
    await using _ = await pass.measure(model.blocks[0], new ToyWeights());
    await pass.advance(model.blocks[0], new ToyWeights(0.5));
    const hidden = (await collect(pass.hiddenStates())).map((window) => [...window.hidden]);
    expect(hidden).toEqual((await statesByHand(WINDOWS, 1, 0.5)).map((state) => [...state]));
  });

  it('comes with a measurement that is asked for no input', async () => {
    const model = toyModel(2);
    await using pass = calibration({ model });
    await pass.start(new ToyWeights());
    for (const block of model.blocks) {
      await using measured = await pass.measure(block, new ToyWeights(), { inputs: [], advance: true });
      expect(measured.size).toBe(0);
    }
    const hidden = (await collect(pass.hiddenStates())).map((window) => [...window.hidden]);
    expect(hidden).toEqual((await statesByHand(WINDOWS, 2)).map((state) => [...state]));
  });

  it('makes the states unusable when it fails half-way, rather than mixing two depths', async () => {
    const model = toyModel(1);
    const toy = new ToyEngine();
    const engine = toy.asEngine();
    const program = await engine.compile({} as never);
    const run = program.run.bind(program);
    program.run = async (...args) => {
      if (toy.runs === 1) throw new Error('the device went away');
      return run(...args);
    };
    await using pass = calibration({ model, engine, batchTokens: 4 });
    await pass.start(new ToyWeights());
    await expect(pass.advance(model.blocks[0], new ToyWeights())).rejects.toThrow('the device went away');
    await expect(pass.advance(model.blocks[0], new ToyWeights())).rejects.toThrow(/start again/);
    await expect(collect(pass.hiddenStates())).rejects.toThrow(/start again/);
    await expect(pass.measure(model.blocks[0], new ToyWeights())).rejects.toThrow(/start again/);
    await pass.start(new ToyWeights());
    expect((await collect(pass.hiddenStates())).length).toBe(4);
  });

  it('may be tried again when it fails before anything has moved', async () => {
    const model = toyModel(1);
    await using pass = calibration({ model });
    await pass.start(new ToyWeights());
    const broken = new ToyWeights(Number.NaN);
    await expect(pass.advance(model.blocks[0], broken)).rejects.toThrow(
      /the output of model\.layers\.0 is NaN at token 0 of sample 0/,
    );
    await pass.advance(model.blocks[0], new ToyWeights());
    const hidden = (await collect(pass.hiddenStates())).map((window) => [...window.hidden]);
    expect(hidden).toEqual((await statesByHand(WINDOWS, 1)).map((state) => [...state]));
  });

  it('needs the embeddings first', async () => {
    await using pass = calibration();
    await expect(pass.advance(toyModel().blocks[0], new ToyWeights())).rejects.toThrow(/start with the embeddings/);
  });
});

it('tells how far each phase is, in tokens', async () => {
  const seen: CalibrationProgress[] = [];
  await using pass = calibration({ batchTokens: 4, onProgress: (progress) => seen.push(progress) });
  const [block] = toyModel().blocks;
  const weights = new ToyWeights();
  await pass.start(weights);
  await using _ = await pass.measure(block, weights);
  await pass.advance(block, weights);
  expect(seen.map(({ phase, block, done, total }) => [phase, block, done, total])).toEqual([
    ['embed', undefined, 13, 13],
    ...['measure', 'advance'].flatMap((phase) => [4, 6, 9, 13].map((done) => [phase, 'model.layers.0', done, 13])),
  ]);
});

it('stops after the batch that runs when it is aborted', async () => {
  const controller = new AbortController();
  const toy = new ToyEngine();
  await using pass = calibration({
    batchTokens: 4,
    engine: toy.asEngine(),
    signal: controller.signal,
    onProgress: ({ phase }) => phase === 'measure' && controller.abort(new Error('enough')),
  });
  await pass.start(new ToyWeights());
  await expect(pass.measure(toyModel().blocks[0], new ToyWeights())).rejects.toThrow('enough');
  expect(toy.runs).toBe(2);
});

it('runs as many windows at once as the bound allows, and a longer window alone', async () => {
  const toy = new ToyEngine();
  await using pass = calibration({ batchTokens: 6, engine: toy.asEngine() });
  const weights = new ToyWeights();
  await pass.start(weights);
  await pass.advance(toyModel().blocks[0], weights);
  expect(toy.batches).toEqual([
    [1, 4],
    [2, 3],
    [1, 4],
  ]);
});

describe('windows the model cannot take', () => {
  it.each([
    ['none at all', []],
    ['an empty one', [Int32Array.of(1), new Int32Array(0)]],
    ['one longer than the context', [new Int32Array(65)]],
  ])('are refused: %s', (_, windows) => {
    expect(() => calibration({ windows })).toThrow(RecipeError);
  });
});

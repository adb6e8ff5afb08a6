/** A merge reads each byte as often as its method must, and holds no more than it was allowed, however large a tensor is. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { merge } from '../../src/runs/merge/merge.ts';
import { mergeRecipe } from '../../src/runs/merge/recipe.ts';
import { nudged, randomTensor, readWeights, saveFile } from '../support/merge-models.ts';
import { runCliJson } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

/** Making models takes a while on a busy machine. */
const SETUP_MS = 120_000;
const scratch = scratchFolder();
const cwd = scratch.path;
const BUDGET = 64 * 2 ** 20;
/** Buffers for the whole tensor, 48 bytes an element, would take more than eight times the budget. */
const LARGE = [12_000, 1024];
const FILE_BYTES = 4 * LARGE[0] * LARGE[1];

beforeAll(async () => {
  for (const [prefix, shape] of [
    ['large', LARGE],
    ['small', [8, 1024]],
  ] as const) {
    const base = new Map([['w', randomTensor(shape, 1)]]);
    await saveFile(join(cwd, `${prefix}-base.safetensors`), base);
    await saveFile(join(cwd, `${prefix}-a.safetensors`), nudged(base, 2));
    await saveFile(join(cwd, `${prefix}-b.safetensors`), nudged(base, 3));
  }
}, SETUP_MS);

const inputs = (prefix: string) => [`${prefix}-a.safetensors`, `${prefix}-b.safetensors`, '--base', `${prefix}-base.safetensors`];

/** Bytes that this process has read by system calls so far. */
function bytesRead(): number {
  return Number(/rchar: (\d+)/.exec(readFileSync('/proc/self/io', 'utf8'))?.[1]);
}

describe.skipIf(!existsSync('/proc/self/io'))('every byte of the inputs is read', () => {
  it.each([
    ['once by an elementwise method', 'task-arithmetic', 1],
    ['twice by one that selects, when a tensor does not fit, and a sample of it before', 'ties', 2],
    ['once by that method, when it is told to keep everything', 'ties', 1],
  ])('%s', async (_, method, passes) => {
    const [a, b, , base] = inputs('large').map((name) => join(cwd, name));
    const set = passes === 2 ? ['density=0.3'] : [];
    const recipe = mergeRecipe({ base, method, set, maxMemory: BUDGET, card: false }, 1);
    const before = bytesRead();
    const outcome = await merge([a, b], join(cwd, `read-${method}-${passes}`), recipe, {
      overwrite: false,
      resume: false,
      dryRun: false,
    });
    const read = bytesRead() - before;
    // A third pass is announced, in case the sample misleads; it does not.
    const sampled = passes === 2 ? outcome.readBytes - 3 * 3 * FILE_BYTES : 0;
    if (passes === 2) expect(sampled / (3 * FILE_BYTES)).toBeCloseTo(1 / 16, 1);
    else expect(outcome.readBytes).toBe(passes * 3 * FILE_BYTES);
    expect(read).toBeGreaterThanOrEqual(passes * 3 * FILE_BYTES + sampled);
    // Headers, package.json, and the edges of the files that a resumed run compares.
    expect(read).toBeLessThan(passes * 3 * FILE_BYTES + sampled + 2e6);
  });
});

it.each(['linear', 'ties'])('%s stays within --max-memory on a tensor that needs eight times as much', async (method) => {
  const run = (prefix: string) =>
    runCliJson<{ predictedPeakBytes: number; run: { peakBytes: number } }>(
      [
        'merge',
        ...inputs(prefix),
        '--method',
        method,
        '--threads',
        '1',
        '--max-memory',
        '64MiB',
        '--quiet',
        '-o',
        `${method}-${prefix}`,
      ],
      { cwd },
    );
  const small = await run('small');
  const large = await run('large');
  expect(large.predictedPeakBytes).toBeLessThanOrEqual(BUDGET);
  expect(large.run.peakBytes - small.run.peakBytes).toBeLessThanOrEqual(BUDGET);
});

it('blocks give the values that a whole tensor gives', async () => {
  const [a, b, , base] = inputs('large').map((name) => join(cwd, name));
  const recipe = mergeRecipe({ base, method: 'ties', set: ['density=0.3'], maxMemory: 2 ** 31, card: false }, 1);
  await merge([a, b], join(cwd, 'whole'), recipe, { overwrite: false, resume: false, dryRun: false });
  const blocks = mergeRecipe({ base, method: 'ties', set: ['density=0.3'], maxMemory: BUDGET, card: false }, 1);
  await merge([a, b], join(cwd, 'blocks'), blocks, { overwrite: false, resume: false, dryRun: false });
  const [whole, byBlocks] = [await readWeights(join(cwd, 'whole')), await readWeights(join(cwd, 'blocks'))];
  expect(Buffer.compare(Buffer.from(whole.get('w')!.values.buffer), Buffer.from(byBlocks.get('w')!.values.buffer))).toBe(0);
});

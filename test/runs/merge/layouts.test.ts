/** Methods that look at rows or whole matrices see every weight as (out, in), one matrix at a time, however it is stored. */
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { merge } from '../../../src/runs/merge/merge.ts';
import { mergeRecipe } from '../../../src/runs/merge/recipe.ts';
import {
  type NamedTensor,
  nudged,
  randomTensor,
  readWeights,
  saveFile,
  saveFolder,
  type Weights,
  weightsOf,
} from '../../support/merge-models.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { tinyGpt2 } from '../../support/tiny-models.ts';

const scratch = scratchFolder();

/** Merges two experts into a base; with a configuration, the base is a folder. */
async function run(
  method: string,
  set: string[],
  models: readonly Weights[],
  config?: Readonly<Record<string, unknown>>,
): Promise<Weights> {
  const folder = scratch.folder();
  const [base, a, b] = models;
  const place = config
    ? await saveFolder(join(folder, 'base'), base, config)
    : await saveFile(join(folder, 'base.safetensors'), base);
  const experts = [await saveFile(join(folder, 'a.safetensors'), a), await saveFile(join(folder, 'b.safetensors'), b)];
  const recipe = mergeRecipe({ base: place, method, set, card: false }, 1);
  await merge(experts, join(folder, 'out'), recipe, { overwrite: false, resume: false, dryRun: false });
  return readWeights(join(folder, 'out'));
}

function turned({ shape: [rows, columns], values }: NamedTensor): NamedTensor {
  const result = values.map((_, i) => values[(i % rows) * columns + Math.floor(i / rows)]);
  return { shape: [columns, rows], values: result };
}

it.each([
  ['tsv-m', []],
  ['model-stock', ['filter_wise=true']],
])("by %s, GPT-2's weights stored (in, out) merge as the same weights stored (out, in)", async (method, set) => {
  const gpt2 = tinyGpt2('layouts');
  const base = weightsOf(gpt2);
  const models = [base, nudged(base, 1), nudged(base, 2)];
  const NAME = 'h.1.mlp.c_fc.weight';
  const found = (await run(method, set, models, gpt2.config)).get(NAME)!;
  // Under another name: in a file without configuration, h.1.mlp.c_fc would be taken for GPT-2's too.
  const plain = models.map((weights): Weights => new Map([['linear.weight', turned(weights.get(NAME)!)]]));
  const expected = turned((await run(method, set, plain)).get('linear.weight')!);
  expect(found).toEqual(expected);
});

it('by a method on matrices, a stack of matrices is merged one by one', async () => {
  const stack = randomTensor([3, 8, 6], 1);
  const models: Weights[] = [new Map([['experts.weight', stack]])];
  models.push(nudged(models[0], 2), nudged(models[0], 3));
  const found = (await run('tsv-m', [], models)).get('experts.weight')!;
  expect(found.shape).toEqual([3, 8, 6]);
  for (let i = 0; i < 3; i++) {
    const slice = models.map((weights): Weights => {
      const { values } = weights.get('experts.weight')!;
      return new Map([['expert.weight', { shape: [8, 6], values: values.slice(i * 48, (i + 1) * 48) }]]);
    });
    const expected = (await run('tsv-m', [], slice)).get('expert.weight')!.values;
    expect(found.values.slice(i * 48, (i + 1) * 48)).toEqual(expected);
  }
});

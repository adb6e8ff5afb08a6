/** What a resumed merge must share with the run that it goes on from. */
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { openSafetensors } from '../../../formats/safetensors/reader.ts';
import type { MergeInput } from '../../../src/artifacts/merge/merge-input.ts';
import { openMergeInputs } from '../../../src/runs/merge/inputs.ts';
import { markInputs } from '../../../src/runs/merge/marks.ts';
import { mergeRecipe } from '../../../src/runs/merge/recipe.ts';
import { randomTensor, saveFile } from '../../support/merge-models.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';

const scratch = scratchFolder();
const saved = (name: string, seed: number) =>
  saveFile(join(scratch.path, `${name}.safetensors`), new Map([['w', randomTensor([4, 4], seed)]]));

it('what was made for the result may round otherwise on other threads; what was given may not change', async () => {
  const base = await saved('base', 1);
  const experts = [await saved('a', 2), await saved('b', 3)];
  const recipe = mergeRecipe({ base, method: 'linear', card: false }, 1);
  const hashes: string[] = [];
  for (const [expert, made] of [
    [2, 10],
    [2, 11],
    [4, 11],
  ]) {
    await saved('a', expert);
    const path = await saved('made', made);
    await using tensors = await openSafetensors(path);
    await using inputs = await openMergeInputs(experts, recipe);
    const source: MergeInput = { place: { kind: 'file', path }, label: 'made', tensors };
    hashes.push((await markInputs({ ...inputs, all: [...inputs.all, source] }, recipe)).hash);
  }
  expect(hashes[1]).toBe(hashes[0]);
  expect(hashes[2]).not.toBe(hashes[0]);
});

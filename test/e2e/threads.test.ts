/** However many threads share the work, the artifact has the same bytes. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { quantize } from '../../src/runs/quantize/quantize.ts';
import { quantizeRecipe } from '../../src/runs/quantize/recipe.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const lab = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));

// gate_proj and up_proj have 768 rows: enough for the kernels to divide a group of 128 columns among three threads.
it.each([
  ['slim-llm', 'paper', 2],
  ['slim-llm', 'best', 2.3],
  ['gptq', 'best', 3],
  ['rtn', 'best', 2.5],
] as const)('%s, preset %s, on one thread, two and three', async (method, preset, bits) => {
  const text = method === 'rtn' ? {} : { calibration: [lab('text/python.train.txt')], samples: 4, sequenceLength: 64 };
  const request = { method, preset, bits, formats: 'safetensors', only: ['model.layers.0.*'], ...text };
  const made = [];
  for (const threads of [1, 2, 3]) {
    const out = join(scratch.path, `${method}-${preset}-${threads}`);
    await quantize(lab('base'), out, quantizeRecipe(request, threads), { overwrite: false, resume: false, dryRun: false });
    made.push(JSON.parse(readFileSync(join(out, 'pcomp.json'), 'utf8')) as { plan: unknown; outputs: unknown });
  }
  const [one, ...more] = made;
  for (const other of more) expect(other).toEqual(one);
});

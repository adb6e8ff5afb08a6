/** `--max-loss`: the smallest artifact that loses no more, on text the rest of the run has not seen. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { quantize } from '../../src/runs/quantize/quantize.ts';
import { quantizeRecipe } from '../../src/runs/quantize/recipe.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
let text: string;
let llama: string;
beforeAll(async () => {
  text = scratch.write('text.txt', tinyText(2000));
  llama = await saveCheckpoint(join(scratch.path, 'llama'), groupedLlama('searching', { num_hidden_layers: 2 }));
});

const recipe = (changes: object) =>
  quantizeRecipe(
    { groupSize: 32, calibration: [text], samples: 24, sequenceLength: 32, formats: ['safetensors'], ...changes },
    1,
  );
const NEW = { overwrite: false, resume: false, dryRun: false } as const;

describe('a tolerable loss', () => {
  it('is met with at most four artifacts made, and the smallest that meets it is kept', async () => {
    const { search } = await quantize(llama, join(scratch.path, 'met'), recipe({ maxLoss: '4%' }), NEW);
    expect(search!.rounds.length).toBeLessThanOrEqual(4);
    const kept = search!.rounds[search!.kept];
    expect(kept.rise).toBeLessThanOrEqual(0.04);
    for (const { rise, bitsPerWeight } of search!.rounds) {
      if (rise <= 0.04) expect(bitsPerWeight).toBeGreaterThanOrEqual(kept.bitsPerWeight);
    }
    const manifest = JSON.parse(readFileSync(join(scratch.path, 'met', 'pcomp.json'), 'utf8')) as { search: { kept: number } };
    expect(manifest.search.kept).toBe(search!.kept);
  });

  it('larger begins with a smaller artifact, and ends with none that is larger', async () => {
    const of = async (maxLoss: string) => {
      const { search } = await quantize(llama, join(scratch.path, `loss${maxLoss}`), recipe({ maxLoss }), NEW);
      return [search!.rounds[0].bitsPerWeight, search!.rounds[search!.kept].bitsPerWeight];
    };
    const [loose, strict] = [await of('40%'), await of('2%')];
    expect(loose[0]).toBeLessThan(strict[0]);
    expect(loose[1]).toBeLessThanOrEqual(strict[1]);
  });

  it('that anything meets ends at the smallest file there is', async () => {
    const said: string[] = [];
    const wanted = recipe({ maxLoss: '99%', formats: ['onnx'] });
    await quantize(llama, join(scratch.path, 'anything'), wanted, NEW, { note: (message) => said.push(message) });
    expect(said.some((message) => message.includes('met by the smallest artifact there is'))).toBe(true);
  });

  it('that was interrupted goes on to the same bytes', async () => {
    const wanted = recipe({ maxLoss: '4%' });
    const abort = new AbortController();
    const output = join(scratch.path, 'stopped');
    const note = (message: string) => {
      if (message.startsWith('round 1')) abort.abort(new Error('stopped'));
    };
    await expect(quantize(llama, output, wanted, NEW, { signal: abort.signal, note })).rejects.toThrow('stopped');
    expect(existsSync(output)).toBe(false);
    await quantize(llama, output, wanted, { ...NEW, resume: true });
    for (const file of ['model.safetensors', 'pcomp.json']) {
      expect(readFileSync(join(output, file)).equals(readFileSync(join(scratch.path, 'met', file))), file).toBe(true);
    }
  });

  it.each([
    [{ maxLoss: '5%', bits: 2 }, /one budget at a time/],
    [{ maxLoss: '0%' }, /a part above 0 % and at most 100 %/],
    [{ maxLoss: '5%', method: 'gptq' }, /--max-loss/],
    [{ maxLoss: '5%', preset: 'paper' }, /--max-loss/],
  ])('%j is refused', (changes, message) => {
    expect(() => recipe(changes)).toThrow(message);
  });

  it('that nothing meets is refused with the nearest that can be, and nothing is written', async () => {
    const output = join(scratch.path, 'none');
    await expect(quantize(llama, output, recipe({ maxLoss: 1e-7 }), NEW)).rejects.toThrow(
      /the nearest that can be met is --max-loss/,
    );
    expect(existsSync(output) || existsSync(`${output}.partial`)).toBe(false);
  });
});

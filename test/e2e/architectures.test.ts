/** Every architecture from checkpoint to artifact and back, in this process: what the command line adds is tested elsewhere. */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { evaluate } from '../../src/evaluate.ts';
import { inspect } from '../../src/inspect.ts';
import { quantize } from '../../src/quantize.ts';
import { type QuantizeRequest, quantizeRecipe } from '../../src/recipe.ts';
import { saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyModels } from '../support/tiny-models.ts';

const scratch = scratchFolder();
let text: string;
beforeAll(() => {
  text = scratch.write('text.txt', tinyText(200));
});

const MODE = { overwrite: false, resume: false, dryRun: false };

describe.each(tinyModels().map((tiny) => [tiny.label, tiny] as const))('%s', (label, tiny) => {
  it('quantizes with rtn and slim-llm, and the written ONNX computes what its weights say', async () => {
    const folder = join(scratch.path, label.replaceAll(/\W+/g, '-'));
    const model = await saveCheckpoint(join(folder, 'model'), tiny);
    const measure = async (path: string, accuracy: 'exact' | 'fast') => {
      const options = { text: [text], sequenceLength: 32, device: 'cpu', threads: 1, maxMemory: 2 ** 30 } as const;
      return evaluate(path, { ...options, accuracy });
    };
    const float = await measure(model, 'exact');
    const requests: QuantizeRequest[] = [
      { method: 'rtn', bits: 8 },
      { method: 'slim-llm', bits: 4, calibration: [text], samples: 4, sequenceLength: 32 },
    ];
    for (const request of requests) {
      const out = join(folder, String(request.method));
      const recipe = quantizeRecipe({ groupSize: 32, ...request }, 1);
      const outcome = await quantize(model, out, recipe, MODE);
      expect(outcome.quantizedModules).toBe(outcome.modules);
      expect(existsSync(join(out, 'onnx', request.method === 'rtn' ? 'model_quantized.onnx' : 'model_q4.onnx'))).toBe(true);
      expect(readdirSync(out)).toEqual(expect.arrayContaining(['config.json', 'pcomp.json', 'report.json', 'tokenizer.json']));
      const { modules, bytes } = await inspect(out);
      expect(modules).toHaveLength(outcome.modules);

      const exact = await measure(out, 'exact');
      const fast = await measure(out, 'fast');
      expect(exact).toMatchObject({ tokens: float.tokens, averageBits: request.bits, bytes });
      expect(Math.abs(fast.nll / exact.nll - 1), `${request.method}: fast ${fast.nll}, exact ${exact.nll}`).toBeLessThan(0.03);
      // 8 bits are nearly what was there; a graph that mixed layers up would not come near it.
      if (request.method === 'rtn') expect(Math.abs(exact.nll / float.nll - 1)).toBeLessThan(0.02);
    }
  });
});

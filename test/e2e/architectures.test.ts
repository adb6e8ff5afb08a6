/** Every architecture from checkpoint to artifact and back, in this process: what the command line adds is tested elsewhere. */
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { inspect } from '../../src/runs/inspect/inspect.ts';
import type { QuantizeRequest } from '../../src/runs/quantize/recipe.ts';
import { saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { runEvaluate, runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyModels } from '../support/tiny-models.ts';

const scratch = scratchFolder();
let text: string;
beforeAll(() => {
  text = scratch.write('text.txt', tinyText(200));
});

describe.each(tinyModels().map((tiny) => [tiny.label, tiny] as const))('%s', (label, tiny) => {
  it('quantizes with rtn and slim-llm, and the written ONNX computes what its weights say', async () => {
    const folder = join(scratch.path, label.replaceAll(/\W+/g, '-'));
    const model = await saveCheckpoint(join(folder, 'model'), tiny);
    const float = await runEvaluate(model, text);
    const requests: QuantizeRequest[] = [
      { method: 'rtn', bits: 8 },
      { method: 'slim-llm', bits: 4, calibration: [text], samples: 4, sequenceLength: 32 },
    ];
    for (const request of requests) {
      const out = join(folder, String(request.method));
      const outcome = await runQuantize(model, out, request);
      expect(outcome.quantizedModules).toBe(outcome.modules);
      expect(existsSync(join(out, 'onnx', request.method === 'rtn' ? 'model_quantized.onnx' : 'model_q4.onnx'))).toBe(true);
      expect(readdirSync(out)).toEqual(expect.arrayContaining(['config.json', 'pcomp.json', 'report.json', 'tokenizer.json']));
      const { modules, bytes } = await inspect(out);
      expect(modules).toHaveLength(outcome.modules);

      const exact = await runEvaluate(out, text);
      const fast = await runEvaluate(out, text, { accuracy: 'fast' });
      expect(exact).toMatchObject({ tokens: float.tokens, averageBits: request.bits, bytes });
      expect(Math.abs(fast.nll / exact.nll - 1), `${request.method}: fast ${fast.nll}, exact ${exact.nll}`).toBeLessThan(0.03);
      // 8 bits are nearly what was there; a graph that mixed layers up would not come near it.
      if (request.method === 'rtn') expect(Math.abs(exact.nll / float.nll - 1)).toBeLessThan(0.02);
    }
  });
});

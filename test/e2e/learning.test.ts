/** Methods that learn, from checkpoint to artifact and back: what is written is what was learned, and a seed decides every byte. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { quantize } from '../../src/runs/quantize/quantize.ts';
import { type QuantizeRequest, quantizeRecipe } from '../../src/runs/quantize/recipe.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { artifactTree } from '../support/folder-tree.ts';
import { runEvaluate, runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyGpt2 } from '../support/tiny-models.ts';

const scratch = scratchFolder();
let text: string;
let llama: string;
beforeAll(async () => {
  text = scratch.write('text.txt', tinyText(2000));
  llama = await saveCheckpoint(join(scratch.path, 'llama'), groupedLlama('learning', { num_hidden_layers: 3 }));
});

const request = (changes: QuantizeRequest): QuantizeRequest => ({
  ...{ bits: 2, calibration: [text], samples: 24, sequenceLength: 32, steps: 30, formats: ['safetensors', 'onnx'] },
  ...changes,
});

interface Learned {
  readonly lossBefore: number;
  readonly lossAfter: number;
  readonly step: number;
}

function learningOf(output: string): Record<string, Learned> {
  return JSON.parse(readFileSync(join(output, 'report.json'), 'utf8')).learning;
}

const methods = ['slim-llm-plus', 'autoround'].flatMap((method) => ['best', 'paper'].map((preset) => [method, preset] as const));

describe.each(methods)('%s, preset %s', (method, preset) => {
  it('never leaves a block worse than it found it, and the files hold what it learned', async () => {
    const output = join(scratch.path, `${method}-${preset}`);
    await runQuantize(llama, output, request({ method, preset }));
    const learning = learningOf(output);
    expect(Object.keys(learning)).toEqual(['model.layers.0', 'model.layers.1', 'model.layers.2']);
    for (const { lossBefore, lossAfter, step } of Object.values(learning)) {
      expect(lossAfter).toBeLessThanOrEqual(lossBefore);
      expect(step === 0).toBe(lossAfter === lossBefore);
    }
    // What preset `best` starts from may be as good as so little text can tell.
    if (preset === 'paper') expect(Object.values(learning).some(({ step }) => step > 0)).toBe(true);
    const { averageBits, nll, tokens } = await runEvaluate(output, text);
    expect(averageBits).toBeLessThan(2.05);
    // The ONNX graph, another reader of the same codes.
    const fast = await runEvaluate(output, text, { accuracy: 'fast' });
    expect(fast.tokens).toBe(tokens);
    expect(Math.abs(fast.nll / nll - 1)).toBeLessThan(0.03);
  });
});

describe('a learned run', () => {
  it('that is stopped between blocks ends in the same bytes when it is resumed', async () => {
    const recipe = quantizeRecipe({ groupSize: 32, ...request({ method: 'autoround', formats: ['safetensors'] }) }, 1);
    const whole = join(scratch.path, 'whole');
    await quantize(llama, whole, recipe, { overwrite: false, resume: false, dryRun: false });
    const stopped = join(scratch.path, 'stopped');
    const controller = new AbortController();
    const hooks = {
      signal: controller.signal,
      progress: ({ phase }: { phase: string }) => {
        if (phase === 'model.layers.2: learning') controller.abort(new Error('stopped here'));
      },
    };
    const run = quantize(llama, stopped, recipe, { overwrite: false, resume: false, dryRun: false }, hooks);
    await expect(run).rejects.toThrow('stopped here');
    await quantize(llama, stopped, recipe, { overwrite: false, resume: true, dryRun: false });
    expect(artifactTree(stopped)).toEqual(artifactTree(whole));
  });

  it('follows another seed to other codes', async () => {
    const trees: Record<string, string>[] = [];
    for (const seed of [1, 2]) {
      const output = join(scratch.path, `seed-${seed}`);
      await runQuantize(llama, output, request({ method: 'autoround', formats: ['safetensors'], seed }));
      trees.push(artifactTree(output));
    }
    expect(trees[0]['model.safetensors']).not.toBe(trees[1]['model.safetensors']);
  });

  it('learns layers with biases, stored transposed, and some left as they are', async () => {
    const model = await saveCheckpoint(join(scratch.path, 'gpt2'), tinyGpt2('learning'));
    const output = join(scratch.path, 'gpt2-out');
    await runQuantize(model, output, request({ method: 'slim-llm-plus', skip: ['*.c_proj'] }));
    expect(Object.keys(learningOf(output))).toHaveLength(2);
    const { nll } = await runEvaluate(output, text);
    expect(Math.abs((await runEvaluate(output, text, { accuracy: 'fast' })).nll / nll - 1)).toBeLessThan(0.03);
  });
});

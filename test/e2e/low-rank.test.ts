/** `quantize --lowrank`: branches that repair what codes lose, from checkpoint to artifact and back. */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { openSafetensors } from '../../formats/safetensors/reader.ts';
import { inspect } from '../../src/runs/inspect/inspect.ts';
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
let gpt2: string;
beforeAll(async () => {
  text = scratch.write('text.txt', tinyText(2000));
  llama = await saveCheckpoint(join(scratch.path, 'llama'), groupedLlama('repair', { num_hidden_layers: 2 }));
  gpt2 = await saveCheckpoint(join(scratch.path, 'gpt2'), tinyGpt2('repair'));
});

const request = (changes: QuantizeRequest): QuantizeRequest => ({
  ...{ bits: 2, lowrank: 'bpw=1.5', calibration: [text], samples: 24, sequenceLength: 32, formats: ['safetensors', 'onnx'] },
  ...changes,
});

interface Report {
  readonly ranks: {
    readonly total: number;
    readonly spent: number;
    readonly predicted: { readonly before: number; readonly after: number };
  };
  readonly allocation: { readonly predictedLoss: number };
  readonly sites: Readonly<Record<string, { readonly relativeError: number; readonly relativeErrorOfCodes?: number }>>;
}

const reportOf = (output: string) => JSON.parse(readFileSync(join(output, 'report.json'), 'utf8')) as Report;

describe.each(['llama', 'gpt2'] as const)('a %s', (name) => {
  it('with branches is closer to the float model than without, in every layout alike', async () => {
    const model = name === 'llama' ? llama : gpt2;
    const [output, plain] = [join(scratch.path, `${name}-branches`), join(scratch.path, `${name}-plain`)];
    const { artifacts, plan } = await runQuantize(model, output, request({}));
    await runQuantize(model, plain, request({ lowrank: undefined }));
    const { ranks, sites } = reportOf(output);
    expect(ranks.spent).toBeLessThanOrEqual(ranks.total);
    expect(ranks.predicted.after).toBeLessThan(ranks.predicted.before);
    for (const [name, { rank }] of Object.entries(plan.modules)) {
      if (rank !== undefined) expect(sites[name].relativeError).toBeLessThan(sites[name].relativeErrorOfCodes!);
    }
    const inspected = (await inspect(output)).modules.map(({ name: own, rank }) => [own, rank]);
    expect(inspected).toEqual(Object.entries(plan.modules).map(([own, { rank }]) => [own, rank]));
    for (const { lowRankBitsPerWeight } of artifacts) {
      expect(lowRankBitsPerWeight).toBeGreaterThan(1);
      expect(lowRankBitsPerWeight).toBeLessThanOrEqual(1.5);
    }
    const repaired = await runEvaluate(output, text, { against: model });
    const without = await runEvaluate(plain, text, { against: model });
    expect(repaired.kl!).toBeLessThan(without.kl!);
    const fast = await runEvaluate(output, text, { accuracy: 'fast' });
    expect(Math.abs(fast.nll / repaired.nll - 1)).toBeLessThan(0.03);
  });
});

describe.each([8, 4] as const)('branches of %i bits', (lowrankBits) => {
  it('are charged as they are stored, decode alike in every layout, and repair', async () => {
    const output = join(scratch.path, `coded-${lowrankBits}`);
    const { artifacts, plan } = await runQuantize(llama, output, request({ lowrankBits, lowrank: 'bpw=0.8' }));
    const { ranks } = reportOf(output);
    expect(ranks.spent).toBeLessThanOrEqual(ranks.total);
    const ranked = Object.values(plan.modules).filter(({ rank }) => rank !== undefined);
    expect(ranked.length).toBeGreaterThan(0);
    for (const { rankBits } of ranked) expect(rankBits).toBe(lowrankBits);
    for (const { lowRankBitsPerWeight } of artifacts) {
      expect(lowRankBitsPerWeight).toBeGreaterThan(0.5);
      expect(lowRankBitsPerWeight).toBeLessThanOrEqual(0.8);
    }
    // What is charged is what lies in the file.
    await using source = await openSafetensors(join(output, 'model.safetensors'));
    const bytes = [...source.tensors.values()]
      .filter(({ name }) => name.includes('.lora_'))
      .reduce((sum, { byteLength }) => sum + byteLength, 0);
    const weights = (await inspect(output)).modules.reduce(
      (sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures,
      0,
    );
    expect(artifacts.find(({ format }) => format === 'safetensors')!.lowRankBitsPerWeight).toBeCloseTo((8 * bytes) / weights, 6);
    const plain = join(scratch.path, `coded-${lowrankBits}-plain`);
    await runQuantize(llama, plain, request({ lowrank: undefined }));
    const repaired = await runEvaluate(output, text, { against: llama });
    expect(repaired.kl!).toBeLessThan((await runEvaluate(plain, text, { against: llama })).kl!);
    const fast = await runEvaluate(output, text, { accuracy: 'fast' });
    expect(Math.abs(fast.nll / repaired.nll - 1)).toBeLessThan(0.03);
    const again = join(scratch.path, `coded-${lowrankBits}-planned`);
    await runQuantize(
      llama,
      again,
      request({ bits: undefined, lowrank: undefined, plan: join(output, 'pcomp.json'), groupSize: undefined }),
    );
    for (const file of ['model.safetensors', 'onnx/model_q2.onnx_data'])
      expect(readFileSync(join(again, file)).equals(readFileSync(join(output, file)))).toBe(true);
  });
});

describe('a run with branches', () => {
  const stopped = async (phase: string) => {
    const output = join(scratch.path, `stopped-${phase.replace(/\W/g, '')}`);
    const wanted = quantizeRecipe({ groupSize: 32, ...request({ formats: ['safetensors'] }) }, 1);
    const abort = new AbortController();
    const progress = (event: { readonly phase: string }) => {
      if (event.phase.startsWith(phase)) abort.abort(new Error('stopped'));
    };
    const mode = { overwrite: false, resume: false, dryRun: false };
    await expect(quantize(llama, output, wanted, mode, { signal: abort.signal, progress })).rejects.toThrow('stopped');
    await quantize(llama, output, wanted, { ...mode, resume: true });
    return artifactTree(output);
  };

  it('that is stopped in either pass ends in the same bytes when it is resumed', async () => {
    const output = join(scratch.path, 'through');
    await runQuantize(llama, output, request({ formats: ['safetensors'] }));
    const whole = artifactTree(output);
    expect(await stopped('ranks: model.layers.1')).toEqual(whole);
    expect(await stopped('model.layers.1')).toEqual(whole);
  });

  it('follows the ranks of a plan without sharing any out', async () => {
    const [first, second] = [join(scratch.path, 'planned'), join(scratch.path, 'replanned')];
    await runQuantize(llama, first, request({ formats: ['safetensors'] }));
    const plan = join(first, 'pcomp.json');
    await runQuantize(
      llama,
      second,
      request({ bits: undefined, lowrank: undefined, plan, formats: ['safetensors'], groupSize: undefined }),
    );
    expect(readFileSync(join(second, 'model.safetensors')).equals(readFileSync(join(first, 'model.safetensors')))).toBe(true);
  });

  it('repairs plain rounding too, and better by what the inputs are than by the weights alone', async () => {
    const kl = async (label: string, changes: QuantizeRequest) => {
      const output = join(scratch.path, label);
      const formats = ['safetensors'];
      await runQuantize(llama, output, request({ method: 'rtn', preset: 'paper', bits: 2, formats, ...changes }));
      return (await runEvaluate(output, text, { against: llama })).kl!;
    };
    const none = await kl('rtn', { lowrank: undefined, calibration: undefined, samples: undefined, sequenceLength: undefined });
    const plain = await kl('rtn-plain', { lowrankInputs: 'zeroquant' });
    const exact = await kl('rtn-exact', {});
    expect(plain).toBeLessThan(none);
    expect(exact).toBeLessThan(plain);
  });

  it('stays within a budget of bytes, branches included', async () => {
    const { artifacts } = await runQuantize(
      llama,
      join(scratch.path, 'sized'),
      request({ bits: undefined, size: 90_000, formats: ['safetensors'] }),
    );
    expect(artifacts[0].bytes).toBeLessThanOrEqual(90_000);
    expect(artifacts[0].lowRankBitsPerWeight).toBeGreaterThan(1);
  });

  it('shares one budget out over widths and ranks with --joint', async () => {
    const output = join(scratch.path, 'joint');
    const wanted = request({ bits: undefined, bpw: 3.5, joint: true, formats: ['safetensors'] });
    const { artifacts, notes } = await runQuantize(llama, output, wanted);
    expect(artifacts[0].bitsPerWeight).toBeLessThanOrEqual(5);
    expect(artifacts[0].bitsPerWeight).toBeGreaterThan(4.5);
    const { ranks, allocation } = reportOf(output);
    expect(allocation.predictedLoss).toBe(ranks.predicted.after);
    expect(ranks.predicted.after).toBeLessThan(ranks.predicted.before);
    // A rank of layers this small costs more than a bit.
    expect(ranks.spent).toBe(0);
    expect(notes).toContainEqual(expect.stringMatching(/--joint: no layer got a branch/));
    const again = join(scratch.path, 'joint-planned');
    const repeat = { ...wanted, bpw: undefined, joint: undefined, lowrank: undefined, plan: join(output, 'pcomp.json') };
    await runQuantize(llama, again, { ...repeat, groupSize: undefined });
    expect(readFileSync(join(again, 'model.safetensors')).equals(readFileSync(join(output, 'model.safetensors')))).toBe(true);
  });

  it('with several rounds never has a larger error than with one', async () => {
    const errors = async (label: string, lowrankOuter: number) => {
      const output = join(scratch.path, label);
      await runQuantize(llama, output, request({ lowrankOuter, method: 'gptq', formats: ['safetensors'] }));
      return reportOf(output).sites['model.layers.0.self_attn.q_proj'].relativeError;
    };
    // Before the first layer, both runs see the same inputs.
    expect(await errors('rounds-3', 3)).toBeLessThanOrEqual((await errors('rounds-1', 1)) * 1.001);
  });
});

describe('a request for branches', () => {
  it.each<[QuantizeRequest, RegExp]>([
    [{ lowrank: 'bpw' }, /--lowrank bpw: one of r=16/],
    [{ lowrank: 'params=3' }, /--lowrank params=3: is 3 parameters, and one rank takes at least/],
    [{ formats: ['gptq'], method: 'gptq' }, /--format gptq has no place for a low-rank branch/],
    [{ bits: undefined, maxLoss: '5%' }, /--max-loss is met by widths alone/],
    [{ lowrank: undefined, lowrankOuter: 2 }, /--lowrank-outer: goes with --lowrank/],
    [{ lowrank: undefined, joint: true }, /--joint: .* goes with --lowrank/],
    [{ joint: true, method: 'gptq' }, /--joint: --method gptq does not use it/],
    [{ joint: true, lowrank: 'r=2' }, /with --joint, ranks are counted by/],
    [{ lowrankBits: 5 }, /--lowrank-bits 5: branches are stored in 16, 8, 4 bits/],
    [{ lowrankBits: 4, lowrank: undefined }, /--lowrank-bits: goes with --lowrank; a plan says how wide/],
    [{ lowrankOuter: 5 }, /--lowrank-outer 5: must be within 1..4/],
    [{ bits: undefined, size: 90_000, lowrank: 'r=2' }, /--lowrank r=2: inside a budget of bytes/],
  ])('%j is refused before any work', async (changes, message) => {
    const run = async () => runQuantize(llama, join(scratch.path, 'refused'), request(changes));
    await expect(run()).rejects.toThrow(message);
  });

  it('with a plan whose rank is larger than the layer is refused by name', async () => {
    const plan = join(scratch.path, 'plan.json');
    const { plan: made } = await runQuantize(
      llama,
      join(scratch.path, 'to-plan'),
      request({ lowrank: undefined, formats: ['safetensors'] }),
    );
    const name = 'model.layers.0.self_attn.q_proj';
    writeFileSync(plan, JSON.stringify({ modules: { ...made.modules, [name]: { ...made.modules[name], rank: 999 } } }));
    const run = runQuantize(
      llama,
      join(scratch.path, 'refused'),
      request({ bits: undefined, lowrank: undefined, plan, groupSize: undefined }),
    );
    await expect(run).rejects.toThrow(new RegExp(`"${name}" has rank 999, but is \\d+ x \\d+`));
  });
});

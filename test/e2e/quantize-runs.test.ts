/** Whole runs of the command line: what they print, what they leave on disk, and what a killed one leaves. */
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import { Random } from '../../src/compute/random.ts';
import type { QuantizeOutcome } from '../../src/index.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { runCli, runCliJson, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
let model = '';
let text = '';
let held = '';
const BLOCKS = 4;

beforeAll(async () => {
  model = await saveCheckpoint(join(scratch.path, 'model'), groupedLlama('runs', { num_hidden_layers: BLOCKS }));
  text = scratch.write('calibration.txt', tinyText(4000));
  held = scratch.write('held-out.txt', tinyText(900, 2));
});

const out = (name: string) => join(scratch.path, name);
/** Arguments of a small slim-llm run; nothing else decides the bytes. */
const quantizeArgs = (output: string, ...more: string[]) => {
  const fixed = ['--bits', '2', '--group-size', '32', '--calibration', text, '--samples', '8', '--threads', '1'];
  return ['quantize', model, '-o', output, ...fixed, ...more];
};

/** Every file below a folder by its path, report.json aside: the one that may differ. */
function contents(folder: string): Record<string, string> {
  const files = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  const named = files.map((entry): [string, string] => {
    const path = join(entry.parentPath, entry.name);
    return [path.slice(folder.length), readFileSync(path, 'base64')];
  });
  return Object.fromEntries(named.filter(([name]) => !name.endsWith('report.json')).sort(([a], [b]) => (a < b ? -1 : 1)));
}

describe('one recipe', () => {
  it('gives the same bytes every time but for report.json, wherever the model lies; another seed gives others', async () => {
    await runCliJson(quantizeArgs(out('once'), '--format', 'onnx,safetensors'));
    mkdirSync(out('elsewhere'));
    cpSync(model, join(out('elsewhere'), 'model'), { recursive: true });
    const again = quantizeArgs('../twice', '--format', 'onnx,safetensors').map((arg) => (arg === model ? 'model' : arg));
    await runCliJson(again, { cwd: out('elsewhere') });
    await runCliJson(quantizeArgs(out('seed'), '--format', 'onnx,safetensors', '--seed', '1'));
    const first = contents(out('once'));
    expect(Object.keys(first)).toContain('/onnx/model_q2.onnx_data');
    expect(contents(out('twice'))).toEqual(first);
    expect(contents(out('seed'))['/onnx/model_q2.onnx_data']).not.toBe(first['/onnx/model_q2.onnx_data']);
  });

  it('is reproduced from the plan it wrote', async () => {
    await runCliJson(quantizeArgs(out('planned-by')));
    const args = ['quantize', model, '-o', out('planned'), '--plan', join(out('planned-by'), 'pcomp.json')];
    await runCliJson([...args, '--calibration', text, '--samples', '8', '--threads', '1']);
    const weights = (name: string) =>
      (JSON.parse(readFileSync(join(out(name), 'pcomp.json'), 'utf8')) as { weights: unknown }).weights;
    expect(weights('planned')).toEqual(weights('planned-by'));
  });

  it('predicts in a dry run the bytes that a run reports, and writes nothing', async () => {
    const args = (name: string) => [
      'quantize',
      model,
      '-o',
      out(name),
      '--bits',
      '3',
      '--method',
      'rtn',
      '--format',
      'onnx,safetensors',
    ];
    const predicted = await runCliJson<QuantizeOutcome>([...args('dry'), '--dry-run']);
    expect(existsSync(out('dry'))).toBe(false);
    expect(existsSync(`${out('dry')}.partial`)).toBe(false);
    const made = await runCliJson<QuantizeOutcome>(args('wet'));
    const sizes = ({ artifacts }: QuantizeOutcome) =>
      artifacts.map(({ bitsPerWeight, quantizedBytes }) => [bitsPerWeight, quantizedBytes]);
    expect(sizes(predicted)).toEqual(sizes(made));
  });
});

describe('a run that is killed', () => {
  it('leaves nothing under the final name at any moment, and resumes to the same bytes', async () => {
    const started = performance.now();
    await runCliJson(quantizeArgs(out('whole')));
    const duration = performance.now() - started;
    const random = new Random(1, 'kill');
    for (let round = 0; round < 4; round++) {
      const name = `killed-${round}`;
      const running = startCli(quantizeArgs(out(name)));
      // From the first blocks to the last writes; a run that was faster than the kill is whole, which is right too.
      await sleep(duration * (0.35 + 0.65 * random.nextFloat()));
      running.process.kill('SIGKILL');
      const { code } = await running.done;
      if (code !== 0) expect(existsSync(out(name))).toBe(false);
      if (code !== 0) await runCliJson(quantizeArgs(out(name), '--resume'));
      expect(contents(out(name))).toEqual(contents(out('whole')));
      expect(existsSync(`${out(name)}.partial`)).toBe(false);
    }
  });

  it('is not resumed with another recipe', async () => {
    const running = startCli(quantizeArgs(out('mixed')));
    while (!existsSync(join(`${out('mixed')}.partial`, 'state.json'))) await sleep(5);
    running.process.kill('SIGKILL');
    await running.done;
    const { code, stderr } = await runCli(quantizeArgs(out('mixed'), '--resume', '--seed', '7'));
    expect(code).toBe(2);
    expect(stderr).toMatch(/--resume.*another recipe/);
  });

  it('by Ctrl-C exits with 130 and can be resumed', async () => {
    const running = startCli(quantizeArgs(out('stopped')));
    while (!existsSync(join(`${out('stopped')}.partial`, 'state.json'))) await sleep(5);
    running.process.kill('SIGINT');
    expect((await running.done).code).toBe(130);
    expect(existsSync(out('stopped'))).toBe(false);
    await runCliJson(quantizeArgs(out('stopped'), '--resume'));
    expect(contents(out('stopped'))).toEqual(contents(out('whole')));
  });
});

describe('evaluate', () => {
  it('gives one perplexity for all layouts of one plan, and none of them differs from itself', async () => {
    const shared = ['--bits', '4', '--method', 'gptq', '--group-size', '32', '--calibration', text, '--samples', '8'];
    await runCliJson(['quantize', model, '-o', out('layouts'), ...shared, '--format', 'onnx,gptq']);
    await runCliJson(['quantize', model, '-o', out('planes'), ...shared, '--format', 'safetensors']);
    const evaluate = (path: string, ...more: string[]) =>
      runCliJson<Record<string, number>>(['evaluate', path, '--text', held, ...more]);
    const onnx = await evaluate(out('layouts'), '--against', out('layouts'));
    const planes = await evaluate(out('planes'));
    expect(Object.keys(onnx)).toEqual(
      expect.arrayContaining([
        'perplexity',
        'nll',
        'tokens',
        'bytes',
        'bitsPerWeight',
        'averageBits',
        'tokensPerSecond',
        'kl',
        'top1Agreement',
        'perplexityRatio',
      ]),
    );
    expect(planes['perplexity'] / onnx['perplexity']).toBeCloseTo(1, 6);
    expect(onnx['kl']).toBeCloseTo(0, 9);
    expect(onnx['top1Agreement']).toBe(1);
    expect(onnx['averageBits']).toBe(4);
    const fast = await evaluate(out('layouts'), '--accuracy', 'fast');
    expect(Math.abs(fast['perplexity'] / onnx['perplexity'] - 1)).toBeLessThan(0.02);
  });
});

describe('a request that is wrong', () => {
  it.each([
    [['--bits', '9'], 2, '--bits 9: pcomp quantizes to 1..8 bits'],
    [['--bits', '2.5'], 2, '--bits 2.5: must be a whole number'],
    [[], 2, '--bits: a budget is required'],
    [['--bits', '2', '--preset', 'best'], 2, '--preset best: not in this version'],
    [['--bits', '2', '--nope'], 2, "unknown option '--nope'"],
    [['--bits', '2', '--skip', 'nothing'], 2, '--skip nothing: matches none of'],
    [['--bits', '2', '--method', 'rtn', '--act-order'], 2, '--act-order: --method rtn does not use it'],
    [['--bits', '2', '--format', 'safetensors,gptq'], 2, 'both write model.safetensors'],
    [['--bits', '2', '--calibration', 'no-such-*.txt'], 2, 'no file matches'],
    [['--bits', '2', '--device', 'dml'], 1, 'dml'],
  ] as const)('%j exits with %i and one line', async (flags, exit, message) => {
    const output = out(`wrong-${flags.join('')}`.replaceAll(/[^\w-]/g, ''));
    const { code, stdout, stderr } = await runCli(['quantize', model, '-o', output, '--quiet', ...flags]);
    const lines = stderr
      .trim()
      .split('\n')
      .filter((line) => !line.startsWith('note: '));
    expect(lines).toHaveLength(1);
    expect(lines[0]).toContain(message);
    expect([code, stdout]).toEqual([exit, '']);
    expect(existsSync(output)).toBe(false);
    expect(existsSync(`${output}.partial`)).toBe(false);
  });

  it('leaves an existing output as it is', async () => {
    mkdirSync(out('mine'));
    writeFileSync(join(out('mine'), 'precious.txt'), 'mine');
    for (const flags of [[], ['--overwrite']]) {
      const { code, stderr } = await runCli(quantizeArgs(out('mine'), ...flags));
      expect(code).toBe(2);
      expect(stderr).toContain('mine');
    }
    expect(readdirSync(out('mine'))).toEqual(['precious.txt']);
  });
});

/** What is printed where: JSON for programs, plain text for pipes; and what a machine without onnxruntime can still do. */
import { beforeAll, describe, expect, it } from 'vitest';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { artifactTree } from '../support/folder-tree.ts';
import { runCli, runCliJson, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const cwd = scratch.path;
const SETTINGS = ['--bits', '2', '--group-size', '32', '--calibration', 'text.txt', '--samples', '4'];

beforeAll(async () => {
  await saveCheckpoint(`${cwd}/model`, groupedLlama());
  scratch.write('text.txt', tinyText(300));
  await runCliJson(['quantize', 'model', ...SETTINGS, '-o', 'out'], { cwd });
});

/** The JSON that a command prints, having checked that it is all of stdout. */
async function jsonOf(args: string[], stderr: RegExp): Promise<Record<string, unknown>> {
  const result = await runCli([...args, '--json'], { cwd });
  expect(result).toMatchObject({ code: 0, stderr: expect.stringMatching(stderr) });
  const value: unknown = JSON.parse(result.stdout);
  expect(value).toBeTypeOf('object');
  expect(result.stdout.endsWith('}\n')).toBe(true);
  return value as Record<string, unknown>;
}

describe('--json prints one object on stdout, and the rest on stderr:', () => {
  it('quantize', async () => {
    const result = await jsonOf(
      ['quantize', 'model', ...SETTINGS, '--samples', '40', '-o', 'again'],
      /note: the calibration text has/,
    );
    expect(result).toMatchObject({
      architecture: 'LlamaForCausalLM',
      modules: 14,
      quantizedModules: 14,
      artifacts: [
        { format: 'onnx', bitsPerWeight: expect.any(Number), bytes: expect.any(Number), runtimeBytes: expect.any(Number) },
      ],
      notes: [expect.stringMatching(/windows overlap/)],
      run: { output: 'again', device: 'cpu', seconds: expect.any(Number), peakBytes: expect.any(Number) },
    });
  });

  it('quantize --dry-run', async () => {
    const result = await jsonOf(
      ['quantize', 'model', ...SETTINGS, '-o', 'never', '--dry-run'],
      /note: sizes are those of one width/,
    );
    expect(result).not.toHaveProperty('run');
    expect(result).toMatchObject({
      averageBits: 2,
      passes: '3 forward passes over 256 tokens in 4 windows',
      predictedPeakBytes: expect.any(Number),
      plan: { modules: { 'model.layers.1.mlp.down_proj': { groupSize: 32, bits: [2, 2, 2, 2, 2, 2] } } },
      notes: [expect.stringMatching(/sizes are those of one width/)],
    });
  });

  it('evaluate, with the keys of the contract', async () => {
    const alone = await jsonOf(['evaluate', 'out', '--text', 'text.txt', '--quiet'], /^$/);
    const keys = ['perplexity', 'nll', 'tokens', 'bytes', 'bitsPerWeight', 'averageBits', 'tokensPerSecond'];
    for (const key of keys) expect(alone[key], key).toBeTypeOf('number');
    for (const key of ['kl', 'top1Agreement', 'perplexityRatio']) expect(alone).not.toHaveProperty(key);
    const both = await jsonOf(['evaluate', 'out', '--text', 'text.txt', '--against', 'model'], /%/);
    for (const key of [...keys, 'kl', 'top1Agreement', 'perplexityRatio']) expect(both[key], key).toBeTypeOf('number');
  });

  it('inspect, whose bytes add up', async () => {
    const result = await jsonOf(['inspect', 'out'], /^$/);
    const { bytes, where, files, modules, widths } = result as unknown as {
      bytes: number;
      where: Record<string, number>;
      files: { bytes: number }[];
      modules: { bits: number[] }[];
      widths: Record<string, number>;
    };
    const sum = (values: number[]) => values.reduce((a, b) => a + b, 0);
    expect(sum(Object.values(where))).toBe(bytes);
    expect(sum(files.map((file) => file.bytes))).toBe(bytes);
    expect(sum(Object.values(widths))).toBe(modules.flatMap((module) => module.bits).length);
    expect(result).toMatchObject({ kind: 'onnx', architecture: 'LlamaForCausalLM' });
  });
});

it('text for people has no colours and redraws nothing in a pipe', async () => {
  const env = { NO_COLOR: undefined, FORCE_COLOR: '1' };
  const runs = [
    await runCli(['quantize', 'model', ...SETTINGS, '-o', 'plain'], { cwd, env }),
    await runCli(['evaluate', 'out', '--text', 'text.txt'], { cwd, env: { ...env, NO_COLOR: '1' } }),
    await runCli(['inspect', 'out', '--groups', '--tensors'], { cwd, env }),
  ];
  for (const { code, stdout, stderr } of runs) {
    expect(code).toBe(0);
    expect(stdout + stderr).toMatch(/^[ -~\n]*$/);
  }
  expect(runs[0].stdout).toMatch(/stored bpw[\s\S]*Written to plain\n$/);
  expect(runs[1].stdout).toMatch(/^perplexity +\d/);
  expect(runs[2].stdout).toMatch(/model.layers.1.mlp.down_proj {2}[123]{6}\n/);
});

it('a dry run says the plan, the sizes, the passes and the memory, and writes nothing', async () => {
  const before = artifactTree(cwd);
  const { code, stdout } = await runCli(['quantize', 'model', ...SETTINGS, '-o', 'out', '--dry-run'], { cwd });
  expect(code).toBe(0);
  expect(stdout).toMatch(/plan +2 bits in 36 groups\npeak memory +about \d+ MB\npasses +3 forward passes over 256 tokens/);
  expect(stdout).toMatch(/Dry run: nothing was written\.\n$/);
  expect(artifactTree(cwd)).toEqual(before);
});

it('a reader that stops reading is no failure', async () => {
  const running = startCli(['inspect', 'out', '--tensors', '--groups'], { cwd });
  running.process.stdout.destroy();
  expect(await running.done).toMatchObject({ code: 0, stderr: '' });
});

describe('without onnxruntime-node', () => {
  // As if it were not installed: its name resolves to nothing.
  const hook = `export async function resolve(name, context, next) {
    if (name !== 'onnxruntime-node') return next(name, context);
    throw Object.assign(new Error("Cannot find package 'onnxruntime-node'"), { code: 'ERR_MODULE_NOT_FOUND' });
  }`;
  const asUrl = (code: string) => `data:text/javascript,${encodeURIComponent(code)}`;
  const register = asUrl(`import { register } from 'node:module'; register(${JSON.stringify(asUrl(hook))});`);
  // Runs have a thread of their own, which the program's flags do not reach.
  const inThreads = asUrl(
    `import threads from 'node:worker_threads'; import { syncBuiltinESMExports } from 'node:module'; const { Worker } = threads;
    threads.Worker = class extends Worker {
      constructor(url, options) {
        const code = 'import(' + ${JSON.stringify(JSON.stringify(register))} + ').then(() => import(' + JSON.stringify(url.href) + '))';
        super(code, { ...options, eval: true });
      }
    };
    syncBuiltinESMExports();`,
  );
  const without = { cwd, nodeArgs: ['--import', register, '--import', inThreads] };

  it.each([
    ['quantize', ['quantize', 'model', ...SETTINGS, '-o', 'no-runtime']],
    ['evaluate', ['evaluate', 'model', '--text', 'text.txt']],
  ])('%s says how to install it, and leaves nothing', async (_, args) => {
    const before = artifactTree(cwd);
    const { code, stdout, stderr } = await runCli(args, without);
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
    expect(stderr).toMatch(/^pcomp: onnxruntime-node cannot be loaded on .* Install it: .*npm install onnxruntime-node\n$/);
    expect(artifactTree(cwd)).toEqual(before);
  });

  it('inspect works', async () => {
    const { code, stdout } = await runCli(['inspect', 'out'], without);
    expect(code).toBe(0);
    expect(stdout).toMatch(/layout onnx/);
  });

  it('a dry run works', async () => {
    expect(await runCli(['quantize', 'model', ...SETTINGS, '--dry-run'], without)).toMatchObject({ code: 0 });
  });
});

/** `pcomp merge --set lambda=auto` as a user runs it, beside all merges that it stands for. */
import { copyFileSync, cpSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { merge } from '../../src/runs/merge/merge.ts';
import { mergeRecipe } from '../../src/runs/merge/recipe.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { artifactTree, folderTree } from '../support/folder-tree.ts';
import { nudged, randomTensor, readWeights, saveAdapter, saveFolder, type Weights, weightsOf } from '../support/merge-models.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { runCli, runCliJson, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const MINUTES = 300_000;
const LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.3];
const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const base = tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 512 });
const baseWeights = weightsOf(base);
const LABELS = ['code', 'math'] as const;
const EXPERTS = ['code', 'math', '--base', 'base'];
const TEXTS = ['--calibration', 'code=code.txt', 'math=math.txt'];
const tokens = new Map<string, number[]>();

interface Found {
  readonly value: number;
  readonly tried: readonly { readonly lambda: number; readonly kl: number }[];
}

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${name}`), at('base', name));
  for (const [i, name] of LABELS.entries()) await saveFolder(at(name), nudged(baseWeights, i + 1, 0.2), base.config);
  const text = readFileSync(fixture('text/python.train.txt'), 'utf8');
  // Shorter than a window: a sample is the whole text.
  writeFileSync(at('code.txt'), text.slice(0, 250));
  writeFileSync(at('math.txt'), text.slice(5000, 5300));
  const tokenizer = await loadTokenizer(at('base'), 2048);
  for (const name of LABELS) tokens.set(name, [...tokenizer.encode(readFileSync(at(`${name}.txt`), 'utf8'))]);
}, MINUTES);

function logitsOf(weights: Weights, label: string): number[][] {
  return referenceForward(base.config, (name) => weights.get(name)?.values, tokens.get(label)!).logits;
}

function meanKl(teacher: readonly number[][], own: readonly number[][]): number {
  const logSoftmax = (row: readonly number[]) => {
    const most = Math.max(...row);
    const log = most + Math.log(row.reduce((sum, x) => sum + Math.exp(x - most), 0));
    return row.map((x) => x - log);
  };
  const kls = teacher.map((row, t) => {
    const [p, q] = [logSoftmax(row), logSoftmax(own[t])];
    return p.reduce((sum, x, i) => sum + Math.exp(x) * (x - q[i]), 0);
  });
  return kls.reduce((sum, kl) => sum + kl, 0) / kls.length;
}

/** Of every merge by a lambda that is given: mean over experts, in float64, of the models as they were written. */
async function measured(request: { readonly method: string; readonly weights?: string; readonly set: readonly string[] }) {
  const teachers = new Map<string, number[][]>();
  for (const label of LABELS) teachers.set(label, logitsOf(await readWeights(at(label)), label));
  const kls: number[] = [];
  for (const lambda of LAMBDAS) {
    const output = at(`${request.method} by ${lambda}`);
    const recipe = mergeRecipe({ ...request, base: at('base'), set: [...request.set, `lambda=${lambda}`] }, 1);
    await merge([at('code'), at('math')], output, recipe, { overwrite: false, resume: false, dryRun: false });
    const weights = await readWeights(output);
    kls.push(LABELS.reduce((sum, label) => sum + meanKl(teachers.get(label)!, logitsOf(weights, label)), 0) / LABELS.length);
  }
  return kls;
}

const WITHOUT = ['pcomp.json', 'report.json', 'README.md'];

describe.each([
  {
    method: 'ties',
    weights: 'code=1.5,math=0.5',
    set: ['density=0.6', '*.mlp.*:density=0.2', '*.1.*:normalize=false', '*.layers.0.*:math.weight=2'],
  },
  { method: 'iso-c', set: [] },
])('lambda=auto of $method', ({ method, weights, set }) => {
  it(
    'finds the lambda whose merge is nearest to the experts, and writes that merge',
    async () => {
      const flags = ['--method', method, ...(weights ? ['--weights', weights] : []), ...TEXTS, '--set', 'lambda=auto', ...set];
      const { lambda, notes } = await runCliJson<{ lambda: Found; notes: string[] }>(
        ['merge', ...EXPERTS, ...flags, '-o', method],
        {
          cwd,
        },
      );
      const kls = await measured({ method, ...(weights ? { weights } : {}), set });
      expect(lambda.tried.map((one) => one.lambda)).toEqual(LAMBDAS);
      for (const [i, { kl }] of lambda.tried.entries())
        expect(Math.abs(kl - kls[i]) / kls[i], `${LAMBDAS[i]}`).toBeLessThan(1e-3);
      expect(lambda.value).toBe(LAMBDAS[kls.indexOf(Math.min(...kls))]);
      expect(Math.max(...kls) / Math.min(...kls)).toBeGreaterThan(1.2);

      expect(folderTree(at(method), WITHOUT)).toEqual(folderTree(at(`${method} by ${lambda.value}`), WITHOUT));
      const { recipe, plan } = JSON.parse(readFileSync(at(method, 'pcomp.json'), 'utf8'));
      expect(recipe.set).toEqual(['lambda=auto', ...set]);
      expect(plan).toMatchObject({ method, lambda });
      expect(JSON.parse(readFileSync(at(method, 'report.json'), 'utf8')).lambda).toEqual(lambda);
      expect(notes.filter((note) => note.startsWith(`lambda ${lambda.value} is nearest`))).toHaveLength(1);
      expect(readFileSync(at(method, 'README.md'), 'utf8')).toContain(`lambda is ${lambda.value}:`);
    },
    MINUTES,
  );
});

const QUICK = ['--method', 'dare-linear', ...TEXTS, '--set', 'lambda=auto', 'density=0.5', 'samples=2', 'length=64'];
const run = (output: string, ...flags: string[]) =>
  runCli(['merge', ...EXPERTS, ...QUICK, '--quiet', '-o', output, ...flags], { cwd });

it(
  'a search that is killed goes on to the same bytes',
  async () => {
    expect(await run('whole')).toMatchObject({ code: 0 });
    const running = startCli(['merge', ...EXPERTS, ...QUICK, '--quiet', '-o', 'killed'], { cwd });
    const progress = at('killed.partial', 'parts', 'lambda.json');
    while (!existsSync(progress)) {
      if (running.process.exitCode !== null) throw new Error(`ended early: ${(await running.done).stderr}`);
      await delay(1);
    }
    running.process.kill('SIGKILL');
    await running.done;
    expect(existsSync(at('killed'))).toBe(false);
    cpSync(at('killed.partial'), at('told.partial'), { recursive: true });

    expect(await run('killed', '--resume')).toMatchObject({ code: 0 });
    expect(artifactTree(at('killed'))).toEqual(artifactTree(at('whole')));

    // What was judged is not judged again: were 0.1 perfect, it would be taken.
    const told = JSON.parse(readFileSync(at('told.partial', 'parts', 'lambda.json'), 'utf8')) as Found;
    const tried = told.tried.map((one) => (one.lambda === 0.1 ? { ...one, kl: 0 } : one));
    writeFileSync(at('told.partial', 'parts', 'lambda.json'), JSON.stringify({ ...told, tried }));
    expect(await run('told', '--resume')).toMatchObject({ code: 0 });
    expect(JSON.parse(readFileSync(at('told', 'pcomp.json'), 'utf8')).plan.lambda.value).toBe(0.1);
  },
  MINUTES,
);

it(
  'takes adapters, prompts that experts answer, and a dry run says what it will take',
  async () => {
    const target = 'model.layers.0.self_attn.q_proj';
    const [out, inputs] = baseWeights.get(`${target}.weight`)!.shape;
    const half = (name: string, shape: number[], seed: number) =>
      [`base_model.model.${target}.lora_${name}.weight`, randomTensor(shape, seed)] as const;
    await saveAdapter(at('lora'), new Map([half('A', [2, inputs], 5), half('B', [out, 2], 6)]));
    writeFileSync(at('lora.jsonl'), ['def f(', 'import ', 'return '].map((prompt) => JSON.stringify({ prompt })).join('\n'));
    const args = ['code', 'lora', '--base', 'base', '--method', 'task-arithmetic', '--dtype', 'bf16'];
    const flags = [
      '--calibration',
      'code=code.txt',
      'lora=lora.jsonl',
      '--set',
      'lambda=auto',
      'response_length=4',
      '-o',
      'mixed',
    ];
    const cost = await runCliJson<{ toFindLambda: object }>(['merge', ...args, ...flags, '--dry-run'], { cwd });
    expect(cost.toFindLambda).toMatchObject({ lambdas: 9, samples: 4, prompts: 3, temporaryBytes: 0 });
    expect(existsSync(at('mixed'))).toBe(false);

    const { lambda } = await runCliJson<{ lambda: Found }>(['merge', ...args, ...flags], { cwd });
    expect(lambda.tried).toHaveLength(9);
    expect(lambda.value).toBe([...lambda.tried].sort((a, b) => a.kl - b.kl)[0].lambda);
    expect(await runCli(['merge', ...args, '--set', `lambda=${lambda.value}`, '-o', 'given', '--quiet'], { cwd })).toMatchObject({
      code: 0,
    });
    expect(folderTree(at('mixed'), WITHOUT)).toEqual(folderTree(at('given'), WITHOUT));
  },
  MINUTES,
);

it.each([
  [['--method', 'ties', '--set', 'lambda=auto'], /--set lambda=auto: is found on text of every expert; give --calibration/],
  [['--method', 'linear', ...TEXTS, '--set', 'lambda=auto'], /linear has no lambda that can be found; task-arithmetic, /],
  [['--method', 'regmean', ...TEXTS, '--set', 'lambda=auto'], /regmean has no lambda that can be found/],
  [[...TEXTS, '--set', 'lambda=auto'], /expert-merging\+\+ has no lambda to be found/],
  [
    ['--method', 'ties', ...TEXTS, '--set', 'lambda=auto', '*.mlp.*:lambda=1'],
    /--set \*\.mlp\.\*:lambda=1: has no place beside lambda=auto/,
  ],
  [['--method', 'ties', ...TEXTS, '--set', '*.mlp.*:lambda=auto'], /one lambda is found, for all tensors/],
  [['--method', 'ties', ...TEXTS, '--set', 'lambda=auto', '--plan', 'x.json'], /--plan: --method ties learns nothing/],
  [['--method', 'ties', ...TEXTS, '--set', 'lambda=auto', 'samples=0'], /samples 0: .*at least 1/],
  [
    ['--method', 'ties', ...TEXTS, '--set', 'samples=4'],
    /--calibration: --method ties learns nothing.*lambda=auto finds its lambda/,
  ],
  [['--method', 'ties', '--set', 'samples=4'], /samples: ties has no such parameter/],
])('%j is refused in one line', async (args, message) => {
  const { code, stderr } = await runCli(['merge', ...EXPERTS, '--quiet', '-o', 'refused', ...args], { cwd });
  expect(code).toBe(2);
  expect(stderr).toMatch(message);
  expect(stderr.trim().split('\n')).toHaveLength(1);
  expect(existsSync(at('refused'))).toBe(false);
});

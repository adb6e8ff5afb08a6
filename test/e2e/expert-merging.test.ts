/** `pcomp merge --calibration` as a user runs it, on experts small enough to learn in seconds. */
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { nudged, product, randomTensor, readWeights, saveAdapter, saveFolder, weightsOf } from '../support/merge-models.ts';
import { runCli, runCliJson } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const SETUP_MS = 300_000;
const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);

const base = tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 64 });
const Q = 'model.layers.0.self_attn.q_proj.weight';

const EXPERTS = ['code', 'math', '--base', 'base'];
const TEXTS = ['--calibration', 'code=code.txt', 'math=math.jsonl'];
const QUICK = ['samples=16', 'length=24', 'updates=6', 'chunk_updates=4', 'chunks=2', 'gamma=0.1'];

interface Learned {
  readonly learning: {
    readonly judgedOn: string;
    readonly experts: readonly {
      readonly label: string;
      readonly start: { readonly kl: number };
      readonly merged: { readonly kl: number };
    }[];
    readonly stages: readonly { readonly losses: readonly number[]; readonly looks: readonly { readonly kl: number }[] }[];
  };
}

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) copyFileSync(fixture(`base/${name}`), at('base', name));
  const weights = weightsOf(base);
  for (const [name, seed] of [
    ['code', 1],
    ['math', 2],
  ] as const)
    await saveFolder(at(name), nudged(weights, seed, 0.2), base.config);
  const text = readFileSync(fixture('text/python.train.txt'), 'utf8');
  writeFileSync(at('code.txt'), text.slice(0, 20_000));
  const lines = text
    .slice(20_000, 60_000)
    .split('\n\n')
    .filter((part) => part.length > 60);
  writeFileSync(
    at('math.jsonl'),
    lines.map((part) => JSON.stringify({ prompt: part.slice(0, 30), response: part.slice(30) })).join('\n'),
  );
}, SETUP_MS);

describe('expert-merging++, the default with texts', () => {
  it(
    'learns, is no further from the experts than its start, and a plan says all that was learned',
    async () => {
      const learned = (await runCliJson(['merge', ...EXPERTS, ...TEXTS, '--set', ...QUICK, '-o', 'merged'], {
        cwd,
      })) as unknown as Learned;
      const { experts, stages, judgedOn } = learned.learning;
      expect(judgedOn).toBe('held-out samples');
      expect(experts.map(({ label }) => label)).toEqual(['code', 'math']);
      expect(mean(experts.map(({ merged }) => merged.kl))).toBeLessThanOrEqual(mean(experts.map(({ start }) => start.kl)));
      expect(stages.map(({ losses }) => losses.length)).toEqual([6, 4]);

      const { plan } = JSON.parse(readFileSync(at('merged', 'pcomp.json'), 'utf8'));
      const { bounds, coefficients } = plan.tensors[Q];
      expect(coefficients).toHaveLength(2);
      expect(coefficients[0]).toHaveLength(bounds.length - 1);

      // What was written is what the plan says: start + sum alpha tau, for the base and the experts as anybody reads them.
      const texts = plan.start.method === 'regmean' ? TEXTS : [];
      const applied = await runCli(['merge', ...EXPERTS, '--plan', 'merged/pcomp.json', ...texts, '-o', 'again'], { cwd });
      expect(applied.code, applied.stderr).toBe(0);
      expect(readFileSync(at('again', 'model.safetensors'))).toEqual(readFileSync(at('merged', 'model.safetensors')));
    },
    SETUP_MS,
  );

  it(
    'from the base alone, the result is the base and the task vectors by their coefficients',
    async () => {
      const flags = ['--set', ...QUICK, 'start=none', 'passive=base'];
      await runCliJson(['merge', ...EXPERTS, ...TEXTS, ...flags, '-o', 'plain'], { cwd });
      const { plan } = JSON.parse(readFileSync(at('plain', 'pcomp.json'), 'utf8'));
      const [own, code, math, result] = await Promise.all(['base', 'code', 'math', 'plain'].map((name) => readWeights(at(name))));
      const { bounds, coefficients } = plan.tensors[Q];
      const b = own.get(Q)!.values;
      const made = result.get(Q)!.values;
      for (let i = 0; i < b.length; i += 7) {
        const s = bounds.findIndex((bound: number) => bound > i) - 1;
        const expected =
          b[i] + coefficients[0][s] * (code.get(Q)!.values[i] - b[i]) + coefficients[1][s] * (math.get(Q)!.values[i] - b[i]);
        expect(Math.abs(made[i] - expected)).toBeLessThan(1e-5);
      }
      expect(result.get('model.embed_tokens.weight')!.values).toEqual(own.get('model.embed_tokens.weight')!.values);
    },
    SETUP_MS,
  );

  it(
    'learns the same again, and as published with --preset paper',
    async () => {
      const run = async (output: string, ...flags: string[]) => {
        await runCliJson(['merge', ...EXPERTS, ...TEXTS, ...flags, '-o', output], { cwd });
        return readFileSync(at(output, 'model.safetensors'));
      };
      const paper = ['--preset', 'paper', '--set', 'length=24'];
      expect(await run('paper-1', ...paper)).toEqual(await run('paper-2', ...paper));
      const { plan } = JSON.parse(readFileSync(at('paper-1', 'pcomp.json'), 'utf8'));
      expect(plan.start.scale).toBe(0);
      const all = Object.values(plan.tensors as Record<string, { coefficients: number[][] }>).flatMap(({ coefficients }) =>
        coefficients.flat(),
      );
      expect(all.every((alpha) => alpha > 0 && alpha < 1)).toBe(true);
    },
    SETUP_MS,
  );

  it(
    'starts from regmean, which measures the text: its plan asks for the text again',
    async () => {
      const flags = ['--set', ...QUICK, 'start=regmean', '--threads', '1'];
      const { learning } = await runCliJson<Learned>(['merge', ...EXPERTS, ...TEXTS, ...flags, '-o', 'measured'], { cwd });
      expect(learning.stages).toHaveLength(2);
      const follow = ['merge', ...EXPERTS, '--plan', 'measured/pcomp.json', '--threads', '1'];
      const bare = await runCli([...follow, '-o', 'bare'], { cwd });
      expect([bare.code, bare.stderr]).toEqual([2, expect.stringMatching(/starts from regmean, .* give the --calibration/)]);
      const again = await runCli([...follow, ...TEXTS, '-o', 'measured-again'], { cwd });
      expect(again.code, again.stderr).toBe(0);
      const bytes = (folder: string) => readFileSync(at(folder, 'model.safetensors'));
      expect(bytes('measured-again').equals(bytes('measured'))).toBe(true);
    },
    SETUP_MS,
  );

  it(
    'takes an adapter as it takes the expert that it makes',
    async () => {
      const [a, b] = [randomTensor([2, 32], 3), randomTensor([32, 2], 4)];
      const stem = `base_model.model.${Q.slice(0, -'.weight'.length)}`;
      await saveAdapter(
        at('adapter'),
        new Map([
          [`${stem}.lora_A.weight`, a],
          [`${stem}.lora_B.weight`, b],
        ]),
      );
      const weights = new Map(weightsOf(base));
      const change = product(a, b, 2);
      weights.set(Q, { shape: [32, 32], values: weights.get(Q)!.values.map((value, i) => value + change[i]) });
      await saveFolder(at('adapted'), weights, base.config);
      const plans = [];
      for (const expert of ['adapter', 'adapted']) {
        const texts = ['--calibration', `${expert}=code.txt`, 'math=math.jsonl'];
        const flags = ['--method', 'expert-merging', '--set', ...QUICK, 'start=none', 'passive=base'];
        await runCliJson(['merge', expert, 'math', '--base', 'base', ...texts, ...flags, '-o', `of-${expert}`], { cwd });
        plans.push(JSON.parse(readFileSync(at(`of-${expert}`, 'pcomp.json'), 'utf8')).plan.tensors[Q].coefficients.flat());
      }
      for (const [i, value] of plans[0].entries()) expect(plans[1][i]).toBeCloseTo(value, 3);
    },
    SETUP_MS,
  );
});

describe('adamerging', () => {
  it(
    'learns one coefficient per tensor to be certain of what comes next, and says how near the experts that is',
    async () => {
      const args = ['merge', ...EXPERTS, ...TEXTS, '--method', 'adamerging', '--set', 'samples=8', 'length=24', 'updates=8'];
      const { learning } = (await runCliJson([...args, '-o', 'certain'], { cwd })) as unknown as Learned;
      const [{ losses }] = learning.stages;
      expect(losses).toHaveLength(8);
      expect(mean(losses.slice(-3))).toBeLessThan(mean(losses.slice(0, 3)));
      const { plan } = JSON.parse(readFileSync(at('certain', 'pcomp.json'), 'utf8')) as {
        plan: { tensors: Record<string, { coefficients: number[][] }> };
      };
      for (const { coefficients } of Object.values(plan.tensors)) expect(coefficients.map((own) => own.length)).toEqual([1, 1]);
      const trimmed = ['granularity=task', 'trim=0.3', 'updates=4'];
      await runCliJson([...args, ...trimmed, '-o', 'trimmed'], { cwd });
      const { plan: shared } = JSON.parse(readFileSync(at('trimmed', 'pcomp.json'), 'utf8')) as {
        plan: { tensors: Record<string, { coefficients: number[][] }> };
      };
      const all = Object.values(shared.tensors);
      expect(all[0].coefficients.flat()).not.toContain(0.3);
      for (const tensor of all) expect(tensor).toMatchObject({ coefficients: all[0].coefficients, trim: 0.3 });
      // By definition: the base, and of every task vector the largest entries.
      const [own, code, math, made] = await Promise.all(['base', 'code', 'math', 'trimmed'].map((name) => readWeights(at(name))));
      const b = own.get(Q)!.values;
      const result = b.slice();
      for (const [k, expert] of [code, math].entries()) {
        const tau = expert.get(Q)!.values.map((value, i) => value - b[i]);
        const order = [...tau.keys()].sort((i, j) => Math.abs(tau[j]) - Math.abs(tau[i]) || i - j);
        for (const i of order.slice(0, Math.floor(0.3 * tau.length))) result[i] += all[0].coefficients[k][0] * tau[i];
      }
      const found = made.get(Q)!.values;
      for (let i = 0; i < b.length; i++) expect(Math.abs(found[i] - result[i])).toBeLessThan(1e-5);
      const refused = await runCli([...args, 'gamma=1', '-o', 'never'], { cwd });
      expect([refused.code, refused.stderr]).toEqual([
        2,
        expect.stringMatching(
          /gamma: adamerging has no such parameter; it has samples, length, response_length, response_temperature, updates, granularity, trim/,
        ),
      ]);
    },
    SETUP_MS,
  );
});

describe('a request that cannot be learned from', () => {
  it.each([
    [['--calibration', 'code=code.txt'], /^pcomp: --calibration: no text for expert math; give math=FILE$/m],
    [['--calibration', 'physics=code.txt'], /--calibration physics=code\.txt: no expert is called physics; there are code, math/],
    [['--method', 'expert-merging'], /--calibration: expert-merging learns on text of every expert; give label=FILE for each/],
    [
      ['--method', 'ties', ...TEXTS],
      /--calibration: --method ties learns nothing; expert-merging, expert-merging\+\+, adamerging do/,
    ],
    [[...TEXTS, '--weights', '0.5'], /--weights: expert-merging\+\+ learns them/],
    [[...TEXTS, '--set', 'lambda=2'], /lambda: expert-merging\+\+ has no such parameter; it has samples, /],
    [[...TEXTS, '--set', '*.q_proj*:gamma=2'], /takes its parameters for all tensors and experts at once/],
    [['--plan', 'code.txt'], /code\.txt/],
  ])('%j', async (flags, message) => {
    const { code, stderr } = await runCli(['merge', ...EXPERTS, ...flags, '-o', 'refused'], { cwd });
    expect(code).not.toBe(0);
    expect(stderr).toMatch(message);
  });
});

/** A learned merge from prompts alone, killed while it writes and while it learns: the same bytes in the end. */
import { copyFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { beforeAll, describe, expect, it } from 'vitest';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { artifactTree } from '../support/folder-tree.ts';
import { nudged, saveFolder, weightsOf } from '../support/merge-models.ts';
import { type RunningCli, runCli, startCli } from '../support/run-cli.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { tinyLlama } from '../support/tiny-models.ts';

const SETUP_MS = 300_000;
const fixture = (path: string) => fileURLToPath(new URL(`../../fixtures/lab/${path}`, import.meta.url));
const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...parts: string[]) => join(cwd, ...parts);
const base = tinyLlama('base', { vocab_size: 2048, max_position_embeddings: 64 });
const TEMPLATE =
  "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}";
const SETTINGS = ['samples=16', 'length=32', 'response_length=6', 'updates=6', 'chunk_updates=5', 'chunks=2', 'gamma=0.1'];
const ARGS = ['merge', 'code', 'math', '--base', 'base', '--calibration', 'code=code.jsonl', 'math=math.jsonl'];
const start = (output: string, ...flags: string[]) =>
  startCli([...ARGS, '--set', ...SETTINGS, '--threads', '1', '--quiet', '-o', output, ...flags], { cwd });

let whole: Record<string, string>;

beforeAll(async () => {
  await saveCheckpoint(at('base'), base, 1e9);
  copyFileSync(fixture('base/tokenizer.json'), at('base', 'tokenizer.json'));
  const config = JSON.parse(readFileSync(fixture('base/tokenizer_config.json'), 'utf8')) as Record<string, unknown>;
  writeFileSync(at('base', 'tokenizer_config.json'), JSON.stringify({ ...config, chat_template: TEMPLATE }));
  const weights = weightsOf(base);
  await saveFolder(at('code'), nudged(weights, 1, 0.2), base.config);
  await saveFolder(at('math'), nudged(weights, 2, 0.2), base.config);
  const words = readFileSync(fixture('text/python.train.txt'), 'utf8').split(/\s+/);
  const prompt = (i: number) => words.slice(4 * i, 4 * i + 3).join(' ');
  const lines = (make: (i: number) => unknown) => Array.from({ length: 16 }, (_, i) => `${JSON.stringify(make(i))}\n`).join('');
  writeFileSync(
    at('code.jsonl'),
    lines((i) => ({ prompt: prompt(i) })),
  );
  writeFileSync(
    at('math.jsonl'),
    lines((i) => ({ messages: [{ role: 'user', content: prompt(i + 40) }] })),
  );
  const first = await start('whole').done;
  expect(first.code, first.stderr).toBe(0);
  whole = artifactTree(at('whole'));
}, SETUP_MS);

interface Progress {
  readonly current?: { readonly name: string; readonly state: { readonly update: number } };
  readonly finished: Readonly<Record<string, unknown>>;
}

const part = (output: string, name: string) => at(`${output}.partial`, 'parts', name);
const responses = (output: string) =>
  existsSync(part(output, 'responses.jsonl')) ? readFileSync(part(output, 'responses.jsonl'), 'utf8').split('\n').length - 1 : 0;
const progress = (output: string): Progress | undefined =>
  existsSync(part(output, 'learning.json'))
    ? (JSON.parse(readFileSync(part(output, 'learning.json'), 'utf8')) as Progress)
    : undefined;

async function killedWhen(running: RunningCli, reached: () => boolean): Promise<void> {
  while (!reached()) {
    if (running.process.exitCode !== null) throw new Error(`ended early: ${(await running.done).stderr}`);
    await delay(1);
  }
  running.process.kill('SIGKILL');
  await running.done;
}

describe('a merge that learns from prompts', () => {
  it('says what it will take before it begins', async () => {
    const { code, stdout } = await runCli([...ARGS, '--set', ...SETTINGS, '-o', 'dry', '--dry-run', '--json'], { cwd });
    expect(code).toBe(0);
    const { toLearn } = JSON.parse(stdout) as { toLearn: Record<string, number> };
    expect(toLearn).toMatchObject({ samples: 28, heldOut: 4, prompts: 32, updates: 11, temporaryBytes: 0 });
    expect(existsSync(at('dry.partial'))).toBe(false);
  });

  it(
    'killed while experts write, in the first stage and in the second, ends as if it had not been',
    async () => {
      await killedWhen(start('again'), () => responses('again') > 0);
      const written = readFileSync(part('again', 'responses.jsonl'), 'utf8');
      const { sample, tokens } = JSON.parse(written.split('\n')[0]) as { sample: number; tokens: number[] };
      expect(sample).toBeLessThan(32);
      expect(tokens.length).toBeLessThanOrEqual(6);
      await killedWhen(start('again', '--resume'), () => (progress('again')?.current?.state.update ?? 0) >= 2);
      const first = progress('again')!;
      expect(first.current?.name).toBe('coefficients per tensor');
      expect(readFileSync(part('again', 'responses.jsonl'), 'utf8').startsWith(written)).toBe(true);
      const second = () => progress('again')?.current;
      await killedWhen(
        start('again', '--resume'),
        () => second()?.name === 'coefficients per chunk' && second()!.state.update >= 1,
      );
      expect(Object.keys(progress('again')!.finished)).toEqual(['coefficients per tensor']);
      const last = await start('again', '--resume', '--threads', '2').done;
      expect(last.code, last.stderr).toBe(0);
      expect(last.stderr).toMatch(/learning goes on after update \d of coefficients per chunk/);
      expect(last.stderr).toMatch(/goes on with the 1 threads it began with/);
      expect(artifactTree(at('again'))).toEqual(whole);
    },
    SETUP_MS,
  );

  it('reports what was written, and how each expert is predicted before and after', () => {
    const report = JSON.parse(readFileSync(at('whole', 'report.json'), 'utf8')) as {
      learning: {
        responses: number;
        experts: { base: { perplexity: number }; merged: { perplexity: number; agreement: number } }[];
      };
    };
    expect(report.learning.responses).toBe(32);
    for (const { base: before, merged } of report.learning.experts) {
      expect(before.perplexity).toBeGreaterThan(1);
      expect(merged.perplexity).toBeGreaterThan(1);
      expect(merged.agreement).toBeGreaterThanOrEqual(0);
    }
  });

  it.each([
    [['--method', 'ties'], /--calibration: --method ties learns nothing/],
    [['--set', 'response_length=0'], /response_length/],
  ])('refuses %j', async (flags, message) => {
    const { code, stderr } = await runCli([...ARGS, ...flags, '-o', 'refused'], { cwd });
    expect(code).toBe(2);
    expect(stderr).toMatch(message);
  });
});

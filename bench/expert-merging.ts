/**
 * Merging two experts of one small model: perplexity on each domain of every training-free method at its best scale, and of learned merges.
 * `npx tsx bench/expert-merging.ts [--seeds 3] [--methods a,b]`; writes bench/results/expert-merging.{json,md}. Needs ../shared/data/lab.
 *
 * Recovered: how much of the way from the linear average to the experts a merge goes, in nats per token of each domain's own text:
 * `(nll(average) - nll(merge)) / (nll(average) - nll(expert))`, the mean over domains. A training-free method is given the scale that is best on
 * the very text it is judged on, which no user has; a learned one sees its calibration text only.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { evaluate } from '../src/evaluate.ts';
import { merge } from '../src/merge.ts';
import { type MergeRequest, mergeRecipe } from '../src/merge-recipe.ts';
import { type Row, writeResults } from './results.ts';

const data = process.env['PCOMP_TEST_DATA'] ?? fileURLToPath(new URL('../../shared/data', import.meta.url));
const lab = (path: string) => join(data, 'lab', path);
const DOMAINS = ['python', 'shakespeare'] as const;
const EXPERTS = DOMAINS.map((domain) => lab(`expert-${domain}`));
const SCALES = [0.5, 0.7, 1, 1.3];
const TEXTS = DOMAINS.map((domain) => `expert-${domain}=${lab(`text/${domain}.train.txt`)}`);

/** Settings at which a method is tried; the best counts. */
const FREE: Readonly<Record<string, readonly string[]>> = {
  'task-arithmetic': SCALES.map((scale) => `lambda=${scale}`),
  ties: SCALES.map((scale) => `density=0.5 lambda=${scale}`),
  'dare-ties': SCALES.map((scale) => `density=0.5 lambda=${scale}`),
  della: SCALES.map((scale) => `density=0.5 lambda=${scale}`),
  breadcrumbs: SCALES.map((scale) => `density=0.5 lambda=${scale}`),
  'model-stock': [''],
  sce: ['', 'select_topk=0.5'],
  karcher: [''],
  'tsv-m': SCALES.map((scale) => `lambda=${scale}`),
  'iso-c': SCALES.map((scale) => `lambda=${scale}`),
  wudi: SCALES.map((scale) => `lambda=${scale}`),
};

const { values } = parseArgs({ options: { seeds: { type: 'string', default: '3' }, methods: { type: 'string' } } });
if (!existsSync(lab('base'))) {
  console.error(`skipped: ${lab('base')} is not there`);
  process.exit(0);
}
const threads = availableParallelism();
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-experts-'));

/** Nats per token on each domain's held-out text. */
async function score(model: string): Promise<number[]> {
  const nlls: number[] = [];
  for (const domain of DOMAINS) {
    const text = [lab(`text/${domain}.eval.txt`)];
    const machine = { sequenceLength: 256, device: 'cpu', threads, maxMemory: 2 ** 30, accuracy: 'exact' } as const;
    nlls.push((await evaluate(model, { ...machine, text })).nll);
  }
  return nlls;
}

async function merged(request: MergeRequest): Promise<{ nlls: number[]; seconds: number }> {
  const output = join(scratch, 'merged');
  const recipe = mergeRecipe({ base: lab('base'), dtype: 'f32', ...request }, threads);
  const { run } = await merge(EXPERTS, output, recipe, { overwrite: true, resume: false, dryRun: false });
  return { nlls: await score(output), seconds: run?.seconds ?? 0 };
}

const mean = (list: readonly number[]) => list.reduce((sum, value) => sum + value, 0) / list.length;
const experts: number[][] = [];
for (const expert of EXPERTS) experts.push(await score(expert));
const average = await merged({ method: 'linear' });
const recovered = (nlls: readonly number[]) =>
  mean(DOMAINS.map((_, k) => (average.nlls[k] - nlls[k]) / (average.nlls[k] - experts[k][k])));

const rows: Row[] = [];
const add = (method: string, setting: string, nlls: readonly number[], seconds?: number): void => {
  const row = {
    method,
    setting,
    ...Object.fromEntries(DOMAINS.map((domain, k) => [`${domain}, perplexity`, Math.exp(nlls[k])])),
    'recovered, %': 100 * recovered(nlls),
    ...(seconds === undefined ? {} : { seconds }),
  };
  rows.push(row);
  console.error(JSON.stringify(row));
};
add('base', '', await score(lab('base')));
for (const [k, domain] of DOMAINS.entries()) add(`expert-${domain}`, '', experts[k]);
add('linear average', '', average.nlls, average.seconds);

const wanted = values.methods?.split(',') ?? Object.keys(FREE);
for (const method of wanted) {
  let best: { setting: string; nlls: number[]; seconds: number } | undefined;
  for (const setting of FREE[method]) {
    const made = await merged({ method, set: setting === '' ? [] : setting.split(' ') });
    if (best === undefined || mean(made.nlls) < mean(best.nlls)) best = { setting, ...made };
  }
  if (best) add(method, best.setting, best.nlls, best.seconds);
}

/** Measured on text, at their defaults but for the length of a window. */
for (const method of ['regmean', 'fisher']) {
  const { nlls, seconds } = await merged({ method, calibration: TEXTS, set: ['length=256'] });
  add(method, 'default', nlls, seconds);
}

const LEARNED: readonly (readonly [string, MergeRequest])[] = [
  ['expert-merging, paper', { method: 'expert-merging', preset: 'paper' }],
  ['expert-merging++, paper', { method: 'expert-merging++', preset: 'paper' }],
  ['expert-merging, best', { method: 'expert-merging', set: ['gamma=0.1'] }],
  ['expert-merging++, best', { method: 'expert-merging++', set: ['gamma=0.1'] }],
];
for (const [label, request] of LEARNED) {
  const runs: { nlls: number[]; seconds: number }[] = [];
  for (let seed = 0; seed < Number(values.seeds); seed++) runs.push(await merged({ ...request, calibration: TEXTS, seed }));
  const nlls = DOMAINS.map((_, k) => mean(runs.map((run) => run.nlls[k])));
  const all = runs.map((run) => 100 * recovered(run.nlls));
  const spread = Math.sqrt(mean(all.map((value) => (value - mean(all)) ** 2)));
  add(label, `${runs.length} seeds, +- ${spread.toFixed(1)} %`, nlls, mean(runs.map(({ seconds }) => seconds)));
}
await rm(scratch, { recursive: true, force: true });
await writeResults('expert-merging', ['npx tsx bench/expert-merging.ts', ...process.argv.slice(2)].join(' '), rows, [
  'Recovered: the way from the linear average to the experts, in nats per token on the domain of each, mean of both. Training-free methods have the scale that is best on the text they are judged on.',
]);

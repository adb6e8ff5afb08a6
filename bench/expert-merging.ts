/**
 * Merging two experts of one small model: perplexity on each domain of every training-free method at its best scale, and of learned merges.
 * `npx tsx bench/expert-merging.ts [--seeds 3] [--methods a,b] [--minutes 5] [--state FILE] [--threads 2]`; writes
 * bench/results/expert-merging.{json,md}. Needs ../shared/data/lab. Rows that are finished are kept in the state file, and a learned merge that
 * is cut short by --minutes goes on from its last update: run it again until it says that nothing is left.
 *
 * Recovered: how much of the way from the linear average to the experts a merge goes, in nats per token of each domain's own text:
 * `(nll(average) - nll(merge)) / (nll(average) - nll(expert))`, the mean over domains. Everything is chosen on calibration text: the first 270,000
 * characters of each domain's training text are what methods see, the last 30,000 are what the scale of a training-free method is chosen on.
 */
import { existsSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { evaluate } from '../src/runs/evaluate/evaluate.ts';
import { valley } from '../src/runs/merge/experts/start.ts';
import { merge } from '../src/runs/merge/merge.ts';
import { type MergeRequest, mergeRecipe } from '../src/runs/merge/recipe.ts';
import { type Row, writeResults } from './results.ts';

const data = process.env['PCOMP_TEST_DATA'] ?? fileURLToPath(new URL('../../shared/data', import.meta.url));
const lab = (path: string) => join(data, 'lab', path);
const DOMAINS = ['python', 'shakespeare'] as const;
const EXPERTS = DOMAINS.map((domain) => lab(`expert-${domain}`));
const WITH_LORA = [lab('expert-python'), lab('lora-shakespeare')];
const SCALES = [0.3, 0.5, 0.7, 1, 1.3, 1.6, 2];
/** Characters of the held-out text that are scored, and of the training text that scales are chosen on. */
const SCORED = 64_000;
const CHOSEN_ON = 30_000;

/** Training-free methods, with the settings that are tried besides the scale. */
const FREE: Readonly<Record<string, readonly string[]>> = {
  'task-arithmetic': [''],
  ties: ['density=0.5'],
  'dare-ties': ['density=0.5'],
  della: ['density=0.5'],
  breadcrumbs: ['density=0.5'],
  'model-stock': [''],
  sce: ['', 'select_topk=0.5'],
  karcher: [''],
  'tsv-m': [''],
  'iso-c': [''],
  wudi: [''],
  regmean: ['samples=64 length=256'],
  fisher: ['samples=64 length=256'],
};
/** Measured on each expert's text. */
const MEASURED = ['regmean', 'fisher'];

const { values } = parseArgs({
  options: {
    seeds: { type: 'string', default: '3' },
    methods: { type: 'string' },
    minutes: { type: 'string', default: '60' },
    state: { type: 'string', default: join(tmpdir(), 'pcomp-expert-merging') },
    threads: { type: 'string', default: String(availableParallelism()) },
  },
});
if (!existsSync(lab('base'))) {
  console.error(`skipped: ${lab('base')} is not there`);
  process.exit(0);
}
const threads = Number(values.threads);
const scratch = values.state;
const until = AbortSignal.timeout(Number(values.minutes) * 60_000);
await mkdir(scratch, { recursive: true });
const text = (domain: string, part: string) => join(scratch, `${domain}.${part}.txt`);
for (const domain of DOMAINS) {
  const training = await readFile(lab(`text/${domain}.train.txt`), 'utf8');
  await writeFile(text(domain, 'calibration'), training.slice(0, -CHOSEN_ON));
  await writeFile(text(domain, 'choice'), training.slice(-CHOSEN_ON));
  await writeFile(text(domain, 'test'), (await readFile(lab(`text/${domain}.eval.txt`), 'utf8')).slice(0, SCORED));
}

/** What is known, by name; written after everything that is added. */
const statePath = join(scratch, 'state.json');
const known: Record<string, unknown> = existsSync(statePath)
  ? (JSON.parse(readFileSync(statePath, 'utf8')) as Record<string, unknown>)
  : {};
function remember(key: string, value: unknown): void {
  known[key] = value;
  writeFileSync(`${statePath}.new`, JSON.stringify(known));
  renameSync(`${statePath}.new`, statePath);
}

async function once<T>(key: string, make: () => Promise<T>): Promise<T> {
  if (key in known) return known[key] as T;
  until.throwIfAborted();
  const value = await make();
  remember(key, value);
  console.error(key, JSON.stringify(value));
  return value;
}

/** Nats per token on each domain. */
async function score(model: string, part: 'test' | 'choice', adapter?: string): Promise<number[]> {
  const nlls: number[] = [];
  for (const domain of DOMAINS) {
    const machine = { sequenceLength: 256, device: 'cpu', threads, maxMemory: 2 ** 30, accuracy: 'exact' } as const;
    const asked = { ...machine, text: [text(domain, part)], ...(adapter ? { adapter } : {}) };
    nlls.push((await evaluate(model, asked)).nll);
  }
  return nlls;
}

const calibration = (experts: readonly string[]) =>
  experts.map((path, k) => `${path.slice(path.lastIndexOf('/') + 1)}=${text(DOMAINS[k], 'calibration')}`);

/** @returns seconds of all threads, of every leg of a run that was cut short */
async function merged(output: string, experts: readonly string[], request: MergeRequest): Promise<number> {
  const recipe = mergeRecipe({ base: lab('base'), dtype: 'f32', ...request }, threads);
  const partial = existsSync(`${output}.partial`);
  const mode = { overwrite: !partial, resume: partial, dryRun: false };
  const legs = `${basename(output)}, seconds of its legs`;
  const earlier = partial ? Number(known[legs] ?? 0) : 0;
  const before = process.cpuUsage();
  const spent = (): number => {
    const { user, system } = process.cpuUsage(before);
    return earlier + (user + system) / 1e6;
  };
  try {
    await merge(experts, output, recipe, mode, { signal: until });
  } catch (error) {
    remember(legs, spent());
    throw error;
  }
  return spent();
}

const mean = (list: readonly number[]) => list.reduce((sum, value) => sum + value, 0) / list.length;
interface Scored {
  readonly setting: string;
  readonly nlls: readonly number[];
  readonly seconds: number;
}

const slug = (name: string): string => name.replaceAll(/[^a-z0-9.]+/g, '-');

/** A method is linear in its scale, so that one merge at scale 1 is an expert that the other scales are of. */
async function atBestScale(method: string): Promise<Scored> {
  const scaled = join(scratch, 'scaled');
  const found: { setting: string; scale: number; nll: number }[] = [];
  const wholeOf = (setting: string) => join(scratch, slug(`whole ${method} ${setting}`));
  const make = async (setting: string): Promise<number> => {
    const texts = MEASURED.includes(method) ? { calibration: calibration(EXPERTS) } : {};
    return merged(wholeOf(setting), EXPERTS, { method, set: setting === '' ? [] : setting.split(' '), ...texts });
  };
  const scale = (setting: string, lambda: number) =>
    merged(scaled, [wholeOf(setting)], { method: 'task-arithmetic', set: [`lambda=${lambda}`] });
  const seconds: Record<string, number> = {};
  for (const setting of FREE[method]) {
    seconds[setting] = await once(`${method} ${setting}, seconds`, () => make(setting));
    const judged = async (index: number): Promise<number> => {
      const nll = await once(`${method} ${setting} ${SCALES[index]}, on the choice`, async () => {
        await scale(setting, SCALES[index]);
        return mean(await score(scaled, 'choice'));
      });
      found.push({ setting, scale: SCALES[index], nll });
      return nll;
    };
    await valley(SCALES.length, SCALES.indexOf(1), judged);
  }
  const [best] = found.sort((x, y) => x.nll - y.nll);
  const nlls = await once(`${method}, nll`, async () => {
    await scale(best.setting, best.scale);
    return score(scaled, 'test');
  });
  return {
    setting: [best.setting, `scale ${best.scale}`].filter((part) => part !== '').join(', '),
    nlls,
    seconds: seconds[best.setting],
  };
}

interface Learning {
  readonly stages: readonly { readonly name: string; readonly plan: unknown }[];
  readonly start: readonly unknown[];
}

/** A learned merge; with the plan of its first stage applied as well, which is what the method without chunks learns. */
async function learned(name: string, experts: readonly string[], request: MergeRequest, first: boolean): Promise<Scored[]> {
  const output = join(scratch, slug(name));
  const seconds = await once(`${name}, seconds`, () =>
    merged(output, experts, { calibration: calibration(experts), ...request }),
  );
  const { learning } = JSON.parse(await readFile(join(output, 'report.json'), 'utf8')) as { learning: Learning };
  const { plan } = JSON.parse(await readFile(join(output, 'pcomp.json'), 'utf8')) as {
    plan: { start: { method: string; scale: number } };
  };
  const setting = `start ${plan.start.method}, scale ${plan.start.scale}`;
  const all: Scored[] = [{ setting, nlls: await once(`${name}, nll`, () => score(output, 'test')), seconds }];
  if (first) {
    const path = join(scratch, 'first.json');
    await writeFile(path, JSON.stringify(learning.stages[0].plan));
    const texts = plan.start.method === 'regmean' ? { calibration: calibration(experts) } : {};
    const nlls = await once(`${name}, first stage`, async () => {
      const applied = join(scratch, 'first');
      await merged(applied, experts, { plan: path, ...texts });
      return score(applied, 'test');
    });
    all.push({ setting, nlls, seconds });
  }
  return all;
}

const rows: Row[] = [];
let experts: number[][] = [];
let average: number[] = [];
const recovered = (nlls: readonly number[]) => mean(DOMAINS.map((_, k) => (average[k] - nlls[k]) / (average[k] - experts[k][k])));
const add = (method: string, setting: string, nlls: readonly number[], seconds?: number): void => {
  rows.push({
    method,
    setting,
    ...Object.fromEntries(DOMAINS.map((domain, k) => [`${domain}, perplexity`, Math.exp(nlls[k])])),
    'recovered, %': 100 * recovered(nlls),
    ...(seconds === undefined ? {} : { 'CPU seconds': seconds }),
  });
};

/** Runs of one setting, seed by seed. */
function addSeeds(method: string, runs: readonly Scored[]): void {
  if (runs.length === 0) return;
  const all = runs.map(({ nlls }) => 100 * recovered(nlls));
  const spread = Math.sqrt(mean(all.map((value) => (value - mean(all)) ** 2)));
  const nlls = DOMAINS.map((_, k) => mean(runs.map((run) => run.nlls[k])));
  const starts = [...new Set(runs.map(({ setting }) => setting))].join('; ');
  const seeds = runs.length === 1 ? '1 seed' : `${runs.length} seeds, +- ${spread.toFixed(1)} %`;
  add(method, `${seeds}; ${starts}`, nlls, mean(runs.map(({ seconds }) => seconds)));
}

/** Everything, in the order of what is most worth knowing; stops where the time is up. */
async function measure(): Promise<void> {
  const base = await once('base', () => score(lab('base'), 'test'));
  experts = await once('experts', () => Promise.all(EXPERTS.map((expert) => score(expert, 'test'))));
  average = await once('average', async () => {
    const output = join(scratch, 'whole');
    await merged(output, EXPERTS, { method: 'linear' });
    return score(output, 'test');
  });
  add('base', '', base);
  for (const [k, domain] of DOMAINS.entries()) add(`expert-${domain}`, '', experts[k]);
  add('linear average', '', average);
  const best: Scored[][] = [[], []];
  const free: [string, Scored][] = [];
  const rest: [string, Scored][] = [];
  const seeds = Number(values.seeds);
  try {
    const run = async (seed: number): Promise<void> => {
      const [second, first] = await learned(
        `expert-merging++ best ${seed}`,
        EXPERTS,
        { method: 'expert-merging++', set: ['gamma=0.1'], seed },
        true,
      );
      best[0].push(first);
      best[1].push(second);
    };
    await run(0);
    for (const method of ['regmean', 'tsv-m']) free.push([method, await atBestScale(method)]);
    for (const method of ['expert-merging', 'expert-merging++'])
      rest.push([`${method}, paper`, (await learned(`${method} paper`, EXPERTS, { method, preset: 'paper' }, false))[0]]);
    for (const method of values.methods?.split(',') ?? Object.keys(FREE)) {
      if (!free.some(([name]) => name === method)) free.push([method, await atBestScale(method)]);
    }
    for (let seed = 1; seed < seeds; seed++) await run(seed);
    const less = ['samples=16', 'length=128', 'updates=40'];
    const [entropy] = await learned('adamerging best', EXPERTS, { method: 'adamerging', set: less }, false);
    rest.push(['adamerging', { ...entropy, setting: `${less.join(' ')}; ${entropy.setting}` }]);
    for (const method of ['tsv-m']) {
      const nlls = await once(`${method} with the LoRA`, async () => {
        const output = join(scratch, 'lora');
        await merged(output, WITH_LORA, { method });
        return score(output, 'test');
      });
      rest.push([`${method} of expert-python and lora-shakespeare`, { setting: 'scale 1', nlls, seconds: Number.NaN }]);
    }
    const alone = await once('lora', () => score(lab('base'), 'test', lab('lora-shakespeare')));
    rest.push(['lora-shakespeare alone', { setting: '', nlls: alone, seconds: Number.NaN }]);
    const [withLora] = await learned(
      'expert-merging++ with the LoRA',
      WITH_LORA,
      { method: 'expert-merging++', set: ['gamma=0.1'] },
      false,
    );
    rest.push(['expert-merging++, gamma=0.1, of expert-python and lora-shakespeare', withLora]);
  } finally {
    for (const [method, { setting, nlls, seconds }] of free) add(method, setting, nlls, seconds);
    for (const [method, { setting, nlls, seconds }] of rest) add(method, setting, nlls, seconds);
    addSeeds('expert-merging, best, gamma=0.1 (the first stage of the next)', best[0]);
    addSeeds('expert-merging++, best, gamma=0.1', best[1]);
  }
}

let whole = true;
try {
  await measure();
} catch (error) {
  if (!until.aborted) throw error;
  whole = false;
}
console.error(whole ? 'nothing is left to run' : 'time is up: run it again to go on');
await writeResults(
  'expert-merging',
  `npx tsx bench/expert-merging.ts --seeds ${values.seeds}${values.methods ? ` --methods ${values.methods}` : ''}`,
  rows,
  [
    'Recovered: the way from the linear average to the experts, in nats per token on the domain of each, mean of both; the first 64,000 characters of the held-out texts. Training-free methods have the scale of 0.3, 0.5, 0.7, 1, 1.3, 1.6 and 2 that is best on text that was held out of calibration. CPU seconds are of all threads, on a machine shared with other work.',
    ...(whole ? [] : ['Not all rows were run.']),
  ],
);
if (whole) await rm(scratch, { recursive: true, force: true });

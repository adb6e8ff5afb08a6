/**
 * Adapters of equal size on a real model: perplexity on text that no run has seen, by method, budget and seed. The ranks of the first seed are a heat
 * map below the table. `npx tsx bench/adapt.ts [--domain shakespeare] [--budgets 1,2] [--steps 150] [--seeds 3] [--methods uniform,uniform:pissa,...]`:
 * what follows a method's name is an --init, or dora, or a learning rate other than its own (adalora:lr=2e-3); after an @, layers, and what 1 % and so on of
 * all layers costs is spent on these. "full" is full fine-tuning, whatever the budget. Rows replace those of the same method, budget and steps in
 * bench/results/adapt-<domain>.{json,md}, and are written as they are made. Needs the expert texts of ../shared.
 */
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { adapt, adaptRecipe, evaluate } from '../src/index.ts';
import type { AdaptOutcome } from '../src/runs/adapt/outcome.ts';
import { fullFineTuning } from './full-finetune.ts';
import { earlierResults, type Row, writeResults } from './results.ts';

const METHODS = [
  ...['uniform', 'uniform:dora', 'uniform:pissa', 'uniform:olora'],
  ...['eva', 'gora', 'lamda++', 'adalora', 'increlora', 'triadaptlora', 'snella', 'mola@*gate_proj+*up_proj'],
  'full:lr=1e-4',
];
const { values } = parseArgs({
  options: {
    budgets: { type: 'string', default: '1,2' },
    steps: { type: 'string', default: '150' },
    seeds: { type: 'string', default: '3' },
    methods: { type: 'string', default: METHODS.join() },
    domain: { type: 'string', default: 'shakespeare' },
  },
});
const shared = process.env['PCOMP_TEST_DATA'] ?? fileURLToPath(new URL('../../shared/data', import.meta.url));
const base = join(shared, 'lab/base');
const [training, unseen] = ['train', 'eval'].map((part) => join(shared, `lab/text/${values.domain}.${part}.txt`));
if (!existsSync(training)) throw new Error(`${training} is not there`);

const threads = availableParallelism();
const steps = Number(values.steps);
const machine = { device: 'cpu', threads, maxMemory: 2 ** 30 } as const;
const text = { batch: 8, sequenceLength: 128 } as const;
const evaluated = { ...machine, text: [unseen], sequenceLength: 128, accuracy: 'exact' } as const;
type Layer = AdaptOutcome['modules'][number];
interface Made {
  readonly parameters: number;
  /** Nats per token of the text held out of training. */
  readonly heldOut: number;
  readonly seconds: number;
  readonly modules: readonly Layer[];
}

/** Of all linear layers. */
const weights = await (async () => {
  await using source = await openModelSource(base);
  const sites = source.model.blocks.flatMap((block) => block.sites);
  return sites.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
})();
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-bench-adapt-'));
const results = `adapt-${values.domain}`;
const kept = await earlierResults(results);
const maps = new Map(kept.notes.map((note) => [note.slice(0, note.indexOf('\n')), note]));
let rows: Row[] = kept.rows.filter(({ method }) => method !== 'base');
const { perplexity } = await evaluate(base, evaluated);
for (const budget of values.budgets.split(',')) {
  for (const entry of values.methods.split(',')) {
    const again = entry.startsWith('full') && budget !== values.budgets.split(',')[0];
    if (!again) await measure(entry, budget);
  }
}
await rm(scratch, { recursive: true, force: true });

/** Trains and judges one method at one budget with every seed, and writes the table with its row. */
async function measure(entry: string, budget: string): Promise<void> {
  const found: number[] = [];
  const heldOut: number[] = [];
  let [parameters, seconds] = [0, 0];
  let ranks: number[] = [];
  const full = entry.startsWith('full');
  for (let seed = 0; seed < Number(values.seeds); seed++) {
    const output = join(scratch, `adapter-${seed}`);
    const made = full ? await trainWhole(entry, output, seed) : await train(entry, budget, output, seed);
    found.push((await evaluate(base, { ...evaluated, adapter: output })).perplexity);
    heldOut.push(Math.exp(made.heldOut));
    [parameters, seconds] = [made.parameters, seconds + made.seconds];
    await rm(output, { recursive: true });
    if (seed > 0 || full) continue;
    ranks = made.modules.map(gotOf);
    const title = `Ranks of ${entry}, ${budget} %:`;
    maps.set(title, heatMap(title, made.modules));
  }
  const mean = (all: readonly number[]) => all.reduce((sum, value) => sum + value, 0) / all.length;
  const row = {
    method: entry,
    budget: full ? '-' : `${budget} %`,
    steps,
    seeds: found.length,
    parameters,
    perplexity: mean(found),
    lowest: Math.min(...found),
    highest: Math.max(...found),
    'held out': mean(heldOut),
    ranks: full ? '' : `${Math.min(...ranks)} to ${Math.max(...ranks)}`,
    'seconds a run': seconds / found.length,
  };
  console.error(row);
  const same = (other: Row) => other['method'] === entry && other['budget'] === row.budget && other['steps'] === steps;
  rows = [...rows.filter((other) => !same(other)), row].sort((a, b) => order(a) - order(b));
  await writeResults(
    results,
    `npx tsx bench/adapt.ts --domain ${values.domain}`,
    [{ method: 'base', budget: '-', steps: 0, seeds: 1, parameters: 0, perplexity }, ...rows],
    [...maps.values()],
  );
}

async function train(entry: string, budget: string, output: string, seed: number): Promise<Made> {
  const [choice, layers] = entry.split('@');
  const [method, variant] = choice.split(':');
  const rate = rateOf(entry);
  const request = {
    text: [training],
    budget: layers === undefined ? `pct=${budget}%` : `params=${Math.floor((Number(budget) / 100) * weights)}`,
    ...(layers === undefined ? {} : { targets: layers.split('+') }),
    method,
    ...(rate === undefined ? {} : { lr: rate }),
    ...(variant === 'dora' ? { dora: true } : variant && rate === undefined ? { init: variant } : {}),
    ...text,
    seed,
    ...machine,
  };
  const recipe = adaptRecipe({ ...request, steps }, threads);
  const { parameters, run, modules } = await adapt(base, output, recipe, { overwrite: true, resume: false, dryRun: false });
  return { parameters, heldOut: run!.heldOut.best, seconds: run!.seconds, modules };
}

async function trainWhole(entry: string, output: string, seed: number): Promise<Made> {
  const learningRate = rateOf(entry);
  if (learningRate === undefined) throw new Error(`${entry}: give its learning rate, full:lr=1e-4`);
  await mkdir(output);
  const rules = { text: training, steps, ...text, learningRate, seed, threads, maxMemory: 2 ** 30 };
  return { ...(await fullFineTuning(base, output, rules)), modules: [] };
}

/** What is written as `:lr=2e-4` behind a method. */
function rateOf(entry: string): number | undefined {
  const written = /:lr=([^@]+)/.exec(entry)?.[1];
  return written === undefined ? undefined : Number(written);
}

/** By budget, then as METHODS has them. */
function order({ method, budget }: Row): number {
  const place = METHODS.indexOf(String(method));
  return (Number.parseFloat(String(budget)) || 100) * 1000 + (place < 0 ? 999 : place);
}

/** A layer's rank, experts, or non-zeros in percent of its weights. */
function gotOf({ rank, experts, density }: Layer): number {
  return density === undefined ? (experts ?? rank) : Number((100 * density).toFixed(2));
}

/** Ranks by block and layer. */
function heatMap(title: string, modules: readonly Layer[]): string {
  const split = modules.map((module) => {
    const [, block, layer] = /\.(\d+)\.(?:.*\.)?([^.]+)$/.exec(module.name)!;
    return { block, layer, got: gotOf(module) };
  });
  const layers = [...new Set(split.map(({ layer }) => layer))];
  const lines = [...new Set(split.map(({ block }) => block))].map((block) =>
    [block, ...layers.map((layer) => split.find((one) => one.block === block && one.layer === layer)?.got ?? '')].join(' | '),
  );
  return `${title}\n\n| block | ${layers.join(' | ')} |\n|${' --- |'.repeat(layers.length + 1)}\n${lines.map((line) => `| ${line} |`).join('\n')}`;
}

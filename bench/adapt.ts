/**
 * Adapters of equal size on a real model: perplexity on text that no run has seen, by method, budget and seed. The ranks of the first seed are a heat
 * map below the table. `npx tsx bench/adapt.ts [--domain shakespeare] [--budgets 1,2] [--steps 150] [--seeds 3] [--methods uniform,uniform:pissa,...]`:
 * what follows a method's name is an --init, or dora; after an @, layers, and what 1 % and so on of all layers costs is spent on these. `--lr` is that of all methods. Writes bench/results/adapt-<domain>[-<name>].{json,md}. Needs the expert texts of ../shared.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { adapt, adaptRecipe, evaluate } from '../src/index.ts';
import type { AdaptOutcome } from '../src/runs/adapt/outcome.ts';
import { writeResults } from './results.ts';

const METHODS = [
  ...['uniform', 'uniform:dora', 'uniform:pissa', 'uniform:olora'],
  ...['eva', 'gora', 'lamda++', 'adalora', 'increlora', 'triadaptlora', 'snella', 'mola@*gate_proj+*up_proj'],
];
const { values } = parseArgs({
  options: {
    budgets: { type: 'string', default: '1,2' },
    steps: { type: 'string', default: '150' },
    seeds: { type: 'string', default: '3' },
    methods: { type: 'string', default: METHODS.join() },
    domain: { type: 'string', default: 'shakespeare' },
    name: { type: 'string' },
    lr: { type: 'string' },
  },
});
const shared = process.env['PCOMP_TEST_DATA'] ?? fileURLToPath(new URL('../../shared/data', import.meta.url));
const base = join(shared, 'lab/base');
const [training, unseen] = ['train', 'eval'].map((part) => join(shared, `lab/text/${values.domain}.${part}.txt`));
if (!existsSync(training)) throw new Error(`${training} is not there`);

const threads = availableParallelism();
const machine = { device: 'cpu', threads, maxMemory: 2 ** 30 } as const;
const evaluated = { ...machine, text: [unseen], sequenceLength: 128, accuracy: 'exact' } as const;
type Layer = AdaptOutcome['modules'][number];
/** Of all linear layers. */
const weights = await (async () => {
  await using source = await openModelSource(base);
  const sites = source.model.blocks.flatMap((block) => block.sites);
  return sites.reduce((sum, { outFeatures, inFeatures }) => sum + outFeatures * inFeatures, 0);
})();
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-bench-adapt-'));
const maps: string[] = [];
const rows: Record<string, number | string>[] = [
  { method: 'base', budget: '-', parameters: 0, perplexity: (await evaluate(base, evaluated)).perplexity },
];
for (const budget of values.budgets.split(',')) {
  for (const entry of values.methods.split(',')) {
    const [choice, layers] = entry.split('@');
    const [method, variant] = choice.split(':');
    const found: number[] = [];
    const heldOut: number[] = [];
    let parameters = 0;
    let seconds = 0;
    let ranks: number[] = [];
    for (let seed = 0; seed < Number(values.seeds); seed++) {
      const output = join(scratch, 'adapter');
      const request = {
        text: [training],
        budget: layers === undefined ? `pct=${budget}%` : `params=${Math.floor((Number(budget) / 100) * weights)}`,
        ...(layers === undefined ? {} : { targets: layers.split('+') }),
        ...(values.lr === undefined ? {} : { lr: values.lr }),
        method,
        ...(variant === 'dora' ? { dora: true } : variant ? { init: variant } : {}),
        batch: 8,
        sequenceLength: 128,
        seed,
        ...machine,
      };
      const recipe = adaptRecipe({ ...request, steps: Number(values.steps) }, threads);
      const {
        parameters: used,
        run,
        modules,
      } = await adapt(base, output, recipe, { overwrite: true, resume: false, dryRun: false });
      found.push((await evaluate(base, { ...evaluated, adapter: output })).perplexity);
      heldOut.push(Math.exp(run!.heldOut.best));
      [parameters, seconds] = [used, seconds + run!.seconds];
      if (seed > 0) continue;
      ranks = modules.map(gotOf);
      maps.push(heatMap(`${entry}, ${budget} %`, modules));
    }
    const mean = (all: readonly number[]) => all.reduce((sum, value) => sum + value, 0) / all.length;
    rows.push({
      method: entry,
      budget: `${budget} %`,
      parameters,
      perplexity: mean(found),
      lowest: Math.min(...found),
      highest: Math.max(...found),
      'held out': mean(heldOut),
      ranks: `${Math.min(...ranks)} to ${Math.max(...ranks)}`,
      'seconds a run': seconds / found.length,
    });
    console.error(rows.at(-1));
  }
}
await rm(scratch, { recursive: true, force: true });
await writeResults(
  `adapt-${values.domain}${values.name === undefined ? '' : `-${values.name}`}`,
  `npx tsx bench/adapt.ts --domain ${values.domain} --budgets ${values.budgets} --steps ${values.steps} --seeds ${values.seeds} --methods ${values.methods}${values.name === undefined ? '' : ` --name ${values.name}`}${values.lr === undefined ? '' : ` --lr ${values.lr}`}`,
  rows,
  maps,
);

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
  return `Ranks of ${title}:\n\n| block | ${layers.join(' | ')} |\n|${' --- |'.repeat(layers.length + 1)}\n${lines.map((line) => `| ${line} |`).join('\n')}`;
}

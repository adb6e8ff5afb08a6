/**
 * Adapters of equal size on a real model: perplexity on text that no run has seen, by method, budget and seed. The ranks of the first seed go
 * beside the table. `npx tsx bench/adapt.ts [--budgets 1,2] [--steps 150] [--seeds 3] [--methods uniform,eva,gora,adalora]`; writes
 * bench/results/adapt-<domain>.{json,md}. Needs the expert texts of ../shared.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { adapt, adaptRecipe, evaluate } from '../src/index.ts';
import { writeResults } from './results.ts';

const { values } = parseArgs({
  options: {
    budgets: { type: 'string', default: '1,2' },
    steps: { type: 'string', default: '150' },
    seeds: { type: 'string', default: '3' },
    methods: { type: 'string', default: 'uniform,eva,gora,adalora' },
    domain: { type: 'string', default: 'shakespeare' },
  },
});
const shared = process.env['PCOMP_TEST_DATA'] ?? fileURLToPath(new URL('../../shared/data', import.meta.url));
const base = join(shared, 'lab/base');
const [training, unseen] = ['train', 'eval'].map((part) => join(shared, `lab/text/${values.domain}.${part}.txt`));
if (!existsSync(training)) throw new Error(`${training} is not there`);

const threads = availableParallelism();
const machine = { device: 'cpu', threads, maxMemory: 2 ** 30 } as const;
const evaluated = { ...machine, text: [unseen], sequenceLength: 128, accuracy: 'exact' } as const;
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-bench-adapt-'));
const rows: Record<string, number | string>[] = [
  { method: 'base', budget: '-', parameters: 0, perplexity: (await evaluate(base, evaluated)).perplexity },
];
for (const budget of values.budgets.split(',')) {
  for (const method of values.methods.split(',')) {
    const found: number[] = [];
    const heldOut: number[] = [];
    let parameters = 0;
    let seconds = 0;
    let ranks: number[] = [];
    for (let seed = 0; seed < Number(values.seeds); seed++) {
      const output = join(scratch, 'adapter');
      const request = {
        text: [training],
        budget: `pct=${budget}%`,
        method,
        steps: values.steps,
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
      if (seed === 0) ranks = modules.map(({ rank }) => rank);
    }
    const mean = (all: readonly number[]) => all.reduce((sum, value) => sum + value, 0) / all.length;
    rows.push({
      method,
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
  `adapt-${values.domain}`,
  `npx tsx bench/adapt.ts --domain ${values.domain} --budgets ${values.budgets} --steps ${values.steps} --seeds ${values.seeds} --methods ${values.methods}`,
  rows,
);

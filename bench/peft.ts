/**
 * Adapters that pcomp wrote, loaded by PEFT itself: the same logits? `python -m venv VENV && VENV/bin/pip install -r bench/peft-requirements.txt`, then
 * `npx tsx bench/peft.ts VENV/bin/python [--only uniform,eva]`; writes bench/results/peft.{json,md}. Every method trains a few steps on fixtures/lab/base at a high
 * rate, so that its adapter changes a lot; logits are of one window of Python text, in float32 on both sides.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { loadTokenizer } from '../src/calibration/tokenizer.ts';
import { createEngine } from '../src/compute/ort.ts';
import { createBlas } from '../src/compute/ort-blas.ts';
import { adapt, adaptRecipe } from '../src/index.ts';
import type { WeightReader } from '../src/model/model.ts';
import { withAdapter } from '../src/runs/adapt/adapter-weights.ts';
import { BlockLogits } from '../src/runs/evaluate/logits-source.ts';
import { earlierRows, type Row, writeResults } from './results.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const BASE = root('fixtures/lab/base');
const TOKENS = 128;

/** What each row asks of `pcomp adapt`. */
const CASES: Readonly<Record<string, object>> = {
  uniform: { method: 'uniform' },
  'uniform --rslora --alpha 16': { method: 'uniform', alpha: 16, rslora: true },
  'uniform --dora': { method: 'uniform', dora: true },
  'uniform --init pissa': { method: 'uniform', init: 'pissa', lr: 2e-3 },
  'uniform --init olora': { method: 'uniform', init: 'olora', lr: 2e-3 },
  eva: { method: 'eva' },
  'eva --pad-ranks': { method: 'eva', padRanks: true },
  gora: { method: 'gora' },
  'lamda++': { method: 'lamda++' },
  adalora: { method: 'adalora' },
  increlora: { method: 'increlora' },
  triadaptlora: { method: 'triadaptlora' },
  'adalora --steps 0': { method: 'adalora', steps: 0 },
};

const { values, positionals } = parseArgs({ allowPositionals: true, options: { only: { type: 'string' } } });
const [python] = positionals;
if (python === undefined) throw new Error('the Python that PEFT is installed for is needed: bench/peft.ts VENV/bin/python');
const scratch = await mkdtemp(join(tmpdir(), 'pcomp-peft-'));
await using engine = await createEngine({ threads: 1 });
const blas = createBlas(engine);
await using source = await openModelSource(BASE);
const text = await readFile(root('fixtures/lab/text/python.eval.txt'), 'utf8');
const tokenizer = await loadTokenizer(BASE, source.model.shape.vocabSize);
const window = Int32Array.from(tokenizer.encode(text.slice(0, 4000)).slice(0, TOKENS));
await writeFile(join(scratch, 'text.txt'), text.slice(0, 3000));
await writeFile(join(scratch, 'window.json'), JSON.stringify([...window]));

async function logitsOf(weights: WeightReader): Promise<Float32Array> {
  const { model } = source;
  await using logits = await BlockLogits.run({
    model,
    engine,
    blas,
    weights,
    windows: [window],
    hooks: {},
    path: BASE,
    ramBytes: 2 ** 28,
  });
  for await (const { logits: rows } of logits.rows(TOKENS)) return rows.data.slice();
  throw new Error('no rows');
}

const clean = await logitsOf(source.weights);
const rows: Row[] = [...(await earlierRows('peft'))];
for (const [label, options] of Object.entries(CASES)) {
  // Rows that are there are kept.
  if (values.only ? !values.only.split(',').includes(label) : rows.some((row) => row['adapter'] === label)) continue;
  const output = join(scratch, 'adapter');
  const machine = { threads: 1, maxMemory: 2 ** 28 };
  const request = { text: [join(scratch, 'text.txt')], budget: 'r=2', steps: 20, lr: 2e-2, batch: 2, sequenceLength: 64 };
  const recipe = adaptRecipe({ ...request, ...machine, ...options }, 1);
  const { modules } = await adapt(BASE, output, recipe, { overwrite: true, resume: false, dryRun: false });
  const own = await logitsOf(await withAdapter(source, output, blas));
  const theirs = join(scratch, 'theirs.bin');
  const { stdout } = await promisify(execFile)(
    python,
    [root('bench/peft_logits.py'), BASE, output, join(scratch, 'window.json'), theirs],
    {
      env: { ...process.env, OMP_NUM_THREADS: '1', HF_HUB_OFFLINE: '1' },
    },
  );
  const read = await readFile(theirs);
  const other = new Float32Array(read.buffer, read.byteOffset, read.byteLength / 4);
  if (other.length !== own.length) throw new Error(`${label}: ${own.length} logits here, ${other.length} there`);
  const most = (a: Float32Array, b: Float32Array) =>
    a.reduce((largest, value, i) => Math.max(largest, Math.abs(value - b[i])), 0);
  const ranks = modules.map(({ rank }) => rank);
  rows.splice(0, rows.length, ...rows.filter((row) => row['adapter'] !== label));
  rows.push({
    adapter: label,
    ranks: `${Math.min(...ranks)} to ${Math.max(...ranks)}`,
    'largest change of a logit by the adapter': most(own, clean),
    'largest difference, PEFT and pcomp': most(own, other),
    'within 1e-4': most(own, other) <= 1e-4 ? 'yes' : 'no',
    versions: stdout.trim(),
  });
  console.error(rows.at(-1));
  await writeResults('peft', 'npx tsx bench/peft.ts VENV/bin/python', rows, [`${TOKENS} tokens, float32.`]);
}
await rm(scratch, { recursive: true, force: true });

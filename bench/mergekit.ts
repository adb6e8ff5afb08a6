/**
 * Whether pcomp merges as mergekit does: `npx tsx bench/mergekit.ts --python PATH`, a Python with bench/rivals/requirements-mergekit.txt.
 * lab/base and its two experts are merged by both from the same YAML, with every method that both have, computed and stored in float32. Rows go to
 * bench/results/mergekit.{json,md}: the largest difference of an element, relative to the largest element of its tensor, and of the change from the base
 * relative to the largest change. What differs by design is said in its row.
 */
import { execFile } from 'node:child_process';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { openCheckpoint } from '../formats/checkpoint.ts';
import { toFloat32 } from '../formats/dtype.ts';
import { merge } from '../src/runs/merge/merge.ts';
import { readMergekitConfig } from '../src/runs/merge/mergekit/config.ts';
import { mergeRecipe } from '../src/runs/merge/recipe.ts';
import { type Row, writeResults } from './results.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const shared = process.env['PCOMP_TEST_DATA'] ?? root('../shared/data');
const lab = (name: string) => join(shared, 'lab', name);
const { values: options } = parseArgs({ options: { python: { type: 'string' }, only: { type: 'string' } } });

interface Case {
  readonly method: string;
  /** YAML below `parameters:` of the merge, and of each model. */
  readonly parameters?: string;
  readonly own?: readonly string[];
  readonly experts?: 1 | 2;
  /** The method has no base_model. */
  readonly baseless?: true;
  /** Ranks, in parts of a tensor, between which an expert's magnitudes are kept: equal ones at them are taken in another order. */
  readonly bounds?: readonly (readonly number[])[];
  /** Why results may differ. */
  readonly note?: string;
}

const WEIGHTS = ['weight: 0.7', 'weight: 0.4'];
const DENSE = ['weight: 0.7, density: 0.3', 'weight: 0.4, density: 0.6'];
const WHOLE = ['weight: 0.7, density: 1.0', 'weight: 0.4, density: 1.0'];
const TOP = [[0.3], [0.6]];
const BAND = [
  [0.02, 0.3],
  [0.02, 0.6],
];
const MASKS = 'density 1: which elements a random mask keeps differs by design';

const CASES: readonly Case[] = [
  { method: 'linear', own: WEIGHTS, baseless: true },
  { method: 'linear', parameters: 'normalize: false', own: WEIGHTS, baseless: true },
  { method: 'slerp', parameters: 't: 0.3', experts: 1 },
  { method: 'slerp', parameters: 't: [0.1, 0.5, 0.9]', experts: 1 },
  { method: 'nuslerp', own: WEIGHTS, baseless: true },
  { method: 'nuslerp', own: WEIGHTS },
  { method: 'nuslerp', parameters: 'nuslerp_flatten: false', own: WEIGHTS },
  { method: 'nuslerp', parameters: 'nuslerp_flatten: false, nuslerp_row_wise: true', own: WEIGHTS },
  { method: 'multislerp', own: WEIGHTS, baseless: true },
  { method: 'multislerp', own: WEIGHTS },
  { method: 'karcher', baseless: true },
  { method: 'task_arithmetic', parameters: 'lambda: 0.8', own: WEIGHTS },
  { method: 'ties', parameters: 'lambda: 0.9', own: DENSE, bounds: TOP },
  { method: 'ties', parameters: 'normalize: false', own: DENSE, bounds: TOP },
  { method: 'dare_linear', own: WHOLE, note: MASKS },
  { method: 'dare_ties', own: WHOLE, note: MASKS },
  { method: 'della', own: WHOLE, note: MASKS },
  { method: 'della_linear', own: WHOLE, note: MASKS },
  { method: 'breadcrumbs', parameters: 'gamma: 0.02', own: DENSE, bounds: BAND },
  { method: 'breadcrumbs_ties', parameters: 'gamma: 0.02', own: DENSE, bounds: BAND },
  { method: 'sce', note: 'relative energies; mergekit weighs all alike below a mean square of 1e-6 (--compat mergekit)' },
  { method: 'sce', parameters: 'select_topk: 0.4', note: 'as above' },
  {
    method: 'model_stock',
    note: 'exact cosines of 0 and more; mergekit floors norms and takes negative cosines (--compat mergekit)',
  },
  { method: 'model_stock', parameters: 'filter_wise: true', note: 'as above' },
  { method: 'nearswap', parameters: 't: 0.001', experts: 1 },
  { method: 'arcee_fusion', experts: 1, note: 'exact quantiles; mergekit takes them of a random million elements' },
  { method: 'ram' },
  { method: 'ramplus_tl' },
  { method: 'passthrough', parameters: 'scale: 0.5', experts: 1, baseless: true },
];

const EXPERTS = ['expert-python', 'expert-shakespeare'];

/** 1 where a case gives none. */
function weightsOf({ own, experts = 2 }: Case): number[] {
  return EXPERTS.slice(0, experts).map((_, k) => Number(/weight: ([\d.]+)/.exec(own?.[k] ?? '')?.[1] ?? 1));
}

function yamlOf({ method, parameters, own, experts = 2, baseless }: Case): string {
  const models = EXPERTS.slice(0, experts);
  return [
    `merge_method: ${method}`,
    ...(baseless ? [] : [`base_model: ${lab('base')}`]),
    'models:',
    ...(method === 'slerp' ? [`  - model: ${lab('base')}`] : []),
    ...models.flatMap((name, k) => [`  - model: ${lab(name)}`, ...(own ? [`    parameters: { ${own[k]} }`] : [])]),
    ...(parameters ? [`parameters: { ${parameters} }`] : []),
    'dtype: float32',
    '',
  ].join('\n');
}

interface Difference {
  /** Largest difference of an element over the largest element of its tensor. */
  readonly relative: number;
  /** Root of the sum of squares of the differences, over that of the change from the base. */
  readonly ofChange: number;
  readonly tensor: string;
  /** Of all that were compared. */
  readonly elements: number;
  /** Elements further apart than GOAL. */
  readonly apart: number;
  /** Of them those where a rounding decides: a magnitude at a threshold of the selection, or a weighted sum whose parts cancel. */
  readonly ties: number;
}

const GOAL = 1e-6;

async function tensorsOf(path: string): Promise<Map<string, Float32Array>> {
  await using source = await openCheckpoint(path);
  const tensors = new Map<string, Float32Array>();
  for (const { name, dtype } of source.tensors.values()) tensors.set(name, toFloat32(dtype, (await source.read(name)).data));
  return tensors;
}

/** @param weights of the experts that are merged */
async function difference(
  ours: string,
  theirs: string,
  weights: readonly number[],
  bounds: readonly (readonly number[])[],
): Promise<Difference> {
  const [a, b, base] = [await tensorsOf(ours), await tensorsOf(theirs), await tensorsOf(lab('base'))];
  const experts: Map<string, Float32Array>[] = [];
  for (const name of EXPERTS.slice(0, weights.length)) experts.push(await tensorsOf(lab(name)));
  let [relative, tensor, squares, change, elements, apart, ties] = [0, '', 0, 0, 0, 0, 0];
  for (const [name, x] of a) {
    const y = b.get(name);
    // A head tied to the embedding may be stored by one of them alone.
    if (!y) continue;
    const start = base.get(name)!;
    const largest = y.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    const deltas = experts.map((expert) => expert.get(name)!.map((value, i) => value - start[i]));
    const edges = deltas.map((delta, k) => new Set(edgesOf(delta, bounds[k] ?? [])));
    let most = 0;
    elements += x.length;
    for (let i = 0; i < x.length; i++) {
      const gap = Math.abs(x[i] - y[i]);
      most = Math.max(most, gap);
      squares += gap ** 2;
      change += (y[i] - start[i]) ** 2;
      if (gap <= GOAL * largest) continue;
      apart++;
      const parts = deltas.map((delta, k) => weights[k] * delta[i]);
      const sum = parts.reduce((total, part) => total + part, 0);
      const cancels = parts.length > 1 && Math.abs(sum) <= GOAL * Math.abs(parts[0]);
      if (cancels || deltas.some((delta, k) => edges[k].has(Math.abs(delta[i])))) ties++;
    }
    if (most / largest > relative) [relative, tensor] = [most / largest, name];
  }
  return { relative, ofChange: Math.sqrt(squares / change), tensor, elements, apart, ties };
}

/** Magnitudes on both sides of each bound: of the last that is kept and the first that is not. */
function edgesOf(delta: Float32Array, parts: readonly number[]): number[] {
  const sorted = delta.map(Math.abs).sort().reverse();
  let rank = 0;
  return parts.flatMap((part) => {
    rank += Math.floor(part * delta.length);
    return [sorted[Math.max(0, rank - 1)], sorted[Math.min(rank, delta.length - 1)]];
  });
}

if (!options.python) throw new Error('--python: a Python with bench/rivals/requirements-mergekit.txt');
const folder = await mkdtemp(join(tmpdir(), 'pcomp-bench-mergekit-'));
try {
  const cases = CASES.filter(({ method }) => !options.only || method.includes(options.only));
  const at = (i: number, name: string) => join(folder, `${i}-${name}`);
  for (const [i, one] of cases.entries()) await writeFile(at(i, 'config.yml'), yamlOf(one));
  const pairs = cases.flatMap((_, i) => [at(i, 'config.yml'), at(i, 'theirs')]);
  const { stdout } = await promisify(execFile)(options.python, [root('bench/rivals/rival_mergekit.py'), ...pairs], {
    maxBuffer: 1 << 26,
  });
  const [{ versions }, ...results] = stdout
    .split('\n')
    .filter((line) => line.startsWith('{'))
    .map((line) => JSON.parse(line) as { versions?: string; error?: string });
  let compared = 0;
  const rows: Row[] = [];
  for (const [i, one] of cases.entries()) {
    const { method, parameters = '', own, experts = 2, baseless, note = '' } = one;
    const inputs = `${experts === 2 ? 'both' : 'one'}${baseless ? '' : ', base'}`;
    const row = { method, parameters: [parameters, own?.[0]].filter(Boolean).join('; '), experts: inputs };
    if (results[i]?.error !== undefined) {
      rows.push({ ...row, note: `mergekit fails: ${results[i].error}` });
      continue;
    }
    const compat = note.includes('--compat mergekit') || note === 'as above';
    for (const mode of compat ? [undefined, 'mergekit' as const] : [undefined]) {
      try {
        const mergekit = await readMergekitConfig(at(i, 'config.yml'));
        const ours = at(i, `ours-${mode ?? 'plain'}`);
        const recipe = mergeRecipe({ mergekit, card: false, ...(mode ? { compat: mode } : {}) }, 1);
        await merge([], ours, recipe, { overwrite: false, resume: false, dryRun: false });
        const found = await difference(ours, at(i, 'theirs'), weightsOf(one), one.bounds ?? []);
        const { relative, ofChange, tensor, apart, ties } = found;
        compared = Math.max(compared, found.elements);
        const worst = relative > GOAL ? tensor : '';
        rows.push({
          ...row,
          'max relative': relative,
          'of the change': ofChange,
          'elements apart': apart,
          'of them ties': ties,
          note: mode ? '--compat mergekit' : note,
          'worst tensor': worst,
        });
      } catch (error) {
        rows.push({ ...row, note: `pcomp: ${error instanceof Error ? error.message : error}` });
      }
      console.log(rows.at(-1));
    }
  }
  if (!options.only)
    await writeResults('mergekit', 'npx tsx bench/mergekit.ts --python PATH', rows, [
      `${versions}. max relative: largest difference of an element over the largest element of its tensor, goal 1e-6 (float32 rounds at 6e-8); of the change: length of the difference over the length of the merged change from the base. Elements apart: further than the goal, of ${(compared / 1e6).toPrecision(2)} million; ties: where equal magnitudes meet at a threshold (mergekit sorts without an order for them, pcomp takes the first) or weighted changes cancel and a rounding decides the sign. Changes of BF16 weights have few digits, so both are common.`,
      'slerp, nuslerp, multislerp and karcher: mergekit takes norms and products in float32, pcomp in float64.',
    ]);
} finally {
  await rm(folder, { recursive: true, force: true });
}

/**
 * Processor seconds of the merge methods on whole matrices, per matrix: `npx tsx bench/matrix-merge.ts [ROWSxCOLUMNS ...] [--methods tsv-m,iso-c]`,
 * two experts that moved every weight by noise (full rank, the dear case), one thread. Rows replace those of the same matrix and method in
 * bench/results/matrix-merge.{json,md}.
 */
import { parseArgs } from 'node:util';
import { createBlas } from '../src/compute/ort-blas.ts';
import { PlainEngine } from '../src/compute/plain.ts';
import { mergeBlock, mergeTensor } from '../src/methods/merge/drive.ts';
import { extractLora } from '../src/methods/merge/extract-lora.ts';
import { mergerOf } from '../src/methods/merge/index.ts';
import { resolveParameters } from '../src/methods/merge/parameters.ts';
import { earlierRows, type Row, writeResults } from './results.ts';

const LABELS = ['a', 'b'];
const RANK = 64;

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { methods: { type: 'string', default: `tsv-m,iso-c,wudi,regmean,extract-lora` } },
});

let state = 2_463_534_242;
function noise(length: number, scale: number): Float32Array {
  return Float32Array.from({ length }, () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return ((state >>> 0) / 2 ** 32 - 0.5) * scale;
  });
}

/** Gram matrices of as many random inputs as there are columns, roughly: dominated by the diagonal, as is good enough for time. */
function gramOf(columns: number): Float32Array {
  const gram = noise(columns * columns, 0.01 / Math.sqrt(columns));
  for (let i = 0; i < columns; i++) {
    for (let j = 0; j < i; j++) gram[j * columns + i] = gram[i * columns + j];
    gram[i * columns + i] = 1;
  }
  return gram;
}

async function run(method: string, rows: number, columns: number): Promise<void> {
  const base = noise(rows * columns, 0.1);
  const experts = LABELS.map(() => {
    const change = noise(rows * columns, 0.01);
    return change.map((value, i) => value + base[i]);
  });
  if (method === 'extract-lora') {
    extractLora(
      experts[0].map((value, i) => value - base[i]),
      rows,
      columns,
      { rank: RANK, energy: 1 },
    );
    return;
  }
  const merger = mergerOf(method);
  const statistics = merger.statistics ? LABELS.map(() => gramOf(columns)) : undefined;
  const tensor = { name: 'w', shape: [rows, columns], role: 'matrix' as const, experts: LABELS };
  const block = mergeBlock(0, { base, experts, ...(statistics ? { statistics } : {}) });
  const context = { seed: 0, blas: createBlas(new PlainEngine()), note: () => {} };
  const values = resolveParameters(merger, { shared: {} }, LABELS, 'best');
  for await (const _ of mergeTensor(merger, tensor, () => [block], values, context));
}

const table = new Map<string, Row>();
for (const row of await earlierRows('matrix-merge')) table.set(`${row['matrix']} ${row['method']}`, row);
for (const matrix of positionals.length > 0 ? positionals : ['1024x1024', '1024x2752']) {
  const [rows, columns] = matrix.split('x').map(Number);
  for (const method of options.methods.split(',')) {
    await run(method, 64, 64);
    const before = process.cpuUsage();
    await run(method, rows, columns);
    const { user, system } = process.cpuUsage(before);
    const key = `${matrix} ${method}`;
    table.set(key, { matrix, method, 'CPU s': (user + system) / 1e6 });
    console.log(table.get(key));
  }
}
await writeResults(
  'matrix-merge',
  'npx tsx bench/matrix-merge.ts [ROWSxCOLUMNS ...] [--methods tsv-m,iso-c]',
  [...table.values()].sort(
    (a, b) => String(a['matrix']).localeCompare(String(b['matrix'])) || String(a['method']).localeCompare(String(b['method'])),
  ),
  [
    `Two experts, one thread; extract-lora takes rank ${RANK} of one expert. Processor seconds, which other work on the machine makes longer.`,
  ],
);

/**
 * What loading an artifact costs in onnxruntime: time, and memory at its peak. `npx tsx bench/load.ts [big | widths...]`: 8 layers of 4096 x 11008 in every width and
 * container, each loaded by a process of its own; with `big` one file of several GB, in more than one data file. Rows replace those of the same case in
 * bench/results/load.{json,md}. Linux: memory is read from /proc. Codes are random, which loading does not see.
 */
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Initializer } from '../formats/onnx/model.ts';
import { writeOnnx } from '../formats/onnx/writer.ts';
import { onnxStorage } from '../src/artifacts/accounting.ts';
import { LinearRenderer } from '../src/artifacts/onnx/linear-graph.ts';
import { type LinearInitializers, QuantizedInitializers } from '../src/artifacts/onnx/linear-initializers.ts';
import type { OnnxStorageOptions } from '../src/artifacts/onnx/linear-layout.ts';
import { createEngine } from '../src/compute/ort.ts';
import { GraphBuilder, type Value } from '../src/graph/builder.ts';
import type { QuantizedLinear } from '../src/methods/quantize/quantized-linear.ts';
import { earlierRows, type Row, writeResults } from './results.ts';

const ROWS = 4096;
const COLUMNS = 11008;
const GROUP = 128;
const LAYERS = 8;
/** At 3 bits just above 2 GB, where a second data file begins. */
const MANY_LAYERS = 120;
/** Of mixed layers, as preset best sorts them. */
const MIXED = [4, 3, 3, 2, 2, 2, 1, 1];

interface Case {
  readonly widths: string;
  readonly bits: readonly number[];
  readonly storage: OnnxStorageOptions;
  readonly layers: number;
}

const CASES: readonly Case[] = [
  ...[[1], [2], [3], MIXED].flatMap((bits) =>
    [{ container: 'auto' as const }, { container: '4' as const }, { compact: false }].map((storage) => {
      return { widths: bits.join(), bits, storage, layers: LAYERS };
    }),
  ),
  { widths: MIXED.join(), bits: MIXED, storage: { container: '2' }, layers: LAYERS },
];
const BIG: readonly Case[] = [true, false].map((compact) => ({
  ...{ widths: '3', bits: [3], storage: { compact }, layers: MANY_LAYERS },
}));

const [mode, path] = process.argv.slice(2);
if (mode === 'child') await load(path);
else {
  const chosen = process.argv.slice(2);
  const cases = mode === 'big' ? BIG : CASES.filter(({ widths }) => chosen.length === 0 || chosen.includes(widths));
  for (const one of cases) {
    const row = await measure(one);
    const key = (entry: Row) => [entry['widths'], entry['storage'], entry['layers']].join();
    const rows = [...(await earlierRows('load')).filter((earlier) => key(earlier) !== key(row)), row];
    await writeResults('load', 'npx tsx bench/load.ts; npx tsx bench/load.ts big', rows, [
      `Layers of ${ROWS} x ${COLUMNS}, groups of ${GROUP}, float16 scales. Operands: what the runtime holds afterwards. Peak: memory of its own that the process gained while loading ` +
        '(anonymous pages, sampled), without the pages of the mapped file; resident: everything, file and Node included, at most. One thread, a machine shared with other work.',
    ]);
    console.error(JSON.stringify(row));
  }
}

/** What the measured process does: it opens the model, and says what that took. */
async function load(model: string): Promise<void> {
  await using engine = await createEngine({ threads: 1 });
  const before = statusOf('self', 'RssAnon');
  const started = performance.now();
  await using program = await engine.open(model);
  const seconds = (performance.now() - started) / 1000;
  console.log(JSON.stringify({ inputs: program.inputNames.length, before, seconds, resident: statusOf('self', 'VmHWM') }));
}

/** Megabytes of a line of /proc/<process>/status. */
function statusOf(process: number | string, line: string): number {
  const found = new RegExp(`${line}:\\s+(\\d+) kB`).exec(readFileSync(`/proc/${process}/status`, 'utf8'));
  return found ? (Number(found[1]) * 1024) / 1e6 : 0;
}

async function measure({ widths, bits, storage, layers }: Case): Promise<Row> {
  const folder = await mkdtemp(join(tmpdir(), 'pcomp-load-'));
  try {
    const { model, fileBytes, dataFiles, operandBytes } = await write(folder, bits, storage, layers);
    const child = spawn(process.execPath, [...process.execArgv, fileURLToPath(import.meta.url), 'child', model], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let peak = 0;
    const timer = setInterval(() => {
      try {
        peak = Math.max(peak, statusOf(child.pid!, 'RssAnon'));
      } catch {
        // It has ended.
      }
    }, 2);
    let output = '';
    child.stdout.on('data', (chunk: Buffer) => {
      output += chunk.toString();
    });
    await new Promise((resolve) => child.on('close', resolve));
    clearInterval(timer);
    const { before, seconds, resident } = JSON.parse(output) as Record<string, number>;
    const { compact = true, container = 'auto' } = storage;
    return {
      widths,
      storage: compact ? `compact, ${container}` : 'plain',
      layers,
      'file, MB': fileBytes / 1e6,
      'data files': dataFiles,
      'operands, MB': operandBytes / 1e6,
      'load, s': seconds,
      'peak, MB': peak - before,
      'peak / operands': (peak - before) / (operandBytes / 1e6),
      'resident, MB': resident,
    };
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** A model of layers that all read one input. Their bytes are the same, under names of their own. */
async function write(folder: string, bits: readonly number[], storage: OnnxStorageOptions, layers: number) {
  const q = randomCodes(bits);
  const source = { has: () => true, readGrid: async () => q, read: async () => q };
  const initializers = await QuantizedInitializers.create(source, ['m'], storage);
  const layout = initializers.layouts.get('m')!;
  const constants = initializers.of('m');
  const builder = new GraphBuilder();
  const x = builder.input('x', 'F32', ['tokens', COLUMNS]);
  const renderer = new LinearRenderer(builder, 4);
  let sum: Value | undefined;
  for (let layer = 0; layer < layers; layer++) {
    const y = renderer.render(`l${layer}`, layout, renamed(constants, layer), x, null);
    sum = sum ? builder.add(sum, y) : y;
  }
  builder.output('y', sum!);
  const { model, data } = await writeOnnx(builder.build(), folder, 'model.onnx', {});
  const operandBytes = (layers * onnxStorage([['m', 'x', layout]]).get('m')!.runtimeBits) / 8;
  const fileBytes = data.reduce((total, { byteLength }) => total + byteLength, model.byteLength);
  return { model: model.path, fileBytes, dataFiles: data.length, operandBytes };
}

function renamed({ parts, means }: LinearInitializers, layer: number): LinearInitializers {
  const as = (one: Initializer): Initializer => ({ ...one, name: one.name.replace(/^m\./, `l${layer}.`) });
  return {
    parts: parts.map(({ qweight, scales, qzeros }) => {
      return { qweight: qweight.map((piece) => piece.map(as)), scales: as(scales), qzeros: as(qzeros) };
    }),
    ...(means && { means: as(means) }),
  };
}

function randomCodes(widths: readonly number[]): QuantizedLinear {
  const groups = COLUMNS / GROUP;
  const bits = Uint8Array.from({ length: groups }, (_, g) => widths[Math.floor((g * widths.length) / groups)]);
  const codes = new Uint8Array(ROWS * COLUMNS);
  let state = 1;
  for (let row = 0, i = 0; row < ROWS; row++) {
    for (let k = 0; k < COLUMNS; k++, i++) {
      state = (Math.imul(state, 1664525) + 1013904223) | 0;
      codes[i] = (state >>> 16) & ((1 << bits[Math.floor(k / GROUP)]) - 1);
    }
  }
  const count = ROWS * groups;
  return {
    ...{ outFeatures: ROWS, inFeatures: COLUMNS, groupSize: GROUP, bits, codes, scaleDtype: 'F16' },
    ...{ scales: new Float32Array(count).fill(0.0078125), zeroPoints: new Uint8Array(count).fill(1) },
    ...(widths.includes(1) && { offsets: new Float32Array(count).fill(-0.00390625) }),
  };
}

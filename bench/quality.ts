/**
 * Quality of every quantizer on real models: perplexity on held-out text, everything stored counted, evaluated in memory and through the
 * written ONNX file. `npx tsx bench/quality.ts [lab|stories] [--bits 2,3,4] [--bpw 2.3,2.6] [--table methods,without,stored,learned]`; writes
 * bench/results/quality-<model>[-<tables>].{json,md}.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { openOnnx } from '../formats/onnx/reader.ts';
import { writeOnnx } from '../formats/onnx/writer.ts';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { parseTextFile, readText } from '../src/calibration/text.ts';
import { loadTokenizer } from '../src/calibration/tokenizer.ts';
import { evaluationWindows } from '../src/calibration/windows.ts';
import { createEngine } from '../src/compute/ort.ts';
import { evaluate, type QuantizeRequest, quantize, quantizeRecipe, RecipeError } from '../src/index.ts';
import { ArtifactLogits } from '../src/logits-source.ts';
import { BEST_STEPS } from '../src/methods/quantize/best/steps.ts';
import { Scorer } from '../src/scoring.ts';
import { writeResults } from './results.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const shared = process.env['PCOMP_TEST_DATA'] ?? root('../shared/data');

interface Case {
  readonly model: string;
  readonly calibration: string;
  readonly text: string;
  readonly groupSize: number;
  readonly sequenceLength: number;
}

const CASES: Readonly<Record<string, Case>> = {
  lab: {
    model: root('fixtures/lab/base'),
    calibration: root('fixtures/lab/text/python.train.txt'),
    text: root('fixtures/lab/text/python.eval.txt'),
    groupSize: 128,
    sequenceLength: 256,
  },
  stories: {
    model: join(shared, 'stories260k'),
    calibration: join(shared, 'text/tinystories.197k.txt'),
    text: join(shared, 'text/tinystories.valid.30k.txt'),
    groupSize: 32,
    sequenceLength: 512,
  },
};

const PAPER: readonly [string, QuantizeRequest][] = [
  ['rtn', { method: 'rtn' }],
  ['gptq', { method: 'gptq' }],
  ['gptq, act-order', { method: 'gptq', actOrder: true }],
  ['gptq, act-order, true-sequential', { method: 'gptq', actOrder: true, trueSequential: true }],
  ['slim-llm', { method: 'slim-llm' }],
].map(([label, request]) => [`${label}, paper`, { ...(request as QuantizeRequest), preset: 'paper' }]);

const BEST: readonly [string, QuantizeRequest][] = [
  ['rtn, best', { method: 'rtn' }],
  ['gptq, best', { method: 'gptq' }],
  ['slim-llm, best', { method: 'slim-llm' }],
];

/** What branches take of the bits where there are any. */
const BRANCH_BPW = 0.1;

/** What each row of a table asks for; `--table` chooses. */
const TABLES: Readonly<Record<string, (bits: readonly number[], bpw: readonly number[]) => [string, QuantizeRequest][]>> = {
  methods: (bits) =>
    bits.flatMap((width) =>
      [...PAPER, ...BEST].map(([label, request]): [string, QuantizeRequest] => [
        `${label}, ${width} bits`,
        { ...request, bits: width },
      ]),
    ),
  // At the first width asked for: every step left out once.
  without: ([width]) =>
    BEST_STEPS.filter((step) => step !== 'bias').map((step): [string, QuantizeRequest] => [
      `slim-llm, best, ${width} bits, without ${step}`,
      { without: [step], bits: width },
    ]),
  // The same bits: all in codes, a part of them in branches, and learned.
  learned: (_, bpw) =>
    bpw.flatMap((width) => [
      ...['slim-llm', 'slim-llm-plus', 'autoround'].map((method): [string, QuantizeRequest] => [
        `${method}, best, --bpw ${width}`,
        { method, bpw: width },
      ]),
      ...['slim-llm', 'slim-llm-plus'].map((method): [string, QuantizeRequest] => [
        `${method}, best, --bpw ${(width - BRANCH_BPW).toFixed(1)} --lowrank bpw=${BRANCH_BPW}`,
        { method, bpw: width - BRANCH_BPW, lowrank: `bpw=${BRANCH_BPW}` },
      ]),
    ]),
  stored: () => [2.1, 2.3, 2.6, 3.2, 4.2].map((bpw) => [`slim-llm, best, --bpw ${bpw}`, { bpw }]),
};

const threads = availableParallelism();

/** Perplexity of an ONNX file in onnxruntime with every MatMulNBits at accuracy level 1. */
async function perplexityAtLevel1(artifact: string, scratch: string, text: string, sequenceLength: number): Promise<number> {
  await using source = await openModelSource(artifact);
  if (source.onnxPath === undefined) throw new Error(`${artifact} holds no ONNX model`);
  await using file = await openOnnx(source.onnxPath);
  const graph = file.model.graph;
  graph.nodes = graph.nodes.map((node) =>
    node.op === 'MatMulNBits' ? { ...node, attributes: { ...node.attributes, accuracy_level: { kind: 'int', value: 1 } } } : node,
  );
  const written = await writeOnnx(file.model, scratch, 'level1.onnx');
  const tokenizer = await loadTokenizer(source.folder, source.model.shape.vocabSize);
  const { windows } = evaluationWindows(tokenizer.encode(await readText([parseTextFile(text)])), sequenceLength);
  await using engine = await createEngine({ threads });
  await using logits = await ArtifactLogits.open({
    model: source.model,
    engine,
    windows,
    hooks: {},
    onnxPath: written.model.path,
  });
  const scorer = new Scorer();
  for await (const { windowIndex, start, logits: rows } of logits.rows(4096)) {
    scorer.add(rows.data, windows[windowIndex].subarray(start + 1, start + 1 + rows.rows), rows.columns);
  }
  return scorer.score.perplexity;
}

/** Undefined for a budget that the model cannot meet, whose message says the nearest that it can. */
async function quantizeIfFeasible(model: string, output: string, request: QuantizeRequest, infeasible: string[]) {
  const mode = { overwrite: true, resume: false, dryRun: false };
  try {
    return await quantize(model, output, quantizeRecipe(request, threads), mode);
  } catch (error) {
    if (!(error instanceof RecipeError && error.message.startsWith('--bpw'))) throw error;
    console.error(`left out: ${error.message}`);
    infeasible.push(error.message);
    return undefined;
  }
}

const numbers = (list: string) => list.split(',').map(Number);

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    bits: { type: 'string', default: '2,3,4' },
    bpw: { type: 'string', default: '2.3,2.6' },
    table: { type: 'string', default: 'methods' },
  },
});
for (const name of positionals.length > 0 ? positionals : Object.keys(CASES)) {
  const { model, calibration, text, groupSize, sequenceLength } = CASES[name];
  if (!existsSync(model)) {
    console.error(`${name}: skipped, ${model} is not there`);
    continue;
  }
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-quality-'));
  const machine = { sequenceLength, device: 'cpu', threads, maxMemory: 2 ** 30 } as const;
  const float = await evaluate(model, { ...machine, text: [text], accuracy: 'exact' });
  const rows: Record<string, number | string>[] = [
    {
      method: 'float',
      'code bits': float.averageBits,
      'stored bpw': float.bitsPerWeight,
      MB: float.bytes / 1e6,
      perplexity: float.perplexity,
    },
  ];
  /** Said below the table. */
  const infeasible: string[] = [];
  for (const table of values.table.split(',')) {
    for (const [label, options] of TABLES[table](numbers(values.bits), numbers(values.bpw))) {
      const output = join(scratch, 'out');
      const needsText = options.method !== 'rtn';
      const request = {
        ...options,
        groupSize,
        ...(needsText ? { calibration: [calibration], samples: 128, sequenceLength } : {}),
      };
      const outcome = await quantizeIfFeasible(model, output, request, infeasible);
      if (outcome === undefined) continue;
      const exact = await evaluate(output, { ...machine, text: [text], against: model, accuracy: 'exact' });
      const fast = await evaluate(output, { ...machine, text: [text], accuracy: 'fast' });
      const level1 = await perplexityAtLevel1(output, scratch, text, sequenceLength);
      const row = {
        method: label,
        'code bits': exact.averageBits,
        'stored bpw': exact.bitsPerWeight,
        MB: exact.bytes / 1e6,
        perplexity: exact.perplexity,
        'KL, nats': exact.kl ?? Number.NaN,
        'ONNX, level 1': level1,
        'level 1 / memory - 1': level1 / exact.perplexity - 1,
        'ONNX, level 4': fast.perplexity,
        seconds: outcome.run?.seconds ?? Number.NaN,
      };
      console.error(row.method, exact.perplexity.toFixed(3), level1.toFixed(3), fast.perplexity.toFixed(3));
      rows.push(row);
    }
  }
  await rm(scratch, { recursive: true, force: true });
  await writeResults(
    `quality-${name}${values.table === 'methods' ? '' : `-${values.table.replace(',', '-')}`}`,
    `npx tsx bench/quality.ts ${name} --table ${values.table} ${values.table === 'learned' ? `--bpw ${values.bpw}` : `--bits ${values.bits}`}`,
    rows,
    infeasible.map((message) => `Left out: ${message}.`),
  );
}

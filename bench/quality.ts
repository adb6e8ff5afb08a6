/**
 * Quality of every quantizer on real models: perplexity on held-out text, everything stored counted, evaluated in memory and through the
 * written ONNX file. `npx tsx bench/quality.ts [lab|stories|smollm2] [--table methods,without,stored,groups,learned] [--bits 2,3,4] [--bpw 2.1,2.3]`; writes
 * bench/results/quality-<model>[-<tables>].{json,md}. `--table stored` compares at equal stored size: every method at each `--bpw`, then
 * the default less each of its steps at the first of `--steps-at`. With `--keep FILE`, rows that are in FILE are not made again: a killed run goes on there.
 */
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
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
import { BEST_STEPS } from '../src/methods/quantize/best/steps.ts';
import { ArtifactLogits } from '../src/runs/evaluate/logits-source.ts';
import { Scorer } from '../src/runs/evaluate/scoring.ts';
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
  // Made by bench/models/smollm2.py; skipped where it is not.
  smollm2: {
    model: root('out/models/smollm2'),
    calibration: root('fixtures/lab/text/python.train.txt'),
    text: root('fixtures/lab/text/python.eval.txt'),
    groupSize: 64,
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

/** No layer of these models has a bias, so that leaving its correction out changes nothing. */
const STEPS = BEST_STEPS.filter((step) => step !== 'bias');

/** What branches take of the bits where there are any. */
const BRANCH_BPW = 0.1;

/** What a row asks for. With `within`, a method of whole widths takes the widths and groups that come nearest to so many stored bits without passing them. */
interface Wanted {
  readonly label: string;
  readonly request: QuantizeRequest;
  readonly within?: number;
}

interface Sizes {
  readonly bits: readonly number[];
  readonly bpw: readonly number[];
  /** Where the default is compared with itself less a step. */
  readonly stepsAt: number;
}

/** Bits of a group in every way a layer can be told to have one width and one size of groups. */
const WHOLE = [2, 3, 4, 5, 6].flatMap((bits) => [128, 64, 32].map((groupSize) => ({ bits, groupSize })));

const plain = (rows: readonly [string, QuantizeRequest][]): Wanted[] => rows.map(([label, request]) => ({ label, request }));

/** What each row of a table asks for; `--table` chooses. */
const TABLES: Readonly<Record<string, (sizes: Sizes) => Wanted[]>> = {
  methods: ({ bits }) =>
    plain(
      bits.flatMap((width) =>
        [...PAPER, ...BEST].map(([label, request]): [string, QuantizeRequest] => [
          `${label}, ${width} bits`,
          { ...request, bits: width },
        ]),
      ),
    ),
  // At the first width asked for: every step left out once.
  without: ({ bits: [width] }) =>
    plain(
      STEPS.map((step): [string, QuantizeRequest] => [
        `slim-llm, best, ${width} bits, without ${step}`,
        { without: [step], bits: width },
      ]),
    ),
  // The same bits: all in codes, a part of them in branches, and learned.
  learned: ({ bpw }) =>
    plain(
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
    ),
  // The same stored size: methods of whole widths as near as they come, and what every step of the default is worth.
  stored: ({ bpw, stepsAt }) => [
    ...bpw.flatMap((width): Wanted[] => [
      ...PAPER.filter(([, { actOrder }]) => !actOrder).map(([label, request]) => ({
        label: `${label}, within ${width}`,
        request,
        within: width,
      })),
      { label: `slim-llm, best, --bpw ${width}`, request: { bpw: width } },
    ]),
    ...STEPS.map((step): Wanted => {
      const label = `slim-llm, best, --bpw ${stepsAt}, without ${step}`;
      if (step !== 'allocation') return { label, request: { bpw: stepsAt, without: [step] } };
      return { label: label.replace('--bpw', 'within'), request: { without: [step] }, within: stepsAt };
    }),
  ],
  // One size of groups everywhere, and sizes chosen.
  groups: ({ bpw }) =>
    bpw.flatMap((width) =>
      [128, 64, 32, 'auto'].map((groupSize): Wanted => {
        return { label: `slim-llm, best, --bpw ${width} --group-size ${groupSize}`, request: { bpw: width, groupSize } };
      }),
    ),
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

const numbers = (list: string) => list.split(',').map(Number);

type Row = Record<string, number | string>;

/** Rows that were made before, by what they asked for: of this run, and of those that `--keep` remembers. */
class KnownRows {
  readonly #path: string | undefined;
  readonly #rows: Map<string, Row>;

  private constructor(path: string | undefined, rows: Map<string, Row>) {
    this.#path = path;
    this.#rows = rows;
  }

  static async open(path: string | undefined): Promise<KnownRows> {
    const known = path !== undefined && existsSync(path) ? JSON.parse(await readFile(path, 'utf8')) : {};
    return new KnownRows(path, new Map(Object.entries(known)));
  }

  async of(key: string, make: () => Promise<Row>): Promise<Row> {
    const known = this.#rows.get(key);
    if (known) return known;
    const row = await make();
    this.#rows.set(key, row);
    if (this.#path) await writeFile(this.#path, JSON.stringify(Object.fromEntries(this.#rows)));
    return row;
  }
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    bits: { type: 'string', default: '2,3,4' },
    bpw: { type: 'string', default: '2.1,2.3,2.6,3.2,4.2' },
    'steps-at': { type: 'string', default: '2.3' },
    table: { type: 'string', default: 'methods' },
    keep: { type: 'string' },
  },
});
const sizes: Sizes = { bits: numbers(values.bits), bpw: numbers(values.bpw), stepsAt: Number(values['steps-at']) };
const tables = values.table.split(',');
const known = await KnownRows.open(values.keep);
for (const name of positionals.length > 0 ? positionals : Object.keys(CASES)) {
  const { model, calibration, text, groupSize, sequenceLength } = CASES[name];
  if (!existsSync(model)) {
    console.error(`${name}: skipped, ${model} is not there`);
    continue;
  }
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-quality-'));
  const machine = { sequenceLength, device: 'cpu', threads, maxMemory: 2 ** 30 } as const;
  const output = join(scratch, 'out');
  const made = (request: QuantizeRequest) =>
    known.of(`${name} ${JSON.stringify(request)}`, async (): Promise<Row> => {
      const texts = request.method === 'rtn' ? {} : { calibration: [calibration], samples: 128, sequenceLength };
      const mode = { overwrite: true, resume: false, dryRun: false };
      const outcome = await quantize(model, output, quantizeRecipe({ ...request, ...texts }, threads), mode);
      const exact = await evaluate(output, { ...machine, text: [text], against: model, accuracy: 'exact' });
      const fast = await evaluate(output, { ...machine, text: [text], accuracy: 'fast' });
      const level1 = await perplexityAtLevel1(output, scratch, text, sequenceLength);
      return {
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
    });
  /** What one width everywhere takes; no text is needed to know it. */
  const whole: { readonly bits: number; readonly groupSize: number; readonly bpw: number }[] = [];
  for (const shape of WHOLE) {
    const request = quantizeRecipe({ method: 'rtn', preset: 'paper', ...shape }, threads);
    const { artifacts } = await quantize(model, output, request, { overwrite: true, resume: false, dryRun: true });
    whole.push({ ...shape, bpw: artifacts[0].bitsPerWeight });
  }
  whole.sort((a, b) => b.bpw - a.bpw);
  /** The nearest within a size; a method that mixes widths may come out above what one width takes, and is then asked for less. */
  const nearest = async (request: QuantizeRequest, within: number): Promise<Row> => {
    for (const { bits, groupSize: columns, bpw } of whole) {
      if (bpw > within) continue;
      const row = await made({ ...request, bits, groupSize: columns });
      if (Number(row['stored bpw']) <= within) return { ...row, as: `--bits ${bits} --group-size ${columns}` };
    }
    throw new RecipeError(
      `no whole width in groups of 128, 64 or 32 comes within it; the smallest takes ${whole.at(-1)!.bpw.toFixed(4)}`,
    );
  };
  const float = await evaluate(model, { ...machine, text: [text], accuracy: 'exact' });
  const rows: Row[] = [
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
  for (const table of tables) {
    for (const { label, request, within } of TABLES[table](sizes)) {
      // Tables of stored sizes take the groups they name, or the default.
      const shaped = table === 'stored' || table === 'groups' ? request : { groupSize, ...request };
      try {
        const row = within === undefined ? await made(shaped) : await nearest(shaped, within);
        console.error(label, row['perplexity'], row['stored bpw']);
        rows.push({ method: label, ...row });
      } catch (error) {
        // A size that the model cannot have: the message says the nearest that it can.
        if (!(error instanceof RecipeError && (within !== undefined || error.message.startsWith('--bpw')))) throw error;
        console.error(`left out: ${label}: ${error.message}`);
        infeasible.push(`${label}: ${error.message}`);
        rows.push({ method: label, 'stored bpw': 'n/a' });
      }
    }
  }
  await rm(scratch, { recursive: true, force: true });
  const asked = [
    ...(tables.some((table) => table === 'methods' || table === 'without') ? [`--bits ${values.bits}`] : []),
    ...(tables.some((table) => ['stored', 'groups', 'learned'].includes(table)) ? [`--bpw ${values.bpw}`] : []),
    ...(tables.includes('stored') ? [`--steps-at ${values['steps-at']}`] : []),
  ];
  await writeResults(
    `quality-${name}${values.table === 'methods' ? '' : `-${tables.join('-')}`}`,
    `npx tsx bench/quality.ts ${name} --table ${values.table} ${asked.join(' ')}`,
    rows,
    infeasible.map((message) => `Not available: ${message}.`),
  );
}

/**
 * Speed of written artifacts in onnxruntime, batch 1: a prefill of 128 tokens, then one token a run on the KV cache.
 * `npx tsx bench/decode.ts [lab] [1b]`; rows replace those of the same model in bench/results/decode.{json,md}. The artifacts take turns
 * in short rounds, so that what else the machine does falls on all of them alike; medians over all rounds. Once with one thread and once with
 * all cores: sessions here do not spin between operators, so with several threads every operator also pays for waking them.
 */
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openOnnx } from '../formats/onnx/reader.ts';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { writeOnnxArtifact } from '../src/artifacts/onnx/write-onnx.ts';
import type { Program } from '../src/compute/engine.ts';
import { createEngine } from '../src/compute/ort.ts';
import { nextFeeds } from '../src/generate.ts';
import { type QuantizeRequest, quantize, quantizeRecipe } from '../src/index.ts';
import { promptFeeds } from '../src/logits-source.ts';
import type { Model } from '../src/model/model.ts';
import { type Row, writeResults } from './results.ts';
import { SHAPES, writeSynthetic } from './synthetic.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const LAB = root('fixtures/lab/base');
const CALIBRATION = root('fixtures/lab/text/python.train.txt');
const PREFILL = 128;
const STEPS = 24;
const ROUNDS = 15;
/** Blocks of the 1B shape: 61 M weights each, so that even two bits exceed most caches. */
const BLOCKS = 2;

const MODELS: Readonly<Record<string, (folder: string) => Promise<string>>> = {
  lab: async () => LAB,
  '1b': async (folder) => {
    await writeSynthetic(folder, SHAPES['1b'], BLOCKS, LAB);
    return folder;
  },
};

/** The first is what the others are measured against. `undefined`: the checkpoint as it is. */
const ARTIFACTS: readonly [string, QuantizeRequest | undefined][] = [
  ['rtn, 4 bits', { method: 'rtn', preset: 'paper', bits: 4 }],
  ['float', undefined],
  ['rtn, 2 bits', { method: 'rtn', preset: 'paper', bits: 2 }],
  ['slim-llm, paper, 2 bits', { method: 'slim-llm', preset: 'paper', bits: 2 }],
  ['slim-llm, best, 2 bits', { bits: 2 }],
  ['slim-llm, best, 2 bits, without transform', { bits: 2, without: ['transform'] }],
  ['slim-llm, best, 2 bits, without allocation', { bits: 2, without: ['allocation'] }],
];

const cores = availableParallelism();

interface Candidate {
  readonly artifact: string;
  readonly nodes: number;
  readonly program: Program;
  readonly prefill: number[];
  readonly decode: number[];
}

const names = process.argv.length > 2 ? process.argv.slice(2) : Object.keys(MODELS);
for (const name of names) {
  if (!Object.hasOwn(MODELS, name)) throw new Error(`no model "${name}"; there are ${Object.keys(MODELS).join(', ')}`);
}
for (const name of names) {
  const rows = [...(await earlierRows()).filter(({ model }) => model !== name), ...(await measure(name))];
  rows.sort((a, b) => Number(a['model'] === '1b') - Number(b['model'] === '1b'));
  await writeResults('decode', 'npx tsx bench/decode.ts', rows, [
    `lab: fixtures/lab/base. 1b: ${BLOCKS} blocks of hidden 2048, intermediate 8192, vocabulary 2048, random weights. Batch 1, prefill of ${PREFILL} ` +
      `tokens, ${STEPS} tokens decoded, ${ROUNDS} rounds in which the artifacts take turns, accuracy level 4. ` +
      'Ratios above 1 are faster than 4 bits. Nodes: of the file, before onnxruntime folds constants.',
  ]);
}

async function measure(name: string): Promise<Row[]> {
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-decode-'));
  try {
    const folder = await MODELS[name](join(scratch, 'model'));
    const paths: string[] = [];
    for (const [artifact, request] of ARTIFACTS) {
      paths.push(await write(folder, join(scratch, `${paths.length}`), request));
      console.error(`${name}: ${artifact} written`);
    }
    const rows: Row[] = [];
    for (const threads of new Set([1, cores])) rows.push(...(await measureWith(threads, name, folder, paths)));
    return rows;
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function measureWith(threads: number, name: string, folder: string, paths: readonly string[]): Promise<Row[]> {
  await using source = await openModelSource(folder);
  await using engine = await createEngine({ threads });
  const candidates: Candidate[] = [];
  for (const [i, path] of paths.entries()) {
    await using file = await openOnnx(path);
    const nodes = file.model.graph.nodes.length;
    candidates.push({ artifact: ARTIFACTS[i][0], nodes, program: await engine.open(path), prefill: [], decode: [] });
  }
  // Round 0 warms up.
  for (let round = 0; round <= ROUNDS; round++) {
    for (const one of candidates) await generate(source.model, one, round > 0);
  }
  const against = { decode: median(candidates[0].decode), prefill: median(candidates[0].prefill) };
  return candidates.map(({ artifact, nodes, decode, prefill }) => ({
    model: name,
    artifact,
    nodes,
    threads,
    'decode, tokens/s': 1000 / median(decode),
    'decode / 4 bits': against.decode / median(decode),
    'prefill, tokens/s': (1000 * PREFILL) / median(prefill),
    'prefill / 4 bits': against.prefill / median(prefill),
  }));
}

/** Prompt and tokens are made up: what a model says does not change how fast it says it. */
async function generate(model: Model, { program, prefill, decode }: Candidate, counts: boolean): Promise<void> {
  let feeds = promptFeeds(
    model,
    Int32Array.from({ length: PREFILL }, (_, i) => 3 + ((i * 37) % 2000)),
  );
  for (let step = 0; step <= STEPS; step++) {
    const started = performance.now();
    const results = await program.run(feeds);
    const milliseconds = performance.now() - started;
    if (counts) (step === 0 ? prefill : decode).push(milliseconds);
    feeds = nextFeeds(results, model.shape.blockCount, 3 + step, PREFILL + step + 1);
  }
}

/** Writes the artifact, or the checkpoint as it is, to `folder`; returns the path of the .onnx file. */
async function write(model: string, folder: string, request: QuantizeRequest | undefined): Promise<string> {
  if (request === undefined) {
    await using source = await openModelSource(model);
    const refuse = () => Promise.reject(new Error('no module is quantized'));
    const quantized = { has: () => false, readGrid: refuse, read: refuse };
    await mkdir(folder);
    const written = await writeOnnxArtifact({ model: source.model, tensors: source.tensors, quantized, folder, version: '0' });
    return join(folder, written.modelFile);
  }
  // How well codes fit does not change their speed, so a little text does; it decides the plan, which does.
  const text = request.method === 'rtn' ? {} : { calibration: [CALIBRATION], samples: 8, sequenceLength: 128 };
  await quantize(model, folder, quantizeRecipe({ ...request, ...text }, cores), {
    overwrite: false,
    resume: false,
    dryRun: false,
  });
  await using artifact = await openModelSource(folder);
  if (artifact.onnxPath === undefined) throw new Error(`${folder} holds no ONNX model`);
  return artifact.onnxPath;
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1];
}

async function earlierRows(): Promise<Row[]> {
  const text = await readFile(root('bench/results/decode.json'), 'utf8').catch(() => '{"rows":[]}');
  return (JSON.parse(text) as { rows: Row[] }).rows;
}

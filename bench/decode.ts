/**
 * Speed of written artifacts in onnxruntime, batch 1: a prefill of 128 tokens, then one token a run on the KV cache.
 * `npx tsx bench/decode.ts [lab] [1b]`; rows replace those of the same model in bench/results/decode.{json,md}. The artifacts take turns
 * in short rounds, one thread; medians over all rounds, ratios within one. Times are of the processor, not of the clock: what else the machine does
 * must not count.
 */
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { openCheckpoint } from '../formats/checkpoint.ts';
import { openOnnx } from '../formats/onnx/reader.ts';
import { openModelSource } from '../src/artifacts/model-source.ts';
import { ONNX_CONTAINERS, type OnnxContainer } from '../src/artifacts/onnx/linear-layout.ts';
import { onnxModules } from '../src/artifacts/onnx/onnx-modules.ts';
import { writeOnnxArtifact } from '../src/artifacts/onnx/write-onnx.ts';
import { readPlanes, readPlanesGrid } from '../src/artifacts/planes.ts';
import { parseQuantMetadata } from '../src/artifacts/quant-metadata.ts';
import { storageOfModules } from '../src/artifacts/storage-of-modules.ts';
import type { Program } from '../src/compute/engine.ts';
import { createEngine } from '../src/compute/ort.ts';
import { type QuantizeRequest, quantize, quantizeRecipe } from '../src/index.ts';
import type { Model } from '../src/model/model.ts';
import { nextFeeds } from '../src/runs/evaluate/generate.ts';
import { promptFeeds } from '../src/runs/evaluate/logits-source.ts';
import { earlierRows, type Row, writeResults } from './results.ts';
import { SHAPES, writeSynthetic } from './synthetic.ts';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));
const LAB = root('fixtures/lab/base');
const CALIBRATION = root('fixtures/lab/text/python.train.txt');
const PREFILL = 128;
const STEPS = 24;
const ROUNDS = 9;
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
const SOLUTIONS: readonly [string, QuantizeRequest | undefined, readonly OnnxContainer[]][] = [
  ['rtn, 4 bits', { method: 'rtn', preset: 'paper', bits: 4 }, ['auto']],
  ['float', undefined, ['auto']],
  ['rtn, 2 bits', { method: 'rtn', preset: 'paper', bits: 2 }, ONNX_CONTAINERS.filter((one) => one !== '2')],
  ['slim-llm, best, 2 bits', { bits: 2 }, ONNX_CONTAINERS],
];

const cores = availableParallelism();

/** One artifact of a model. */
interface Written {
  readonly artifact: string;
  readonly container: string;
  readonly path: string;
  /** Quantized operands as the runtime holds them. */
  readonly runtimeMegabytes: number;
}

interface Candidate {
  readonly written: Written;
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
  const rows = [...(await earlierRows('decode')).filter(({ model }) => model !== name), ...(await measure(name))];
  rows.sort((a, b) => Number(a['model'] === '1b') - Number(b['model'] === '1b'));
  await writeResults('decode', 'npx tsx bench/decode.ts', rows, [
    `lab: fixtures/lab/base. 1b: ${BLOCKS} blocks of hidden 2048, intermediate 8192, vocabulary 2048, random weights. Batch 1, prefill of ${PREFILL} ` +
      `tokens, ${STEPS} tokens decoded, ${ROUNDS} rounds in which the artifacts take turns, accuracy level 4; a machine shared with other work. ` +
      'Ratios are medians of those of one round; above 1 is faster than 4 bits. Operands: what onnxruntime holds of quantized layers. Nodes: of the file, before onnxruntime folds constants.',
  ]);
}

async function measure(name: string): Promise<Row[]> {
  const scratch = await mkdtemp(join(tmpdir(), 'pcomp-decode-'));
  try {
    const folder = await MODELS[name](join(scratch, 'model'));
    const artifacts: Written[] = [];
    for (const [artifact, request, containers] of SOLUTIONS) {
      artifacts.push(...(await write(folder, join(scratch, `${artifacts.length}`), artifact, request, containers)));
      console.error(`${name}: ${artifact} written`);
    }
    return await measureAll(name, folder, artifacts);
  } finally {
    await rm(scratch, { recursive: true, force: true });
  }
}

async function measureAll(name: string, folder: string, artifacts: readonly Written[]): Promise<Row[]> {
  await using source = await openModelSource(folder);
  await using engine = await createEngine({ threads: 1 });
  const candidates: Candidate[] = [];
  for (const written of artifacts) {
    await using file = await openOnnx(written.path);
    const nodes = file.model.graph.nodes.length;
    candidates.push({ written, nodes, program: await engine.open(written.path), prefill: [], decode: [] });
  }
  // Round 0 warms up.
  for (let round = 0; round <= ROUNDS; round++) {
    for (const one of candidates) await generate(source.model, one, round > 0);
  }
  const [first] = candidates;
  return candidates.map(({ written, nodes, decode, prefill }) => ({
    model: name,
    artifact: written.artifact,
    container: written.container,
    'operands, MB': written.runtimeMegabytes,
    nodes,
    'decode, tokens/CPU s': 1000 / median(decode),
    'decode / 4 bits': ratio(first.decode, decode),
    'prefill, tokens/CPU s': (1000 * PREFILL) / median(prefill),
    'prefill / 4 bits': ratio(first.prefill, prefill),
  }));
}

/** Median of the ratios of runs that followed each other. */
function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((milliseconds, i) => milliseconds / theirs[i]));
}

/** Prompt and tokens are made up: what a model says does not change how fast it says it. */
async function generate(model: Model, { program, prefill, decode }: Candidate, counts: boolean): Promise<void> {
  let feeds = promptFeeds(
    model,
    Int32Array.from({ length: PREFILL }, (_, i) => 3 + ((i * 37) % 2000)),
  );
  for (let step = 0; step <= STEPS; step++) {
    const started = cpuMilliseconds();
    const results = await program.run(feeds);
    const milliseconds = cpuMilliseconds() - started;
    if (counts) (step === 0 ? prefill : decode).push(milliseconds);
    feeds = nextFeeds(results, model.shape.blockCount, 3 + step, PREFILL + step + 1);
  }
}

function cpuMilliseconds(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

/** Quantizes once, or takes the checkpoint as it is, and writes an ONNX file for each container below `folder`. */
async function write(
  model: string,
  folder: string,
  artifact: string,
  request: QuantizeRequest | undefined,
  containers: readonly OnnxContainer[],
): Promise<Written[]> {
  await using source = await openModelSource(model);
  // How well codes fit does not change their speed, so a little text does; it decides the plan, which does.
  const text =
    request === undefined || request.method === 'rtn' ? {} : { calibration: [CALIBRATION], samples: 4, sequenceLength: 128 };
  if (request) {
    const recipe = quantizeRecipe({ ...request, ...text, formats: ['safetensors'] }, cores);
    await quantize(model, folder, recipe, { overwrite: false, resume: false, dryRun: false });
  }
  await using solution = request ? await openCheckpoint(folder) : undefined;
  const modules = solution ? parseQuantMetadata(solution.path, solution.metadata) : new Map();
  const quantized = {
    has: (name: string) => modules.has(name),
    readGrid: (name: string) => readPlanesGrid(solution!, name, modules.get(name)!),
    read: (name: string) => readPlanes(solution!, name, modules.get(name)!),
  };
  const written: Written[] = [];
  for (const container of containers) {
    const target = `${folder}-${container}`;
    await mkdir(target);
    const { tensors } = source;
    const { modelFile } = await writeOnnxArtifact({
      model: source.model,
      tensors,
      quantized,
      folder: target,
      version: '0',
      storage: { container },
    });
    const path = join(target, modelFile);
    await using file = await openOnnx(path);
    const { modules: stored } = request ? await storageOfModules(source.model, await onnxModules(file)) : { modules: [] };
    const runtimeMegabytes = stored.reduce((sum, { runtimeBits = 0 }) => sum + runtimeBits, 0) / 8e6;
    written.push({ artifact, container: request ? container : '', path, runtimeMegabytes });
  }
  return written;
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1];
}

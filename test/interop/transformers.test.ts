/** The untouched transformers.js loads what pcomp writes, and says the same as onnxruntime. */
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { AutoModelForCausalLM, AutoTokenizer, env, type Tensor } from '@huggingface/transformers';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { roundToF16 } from '../../formats/dtype.ts';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import { writeArtifact } from '../../src/artifacts/write-artifact.ts';
import { loadTokenizer } from '../../src/calibration/tokenizer.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { quantize, quantizeRecipe } from '../../src/index.ts';
import { transformColumns } from '../../src/methods/quantize/input-transform.ts';
import type { QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import type { LinearSite } from '../../src/model/model.ts';
import { generate } from '../../src/runs/evaluate/generate.ts';

const base = fileURLToPath(new URL('../../fixtures/lab/base', import.meta.url));
const text = fileURLToPath(new URL('../../fixtures/lab/text/python.train.txt', import.meta.url));
const PROMPT = 'def read(self, size):\n    """Read';

env.allowRemoteModels = false;

describe.each([
  { dtype: 'q2', options: { bits: 2 } },
  { dtype: 'q2', options: { bits: 2, embeddings: 8 } },
  { dtype: 'q4', options: { bits: 4, method: 'gptq' } },
] as const)('an artifact with $options', ({ dtype, options }) => {
  let folder = '';
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-interop-'));
    const recipe = quantizeRecipe({ ...options, calibration: [text], samples: 8, sequenceLength: 256 }, 2);
    await quantize(base, join(folder, 'out'), recipe, { overwrite: false, resume: false, dryRun: false });
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  it(`loads in transformers.js as dtype ${dtype} and continues a prompt with onnxruntime's own greedy tokens`, async () => {
    const path = join(folder, 'out');
    const model = await AutoModelForCausalLM.from_pretrained(path, { dtype, local_files_only: true });
    const theirTokenizer = await AutoTokenizer.from_pretrained(path, { local_files_only: true });
    const inputs = theirTokenizer(PROMPT);
    const output = (await model.generate({ ...inputs, max_new_tokens: 32, do_sample: false })) as Tensor;
    const theirs = Array.from(output.data as BigInt64Array, Number);

    await using source = await openModelSource(path);
    await using engine = await createEngine();
    const tokenizer = await loadTokenizer(path, source.model.shape.vocabSize);
    const prompt = tokenizer.encode(PROMPT);
    const ours = await generate(engine, source.model, source.onnxPath!, prompt, { maxNewTokens: 32, endToken: 2 });

    expect(theirs.slice(0, prompt.length)).toEqual([...prompt]);
    const continued = theirs.slice(prompt.length).filter((token) => token !== 2);
    expect(continued.length).toBeGreaterThan(4);
    expect(continued).toEqual(ours);
    await model.dispose();
  });
});

describe('an artifact with sorted and rotated inputs and groups of 1 to 4 bits', () => {
  let folder = '';
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'pcomp-interop-'));
    await using source = await openModelSource(base);
    const linears = new Map<string, QuantizedLinear>();
    for (const site of source.model.blocks.flatMap((block) => block.sites)) {
      linears.set(site.name, rotated(site, await source.weights.loadSite(site)));
    }
    const quantized = {
      has: (name: string) => linears.has(name),
      readGrid: async (name: string) => linears.get(name)!,
      read: async (name: string) => linears.get(name)!,
    };
    await writeArtifact({ source, quantized, folder, formats: ['onnx'], version: '0.0.0' });
    await writeFile(join(folder, 'pcomp.json'), '{}');
  });
  afterAll(() => rm(folder, { recursive: true, force: true }));

  it("continues a prompt in transformers.js with onnxruntime's own greedy tokens", async () => {
    const [name] = (await readdir(join(folder, 'onnx'))).filter((file) => file.endsWith('.onnx'));
    const model = await AutoModelForCausalLM.from_pretrained(folder, {
      dtype: name === 'model_q2.onnx' ? 'q2' : 'q4',
      local_files_only: true,
    });
    await using source = await openModelSource(folder);
    await using engine = await createEngine();
    const tokenizer = await loadTokenizer(folder, source.model.shape.vocabSize);
    const prompt = tokenizer.encode(PROMPT);
    const theirTokenizer = await AutoTokenizer.from_pretrained(folder, { local_files_only: true });
    const output = (await model.generate({ ...theirTokenizer(PROMPT), max_new_tokens: 24, do_sample: false })) as Tensor;
    const theirs = Array.from(output.data as BigInt64Array, Number).slice(prompt.length);
    const ours = await generate(engine, source.model, source.onnxPath!, prompt, { maxNewTokens: 24, endToken: 2 });
    expect(ours.length).toBeGreaterThan(4);
    expect(theirs.filter((token) => token !== 2)).toEqual(ours);
    await model.dispose();
  });
});

/** Min-max grids over columns in reverse order, rotated by groups of 64; widths from 4 bits down to 1. */
function rotated({ outFeatures: rows, inFeatures: columns }: LinearSite, weight: Float32Array): QuantizedLinear {
  const groupSize = 64;
  const groups = columns / groupSize;
  const transform = { order: Uint32Array.from({ length: columns }, (_, k) => columns - 1 - k), hadamard: groupSize };
  const stored = transformColumns(transform, weight, rows, columns);
  const bits = Uint8Array.from({ length: groups }, (_, g) => Math.max(1, 4 - Math.floor((4 * g) / groups)));
  const codes = new Uint8Array(rows * columns);
  const scales = new Float32Array(rows * groups);
  const zeroPoints = new Uint8Array(rows * groups);
  const offsets = new Float32Array(rows * groups);
  for (let at = 0; at < rows * groups; at++) {
    const values = stored.subarray(at * groupSize, (at + 1) * groupSize);
    const width = bits[at % groups];
    const top = 2 ** width - 1;
    const least = Math.min(0, ...values);
    const scale = roundToF16(Math.max(2 ** -14, (Math.max(0, ...values) - least) / top / (width === 1 ? 2 : 1)));
    scales[at] = scale;
    if (width === 1) offsets[at] = roundToF16(-scale / 2);
    else zeroPoints[at] = Math.min(top, Math.round(-least / scale));
    values.forEach((value, k) => {
      const code = width === 1 ? Number(value >= 0) : Math.round(value / scale) + zeroPoints[at];
      codes[at * groupSize + k] = Math.max(0, Math.min(top, code));
    });
  }
  return {
    outFeatures: rows,
    inFeatures: columns,
    groupSize,
    bits,
    codes,
    scales,
    zeroPoints,
    offsets,
    scaleDtype: 'F16',
    transform,
  };
}

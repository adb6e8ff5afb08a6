/** Folds: sorting the input of an MLP's second layer costs no operation, and the model stays the same function. */
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { toFloat32 } from '../../formats/dtype.ts';
import { openOnnx } from '../../formats/onnx/reader.ts';
import { assertNaturalOrder, openModelSource } from '../../src/artifacts/model-source.ts';
import { type ArtifactFormat, writeArtifact } from '../../src/artifacts/write-artifact.ts';
import { RecipeError } from '../../src/errors.ts';
import { dequantize, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import { saveCheckpoint } from '../support/checkpoint-folder.ts';
import { i64, openGraph } from '../support/run-graph.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../support/tiny-models.ts';
import { randomLinear } from './random-linear.ts';

const scratch = scratchFolder();
const at = (...parts: string[]) => join(scratch.path, ...parts);
const WIDE = {
  hidden_size: 64,
  intermediate_size: 96,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 64,
};
const llama = () => tinyLlama('folds', WIDE);

interface Options {
  readonly hadamard?: number;
  readonly signed?: boolean;
  readonly bits?: readonly number[];
  /** Layers to quantize, and those whose input is sorted. */
  readonly keep?: (name: string) => boolean;
  readonly sort?: (name: string) => boolean;
}

/** Random codes written as an artifact, every layer with a branch, and the bias corrected of those that have one but the first. */
async function write(tiny: TinyModel, format: ArtifactFormat, options: Options = {}) {
  const { hadamard = 0, signed = false, bits = [4, 3, 2, 1], keep = () => true, sort = () => true } = options;
  for (const folder of ['model', 'out']) rmSync(at(folder), { recursive: true, force: true });
  await saveCheckpoint(at('model'), tiny, 1e9);
  await using source = await openModelSource(at('model'));
  const sites = source.model.blocks.flatMap((block) => block.sites).filter(({ name }) => keep(name));
  const inputs = [...new Set(sites.map(({ input }) => input))];
  const linears = new Map(
    sites.map(({ name, outFeatures: rows, inFeatures: columns, input, hasBias }, i): [string, QuantizedLinear] => {
      const transform = sort(name) ? { transform: { hadamard, signed, seed: inputs.indexOf(input) } } : {};
      const lowRank = format === 'gptq' ? {} : { lowRank: 2 };
      const bias = hasBias && !name.startsWith('transformer.h.0');
      return [name, randomLinear({ rows, columns, groupSize: 32, bits, seed: i + 1, bias, ...transform, ...lowRank })];
    }),
  );
  const out = at('out');
  mkdirSync(out);
  const quantized = {
    has: (name: string) => linears.has(name),
    readGrid: async (name: string) => linears.get(name)!,
    read: async (name: string) => linears.get(name)!,
  };
  const artifact = await writeArtifact({ source, quantized, folder: out, formats: [format], version: '0.0.0' });
  writeFileSync(join(out, 'pcomp.json'), '{}');
  return { out, linears, artifact };
}

type Source = Awaited<ReturnType<typeof openModelSource>>;

async function logitsOf({ model }: Source, graph: Parameters<typeof openGraph>[0]): Promise<Float32Array> {
  const session = await openGraph(graph);
  const { headDim, kvHeadCount, blockCount } = model.shape;
  const empty = { dtype: 'F32' as const, shape: [1, kvHeadCount, 0, headDim], data: new Float32Array(0) };
  const past = Array.from({ length: blockCount }, (_, b) =>
    ['key', 'value'].map((part) => [`past_key_values.${b}.${part}`, empty]),
  );
  const feeds = { input_ids: i64([1, 5], [1, 5, 3, 8, 2]), attention_mask: i64([1, 5], [1, 1, 1, 1, 1]) };
  const { logits } = await session.run({ ...feeds, ...Object.fromEntries(past.flat()) });
  await session.release();
  return logits.data as Float32Array;
}

/** Logits of the decoded weights. */
const decodedLogits = (source: Source) => logitsOf(source, source.model.decoderGraph(source.tensors));

function expectClose(a: Float32Array, b: Float32Array, tolerance: number): void {
  const most = b.reduce((sum, value) => Math.max(sum, Math.abs(value)), 0);
  expect(a.reduce((worst, value, i) => Math.max(worst, Math.abs(value - b[i])), 0) / most).toBeLessThan(tolerance);
}

const metadataOf = (metadata: ReadonlyMap<string, string>) =>
  (JSON.parse(metadata.get('pcomp.quant')!) as { inputs: Record<string, { transform: string; folded: boolean }> }).inputs;

describe.each([
  ['a Llama, sorted', llama, 0],
  ['a Llama, sorted and rotated', llama, 32],
  ['a GPT-2, whose first layer has a bias', () => tinyGpt2('folds gpt2'), 32],
] as const)('the MLP of %s', (_, make, hadamard) => {
  it('runs without a gather, as the decoded weights do, which have their rows and columns as the original has them', async () => {
    const tiny = make();
    const { out, linears } = await write(tiny, 'onnx', { hadamard });
    await using source = await openModelSource(out);
    await using file = await openOnnx(source.onnxPath!);
    const orders = [...file.model.graph.initializers.keys()].filter((name) => name.endsWith('.input_order'));
    expect(orders.some((name) => name.includes('.mlp.') && /down_proj|mlp\.c_proj/.test(name))).toBe(false);
    expect(orders.length).toBe(2 * 3);
    const { folds } = JSON.parse(readFileSync(join(out, 'folds.json'), 'utf8')) as { folds: { consumers: string[] }[] };
    for (const { consumers } of folds) {
      const { transform, folded } = metadataOf(file.model.metadata)[consumers[0]];
      expect([transform, folded]).toEqual([hadamard === 0 ? 'perm' : 'perm-had', true]);
    }
    for (const site of source.model.blocks.flatMap((block) => block.sites)) {
      expect(await source.weights.loadSite(site), site.name).toEqual(dequantize(linears.get(site.name)!));
      const bias = linears.get(site.name)!.bias ?? tiny.source.tensors.get(`${site.name}.bias`)?.data;
      if (!site.hasBias || !bias) continue;
      const { dtype, data } = await source.tensors.read(`${site.name}.bias`);
      const expected = bias instanceof Float32Array ? bias : toFloat32(dtype, bias);
      expect(toFloat32(dtype, data)).toEqual(expected);
      expect(toFloat32(dtype, (await source.tensors.readRows(`${site.name}.bias`, 1, 3)).data)).toEqual(expected.subarray(1, 3));
    }
    for (const [i, node] of file.model.graph.nodes.entries()) {
      if (node.op !== 'MatMulNBits') continue;
      file.model.graph.nodes[i] = { ...node, attributes: { ...node.attributes, accuracy_level: { kind: 'int', value: 1 } } };
    }
    expectClose(await logitsOf(source, file.model), await decodedLogits(source), 1e-4);
  });
});

describe('an artifact with folds', () => {
  it('is charged no order for them', async () => {
    const sorted = await write(llama(), 'safetensors');
    const stored = sorted.artifact.formats[0].storage.modules;
    const plain = await write(llama(), 'safetensors', { sort: (name) => !name.endsWith('down_proj') });
    expect(stored).toEqual(plain.artifact.formats[0].storage.modules);
  });

  it('is the same function without folds.json, but takes no adapters', async () => {
    const { out, linears } = await write(llama(), 'safetensors', { hadamard: 32 });
    await using whole = await openModelSource(out);
    assertNaturalOrder(whole, '--base');
    const expected = await decodedLogits(whole);
    rmSync(join(out, 'folds.json'));
    await using source = await openModelSource(out);
    expectClose(await decodedLogits(source), expected, 1e-5);
    const [block] = source.model.blocks;
    const down = block.sites.find(({ name }) => name.endsWith('down_proj'))!;
    const natural = dequantize(linears.get(down.name)!);
    const { order } = linears.get(down.name)!.transform!;
    const weight = await source.weights.loadSite(down);
    expect(weight).toEqual(natural.map((_, i) => natural[i - (i % 96) + order![i % 96]]));
    expect(() => assertNaturalOrder(source, '--base')).toThrow(RecipeError);
    expect(() => assertNaturalOrder(source, '--base')).toThrow(/down_proj.*folds\.json/);
  });

  it('leaves the order where a layer before stays float, or the input is not sorted', async () => {
    const kept = await write(llama(), 'onnx', { keep: (name) => !name.endsWith('1.mlp.up_proj') });
    await using source = await openModelSource(kept.out);
    expect(source.folds.map(({ consumers }) => consumers)).toEqual([['model.layers.0.mlp.down_proj']]);
    await using file = await openOnnx(source.onnxPath!);
    expect(file.model.graph.initializers.has('model.layers.1.mlp.down_proj.input_order')).toBe(true);
    for (const [name, q] of kept.linears) {
      const site = source.model.blocks.flatMap((block) => block.sites).find((one) => one.name === name)!;
      expect(await source.weights.loadSite(site)).toEqual(dequantize(q));
    }
  });

  it('turns signs of a rotation over the whole input by a node, and has nothing to fold', async () => {
    const { out, linears } = await write(llama(), 'onnx', { hadamard: 32, signed: true });
    await using source = await openModelSource(out);
    expect(source.folds).toEqual([]);
    for (const site of source.model.blocks.flatMap((block) => block.sites)) {
      expect(await source.weights.loadSite(site)).toEqual(dequantize(linears.get(site.name)!));
    }
  });

  it('may be of the layout gptq, which has no place for an order', async () => {
    const { out, linears, artifact } = await write(llama(), 'gptq', { bits: [4], sort: (name) => name.endsWith('down_proj') });
    expect(artifact.notes.filter((note) => note.includes('stays in float'))).toEqual([]);
    await using source = await openModelSource(out);
    expect(source.kind).toBe('gptq');
    for (const site of source.model.blocks.flatMap((block) => block.sites)) {
      expect(await source.weights.loadSite(site)).toEqual(dequantize(linears.get(site.name)!));
    }
  });

  it.each([
    ['no permutation', (order: number[]) => order.fill(0), 'columns-order'],
    ['other columns', (order: number[]) => order.pop(), 'columns-order'],
    ['another number of columns', (order: number[]) => order.splice(0, 96, 1, 0), 'folds'],
  ])('is refused with a folds.json that orders %s', async (_, change, rule) => {
    const { out } = await write(llama(), 'safetensors');
    const path = join(out, 'folds.json');
    const written = JSON.parse(readFileSync(path, 'utf8')) as { folds: { order: number[] }[] };
    change(written.folds[0].order);
    writeFileSync(path, JSON.stringify(written));
    await expect(openModelSource(out)).rejects.toMatchObject({ rule, path });
  });
});

/** Checkpoints in every form that is read: shards, bare files, float types, sizes that nothing divides; and quantized embeddings. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { type FloatDType, fromFloat32 } from '../../formats/dtype.ts';
import { inspect } from '../../src/runs/inspect/inspect.ts';
import type { QuantizeRequest } from '../../src/runs/quantize/recipe.ts';
import { groupedLlama, saveCheckpoint, tinyText } from '../support/checkpoint-folder.ts';
import { MemorySource } from '../support/memory-source.ts';
import { runEvaluate, runQuantize } from '../support/runs.ts';
import { scratchFolder } from '../support/scratch-folder.ts';
import type { TinyModel } from '../support/tiny-models.ts';

const scratch = scratchFolder();
const at = (name: string) => join(scratch.path, name);
const RTN = { bits: 4, method: 'rtn' };
const quantizeTo = (model: string, output: string, request: QuantizeRequest = {}) =>
  runQuantize(at(model), at(output), { ...RTN, ...request });
let text: string;
const measure = (model: string, options: Parameters<typeof runEvaluate>[2] = {}) => runEvaluate(at(model), text, options);
const weightsOf = (output: string) =>
  (JSON.parse(readFileSync(join(at(output), 'pcomp.json'), 'utf8')) as { weights: Record<string, string> }).weights;

/** The model with its tensors stored in another type. */
function stored(tiny: TinyModel, dtype: FloatDType): TinyModel {
  const source = new MemorySource();
  for (const [name, { shape }] of tiny.source.tensors)
    source.add(name, dtype, shape, fromFloat32(dtype, tiny.source.values(name)!));
  return { ...tiny, source };
}

const tiny = groupedLlama('inputs');

beforeAll(async () => {
  text = scratch.write('text.txt', tinyText(200));
  await saveCheckpoint(at('model'), tiny);
  await quantizeTo('model', 'whole');
});

it('a checkpoint in shards is the same model', async () => {
  await saveCheckpoint(at('sharded'), tiny, 60_000);
  expect(readdirSync(at('sharded')).filter((name) => name.endsWith('.safetensors')).length).toBeGreaterThan(3);
  expect((await quantizeTo('sharded', 'from-shards')).sourceBytes).toBeGreaterThan(386_000);
  expect(weightsOf('from-shards')).toEqual(weightsOf('whole'));
});

it('a bare file is the folder it lies in', async () => {
  await quantizeTo('model/model.safetensors', 'from-file');
  expect(weightsOf('from-file')).toEqual(weightsOf('whole'));
  expect((await measure('model/model.safetensors')).nll).toBe((await measure('model')).nll);
});

describe.each(['F16', 'BF16', 'F32'] as const)('a checkpoint in %s', (dtype) => {
  it('keeps what is not quantized in that type, and is exact about the rest', async () => {
    await saveCheckpoint(at(dtype), stored(tiny, dtype));
    await quantizeTo(dtype, `${dtype}-out`, { formats: 'onnx,safetensors' });
    const float = await measure(dtype);
    expect(float.bitsPerWeight).toBe(dtype === 'F32' ? 32 : 16);
    const onnx = await measure(`${dtype}-out`, { against: at(dtype) });
    const planes = await measure(`${dtype}-out/model.safetensors`);
    expect(Math.abs(onnx.perplexity / planes.perplexity - 1)).toBeLessThan(1e-6);
    expect(onnx.kl).toBeLessThan(0.2);
    const fast = await measure(`${dtype}-out`, { accuracy: 'fast' });
    expect(Math.abs(fast.nll / onnx.nll - 1)).toBeLessThan(0.02);
    const { tensors } = await inspect(at(`${dtype}-out`));
    const dtypeOf = (name: string) => tensors.find((tensor) => tensor.name === name)?.dtype;
    expect(['model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight'].map(dtypeOf)).toEqual([dtype, dtype, dtype]);
  });
});

describe.each([
  ['with a head of its own', false],
  ['tied to the head', true],
])('embeddings %s', (_, tied) => {
  it.each([4, 8])('of %i bits are stored once, looked up and multiplied with', async (bits) => {
    const name = `embeddings-${bits}-${tied}`;
    await saveCheckpoint(at(name), groupedLlama(name, { tie_word_embeddings: tied }));
    const float = await quantizeTo(name, `${name}-float`, { formats: 'onnx,safetensors' });
    const outcome = await quantizeTo(name, `${name}-out`, { embeddings: bits, formats: 'onnx,safetensors' });
    expect(outcome.averageBits).toBe(4);

    // 41 x 64 values; in ONNX two groups of 32 with F16 scales and zero points that fill whole bytes.
    const rows = 41 * (tied ? 1 : 2);
    const table = rows * ((64 * bits) / 8 + 2 * 2 + (2 * bits) / 8);
    const quantizedBytes = outcome.artifacts.map((artifact) => artifact.quantizedBytes);
    expect(quantizedBytes[0] - float.artifacts[0].quantizedBytes).toBe(table);
    for (const [i, { bytes }] of outcome.artifacts.entries()) {
      const saved = float.artifacts[i].bytes - bytes;
      const dropped = rows * 64 * 4 - (quantizedBytes[i] - float.artifacts[i].quantizedBytes);
      // Graph, headers and padding aside, which take a few kB.
      expect(Math.abs(saved - dropped)).toBeLessThan(6_000);
    }

    const { modules, kind } = await inspect(at(`${name}-out`));
    expect(kind).toBe('onnx');
    const tables = modules.filter((module) => !module.name.startsWith('model.layers'));
    expect(tables.map((module) => [module.name, module.averageBits])).toEqual(
      ['model.embed_tokens', ...(tied ? [] : ['lm_head'])].map((module) => [module, bits]),
    );
    const exact = await measure(`${name}-out`);
    expect(Math.abs((await measure(`${name}-out/model.safetensors`)).perplexity / exact.perplexity - 1)).toBeLessThan(1e-6);
    expect(Math.abs((await measure(`${name}-out`, { accuracy: 'fast' })).nll / exact.nll - 1)).toBeLessThan(0.02);
    expect(exact.bitsPerWeight).toBe(float.artifacts[0].bitsPerWeight);
  });
});

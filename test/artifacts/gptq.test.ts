import { describe, expect, it } from 'vitest';
import { encodeGptq, gptqDeclarations, isSymmetric, readGptq, whyNotGptq } from '../../src/artifacts/gptq.ts';
import { shapeOfGrid } from '../../src/artifacts/planes.ts';
import type { QuantizedModule } from '../../src/artifacts/quant-metadata.ts';
import { asBytes, asWords } from '../../src/artifacts/tensor-bytes.ts';
import { FormatError } from '../../src/errors.ts';
import { dequantize, type QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import { MemorySource } from '../support/memory-source.ts';
import { randomLinear } from './random-linear.ts';

const module: QuantizedModule = { outFeatures: 64, inFeatures: 96, groupSize: 32, input: 'm', transposed: false };
const linear = (bits: number) => randomLinear({ rows: 64, columns: 96, groupSize: 32, bits: [bits], seed: bits });

function source(q: QuantizedLinear, format: 'gptq' | 'gptq_v2'): MemorySource {
  const memory = new MemorySource();
  for (const { name, dtype, shape, data } of encodeGptq('m', q, format)) memory.add(name, dtype, shape, data);
  return memory;
}

describe('the GPTQ layout', () => {
  it.each([2, 3, 4, 8])('brings back %i-bit modules', async (bits) => {
    const q = linear(bits);
    const memory = source(q, 'gptq_v2');
    expect([...memory.tensors.values()].map(({ name, dtype, shape }) => ({ name, dtype, shape }))).toEqual(
      gptqDeclarations('m', q),
    );
    const back = await readGptq(memory, 'm', module, 'gptq_v2');
    expect(back).toEqual(q);
    expect(dequantize(back)).toEqual(dequantize(q));
  });

  it('holds zero points less one in v1, as its readers add one', async () => {
    const q = { ...linear(4), zeroPoints: new Uint8Array(64 * 3).fill(8) };
    expect(isSymmetric(q)).toBe(true);
    const memory = source(q, 'gptq');
    expect(new Set(asWords(memory.tensors.get('m.qzeros')!.data))).toEqual(new Set([0x77777777]));
    expect(await readGptq(memory, 'm', module, 'gptq')).toEqual(q);
  });

  it('has the shapes that AutoGPTQ documents', () => {
    const q = linear(3);
    const shapes = Object.fromEntries(gptqDeclarations('m', q).map(({ name, dtype, shape }) => [name, [dtype, ...shape]]));
    expect(shapes).toEqual({
      'm.qweight': ['I32', 9, 64],
      'm.qzeros': ['I32', 3, 6],
      'm.scales': ['F16', 3, 64],
      'm.g_idx': ['I32', 96],
    });
  });

  it.each([
    ['mixed widths', { rows: 32, columns: 64, groupSize: 32, bits: [2, 4] }, /mixes widths \(2, 4 bits\)/],
    ['1 bit', { rows: 32, columns: 64, groupSize: 32, bits: [1] }, /1 bits/],
    ['5 bits', { rows: 32, columns: 64, groupSize: 32, bits: [5] }, /5 bits/],
    ['a short last group', { rows: 32, columns: 96, groupSize: 64, bits: [4] }, /no multiple of the group size 64/],
    ['outputs that fill no word', { rows: 33, columns: 64, groupSize: 32, bits: [4] }, /multiples of 32/],
    ['inputs that fill no word', { rows: 32, columns: 48, groupSize: 48, bits: [4] }, /multiples of 32/],
    ['a sorted input', { rows: 32, columns: 64, groupSize: 32, bits: [4], transform: { hadamard: 0 } }, /input sorted, for/],
    ['a rotated input', { rows: 32, columns: 64, groupSize: 32, bits: [4], transform: { hadamard: 32 } }, /sorted and rotated/],
    [
      'an input rotated as a whole',
      { rows: 32, columns: 64, groupSize: 32, bits: [4], transform: { hadamard: 64, signed: true } },
      /input rotated, for/,
    ],
    ['scales beyond F16', { rows: 32, columns: 64, groupSize: 32, bits: [4], scaleDtype: 'F32' as const }, /F16/],
  ])('does not suit %s', (_, options, why) => {
    expect(whyNotGptq(shapeOfGrid(randomLinear(options)))).toMatch(why);
  });

  const damaged: readonly (readonly [string, string, (memory: MemorySource) => void])[] = [
    ['missing codes', 'gptq-width', (memory) => memory.tensors.delete('m.qweight')],
    ['codes of no width', 'gptq-width', (memory) => memory.add('m.qweight', 'I32', [10, 64], new Uint8Array(10 * 64 * 4))],
    ['missing scales', 'layout-tensor-missing', (memory) => memory.tensors.delete('m.scales')],
    ['scales of another shape', 'layout-tensor-shape', (memory) => memory.add('m.scales', 'F16', [3, 32], new Uint8Array(192))],
    ['columns in another order', 'gptq-g-idx', (memory) => memory.add('m.g_idx', 'I32', [96], asBytes(new Int32Array(96)))],
  ];
  it.each(damaged)('is refused for %s', async (_, rule, damage) => {
    const memory = source(linear(4), 'gptq_v2');
    damage(memory);
    const error = await readGptq(memory, 'm', module, 'gptq_v2').catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule });
  });

  it('is refused for a module that no such file can hold', async () => {
    const sorted = { ...module, transform: { permuted: true, signed: false, hadamard: 0 } };
    await expect(readGptq(source(linear(4), 'gptq_v2'), 'm', sorted, 'gptq_v2')).rejects.toMatchObject({ rule: 'gptq-shape' });
    const shape = { ...module, outFeatures: 33 };
    await expect(readGptq(source(linear(4), 'gptq_v2'), 'm', shape, 'gptq_v2')).rejects.toMatchObject({ rule: 'gptq-shape' });
  });
});

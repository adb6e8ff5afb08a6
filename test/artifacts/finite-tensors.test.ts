import { describe, expect, it } from 'vitest';
import { type FloatDType, fromFloat32 } from '../../formats/dtype.ts';
import { assertFiniteTensors } from '../../src/artifacts/finite-tensors.ts';
import { UnsupportedError } from '../../src/errors.ts';
import { MemorySource } from '../support/memory-source.ts';

const check = (source: MemorySource, except: readonly string[] = []) => assertFiniteTensors(source, new Set(except), undefined);

/** Zeros but for one value. */
function sourceWith(dtype: FloatDType, shape: readonly number[], at: number, value: number): MemorySource {
  const values = new Float32Array(shape.reduce((product, size) => product * size, 1));
  values[at] = value;
  const source = new MemorySource();
  source.add('fine', dtype, [2], fromFloat32(dtype, Float32Array.of(1, -2)));
  source.add('layer.weight', dtype, shape, fromFloat32(dtype, values));
  return source;
}

describe.each(['F32', 'F16', 'BF16'] as const)('a weight stored as %s', (dtype) => {
  it.each([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])(
    'that is %d is named with its place',
    async (value) => {
      const refused = (place: string) =>
        new UnsupportedError(
          `memory.safetensors: tensor "layer.weight" holds ${value} at [${place}]; only finite weights can be quantized`,
        );
      await expect(check(sourceWith(dtype, [5, 7], 4 * 7 + 6, value))).rejects.toEqual(refused('4, 6'));
      await expect(check(sourceWith(dtype, [9], 0, value))).rejects.toEqual(refused('0'));
      await expect(check(sourceWith(dtype, [2, 3, 4], 12 + 8 + 1, value))).rejects.toEqual(refused('1, 2, 1'));
      await expect(check(sourceWith(dtype, [], 0, value))).rejects.toEqual(refused(''));
      // Several pieces: rows of 64 KiB or 128 KiB, and the value in one of the last.
      await expect(check(sourceWith(dtype, [600, 32768], 599 * 32768 + 5, value))).rejects.toEqual(refused('599, 5'));
    },
  );

  it('that is finite passes, and so does a tensor that the model does not use', async () => {
    await expect(check(sourceWith(dtype, [5, 7], 3, 65504))).resolves.toBeUndefined();
    await expect(check(sourceWith(dtype, [5, 7], 3, Number.NaN), ['layer.weight'])).resolves.toBeUndefined();
  });
});

it('a double beyond float32 counts as infinite, whole numbers are not looked at', async () => {
  const source = new MemorySource();
  source.add('ids', 'I32', [1], new Uint8Array(Int32Array.of(-1).buffer));
  await expect(check(source)).resolves.toBeUndefined();
  source.add('wide', 'F64', [2], new Uint8Array(Float64Array.of(1, 1e300).buffer));
  await expect(check(source)).rejects.toThrow('tensor "wide" holds Infinity at [1]');
});

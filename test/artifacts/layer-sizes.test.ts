import { describe, expect, it } from 'vitest';
import { onnxStorage, planesStoredBits } from '../../src/artifacts/accounting.ts';
import { type BudgetUnit, layerSizes, rotationBits } from '../../src/artifacts/layer-sizes.ts';
import { layOutLinear, type OnnxContainer } from '../../src/artifacts/onnx/linear-layout.ts';
import { shapeOfGrid } from '../../src/artifacts/planes.ts';
import type { QuantizedLinear } from '../../src/methods/quantize/quantized-linear.ts';
import { randomLinear, uniform } from './random-linear.ts';

/** What a module is charged when it is written. */
function charged(unit: BudgetUnit, q: QuantizedLinear, container: OnnxContainer = 'auto'): number {
  if (unit === 'planes') return planesStoredBits(shapeOfGrid(q));
  const { storedBits, runtimeBits } = onnxStorage([
    ['m', 'x', layOutLinear(q, { compact: unit !== 'onnx-plain', container })],
  ]).get('m')!;
  return unit === 'runtime' ? runtimeBits : storedBits;
}

describe.each(['planes', 'onnx', 'onnx-plain', 'runtime'] as const)('the size of a layer, counted as %s', (unit) => {
  it.each([32, 64, 128])('in groups of %i, of any widths in any order, is what it is charged when written', (groupSize) => {
    const random = uniform(groupSize);
    for (let round = 0; round < 60; round++) {
      const [rows, columns] = [1 + Math.floor(40 * random()), 20 + Math.floor(600 * random())];
      const bits = Array.from({ length: Math.ceil(columns / groupSize) }, () => 1 + Math.floor(8 * random()));
      if (round % 2 === 0) bits.sort((a, b) => b - a);
      const q = randomLinear({ rows, columns, groupSize, bits });
      const container = (['auto', '2', '4'] as const)[round % 3];
      const { sizes, rest } = layerSizes({ unit, container }, q, groupSize, [1, 2, 3, 4, 5, 6, 7, 8]);
      const size = bits.reduce((sum, width, g) => sum + sizes[g][width - 1], 0) + (rest?.(bits) ?? 0);
      expect([rows, columns, bits, size]).toEqual([rows, columns, bits, charged(unit, q, container)]);
    }
  });

  it('leaves out the order of an input and the matrix of its rotation, which sites share', () => {
    const shape = { rows: 8, columns: 256, groupSize: 64, bits: [3] };
    const rotated = randomLinear({ ...shape, transform: { hadamard: 64 } });
    const plan = { groupSize: 64, bits: [3, 3, 3, 3], transform: 'perm-had' } as const;
    const matrix = rotationBits(unit, [[rotated, plan]]);
    expect(charged(unit, rotated) - charged(unit, randomLinear(shape))).toBe(32 * 256 + matrix);
    expect(
      rotationBits(unit, [
        [rotated, plan],
        [rotated, plan],
      ]),
    ).toBe(matrix);
    expect(rotationBits(unit, [[rotated, { ...plan, groupSize: 512 }]])).toBe(0);
  });
});

import { expect, test } from 'vitest';
import { createEngine } from '../../../src/compute/ort.ts';
import { createBlas } from '../../../src/compute/ort-blas.ts';
import { QUANTIZERS } from '../../../src/methods/quantize/index.ts';
import { statsOf } from '../../support/reference-layer.ts';
import { contextOf, randomTokens, randomWeight, siteOf } from './support.ts';

/** Products summed in another order flip a code here and there, and every later code of its row may follow. */
const ERROR_TOLERANCE = 0.02;

test('on onnxruntime every quantizer decides the same widths and ends at the same error as with naive products', async () => {
  await using engine = await createEngine({ device: 'cpu', threads: 1 });
  const [rows, n] = [40, 150];
  const weight = randomWeight(rows, n, 31);
  const stats = statsOf(randomTokens(400, n));
  for (const quantizer of Object.values(QUANTIZERS)) {
    for (const actOrder of [false, true]) {
      const [slow, fast] = [contextOf({ groupSize: 16, actOrder }), contextOf({ groupSize: 16, actOrder }, createBlas(engine))];
      // Each with its own statistics: factors are shared through them.
      const plan = await quantizer.decide(slow, siteOf(rows, n), weight, { ...stats });
      expect(await quantizer.decide(fast, siteOf(rows, n), weight, { ...stats })).toEqual(plan);
      const expected = await quantizer.apply(slow, siteOf(rows, n), weight, { ...stats }, plan);
      const actual = await quantizer.apply(fast, siteOf(rows, n), weight, { ...stats }, plan);
      expect(Math.abs(actual.relativeError! / expected.relativeError! - 1)).toBeLessThan(ERROR_TOLERANCE);
      const same = actual.quantized.codes.filter((code, i) => code === expected.quantized.codes[i]).length;
      expect(same / (rows * n)).toBeGreaterThan(0.99);
    }
  }
});

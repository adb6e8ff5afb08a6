/** The vector kernels against the plain loops that they stand for, bit for bit, wherever arrays lie and whatever their length. */
import { expect, test } from 'vitest';
import { fromFloat32, toFloat32 } from '../../../formats/dtype.ts';
import { buildKernels } from '../../../scripts/build-kernels.mjs';
import { VECTORS_WASM } from '../../../src/compute/kernels/vectors.generated.ts';
import { vectors } from '../../../src/compute/kernels/vectors.ts';
import { philox4x32 } from '../../../src/compute/random.ts';

/** Around the lengths that kernels and pieces are cut at. */
const LENGTHS = [1, 3, 4, 7, 8, 9, 31, 4095, 4096, 4097, 9001];

let state = 88_172_645;
function random(): number {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) / 2 ** 32 - 0.5;
}

/** Of sizes from subnormal to large, zeros of both signs, and equal magnitudes. */
function numbers(length: number): Float32Array {
  return Float32Array.from({ length }, () => {
    const kind = random();
    if (kind < -0.4) return kind < -0.45 ? 0 : -0;
    if (kind < -0.3) return Math.sign(random()) * 0.25;
    return random() * 2 ** Math.floor(random() * 40);
  });
}

/** The same values in ordinary memory and in the kernels', in all combinations that matter. */
function places(arrays: readonly Float32Array[]): Float32Array[][] {
  const lent = arrays.map((array) => {
    const copy = vectors().floats(array.length);
    copy.set(array);
    return copy;
  });
  return [[...arrays], lent, arrays.map((array, i) => (i % 2 === 0 ? array : lent[i]))];
}

function bitsOf(values: Float32Array): number[] {
  return [...new Int32Array(values.slice().buffer)];
}

test('every 16-bit code widens as it should, and every finite one comes back', () => {
  using _ = vectors().open();
  for (const dtype of ['BF16', 'F16'] as const) {
    const codes = new Uint8Array(Uint16Array.from({ length: 65_536 }, (_, i) => i).buffer);
    const expected = toFloat32(dtype, codes);
    for (const out of [new Float32Array(65_536), vectors().floats(65_536)]) {
      expect(vectors().widen(dtype, codes, out)).toBe(false);
      expect(bitsOf(out)).toEqual(bitsOf(expected));
    }
    const finite = expected.filter(Number.isFinite);
    expect(vectors().widen(dtype, fromFloat32(dtype, finite), new Float32Array(finite.length))).toBe(true);
    const back = new Uint8Array(2 * finite.length);
    expect(vectors().narrow(dtype, finite, back)).toBe(true);
    expect(back).toEqual(fromFloat32(dtype, finite));
  }
});

test('narrowing rounds to nearest even near every F16 and BF16 boundary', () => {
  for (const dtype of ['BF16', 'F16'] as const) {
    const all = toFloat32(dtype, new Uint8Array(Uint16Array.from({ length: 65_536 }, (_, i) => i).buffer));
    const half = all.filter((value) => Number.isFinite(value) && Math.abs(value) < 2 ** 127);
    const bits = new Int32Array(half.buffer);
    // What lies between two codes differs from them in the lower bits: the middle, and its neighbours.
    const shift = dtype === 'BF16' ? 16 : 13;
    for (const offset of [(1 << (shift - 1)) - 1, 1 << (shift - 1), (1 << (shift - 1)) + 1]) {
      const between = new Float32Array(bits.map((word) => word + offset).buffer);
      const codes = new Uint8Array(2 * between.length);
      const finite = vectors().narrow(dtype, between, codes);
      const expected = fromFloat32(dtype, between);
      expect(codes).toEqual(expected);
      expect(finite).toBe(toFloat32(dtype, expected).every(Number.isFinite));
    }
  }
});

test('one number that is not finite is seen, wherever it is', () => {
  for (const at of [0, 5, 4096, 4100]) {
    const values = numbers(4101);
    const codes = new Uint8Array(2 * values.length);
    expect(vectors().areFinite(values)).toBe(true);
    expect(vectors().narrow('BF16', values, codes)).toBe(true);
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
      values[at] = bad;
      expect(vectors().areFinite(values)).toBe(false);
      expect(vectors().narrow('F16', values, codes)).toBe(false);
    }
  }
});

test('the rounding loss is the sum of squares of what rounding changed, and of what the merge changed', () => {
  const [values, base] = [numbers(4097), numbers(4097)];
  const loss = { error: 0, change: 0 };
  vectors().narrow('BF16', values, new Uint8Array(2 * values.length), base, loss);
  const stored = toFloat32('BF16', fromFloat32('BF16', values));
  const squares = (x: Float32Array, y: Float32Array) => x.reduce((sum, value, i) => sum + (value - y[i]) ** 2, 0);
  expect(loss.error / squares(stored, values)).toBeCloseTo(1, 12);
  expect(loss.change / squares(values, base)).toBeCloseTo(1, 12);
});

test('sums of vectors are of float64, in order, rounded once', () => {
  using _ = vectors().open();
  for (const length of LENGTHS) {
    const inputs = Array.from({ length: 5 }, () => numbers(length));
    const c = [0.3, -1.25, 1e-3, 7];
    for (const [base, ...xs] of places(inputs)) {
      const out = vectors().floats(length);
      const check = (expected: (i: number) => number) => expect(bitsOf(out)).toEqual(bitsOf(base.map((_, i) => expected(i))));
      vectors().weightedSum(xs, c, out);
      check((i) => xs.reduce((sum, x, k) => sum + c[k] * x[i], 0));
      vectors().addTaskVectors(base, xs, c, out);
      check((i) => xs.reduce((sum, x, k) => sum + c[k] * (x[i] - base[i]), base[i]));
      vectors().addScaled(base, xs, c, 0.7, out);
      check((i) => base[i] + 0.7 * xs.reduce((sum, x, k) => sum + c[k] * x[i], 0));
      vectors().subtract(xs[0], xs[1], out);
      check((i) => xs[0][i] - xs[1][i]);
    }
  }
});

test('signs are elected as by asking every expert twice', () => {
  using _ = vectors().open();
  for (const length of LENGTHS) {
    const inputs = Array.from({ length: 4 }, () => numbers(length));
    for (const [mean, weights] of [
      ['none', [1, 2, 0.5]],
      ['positive weights', [1, 2, 0.5]],
      ['any weights', [1, -1, 0.5]],
    ] as const) {
      const factors = weights.map((w) => w * 1.5);
      for (const [base, ...xs] of places(inputs)) {
        const out = new Float32Array(length);
        vectors().electSigns(base, xs, { factors, weights }, { scale: 0.9, mean, least: 1e-8 }, out);
        const expected = base.map((value, i) => {
          const parts = xs.map((x, k) => factors[k] * x[i]);
          const add = (some: (part: number) => boolean, what: (k: number) => number) =>
            parts.reduce((sum, part, k) => (some(part) ? sum + what(k) : sum), 0);
          const above = add(
            (part) => part > 0,
            (k) => parts[k],
          );
          const below = add(
            (part) => part < 0,
            (k) => parts[k],
          );
          const agrees = above + below < 0 ? (part: number) => part < 0 : (part: number) => part > 0;
          const total = add(agrees, (k) => parts[k]);
          const z = add(agrees, (k) => weights[k]);
          return value + (0.9 * total) / (mean === 'none' || Math.abs(z) < 1e-8 ? 1 : z);
        });
        expect(bitsOf(out)).toEqual(bitsOf(expected));
      }
    }
  }
});

test('magnitudes are counted and kept by their bits', () => {
  using _ = vectors().open();
  for (const length of LENGTHS) {
    const values = numbers(length);
    const bits = bitsOf(values).map((word) => word & 0x7fffffff);
    const sorted = [...bits].sort((a, b) => a - b);
    const [low, high] = [sorted[Math.floor(length / 4)], sorted[Math.floor((3 * length) / 4)]];
    for (const [given] of places([values])) {
      const [halves, lows] = [vectors().counters(2 * 0x8000), vectors().counters(0x10000)];
      vectors().countHigh(given, halves);
      const highs = Uint32Array.from({ length: 0x8000 }, (_, i) => halves[i] + halves[i + 0x8000]);
      vectors().countWithin(given, (low >>> 16) * 0x10000, lows);
      const expectedHighs = new Uint32Array(0x8000);
      const expectedLows = new Uint32Array(0x10000);
      for (const word of bits) {
        expectedHighs[word >>> 16]++;
        if (word >>> 16 === low >>> 16) expectedLows[word & 0xffff]++;
      }
      expect(Buffer.compare(Buffer.from(highs), Buffer.from(expectedHighs))).toBe(0);
      expect(Buffer.compare(Buffer.from(lows), Buffer.from(expectedLows))).toBe(0);
      expect(vectors().countEqual(given, low)).toBe(bits.filter((word) => word === low).length);
      const kept = given.slice();
      vectors().keepBetween(kept, low, high);
      expect([...kept]).toEqual([...values].map((value, i) => (bits[i] > low && bits[i] < high ? value : 0)));
    }
  }
});

test('random numbers are those of the counter, from any element on', () => {
  const key = Uint32Array.of(0x1234_5678, 0x9abc_def0);
  for (const at of [0, 1, 6, 4 * 2 ** 30 - 3, 2 ** 33]) {
    const length = 4103;
    const out = new Uint32Array(length);
    vectors().fillUniform(key, at, out);
    const words = new Uint32Array(4);
    const expected = out.map((_, i) => {
      const quad = Math.floor((at + i) / 4);
      philox4x32(Uint32Array.of(quad, quad / 2 ** 32, 0, 0), key, words);
      return words[(at + i) % 4] >>> 8;
    });
    expect(out).toEqual(expected);
    const values = numbers(length);
    const kept = new Float32Array(length);
    vectors().keepRandomly(values, key, at, 0.3 * 2 ** 24, kept);
    expect([...kept]).toEqual([...values].map((value, i) => (expected[i] < 0.3 * 2 ** 24 ? value : 0)));
    vectors().divide(kept, 0.3);
    expect([...kept]).toEqual([...values].map((value, i) => Math.fround((expected[i] < 0.3 * 2 ** 24 ? value : 0) / 0.3)));
  }
});

test('sums are in the order of the elements', () => {
  using _ = vectors().open();
  for (const length of LENGTHS) {
    for (const [x, y] of places([numbers(length), numbers(length)])) {
      const sums = Float64Array.of(0.5, 0.25, 0.125);
      vectors().sumGram(x, y, sums);
      vectors().sumMagnitudes(x, sums);
      const [xx, xy, yy] = [0.5, 0.25, 0.125];
      const sum = (start: number, what: (i: number) => number) => x.reduce((total, _, i) => total + what(i), start);
      const afterGram = sum(xx, (i) => x[i] * x[i]);
      expect([...sums]).toEqual([
        sum(afterGram, (i) => Math.abs(x[i])),
        sum(xy, (i) => x[i] * y[i]),
        sum(yy, (i) => y[i] * y[i]),
      ]);
      const pair = new Float64Array(2);
      vectors().sumMagnitudePairs(x, y, pair);
      vectors().sumProducts(x, y, pair);
      const magnitudes = sum(0, (i) => Math.abs(x[i]));
      expect([...pair]).toEqual([sum(magnitudes, (i) => x[i] * y[i]), sum(0, (i) => Math.abs(y[i]))]);
    }
  }
});

test('memory that was lent is used again, and is good while it grows', () => {
  let first: Float32Array;
  {
    using _ = vectors().open();
    first = vectors().floats(1000).fill(3);
    for (let i = 0; i < 40; i++) vectors().floats(1 << 20);
    expect(first.every((value) => value === 3)).toBe(true);
    const sum = new Float64Array(1);
    vectors().sumMagnitudes(first, sum);
    expect(sum[0]).toBe(3000);
  }
  using _ = vectors().open();
  expect(vectors().floats(10).byteOffset).toBe(first.byteOffset);
  expect(vectors().floats((1 << 20) + 1).buffer).not.toBe(first.buffer);
});

test('the committed module is what its source builds to', async () => {
  expect(VECTORS_WASM).toBe(Buffer.from(await buildKernels('vectors')).toString('base64'));
});

import { describe, expect, it } from 'vitest';
import { philox4x32, Random } from '../../src/compute/random.ts';

/** Known answers that the authors of Philox publish with Random123 (kat_vectors, philox4x32 10). */
const PUBLISHED = [
  [[0, 0, 0, 0], [0, 0], '6627e8d5 e169c58d bc57ac4c 9b00dbd8'],
  [[0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff], [0xffffffff, 0xffffffff], '408f276d 41c83b0e a20bc7c6 6d5451fd'],
  [[0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0], 'd16cfe09 94fdcceb 5001e420 24126ea1'],
] as const;

/** The cipher once more, in BigInt and straight from the paper. */
function philoxOracle(counter: readonly bigint[], key: readonly bigint[]): bigint[] {
  let [c0, c1, c2, c3] = counter;
  let [k0, k1] = key;
  const mask = 0xffffffffn;
  for (let round = 0; round < 10; round++) {
    const p0 = 0xd2511f53n * c0;
    const p1 = 0xcd9e8d57n * c2;
    [c0, c1, c2, c3] = [(p1 >> 32n) ^ c1 ^ k0, p1 & mask, (p0 >> 32n) ^ c3 ^ k1, p0 & mask];
    k0 = (k0 + 0x9e3779b9n) & mask;
    k1 = (k1 + 0xbb67ae85n) & mask;
  }
  return [c0, c1, c2, c3];
}

const take = (random: Random, count: number): number[] => Array.from({ length: count }, () => random.nextUint32());

describe('Philox4x32-10', () => {
  it.each(PUBLISHED)('gives the published words for counter %j and key %j', (counter, key, words) => {
    const out = new Uint32Array(4);
    philox4x32(Uint32Array.from(counter), Uint32Array.from(key), out);
    expect(Array.from(out, (word) => word.toString(16).padStart(8, '0')).join(' ')).toBe(words);
  });

  it('equals the paper in big integers on arbitrary counters and keys', () => {
    const words = take(new Random(5, 'arbitrary'), 600);
    for (let i = 0; i < words.length; i += 6) {
      const [counter, key] = [words.slice(i, i + 4), words.slice(i + 4, i + 6)];
      const out = new Uint32Array(4);
      philox4x32(Uint32Array.from(counter), Uint32Array.from(key), out);
      expect(Array.from(out, BigInt)).toEqual(philoxOracle(counter.map(BigInt), key.map(BigInt)));
    }
  });
});

describe('Random', () => {
  it('gives the same stream for the same seed and name', () => {
    expect(take(new Random(7, 'a.weight'), 9)).toEqual(take(new Random(7, 'a.weight'), 9));
  });

  it('gives other streams for another seed, for another name and for the upper half of the seed', () => {
    const first = take(new Random(7, 'a.weight'), 4);
    expect(take(new Random(8, 'a.weight'), 4)).not.toEqual(first);
    expect(take(new Random(7, 'b.weight'), 4)).not.toEqual(first);
    expect(take(new Random(7 + 2 ** 32, 'a.weight'), 4)).not.toEqual(first);
  });

  it('does not repeat words from one counter to the next', () => {
    expect(new Set(take(new Random(0, ''), 4000)).size).toBeGreaterThan(3990);
  });

  it('draws floats in [0, 1) whose mean and variance are those of the uniform distribution', () => {
    const random = new Random(0, 'floats');
    const count = 20_000;
    let sum = 0;
    let squares = 0;
    for (let i = 0; i < count; i++) {
      const value = random.nextFloat();
      expect(value >= 0 && value < 1).toBe(true);
      sum += value;
      squares += value * value;
    }
    const standardErrors = 5;
    expect(Math.abs(sum / count - 1 / 2)).toBeLessThan(standardErrors * Math.sqrt(1 / 12 / count));
    expect(Math.abs(squares / count - 1 / 3)).toBeLessThan(standardErrors * Math.sqrt(4 / 45 / count));
  });

  it('draws whole numbers below a bound, each about equally often', () => {
    const random = new Random(0, 'ints');
    const counts = new Array<number>(7).fill(0);
    for (let i = 0; i < 14_000; i++) counts[random.nextBelow(7)]++;
    for (const count of counts) expect(Math.abs(count - 2000)).toBeLessThan(5 * Math.sqrt(2000));
    expect(random.nextBelow(1)).toBe(0);
  });

  it('refuses seeds and bounds that are no whole numbers in range', () => {
    for (const seed of [-1, 0.5, Number.NaN, 2 ** 53]) expect(() => new Random(seed, '')).toThrow(RangeError);
    for (const bound of [0, 1.5, 2 ** 32 + 1]) expect(() => new Random(0, '').nextBelow(bound)).toThrow(RangeError);
  });
});

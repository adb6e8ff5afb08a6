import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { Coverage } from '../../../formats/safetensors/coverage.ts';

describe('Coverage', () => {
  it('takes every byte once and finds the first gap, as a list of bytes would', () => {
    const ranges = fc.array(fc.tuple(fc.nat(20), fc.nat(6)), { maxLength: 20 });
    fc.assert(
      fc.property(ranges, fc.constantFrom(0, 1, 26), (list, length) => {
        const coverage = new Coverage(length);
        const taken: boolean[] = Array(length).fill(false);
        for (const [start, size] of list) {
          const end = Math.min(start + size, length);
          if (start > end) continue;
          const free = !taken.slice(start, end).includes(true);
          expect(coverage.claim(start, end)).toBe(free);
          if (free) taken.fill(true, start, end);
          const first = taken.indexOf(false);
          const after = taken.indexOf(true, first);
          expect(coverage.gap()).toEqual(first === -1 ? undefined : { start: first, end: after === -1 ? length : after });
        }
      }),
      { numRuns: 1000 },
    );
  });

  it('is whole from the start when there is nothing to write', () => {
    expect(new Coverage(0).gap()).toBeUndefined();
    expect(new Coverage(3).gap()).toEqual({ start: 0, end: 3 });
  });
});

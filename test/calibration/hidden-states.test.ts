/** Batches of windows and their pads. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { dropPads, HiddenStates, isPadded, padRows, planBatches } from '../../src/calibration/hidden-states.ts';
import { Spool } from '../../src/calibration/state-store.ts';

const windowsOf = (lengths: readonly number[]) => lengths.map((length) => new Int32Array(length));
const anyLengths = fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 30 });

describe('batches', () => {
  it('cover every window once, in order, within the bound unless a window alone is over it', () => {
    fc.assert(
      fc.property(anyLengths, fc.integer({ min: 1, max: 40 }), (lengths, maxTokens) => {
        const batches = planBatches(windowsOf(lengths), maxTokens);
        expect(batches.flatMap((batch) => [...batch.lengths])).toEqual(lengths);
        let window = 0;
        let row = 0;
        for (const batch of batches) {
          expect([batch.firstWindow, batch.rowStart]).toEqual([window, row]);
          window += batch.lengths.length;
          row += batch.lengths.reduce((sum, length) => sum + length, 0);
          expect(batch.rowEnd).toBe(row);
          expect(batch.sequence).toBe(Math.max(...batch.lengths));
          expect(batch.lengths.length === 1 || batch.lengths.length * batch.sequence <= maxTokens).toBe(true);
        }
      }),
    );
  });
});

describe('pads', () => {
  it('are zeros after the real rows of a window, and dropping them gives the rows back', () => {
    fc.assert(
      fc.property(anyLengths, (lengths) => {
        const columns = 2;
        const [batch] = planBatches(windowsOf(lengths), 1e6);
        const rows = Float32Array.from({ length: batch.rowEnd * columns }, (_, i) => i + 1);
        const padded = padRows(batch, rows, columns);
        let row = 0;
        lengths.forEach((length, window) => {
          for (let t = 0; t < batch.sequence; t++) {
            const at = (window * batch.sequence + t) * columns;
            expect([...padded.subarray(at, at + columns)]).toEqual(
              t < length ? [...rows.subarray((row + t) * columns, (row + t + 1) * columns)] : [0, 0],
            );
          }
          row += length;
        });
        expect([...dropPads(batch, padded.slice(), columns)]).toEqual([...rows]);
      }),
    );
  });

  it('cost no copy when all windows are equally long', () => {
    const [batch] = planBatches(windowsOf([4, 4]), 8);
    const rows = new Float32Array(8 * 3);
    expect(isPadded(batch)).toBe(false);
    expect(padRows(batch, rows, 3)).toBe(rows);
  });
});

it('the states of a text are copied for its beginning, in the middle of a window too', async () => {
  await using spool = new Spool();
  await using all = new HiddenStates(windowsOf([5, 3, 4]), 2, 8, spool);
  await all.fill((store) =>
    store.write(
      0,
      Float32Array.from({ length: 24 }, (_, i) => i),
    ),
  );
  for (const lengths of [[5, 3], [4]]) {
    await using few = new HiddenStates(windowsOf(lengths), 2, 4, spool);
    await few.copy(all);
    const rows = [];
    for await (const { hidden } of few.perWindow()) rows.push(...hidden);
    expect(rows).toEqual(Array.from({ length: 2 * few.tokenCount }, (_, i) => i));
  }
});

/** Cutting a token stream into windows. */
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { calibrationWindows, evaluationWindows } from '../../src/calibration/windows.ts';
import { RecipeError } from '../../src/errors.ts';

/** Token t of the stream is t: a window then says where it was cut. */
const stream = (length: number) => Int32Array.from({ length }, (_, i) => i);

describe('calibration windows', () => {
  it('are consecutive pieces of the stream, each of the full length', () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 200 }), fc.nat(5), (sequenceLength, extra, seed) => {
        const tokens = stream(sequenceLength + extra);
        const { windows } = calibrationWindows(tokens, { samples: 6, sequenceLength, seed });
        expect(windows.length).toBe(6);
        for (const window of windows) {
          expect([...window]).toEqual([...tokens.subarray(window[0], window[0] + sequenceLength)]);
        }
      }),
    );
  });

  it('may start at every token where one fits, the first and the last included', () => {
    const { windows } = calibrationWindows(stream(12), { samples: 400, sequenceLength: 8, seed: 0 });
    expect(new Set(windows.map((window) => window[0]))).toEqual(new Set([0, 1, 2, 3, 4]));
  });

  it('are the same for the same seed, and others for another', () => {
    const cut = (seed: number) =>
      calibrationWindows(stream(10_000), { samples: 4, sequenceLength: 16, seed }).windows.map((window) => window[0]);
    expect(cut(7)).toEqual(cut(7));
    expect(cut(7)).not.toEqual(cut(8));
  });

  it('say so when they must overlap', () => {
    const options = { samples: 3, sequenceLength: 10, seed: 0 };
    expect(calibrationWindows(stream(30), options).notes).toEqual([]);
    expect(calibrationWindows(stream(29), options).notes).toEqual([
      'the calibration text has 29 tokens, 3 x 10 = 30 are drawn from it: windows overlap',
    ]);
  });

  it('are one short window, with a note, when the text is shorter than one', () => {
    const { windows, notes } = calibrationWindows(stream(5), { samples: 3, sequenceLength: 10, seed: 0 });
    expect(windows.map((window) => [...window])).toEqual([[0, 1, 2, 3, 4]]);
    expect(notes).toEqual(['the calibration text has 5 tokens: one window of 5 is used, not 3 of 10']);
  });

  it('do not share memory with the stream', () => {
    const tokens = stream(4);
    const { windows } = calibrationWindows(tokens, { samples: 1, sequenceLength: 4, seed: 0 });
    windows[0][0] = 99;
    expect(tokens[0]).toBe(0);
  });

  it.each([
    ['no tokens', 0, 1, 1],
    ['no samples', 9, 0, 1],
    ['half a sample', 9, 0.5, 1],
    ['windows of nothing', 9, 1, 0],
  ])('are refused for %s', (_, length, samples, sequenceLength) => {
    expect(() => calibrationWindows(stream(length), { samples, sequenceLength, seed: 0 })).toThrow(RecipeError);
  });
});

describe('evaluation windows', () => {
  it('follow each other without gap or overlap; all tokens but the first of each are scored', () => {
    fc.assert(
      fc.property(fc.integer({ min: 2, max: 300 }), fc.integer({ min: 2, max: 64 }), (count, length) => {
        const { windows, scoredTokens } = evaluationWindows(stream(count), length);
        const covered = windows.flatMap((window) => [...window]);
        // A single token left over at the end has nothing to be scored.
        expect(count - covered.length).toBe(count % length === 1 ? 1 : 0);
        expect(covered).toEqual([...stream(covered.length)]);
        expect(windows.slice(0, -1).every((window) => window.length === length)).toBe(true);
        expect(scoredTokens).toBe(count - Math.ceil(count / length));
      }),
    );
  });

  it.each([
    [0, 8],
    [1, 8],
    [9, 1],
  ])('are refused when nothing can be scored: %i tokens in windows of %i', (count, length) => {
    expect(() => evaluationWindows(stream(count), length)).toThrow(RecipeError);
  });
});

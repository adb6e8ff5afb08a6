import { describe, expect, it } from 'vitest';
import { Scorer } from '../../../src/runs/evaluate/scoring.ts';

/** Probabilities by the definition. */
function softmax(row: readonly number[]): number[] {
  const total = row.reduce((sum, value) => sum + Math.exp(value), 0);
  return row.map((value) => Math.exp(value) / total);
}

const rows = [
  [0.1, 2.3, -1.2],
  [3, 0, 0.5],
  [-2, -2.5, 1],
];
const originals = [
  [0.2, 2.0, -1],
  [0.5, 1, 0.4],
  [-2, -2, 1.5],
];
const targets = [1, 0, 0];

describe('Scorer', () => {
  it('agrees with the definitions of nll, KL and agreement', () => {
    const scorer = new Scorer();
    scorer.add(
      Float32Array.from(rows.slice(0, 2).flat()),
      targets.slice(0, 2),
      3,
      Float32Array.from(originals.slice(0, 2).flat()),
    );
    scorer.add(Float32Array.from(rows[2]), targets.slice(2), 3, Float32Array.from(originals[2]));
    const nll = (of: number[][]) => of.reduce((sum, row, i) => sum - Math.log(softmax(row)[targets[i]]), 0) / 3;
    const kl = rows.reduce((sum, row, i) => {
      const p = softmax(originals[i]);
      const q = softmax(row);
      return sum + p.reduce((all, value, j) => all + value * Math.log(value / q[j]), 0);
    }, 0);
    expect(scorer.score.tokens).toBe(3);
    expect(scorer.score.nll).toBeCloseTo(nll(rows), 6);
    expect(scorer.score.perplexity).toBeCloseTo(Math.exp(nll(rows)), 6);
    expect(scorer.comparison.kl).toBeCloseTo(kl / 3, 6);
    expect(scorer.comparison.top1Agreement).toBeCloseTo(2 / 3, 12);
    expect(scorer.comparison.perplexityRatio).toBeCloseTo(Math.exp(nll(rows) - nll(originals)), 6);
  });

  it('survives logits whose exponentials overflow', () => {
    const scorer = new Scorer();
    scorer.add(Float32Array.of(1000, 990, -1000), [1], 3);
    expect(scorer.score.nll).toBeCloseTo(10 + Math.log(1 + Math.exp(-10)), 5);
  });

  it('scores only rows that have a target', () => {
    const scorer = new Scorer();
    scorer.add(Float32Array.from(rows.flat()), [1, 0], 3);
    expect(scorer.score.tokens).toBe(2);
  });
});

/** Token embeddings on the host. */
import { describe, expect, it } from 'vitest';
import { embedTokens } from '../../src/calibration/embed.ts';
import { HiddenStates } from '../../src/calibration/hidden-states.ts';
import { Spool } from '../../src/calibration/state-store.ts';
import { FormatError } from '../../src/errors.ts';
import { HIDDEN, ToyWeights, toyModel } from './doubles.ts';

const WINDOWS = [Int32Array.of(10, 0, 3), Int32Array.of(3), Int32Array.of(9, 10)];

async function embedded(
  windows: readonly Int32Array[],
  options: { positions?: boolean; chunkBytes?: number; ramBytes?: number } = {},
) {
  await using spool = new Spool({ ramBytes: options.ramBytes ?? 1e6 });
  await using states = new HiddenStates(windows, HIDDEN, 16, spool);
  const weights = new ToyWeights();
  const model = toyModel(1, { positions: options.positions ?? false });
  await embedTokens(model, weights, states, { path: 'toy', ...(options.chunkBytes && { chunkBytes: options.chunkBytes }) });
  const rows: number[][] = [];
  for await (const { hidden, rowCount } of states.perWindow()) {
    for (let t = 0; t < rowCount; t++) rows.push([...hidden.subarray(t * HIDDEN, (t + 1) * HIDDEN)]);
  }
  return { rows, loads: weights.loads };
}

const expected = WINDOWS.flatMap((window) => [...window].map((id) => ToyWeights.row('embed.weight', id)));

describe('embedding', () => {
  it.each([1e6, 20, 0])('puts the row of each token in its place (%d bytes of RAM)', async (ramBytes) => {
    expect((await embedded(WINDOWS, { ramBytes })).rows).toEqual(expected);
  });

  it('adds learned positions, counted from the start of each window', async () => {
    const { rows } = await embedded(WINDOWS, { positions: true });
    const positions = [0, 1, 2, 0, 0, 1];
    expect(rows).toEqual(expected.map(([a, b, c], i) => [a + positions[i] / 16, b, c + 0]));
  });

  it('reads the table in ranges of bounded size, and only where the text uses it', async () => {
    const { rows, loads } = await embedded(WINDOWS, { chunkBytes: 4 * HIDDEN * 4 });
    expect(rows).toEqual(expected);
    expect(loads).toEqual(['embed.weight[0, 4)', 'embed.weight[9, 11)']);
  });

  it('refuses a token that has no row', async () => {
    const failure = embedded([Int32Array.of(1, 11)]);
    await expect(failure).rejects.toThrow(FormatError);
    await expect(failure).rejects.toThrow(/token id 11, but "embed.weight" has 11 rows \[token-id-beyond-embedding\]/);
  });

  it('refuses a window with more tokens than positions', async () => {
    await expect(embedded([new Int32Array(9)], { positions: true })).rejects.toThrow(
      /9 tokens.*8 rows \[position-beyond-embedding\]/,
    );
  });
});

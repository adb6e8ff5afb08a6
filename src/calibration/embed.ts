/** Token embedding on the host: rows of the table copied to the tokens that need them. */
import { FormatError } from '../errors.ts';
import type { Model, WeightReader } from '../model/model.ts';
import type { HiddenStates } from './hidden-states.ts';

/** Rows of the table held at once, as bytes of float32; a 128k x 8192 table is 4 GiB. */
const TABLE_CHUNK_BYTES = 32 * 1024 * 1024;

export interface EmbedOptions {
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  /** Bytes of the embedding table held at once. */
  readonly chunkBytes?: number;
  /** Tokens embedded so far, of all. */
  readonly onProgress?: (done: number, total: number) => void;
}

/**
 * Fills `states` with the token embeddings of its windows, plus learned positions (0, 1, ... in each window) when the model
 * has them. The table is read in ranges of rows, each at most once, and only where the text uses it.
 * Throws FormatError `token-id-beyond-embedding` or `position-beyond-embedding`.
 */
export async function embedTokens(
  model: Model,
  weights: WeightReader,
  states: HiddenStates,
  options: EmbedOptions,
): Promise<void> {
  const { hiddenSize } = states;
  const { ids, positions } = flatten(states);
  const positionRows = await loadPositions(model, weights, states, options.path);
  const order = Uint32Array.from(ids.keys()).sort((a, b) => ids[a] - ids[b] || a - b);
  const rowsInTable = weights.info(model.tokenEmbedding)?.shape[0] ?? model.shape.vocabSize;
  const highest = ids[order[order.length - 1]];
  if (highest >= rowsInTable) {
    throw new FormatError(
      options.path,
      'token-id-beyond-embedding',
      `the tokenizer gives token id ${highest}, but "${model.tokenEmbedding}" has ${rowsInTable} rows`,
    );
  }

  const maxRows = Math.max(1, Math.floor((options.chunkBytes ?? TABLE_CHUNK_BYTES) / (hiddenSize * 4)));
  const row = new Float32Array(hiddenSize);
  await states.fill(async (store) => {
    for (let i = 0; i < order.length; ) {
      const start = ids[order[i]];
      let next = i;
      while (next < order.length && ids[order[next]] < start + maxRows) next++;
      const table = await weights.loadRows(model.tokenEmbedding, start, ids[order[next - 1]] + 1);
      for (; i < next; i++) {
        const token = order[i];
        const from = (ids[token] - start) * hiddenSize;
        row.set(table.subarray(from, from + hiddenSize));
        if (positionRows) addRow(row, positionRows, positions[token] * hiddenSize);
        await store.write(token, row);
      }
      options.onProgress?.(i, order.length);
    }
  });
}

/** All windows one after the other: token ids, and each token's position in its window. */
function flatten(states: HiddenStates): { ids: Int32Array; positions: Int32Array } {
  const ids = new Int32Array(states.tokenCount);
  const positions = new Int32Array(states.tokenCount);
  let at = 0;
  for (const window of states.windows) {
    ids.set(window, at);
    for (let p = 0; p < window.length; p++) positions[at + p] = p;
    at += window.length;
  }
  return { ids, positions };
}

async function loadPositions(
  model: Model,
  weights: WeightReader,
  states: HiddenStates,
  path: string,
): Promise<Float32Array | undefined> {
  const name = model.positionEmbedding;
  if (name === undefined) return undefined;
  const longest = states.windows.reduce((most, window) => Math.max(most, window.length), 0);
  const available = weights.info(name)?.shape[0] ?? model.shape.contextLength;
  if (longest > available) {
    throw new FormatError(
      path,
      'position-beyond-embedding',
      `a window has ${longest} tokens, but "${name}" has ${available} rows`,
    );
  }
  return weights.loadRows(name, 0, longest);
}

function addRow(row: Float32Array, table: Float32Array, from: number): void {
  for (let i = 0; i < row.length; i++) row[i] += table[from + i];
}

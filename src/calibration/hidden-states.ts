/** The residual stream of all windows between two blocks, one row per real token; pads exist only inside a batch. */
import type { NdArray } from '../compute/engine.ts';
import type { Spool, StateStore } from './state-store.ts';

/** Consecutive windows that run together, right-padded to the longest. */
export interface WindowBatch {
  /** Index of the first window. */
  readonly firstWindow: number;
  /** Real tokens of each window. */
  readonly lengths: Int32Array;
  /** Longest of them: the sequence axis of the padded batch. */
  readonly sequence: number;
  /** Rows of the store the batch covers, pads excluded. */
  readonly rowStart: number;
  readonly rowEnd: number;
}

/** Windows in their order, so many that a padded batch has at most `maxTokens` tokens; a longer window runs alone. */
export function planBatches(windows: readonly Int32Array[], maxTokens: number): WindowBatch[] {
  const batches: WindowBatch[] = [];
  let rowStart = 0;
  for (let first = 0; first < windows.length; ) {
    let sequence = windows[first].length;
    let rowEnd = rowStart + windows[first].length;
    let end = first + 1;
    while (end < windows.length && Math.max(sequence, windows[end].length) * (end + 1 - first) <= maxTokens) {
      sequence = Math.max(sequence, windows[end].length);
      rowEnd += windows[end].length;
      end++;
    }
    const lengths = Int32Array.from(windows.slice(first, end), (window) => window.length);
    batches.push({ firstWindow: first, lengths, sequence, rowStart, rowEnd });
    rowStart = rowEnd;
    first = end;
  }
  return batches;
}

/** True when some window of the batch is shorter than the longest. */
export function isPadded(batch: WindowBatch): boolean {
  return batch.rowEnd - batch.rowStart !== batch.lengths.length * batch.sequence;
}

/** Real rows (rows, columns) -> (batch, sequence, columns) with zeros for pads. Without pads it is the same memory. */
export function padRows(batch: WindowBatch, rows: Float32Array, columns: number): Float32Array {
  if (!isPadded(batch)) return rows;
  const padded = new Float32Array(batch.lengths.length * batch.sequence * columns);
  let from = 0;
  for (let w = 0; w < batch.lengths.length; w++) {
    const size = batch.lengths[w] * columns;
    padded.set(rows.subarray(from, from + size), w * batch.sequence * columns);
    from += size;
  }
  return padded;
}

/** (batch, sequence, columns) -> real rows (rows, columns), moved to the front of the same memory. */
export function dropPads(batch: WindowBatch, padded: Float32Array, columns: number): Float32Array {
  const size = (batch.rowEnd - batch.rowStart) * columns;
  if (isPadded(batch)) {
    let to = 0;
    for (let w = 0; w < batch.lengths.length; w++) {
      const from = w * batch.sequence * columns;
      const length = batch.lengths[w] * columns;
      padded.copyWithin(to, from, from + length);
      to += length;
    }
  }
  return padded.subarray(0, size);
}

/** One window's rows after the last block. */
export interface HiddenWindow {
  readonly windowIndex: number;
  /** Tokens of the window. */
  readonly rowCount: number;
  /** (rowCount, hiddenSize); read-only. */
  readonly hidden: Float32Array;
}

/** Hidden states of all windows, replaced batch by batch as they move through the blocks. */
export class HiddenStates implements AsyncDisposable {
  readonly windows: readonly Int32Array[];
  readonly hiddenSize: number;
  /** Tokens of all windows, pads excluded. */
  readonly tokenCount: number;
  readonly batches: readonly WindowBatch[];
  /** Tokens of the longest window. */
  readonly longest: number;
  /** (tokenCount, hiddenSize), windows one after the other. */
  readonly store: StateStore;
  #condition: 'empty' | 'whole' | 'torn' = 'empty';

  /** @param batchTokens most tokens, pads included, that run at once */
  constructor(windows: readonly Int32Array[], hiddenSize: number, batchTokens: number, spool: Spool) {
    this.windows = windows;
    this.hiddenSize = hiddenSize;
    this.batches = planBatches(windows, batchTokens);
    this.longest = windows.reduce((most, window) => Math.max(most, window.length), 0);
    this.tokenCount = windows.reduce((sum, window) => sum + window.length, 0);
    this.store = spool.allocate(this.tokenCount, hiddenSize);
  }

  /** The batch as a block takes it: `hidden` (batch, sequence, hiddenSize) and `lengths` (batch). */
  async feeds(batch: WindowBatch): Promise<{ hidden: NdArray; lengths: NdArray }> {
    this.#assertWhole();
    const { hiddenSize } = this;
    const rows = await this.store.read(batch.rowStart, batch.rowEnd);
    const count = batch.lengths.length;
    return {
      hidden: { dtype: 'F32', shape: [count, batch.sequence, hiddenSize], data: padRows(batch, rows, hiddenSize) },
      lengths: { dtype: 'I32', shape: [count], data: batch.lengths },
    };
  }

  /** Lets `write` put the embeddings of all tokens into the store; from then on, and not before, there are states. */
  async fill(write: (store: StateStore) => Promise<void>): Promise<void> {
    this.#condition = 'empty';
    await write(this.store);
    this.#condition = 'whole';
  }

  /** Takes over the states of another run, whose tokens begin with these windows' tokens. */
  async copy(other: HiddenStates): Promise<void> {
    other.#assertWhole();
    await this.fill(async (store) => {
      for (const { rowStart, rowEnd } of this.batches) await store.write(rowStart, await other.store.read(rowStart, rowEnd));
    });
  }

  /**
   * Replaces the states of every batch in place by what `move` makes of them (real rows, pads dropped). When `move` throws after
   * some batches have moved, the states are of two depths: they are then unusable until they are filled again.
   */
  async replace(move: (batch: WindowBatch) => Promise<Float32Array>): Promise<void> {
    this.#assertWhole();
    let written = false;
    try {
      for (const batch of this.batches) {
        const rows = await move(batch);
        written = true;
        await this.store.write(batch.rowStart, rows);
      }
    } catch (error) {
      if (written) this.#condition = 'torn';
      throw error;
    }
  }

  /** The states, a window at a time, in order. */
  async *perWindow(): AsyncGenerator<HiddenWindow> {
    this.#assertWhole();
    let row = 0;
    for (let windowIndex = 0; windowIndex < this.windows.length; windowIndex++) {
      const rowCount = this.windows[windowIndex].length;
      yield { windowIndex, rowCount, hidden: await this.store.read(row, row + rowCount) };
      row += rowCount;
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.store[Symbol.asyncDispose]();
  }

  #assertWhole(): void {
    if (this.#condition === 'empty') throw new Error('there are no hidden states yet: start with the embeddings');
    if (this.#condition === 'torn')
      throw new Error('a pass over the hidden states failed half-way: start again from the embeddings');
  }
}

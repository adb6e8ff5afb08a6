/** Ranks of the magnitudes within each row: 0 is the smallest. Of equal magnitudes the one that comes first ranks highest (merging.md 1.1). */
const BUCKETS = 256;

export class RowRanks {
  readonly #columns: number;
  #order: Uint32Array;
  #sorted: Uint32Array;
  readonly #starts = new Uint32Array(BUCKETS);

  constructor(columns: number) {
    this.#columns = columns;
    this.#order = new Uint32Array(columns);
    this.#sorted = new Uint32Array(columns);
  }

  /** Writes the ranks of the row that starts at `from` to the same places of `out`. @param bits float32 patterns */
  write(bits: Int32Array, from: number, out: Uint32Array): void {
    const columns = this.#columns;
    // A stable sort by digits, from the lowest, that starts in reverse order: of equals the last comes out first.
    for (let i = 0; i < columns; i++) this.#order[i] = columns - 1 - i;
    for (let shift = 0; shift < 32; shift += 8) this.#sortByDigit(bits, from, shift);
    for (let rank = 0; rank < columns; rank++) out[from + this.#order[rank]] = rank;
  }

  #sortByDigit(bits: Int32Array, from: number, shift: number): void {
    const order = this.#order;
    const sorted = this.#sorted;
    const starts = this.#starts;
    const mask = shift === 24 ? 0x7f : 0xff; // the sign is no part of the magnitude
    starts.fill(0);
    for (let i = 0; i < order.length; i++) starts[(bits[from + i] >>> shift) & mask]++;
    let start = 0;
    for (let digit = 0; digit < BUCKETS; digit++) {
      const size = starts[digit];
      if (size === order.length) return;
      starts[digit] = start;
      start += size;
    }
    for (let i = 0; i < order.length; i++) {
      const at = order[i];
      sorted[starts[(bits[from + at] >>> shift) & mask]++] = at;
    }
    this.#order = sorted;
    this.#sorted = order;
  }
}

/** Which bytes of a range have been written: each exactly once, in any order. */

interface Interval {
  readonly start: number;
  readonly end: number;
}

export class Coverage {
  readonly #length: number;
  /** Sorted, apart from each other, joined where they touch: one interval for consecutive writes. */
  readonly #written: Interval[] = [];

  constructor(length: number) {
    this.#length = length;
  }

  /** Takes `[start, end)`. Returns false, and takes nothing, when a byte of it is already taken. */
  claim(start: number, end: number): boolean {
    if (start === end) return true;
    let at = this.#written.findIndex((interval) => interval.end >= start);
    if (at === -1) at = this.#written.length;
    const before = this.#written[at]?.end === start ? this.#written[at] : undefined;
    const next = before === undefined ? at : at + 1;
    const after = this.#written[next];
    if (after !== undefined && after.start < end) return false;
    const joinsAfter = after?.start === end;
    const joined = { start: before?.start ?? start, end: joinsAfter ? after.end : end };
    this.#written.splice(at, (before === undefined ? 0 : 1) + (joinsAfter ? 1 : 0), joined);
    return true;
  }

  /** The first stretch that is not written, or undefined when all is. */
  gap(): Interval | undefined {
    const [first, second] = this.#written;
    if (this.#length === 0 || (first?.start === 0 && first.end === this.#length)) return undefined;
    if (first === undefined) return { start: 0, end: this.#length };
    return first.start > 0 ? { start: 0, end: first.start } : { start: first.end, end: second?.start ?? this.#length };
  }
}

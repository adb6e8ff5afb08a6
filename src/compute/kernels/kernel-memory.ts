/** Memory that WASM kernels and typed arrays share: lent to a piece of work, and a place for copies of arrays that lie elsewhere. */
import { roundUp } from './round-up.ts';
import { createSharedMemory, PAGE_BYTES } from './wasm.ts';

const STAGING_BYTES = 8 * 1024 * 1024;
/** Kernels write whole vectors: this much behind the end of an array is theirs. */
const PADDING = 64;
/** Longer arrays are not made here: this memory never shrinks. */
const LONGEST = 1 << 20;

export class KernelMemory {
  // Shared, although by nobody: such memory grows without its views becoming stale.
  readonly memory = createSharedMemory();
  /** A buffer for each size the memory has had: views of all of them are of this memory. */
  readonly #buffers = new Set<unknown>();
  #next = 0;
  /** First byte that is lent. */
  #lentAt = 0;
  #scopes = 0;
  #staging = 0;
  #staged = 0;

  /** @param start first byte that the kernels leave free */
  begin(start: number): void {
    this.#next = start;
    this.#staging = this.reserve(STAGING_BYTES);
  }

  /** Begins a piece of work. What is lent during it goes back when it ends, or with the last of those that overlap. */
  open(): Disposable {
    if (this.#scopes === 0) this.#lentAt = this.#next;
    this.#scopes++;
    return {
      [Symbol.dispose]: () => {
        this.#scopes--;
        if (this.#scopes === 0) this.#next = this.#lentAt;
      },
    };
  }

  /** Memory that kernels use where it lies, not cleared; ordinary memory for a long array, or outside any piece of work. */
  floats(length: number): Float32Array {
    if (this.#scopes === 0 || length > LONGEST) return new Float32Array(length);
    const at = this.reserve(4 * length);
    return new Float32Array(this.memory.buffer, at, length);
  }

  /** Counters at zero. */
  counters(length: number): Uint32Array {
    if (this.#scopes === 0) throw new Error('counters are lent only during a piece of work');
    const at = this.reserve(4 * length);
    return new Uint32Array(this.memory.buffer, at, length).fill(0);
  }

  /** Elements of a piece such that `arrays` of them can be copied in, at most `most`. */
  pieceLength(arrays: number, most: number): number {
    return Math.min(most, Math.floor(STAGING_BYTES / arrays / 8) & ~15);
  }

  /** Forgets the copies of the last piece. */
  restage(): void {
    this.#staged = 0;
  }

  /** Address of elements: where they lie, or of a copy. */
  input(array: Float32Array | Uint16Array, from: number, count: number): number {
    if (this.#buffers.has(array.buffer)) return array.byteOffset + array.BYTES_PER_ELEMENT * from;
    const at = this.stage(array.BYTES_PER_ELEMENT * count);
    this.#view(array, at, count).set(array.subarray(from, from + count));
    return at;
  }

  /** Where results go: the array itself, or a place from which `finish` takes them there. @param replaced what is there is read first */
  room(array: Float32Array | Uint16Array, from: number, count: number, replaced = false): { at: number; finish(): void } {
    if (this.#buffers.has(array.buffer)) return { at: array.byteOffset + array.BYTES_PER_ELEMENT * from, finish: NOTHING };
    const at = replaced ? this.input(array, from, count) : this.stage(array.BYTES_PER_ELEMENT * count);
    return { at, finish: () => array.set(this.#view(array, at, count), from) };
  }

  /** Address of bytes for this piece. */
  stage(byteLength: number): number {
    const at = this.#staging + this.#staged;
    this.#staged += (byteLength + PADDING + 15) & ~15;
    return at;
  }

  /** Address of bytes that are never given back, or not before the piece of work ends. */
  reserve(byteLength: number): number {
    const at = roundUp(this.#next, 64);
    this.#next = at + byteLength + PADDING;
    const missing = this.#next - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / PAGE_BYTES));
    this.#buffers.add(this.memory.buffer);
    return at;
  }

  #view(like: Float32Array | Uint16Array, at: number, count: number): Float32Array | Uint16Array {
    return like instanceof Float32Array
      ? new Float32Array(this.memory.buffer, at, count)
      : new Uint16Array(this.memory.buffer, at, count);
  }
}

const NOTHING = (): void => {};

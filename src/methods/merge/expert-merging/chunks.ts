/** How a tensor is cut into chunks with a coefficient each (merging.md 6.6). */

/** Chunk s is elements `[bounds[s], bounds[s + 1])` of the flat (out, in) tensor; chunks at the end may be empty. */
export type ChunkBounds = readonly number[];

/** Chunks of `ceil(elements / count)` elements wherever rows end, as published: the last ones may be short or empty. */
export function flatChunks(elements: number, count: number): ChunkBounds {
  const size = Math.ceil(elements / count);
  return Array.from({ length: count + 1 }, (_, s) => Math.min(s * size, elements));
}

/**
 * Chunks of whole rows, as even as may be. @param unit rows that stay together: those of one head for q, k and v
 * @param count at most `rows / unit`
 */
export function rowChunks(rows: number, columns: number, count: number, unit = 1): ChunkBounds {
  const units = Math.floor(rows / unit);
  return Array.from({ length: count + 1 }, (_, s) => (s === count ? rows : Math.floor((s * units) / count) * unit) * columns);
}

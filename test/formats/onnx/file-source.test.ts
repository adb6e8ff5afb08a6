/** Reading by position: how a long range is asked for. */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it, vi } from 'vitest';
import { FileSource } from '../../../formats/onnx/file-source.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'pcomp-file-source-'));
});
afterEach(() => {
  vi.restoreAllMocks();
  rmSync(folder, { recursive: true });
});

it('reads a long range in pieces, because one call of 2 GiB ends the process', async () => {
  const path = join(folder, 'long');
  const byteLength = 65 * 2 ** 20;
  writeFileSync(path, Uint8Array.of(1, 2, 3));
  truncateSync(path, byteLength);
  const handle = await open(path);
  const read = vi.spyOn(Object.getPrototypeOf(handle) as FileHandle, 'read');
  await handle.close();

  const source = await FileSource.open(path);
  const bytes = await source?.read(1, byteLength);
  expect([bytes?.byteLength, ...(bytes?.subarray(0, 3) ?? [])]).toEqual([byteLength - 1, 2, 3, 0]);
  const lengths = read.mock.calls.map((call) => (call as unknown as number[])[2]);
  expect(lengths.length).toBeGreaterThan(1);
  expect(Math.max(...lengths)).toBeLessThanOrEqual(64 * 2 ** 20);
});

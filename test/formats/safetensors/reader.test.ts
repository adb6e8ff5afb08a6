import { appendFileSync, existsSync, truncateSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { toFloat32 } from '../../../formats/dtype.ts';
import type { RandomAccessFile } from '../../../formats/safetensors/file.ts';
import { openSafetensors, readSafetensors } from '../../../formats/safetensors/reader.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { entry, safetensorsBytes } from '../malformed/safetensors.ts';

const scratch = scratchFolder();
const labBase = join(process.env['PCOMP_TEST_DATA'] ?? '../shared/data', 'lab/base/model.safetensors');

/** A file in memory that writes down what was read of it. */
class CountingFile implements RandomAccessFile {
  readonly path = 'counted.safetensors';
  readonly byteLength: number;
  readonly reads: [start: number, end: number][] = [];
  closed = false;
  readonly #bytes: Uint8Array;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.byteLength = bytes.byteLength;
  }

  async read(start: number, end: number): Promise<Uint8Array> {
    this.reads.push([start, end]);
    return this.#bytes.slice(start, end);
  }

  async close(): Promise<void> {
    this.closed = true;
  }
}

/** Tensors "small" (2, U8) and "large" (1000, 1000) F32, whose rows hold their own number. */
function twoTensors(): { bytes: Uint8Array; dataStart: number } {
  const header = `{"__metadata__":{"format":"pt"},"small":${entry('U8', '[2]', '[0,2]')},"large":${entry('F32', '[1000,1000]', '[2,4000002]')}}`;
  const bytes = safetensorsBytes(header, 4_000_002);
  const dataStart = bytes.byteLength - 4_000_002;
  bytes.set([7, 9], dataStart);
  const values = Float32Array.from({ length: 1_000_000 }, (_, i) => Math.floor(i / 1000));
  bytes.set(new Uint8Array(values.buffer), dataStart + 2);
  return { bytes, dataStart };
}

describe('reading', () => {
  it('touches the header when opened, and of the data only what is asked for', async () => {
    const { bytes, dataStart } = twoTensors();
    const file = new CountingFile(bytes);
    await using source = await readSafetensors(file);
    for (const [, end] of file.reads) expect(end).toBeLessThanOrEqual(512);

    file.reads.length = 0;
    expect((await source.read('small')).data).toEqual(Uint8Array.of(7, 9));
    expect(file.reads).toEqual([[dataStart, dataStart + 2]]);

    file.reads.length = 0;
    const rows = await source.readRows('large', 998, 1000);
    expect(file.reads).toEqual([[dataStart + 2 + 998 * 4000, dataStart + 2 + 1000 * 4000]]);
    expect(rows).toMatchObject({ name: 'large', dtype: 'F32', shape: [2, 1000], byteLength: 8000 });
    expect(new Set(toFloat32('F32', rows.data))).toEqual(new Set([998, 999]));
  });

  it('knows tensors, metadata and files without reading data', async () => {
    const path = scratch.write('two.safetensors', twoTensors().bytes);
    await using source = await openSafetensors(path);
    expect([...source.tensors.values()]).toMatchObject([
      { name: 'small', dtype: 'U8', shape: [2], byteLength: 2 },
      { name: 'large', dtype: 'F32', shape: [1000, 1000], byteLength: 4_000_000 },
    ]);
    expect([...source.metadata]).toEqual([['format', 'pt']]);
    expect(source.files).toEqual([{ path, byteLength: twoTensors().bytes.byteLength }]);
    expect(source.path).toBe(path);
  });

  it('refuses a name that is not there', async () => {
    await using source = await readSafetensors(new CountingFile(twoTensors().bytes));
    await expect(source.read('Large')).rejects.toMatchObject({ rule: 'tensor-missing' });
    await expect(source.readRows('Large', 0, 1)).rejects.toMatchObject({ rule: 'tensor-missing' });
  });

  it('refuses rows outside of the tensor', async () => {
    const header = `{"scalar":${entry('U8', '[]', '[0,1]')},"four":${entry('U8', '[4]', '[1,5]')}}`;
    await using source = await readSafetensors(new CountingFile(safetensorsBytes(header, 5)));
    for (const [start, end] of [
      [-1, 1],
      [2, 5],
      [3, 2],
      [0.5, 1],
      [0, Number.NaN],
    ] as const) {
      await expect(source.readRows('four', start, end)).rejects.toThrow(RangeError);
    }
    await expect(source.readRows('scalar', 0, 1)).rejects.toThrow(RangeError);
    expect(await source.readRows('four', 4, 4)).toMatchObject({ shape: [0], byteLength: 0 });
  });

  it('notices a file that shrinks while it is open', async () => {
    const path = scratch.write('shrinking.safetensors', twoTensors().bytes);
    await using source = await openSafetensors(path);
    truncateSync(path, 1_000_000);
    await expect(source.read('large')).rejects.toMatchObject({ rule: 'file-changed', path });
    appendFileSync(path, new Uint8Array(4_000_000));
    expect((await source.read('large')).data).toHaveLength(4_000_000);
  });

  it('closes a file whose header it refuses', async () => {
    const file = new CountingFile(safetensorsBytes('{}', 1));
    await expect(readSafetensors(file)).rejects.toMatchObject({ rule: 'data-trailing' });
    expect(file.closed).toBe(true);
  });

  it('says so when there is no file, or none that can be read', async () => {
    await expect(openSafetensors(join(scratch.path, 'absent.safetensors'))).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
    await expect(openSafetensors(scratch.path)).rejects.toMatchObject({ code: 'FILE_UNREADABLE' });
  });

  it.skipIf(!existsSync(labBase))('reads a trained model (skipped without PCOMP_TEST_DATA)', async () => {
    await using source = await openSafetensors(labBase);
    const parameters = [...source.tensors.values()].reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
    expect(parameters).toBe(5_246_208);
    const whole = await source.read('model.embed_tokens.weight');
    expect(whole).toMatchObject({ dtype: 'BF16', shape: [2048, 256], byteLength: 1_048_576 });
    const values = toFloat32('BF16', whole.data);
    expect(values.every((value) => Math.abs(value) < 10)).toBe(true);
    const rows = await source.readRows('model.embed_tokens.weight', 100, 103);
    expect(toFloat32('BF16', rows.data)).toEqual(values.slice(100 * 256, 103 * 256));
  });
});

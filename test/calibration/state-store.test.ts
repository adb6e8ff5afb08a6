/** Rows of floats that are partly in RAM and partly in a file. */
import { mkdtempSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { diskError, Spool } from '../../src/calibration/state-store.ts';
import { EnvironmentError } from '../../src/errors.ts';

let folder = '';
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'state-store-test-'));
});
afterAll(() => rmSync(folder, { recursive: true }));

const COLUMNS = 3;
const ROW_BYTES = COLUMNS * 4;
const rowsFrom = (first: number, count: number) => Float32Array.from({ length: count * COLUMNS }, (_, i) => first * COLUMNS + i);

/** Where a link points; nowhere when it is gone. */
function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch {
    return '';
  }
}

describe('a store', () => {
  it('puts no more into RAM than one typed array holds, whatever the bound', async () => {
    await using spool = new Spool({ ramBytes: 2 ** 60, folder });
    // 2^40 bytes a row: not one fits, so that nothing of that size is made.
    await using store = spool.allocate(2, 2 ** 38);
    expect(store.ramRows).toBe(0);
  });

  it('gives back what was written, wherever RAM ends and whatever the order', async () => {
    const operation = fc.record({ write: fc.boolean(), start: fc.nat(19), count: fc.integer({ min: 1, max: 20 }) });
    await fc.assert(
      fc.asyncProperty(fc.nat(20), fc.array(operation, { maxLength: 12 }), async (ramRows, operations) => {
        await using spool = new Spool({ ramBytes: ramRows * ROW_BYTES + 5, folder });
        await using store = spool.allocate(20, COLUMNS);
        expect(store.ramRows).toBe(ramRows);
        const twin = new Float32Array(20 * COLUMNS);
        let stamp = 1;
        for (const { write, start, count } of operations) {
          const end = Math.min(20, start + count);
          if (write) {
            const data = rowsFrom(1000 * stamp++, end - start);
            await store.write(start, data);
            twin.set(data, start * COLUMNS);
          }
          expect([...(await store.read(start, end))]).toEqual([...twin.subarray(start * COLUMNS, end * COLUMNS)]);
        }
      }),
      { numRuns: 60 },
    );
  });

  it('appends row after row, over the end of RAM', async () => {
    await using spool = new Spool({ ramBytes: 4 * ROW_BYTES, folder });
    await using store = spool.allocate(9, COLUMNS);
    for (const [first, count] of [
      [0, 3],
      [3, 3],
      [6, 3],
    ]) {
      await store.append(rowsFrom(first, count));
    }
    expect([...(await store.read(0, 9))]).toEqual([...rowsFrom(0, 9)]);
  });

  it('refuses rows it does not have, and work after its end', async () => {
    await using spool = new Spool({ folder });
    const store = spool.allocate(2, COLUMNS);
    await expect(store.read(0, 3)).rejects.toThrow(RangeError);
    await expect(store.write(1, rowsFrom(0, 2))).rejects.toThrow(RangeError);
    await expect(store.write(0, new Float32Array(COLUMNS + 1))).rejects.toThrow(RangeError);
    await store[Symbol.asyncDispose]();
    await store[Symbol.asyncDispose]();
    await expect(store.read(0, 1)).rejects.toThrow(/disposed/);
  });
});

describe('a spool', () => {
  it('shares its RAM among its stores and takes it back', async () => {
    await using spool = new Spool({ ramBytes: 10 * ROW_BYTES, folder });
    const first = spool.allocate(8, COLUMNS);
    const second = spool.allocate(8, COLUMNS);
    expect([first.ramRows, second.ramRows]).toEqual([8, 2]);
    await first[Symbol.asyncDispose]();
    const third = spool.allocate(20, COLUMNS);
    expect(third.ramRows).toBe(8);
  });

  it('touches the disk only when RAM is not enough, and leaves nothing behind', async () => {
    const own = mkdtempSync(join(folder, 'own-'));
    {
      await using spool = new Spool({ ramBytes: 2 * ROW_BYTES, folder: own });
      await using store = spool.allocate(3, COLUMNS);
      await store.append(rowsFrom(0, 2));
      expect(readdirSync(own)).toEqual([]);
      await store.append(rowsFrom(2, 1));
      expect(readdirSync(own).length).toBe(1);
      expect([...(await store.read(0, 3))]).toEqual([...rowsFrom(0, 3)]);
    }
    expect(readdirSync(own)).toEqual([]);
  });

  it('ends its stores with itself, so that none keeps a file open', async () => {
    const own = mkdtempSync(join(folder, 'own-'));
    // Links to what is open; a file without a name still has the path it had.
    const open = () => readdirSync('/proc/self/fd').filter((fd) => linkOf(`/proc/self/fd/${fd}`).startsWith(own)).length;
    const spool = new Spool({ ramBytes: 0, folder: own });
    const store = spool.allocate(3, COLUMNS);
    await store.append(rowsFrom(0, 3));
    if (process.platform === 'linux') expect(open()).toBe(1);
    await spool[Symbol.asyncDispose]();
    if (process.platform === 'linux') expect(open()).toBe(0);
    await expect(store.read(0, 1)).rejects.toThrow(/disposed/);
  });

  it.skipIf(process.platform === 'win32')(
    'keeps its rows in files without a name, which a killed process does not leave behind',
    async () => {
      const own = mkdtempSync(join(folder, 'own-'));
      await using spool = new Spool({ ramBytes: 0, folder: own });
      await using store = spool.allocate(3, COLUMNS);
      await store.append(rowsFrom(0, 3));
      expect(readdirSync(own, { recursive: true }).length).toBe(1);
      expect([...(await store.read(0, 3))]).toEqual([...rowsFrom(0, 3)]);
    },
  );

  it('says in one line that its folder cannot be written', async () => {
    const spool = new Spool({ ramBytes: 0, folder: join(folder, 'missing') });
    const failure = spool.allocate(1, COLUMNS).append(rowsFrom(0, 1));
    await expect(failure).rejects.toThrow(EnvironmentError);
    await expect(failure).rejects.toThrow(/TMPDIR/);
    await spool[Symbol.asyncDispose]();
  });
});

it.each(['ENOSPC', 'EDQUOT'])('%s is reported as a full disk', (code) => {
  const error = diskError(Object.assign(new Error(code), { code }), '/tmp/x');
  expect(error).toMatchObject({ code: 'DISK_FULL' });
  expect(String(error)).toContain('/tmp/x: no space left');
});

it('an error of the program is not blamed on the disk', () => {
  const bug = new TypeError('bug');
  expect(diskError(bug, '/tmp/x')).toBe(bug);
});

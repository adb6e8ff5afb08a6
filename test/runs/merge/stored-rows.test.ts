import { expect, it } from 'vitest';
import { StoredRows } from '../../../src/runs/merge/read.ts';

it('rows that a tensor does not have are an error, not the bytes behind it', () => {
  const tensor = {
    input: 0,
    name: 'wpe.weight',
    dtype: 'F32',
    shape: [4, 3],
    byteLength: 48,
    path: 'none',
    position: 0,
  } as const;
  const rows = new StoredRows(() => expect.unreachable('nothing is opened'), tensor, 3);
  expect(() => rows.rows(3, 5)).toThrow(/rows 3\.\.5 of "wpe\.weight", which has 4 rows of 3/);
  expect(() => rows.rows(-1, 1)).toThrow(RangeError);
});

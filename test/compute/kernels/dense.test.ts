/** Memory of the dense kernels beyond 2 GiB, where a signed 32-bit number ends. */
import { expect, it } from 'vitest';
import { denseKernels } from '../../../src/compute/kernels/dense.ts';
import { LARGEST } from '../../../src/compute/linalg/tridiagonal.ts';
import { UnsupportedError } from '../../../src/errors.ts';

it('arrays are beside one another, wherever the memory ends', () => {
  const { arrays } = denseKernels([2 ** 28 + 4, 3, 5]);
  arrays.forEach((array, i) => {
    array[0] = i + 1;
    array[array.length - 1] = i + 1;
  });
  expect(arrays.map(({ length }) => length)).toEqual([2 ** 28 + 4, 3, 5]);
  expect(arrays.map((array) => [array[0], array.at(-1)])).toEqual([1, 2, 3].map((value) => [value, value]));
});

it('the largest matrix fits, and one that does not is refused', () => {
  const of = (n: number) => denseKernels([n * (8 * Math.ceil(n / 8) + 8), n, n, n, n]);
  expect(of(LARGEST).arrays[4].length).toBe(LARGEST);
  expect(() => of(LARGEST + 1)).toThrow(UnsupportedError);
});

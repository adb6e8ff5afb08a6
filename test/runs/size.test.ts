import { describe, expect, it } from 'vitest';
import { formatSize, parseSize } from '../../src/runs/size.ts';

describe('sizes', () => {
  it.each([
    ['120', 120],
    ['1kB', 1000],
    ['1.5 MB', 1_500_000],
    ['2GB', 2e9],
    ['1KiB', 1024],
    ['0.5MiB', 524_288],
    ['.25gib', 268_435_456],
  ])('reads %s', (text, bytes) => {
    expect(parseSize('--size', text)).toBe(bytes);
  });

  it.each(['', 'MB', '-1MB', '1XB', '1e3', '1,5MB', '9999999TB'])('refuses "%s", naming the flag', (text) => {
    expect(() => parseSize('--size', text)).toThrow(/^--size /);
  });

  it('writes three significant digits', () => {
    expect([0, 999, 1000, 1_234_567, 999_600, 5e9].map(formatSize)).toEqual([
      '0 B',
      '999 B',
      '1.00 kB',
      '1.23 MB',
      '1.00 MB',
      '5.00 GB',
    ]);
  });
});

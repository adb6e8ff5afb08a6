/** Sizes as people write them: `120MB`, `1.5GiB`, plain bytes. One parser for every flag. */
import { RecipeError } from '../errors.ts';

const UNITS: Readonly<Record<string, number>> = {
  '': 1,
  b: 1,
  kb: 1e3,
  mb: 1e6,
  gb: 1e9,
  tb: 1e12,
  kib: 2 ** 10,
  mib: 2 ** 20,
  gib: 2 ** 30,
  tib: 2 ** 40,
};

/** Parses a size into whole bytes; kB MB GB are decimal, KiB MiB GiB binary, a plain number is bytes. */
export function parseSize(flag: string, text: string): number {
  const match = /^\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*$/i.exec(text);
  const unit = match ? UNITS[match[2].toLowerCase()] : undefined;
  if (match === null || unit === undefined) {
    throw new RecipeError(`${flag} ${text}: a size is a number with kB, MB, GB, KiB, MiB or GiB, or plain bytes, e.g. 120MB`);
  }
  const bytes = Math.floor(Number(match[1]) * unit);
  if (!Number.isSafeInteger(bytes)) throw new RecipeError(`${flag} ${text}: ${bytes} bytes is more than this tool counts`);
  return bytes;
}

/** Bytes for people, three significant digits, decimal units. */
export function formatSize(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  return `${unit === 0 ? value : value.toPrecision(3)} ${units[unit]}`;
}

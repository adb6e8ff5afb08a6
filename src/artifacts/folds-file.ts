/** `folds.json`: the orders that rows and columns of an artifact's layers were written in, for whoever needs them as the original had them. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { FormatError } from '../errors.ts';
import type { TransformShape } from '../methods/quantize/input-transform.ts';
import type { ColumnFold } from './folds.ts';
import { writeJson } from './manifest.ts';
import { errorCode } from './process-lock.ts';
import type { QuantizedModule } from './quant-metadata.ts';
import { checkedOrder } from './stored-order.ts';

export const FOLDS_FILE = 'folds.json';

/** Writes the folds of an artifact beside its weights; nothing where there are none. */
export async function writeFolds(folder: string, folds: readonly ColumnFold[]): Promise<void> {
  if (folds.length === 0) return;
  await writeJson(join(folder, FOLDS_FILE), { format: 1, folds: folds.map((fold) => ({ ...fold, order: [...fold.order] })) });
}

/** Whether an input's columns lie in an order that the file does not tell. */
function isFolded(transform: TransformShape | undefined): boolean {
  return transform !== undefined && !transform.permuted && !transform.signed;
}

/** Folds of a file with these modules, by the `folds.json` in its folder. `unknown`: a module whose input is folded in an order that is not told there. */
export async function readFolds(
  folder: string,
  modules: ReadonlyMap<string, QuantizedModule>,
): Promise<{ readonly folds: readonly ColumnFold[]; readonly unknown?: string }> {
  const folded = [...modules].filter(([, { transform }]) => isFolded(transform)).map(([name]) => name);
  if (folded.length === 0) return { folds: [] };
  const path = join(folder, FOLDS_FILE);
  const told = await parseFolds(path);
  const folds = told.filter(({ consumers }) => consumers.some((name) => folded.includes(name)));
  for (const { producers, consumers, order } of folds) {
    const wanted = [
      ...producers.map((name) => modules.get(name)?.outFeatures),
      ...consumers.map((name) => modules.get(name)?.inFeatures),
    ];
    const other = wanted.find((count) => count !== order.length);
    if (wanted.every((count) => count === order.length)) continue;
    throw new FormatError(
      path,
      'folds',
      `orders ${order.length} columns of "${consumers[0]}", the weights have ${other ?? 'no such layer'}`,
    );
  }
  const known = new Set(folds.flatMap(({ consumers }) => consumers));
  const unknown = folded.find((name) => !known.has(name));
  return { folds, ...(unknown !== undefined && { unknown }) };
}

async function parseFolds(path: string): Promise<ColumnFold[]> {
  let content: string;
  try {
    content = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return [];
    throw error;
  }
  const fail = (why: string, cause?: unknown) => new FormatError(path, 'folds', why, { cause });
  let parsed: unknown;
  try {
    parsed = JSON.parse(content);
  } catch (cause) {
    throw fail('is not JSON', cause);
  }
  const { format, folds } = (parsed ?? {}) as { format?: unknown; folds?: unknown };
  if (format !== 1 || !Array.isArray(folds)) throw fail('is no list of folds of format 1');
  const names = (value: unknown): value is string[] =>
    Array.isArray(value) && value.length > 0 && value.every((name) => typeof name === 'string');
  return folds.map((fold: Partial<Record<keyof ColumnFold, unknown>>) => {
    const { producers, consumers, order } = fold;
    if (!names(producers) || !names(consumers) || !Array.isArray(order))
      throw fail('has a fold without producers, consumers and order');
    return {
      producers,
      consumers,
      order: checkedOrder(path, `the order of "${consumers[0]}"`, Int32Array.from(order), order.length),
    };
  });
}

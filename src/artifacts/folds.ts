/**
 * Orders of columns that cost no operation at run time: where nothing but element-wise functions lies between two layers, the rows of the first are
 * written in the order that the second wants its columns in. The model is the same function; `folds.json` keeps the orders for whoever needs the
 * layers as the original had them.
 */
import type { QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import type { Fold, Model } from '../model/model.ts';
import type { QuantizedGrid } from './planes.ts';
import type { QuantizedSource } from './quantized-source.ts';
import type { StoredModules } from './stored-modules.ts';
import { isIdentity } from './stored-order.ts';

/** A fold that was made. */
export interface ColumnFold {
  /** Layers whose rows lie in another order: row k is the original's row `order[k]`. */
  readonly producers: readonly string[];
  /** Layers whose columns do: column k is the original's column `order[k]`. */
  readonly consumers: readonly string[];
  readonly order: Uint32Array;
}

/** The folds that are possible when these modules are quantized; what stays float stays as it is. */
function possibleFolds(model: Pick<Model, 'blocks'>, isQuantized: (module: string) => boolean): Fold[] {
  return model.blocks.flatMap(({ folds }) => folds.filter(({ producers }) => producers.every(isQuantized)));
}

/** Inputs whose columns may be sorted at no cost, when these modules are quantized. */
export function freeInputs(model: Pick<Model, 'blocks'>, quantized: ReadonlySet<string>): ReadonlySet<string> {
  return new Set(possibleFolds(model, (name) => quantized.has(name)).map(({ input }) => input));
}

/** The sorted inputs whose order can be folded. @param suits whether a layout holds a module, folded as it would be */
export async function findFolds(
  model: Model,
  quantized: QuantizedSource,
  suits: (grid: QuantizedGrid) => boolean = () => true,
): Promise<ColumnFold[]> {
  const folds: ColumnFold[] = [];
  for (const { input, producers } of possibleFolds(model, (name) => quantized.has(name))) {
    const readers = model.blocks.flatMap(({ sites }) => sites.filter((site) => site.input === input));
    const consumers = readers.map(({ name }) => name);
    if (!consumers.every((name) => quantized.has(name))) continue;
    const { transform } = await quantized.readGrid(consumers[0]);
    if (!transform?.order || isIdentity(transform)) continue;
    let suitable = true;
    for (const name of producers) suitable &&= suits(await quantized.readGrid(name));
    for (const name of consumers) suitable &&= suits(withoutOrder(await quantized.readGrid(name)));
    if (suitable) folds.push({ producers, consumers, order: transform.order });
  }
  return folds;
}

/** Rows of folded layers by module. */
export function rowOrders(folds: readonly ColumnFold[]): Map<string, Uint32Array> {
  return new Map(folds.flatMap(({ producers, order }) => producers.map((name) => [name, order] as const)));
}

/** Columns of folded layers by module. */
export function columnOrders(folds: readonly ColumnFold[]): Map<string, Uint32Array> {
  return new Map(folds.flatMap(({ consumers, order }) => consumers.map((name) => [name, order] as const)));
}

/** Linears with folds made: what a file holds. */
export class FoldedSource implements QuantizedSource {
  readonly #source: QuantizedSource;
  readonly #rows: ReadonlyMap<string, Uint32Array>;
  readonly #columns: ReadonlyMap<string, Uint32Array>;

  constructor(source: QuantizedSource, folds: readonly ColumnFold[]) {
    this.#source = source;
    this.#rows = rowOrders(folds);
    this.#columns = columnOrders(folds);
  }

  has(name: string): boolean {
    return this.#source.has(name);
  }

  async readGrid(name: string): Promise<QuantizedGrid> {
    return this.#fold(name, await this.#source.readGrid(name));
  }

  async read(name: string): Promise<QuantizedLinear> {
    const q = await this.#source.read(name);
    const rows = this.#rows.get(name);
    const codes = rows ? takeRows(q.codes, rows, q.inFeatures) : q.codes;
    return { ...this.#fold(name, q), codes };
  }

  #fold(name: string, grid: QuantizedGrid): QuantizedGrid {
    const rows = this.#rows.get(name);
    const columns = this.#columns.get(name);
    let folded = grid;
    if (rows) folded = withRows(folded, rows);
    if (columns) {
      folded = withoutOrder(folded);
      const { lowRank, inFeatures } = folded;
      if (lowRank) folded = { ...folded, lowRank: { ...lowRank, loraA: takeColumns(lowRank.loraA, columns, inFeatures) } };
    }
    return folded;
  }
}

function withoutOrder(grid: QuantizedGrid): QuantizedGrid {
  if (!grid.transform) return grid;
  const { order: _, ...rest } = grid.transform;
  return { ...grid, transform: rest };
}

function withRows(grid: QuantizedGrid, order: Uint32Array): QuantizedGrid {
  const { scales, zeroPoints, offsets, bias, lowRank, bits } = grid;
  const groups = bits.length;
  return {
    ...grid,
    scales: takeRows(scales, order, groups),
    zeroPoints: takeRows(zeroPoints, order, groups),
    ...(offsets && { offsets: takeRows(offsets, order, groups) }),
    ...(bias && { bias: takeRows(bias, order, 1) }),
    ...(lowRank && { lowRank: { ...lowRank, loraB: takeRows(lowRank.loraB, order, lowRank.rank) } }),
  };
}

/** Row k of the result is row `order[k]`. */
export function takeRows<T extends Float32Array | Uint8Array>(values: T, order: Uint32Array, width: number): T {
  const taken = values.slice() as T;
  order.forEach((row, k) => {
    taken.set(values.subarray(row * width, (row + 1) * width), k * width);
  });
  return taken;
}

/** Column k of the result is column `order[k]`. */
export function takeColumns(values: Float32Array, order: Uint32Array, width: number): Float32Array {
  return Float32Array.from(values, (_, i) => values[i - (i % width) + order[i % width]]);
}

/** What undoes an order: `inverse[order[k]] = k`. */
export function inverseOf(order: Uint32Array): Uint32Array {
  const inverse = new Uint32Array(order.length);
  order.forEach((column, k) => {
    inverse[column] = k;
  });
  return inverse;
}

/** Decoded weights as the original has them. */
export function unfolded(modules: StoredModules, folds: readonly ColumnFold[]): StoredModules {
  const rows = rowOrders(folds);
  const columns = columnOrders(folds);
  return {
    ...modules,
    async decode(name) {
      let weight = await modules.decode(name);
      const { inFeatures } = modules.modules.get(name)!;
      const [row, column] = [rows.get(name), columns.get(name)];
      if (row) weight = takeRows(weight, inverseOf(row), inFeatures);
      return column ? takeColumns(weight, inverseOf(column), inFeatures) : weight;
    },
  };
}

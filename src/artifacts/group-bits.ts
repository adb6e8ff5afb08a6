/** What one group of columns of a layer takes at a width: the currency of budgets, exact but for padding at the ends of rows and files. */
import { groupStorage } from './accounting.ts';

/** What a budget counts: `code` the codes alone; a layout everything its files hold for them; `runtime` operands as onnxruntime holds them. */
export type BudgetUnit = 'code' | 'planes' | 'onnx' | 'onnx-plain' | 'runtime';

/** Smallest block of an ONNX operand: a short last group is filled up. */
const BLOCK = 32;

/** Whole bits of a group of `columns` columns and `rows` rows. */
export function groupBits(unit: BudgetUnit, rows: number, columns: number, bits: number): number {
  const filled = Math.ceil(columns / BLOCK) * BLOCK;
  switch (unit) {
    case 'code':
      return rows * columns * bits;
    case 'planes':
      return groupStorage('planes', rows, columns, bits).fileBits;
    case 'onnx':
    case 'onnx-plain':
      return groupStorage(unit, rows, filled, bits).fileBits;
    case 'runtime':
      return groupStorage('onnx', rows, filled, bits).runtimeBits;
    default:
      return unit satisfies never;
  }
}

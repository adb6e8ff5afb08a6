/** Node attributes, spelled short: `{ axis: int(1), epsilon: float(1e-5) }`. */
import type { Attribute } from '../../formats/onnx/model.ts';

export const int = (value: number): Attribute => ({ kind: 'int', value });
export const ints = (value: readonly number[]): Attribute => ({ kind: 'ints', value });
export const float = (value: number): Attribute => ({ kind: 'float', value });
export const text = (value: string): Attribute => ({ kind: 'string', value });

/** Builds an ONNX graph with typed op helpers; values carry dtype and (symbolic) shape. */
import type { Dim } from '../../formats/onnx/model.ts';
import type { DType } from '../../formats/tensor.ts';

/** One tensor in the graph being built. */
export interface Value {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly Dim[];
}

export class GraphBuilder {}

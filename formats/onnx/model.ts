/** The ONNX graph in memory: plain typed data, with initializers whose bytes are fetched only when needed. */
import type { DType } from '../tensor.ts';

/** A dimension: a number, or the name of a symbolic one. */
export type Dim = number | string;

export interface ValueInfo {
  readonly name: string;
  /** `null`: unknown element type. ONNX strings are not tensors we handle. */
  readonly dtype: DType | null;
  /** `null`: unknown rank. A dimension of which nothing is known is `''`. */
  readonly shape: readonly Dim[] | null;
  /**
   * The type as the file spells it, when dtype and shape do not tell all of it: sequences, maps, optionals, strings,
   * denotations. Written back as long as it still says this dtype and this shape.
   */
  readonly encodedType?: Uint8Array;
  readonly unknown?: readonly Uint8Array[];
}

/** Small constant inside an attribute, or an initializer's header. */
export interface InlineTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly data: Uint8Array;
  readonly name?: string;
  readonly unknown?: readonly Uint8Array[];
}

/**
 * Attribute values by ONNX kind. Integers are `bigint` only when they leave the safe range. Kinds that are not listed
 * (sparse tensors, types, lists of tensors or graphs, strings that are not UTF-8) travel in their node's `unknown`.
 */
export type Attribute = AttributeValue & { readonly unknown?: readonly Uint8Array[] };

export type AttributeValue =
  | { readonly kind: 'float'; readonly value: number }
  | { readonly kind: 'int'; readonly value: number | bigint }
  | { readonly kind: 'string'; readonly value: string }
  | { readonly kind: 'tensor'; readonly value: InlineTensor }
  | { readonly kind: 'floats'; readonly value: readonly number[] }
  | { readonly kind: 'ints'; readonly value: readonly (number | bigint)[] }
  | { readonly kind: 'strings'; readonly value: readonly string[] }
  | { readonly kind: 'graph'; readonly value: Graph };

export interface Node {
  readonly name: string;
  readonly op: string;
  /** '' is the default domain. */
  readonly domain: string;
  /** '' marks an absent optional input. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: Readonly<Record<string, Attribute>>;
  /** Encoded fields this model has no place for (documentation, overload, metadata, ...), kept as they were. */
  readonly unknown?: readonly Uint8Array[];
}

/** A constant of the graph. `read` yields its bytes (little-endian, packed for sub-byte types) each time it is called. */
export interface Initializer {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly byteLength: number;
  /** Whole bytes, or the byte range `[start, end)`. */
  read(start?: number, end?: number): Promise<Uint8Array>;
  readonly unknown?: readonly Uint8Array[];
}

export interface Graph {
  name: string;
  nodes: Node[];
  /** Runtime inputs only (initializers are not repeated here). */
  inputs: ValueInfo[];
  outputs: ValueInfo[];
  valueInfo: ValueInfo[];
  initializers: Map<string, Initializer>;
  /** Inputs that an initializer of the same name gives a default, so that a caller may override it. Main graph only. */
  overridableInputs?: ValueInfo[];
  /** Encoded fields this model has no place for: documentation, sparse initializers, initializers of strings, annotations, ... */
  unknown?: readonly Uint8Array[];
}

export interface OnnxModel {
  irVersion: number;
  /** Domain -> version; '' is the default domain. */
  opsets: Map<string, number>;
  producerName: string;
  producerVersion: string;
  graph: Graph;
  metadata: Map<string, string>;
  /** Encoded fields this model has no place for: documentation, functions, training information, device configurations, ... */
  unknown?: readonly Uint8Array[];
}

/** Renders quantized linears as MatMulNBits nodes; sites that read one activation in one group order share its gather. */
import type { Initializer } from '../../../formats/onnx/model.ts';
import { int } from '../../graph/attributes.ts';
import { type GraphBuilder, MICROSOFT, type Value } from '../../graph/builder.ts';
import { hadamardConstant, rotationSteps } from './hadamard-constant.ts';
import { signsOf } from './input-signs.ts';
import type { FactorConstant, LinearInitializers } from './linear-initializers.ts';
import type { OnnxLinearLayout } from './linear-layout.ts';
import { factorOf, operandOf } from './operand-graph.ts';

/** 1: activations stay float; 4: activations are quantized to int8 per block, which is what runs fast. */
export type AccuracyLevel = 1 | 4;

/** Appends linears to one graph. */
export class LinearRenderer {
  readonly #builder: GraphBuilder;
  readonly #accuracyLevel: AccuracyLevel;
  readonly #shared = new Map<string, Value>();

  constructor(builder: GraphBuilder, accuracyLevel: AccuracyLevel) {
    this.#builder = builder;
    this.#accuracyLevel = accuracyLevel;
  }

  /** `input` (..., inFeatures) F32 -> (..., outFeatures); `bias` (outFeatures) F32. */
  render(site: string, layout: OnnxLinearLayout, constants: LinearInitializers, input: Value, bias: Value | null): Value {
    const builder = this.#builder;
    const x = this.#transform(layout, constants, input);
    const leading = x.shape.slice(0, -1);
    const ordered = layout.order
      ? this.#gatherGroups(site, layout, layout.order, x)
      : layout.padding > 0
        ? this.#pad(layout, x)
        : x;
    const sizes = layout.parts.map((part) => part.columns);
    const inputs = sizes.length > 1 ? this.#split(ordered, sizes) : [ordered];
    const products = layout.parts.map((part, i) => {
      const operands = this.operands(layout, constants, i);
      const attributes = {
        K: int(part.columns),
        N: int(layout.outFeatures),
        bits: int(part.bits),
        block_size: int(layout.blockSize),
        accuracy_level: int(this.#accuracyLevel),
      };
      const output = { dtype: x.dtype, shape: [...leading, layout.outFeatures] };
      const operation = [inputs[i], ...operands, null, i === 0 ? bias : null];
      return builder.node('MatMulNBits', operation, { domain: MICROSOFT, attributes, outputs: [output] })[0];
    });
    if (constants.means) {
      const sums = this.#meanGroupSums(site, layout, x);
      products.push(builder.matmul(sums, this.#float(constants.means)));
    }
    if (constants.lowRank) {
      const { down, up } = constants.lowRank;
      const inner = builder.matmul(input, this.#factor(down, true));
      products.push(builder.matmul(inner, this.#factor(up, false)));
    }
    return products.reduce((sum, product) => builder.add(sum, product));
  }

  /** What part `i` of a linear multiplies with: codes, scales and zero points as the runtime wants them. */
  operands(layout: OnnxLinearLayout, constants: LinearInitializers, i: number): [Value, Value, Value] {
    const { qweight, scales, qzeros } = constants.parts[i];
    const operand = this.#once(`operand ${qweight[0][0].name}`, () => {
      const stored = qweight.map((piece) => piece.map((one) => this.#builder.initializer(one)));
      return operandOf(this.#builder, layout.parts[i], stored);
    });
    return [operand, this.#float(scales), this.#builder.initializer(qzeros)];
  }

  /** @param turned whether codes have the rows that the product has columns */
  #factor(constant: FactorConstant, turned: boolean): Value {
    if ('weight' in constant) return this.#float(constant.weight);
    return this.#once(`factor ${constant.codes.name}`, () => {
      const { codes, scales, bits, length } = constant;
      const stored = this.#builder.initializer(codes);
      const factor = factorOf(this.#builder, { bits, length }, stored, this.#float(scales));
      return turned ? this.#builder.transpose(factor, [1, 0]) : factor;
    });
  }

  #float(constant: Initializer): Value {
    return this.#once(`float ${constant.name}`, () => this.#builder.cast(this.#builder.initializer(constant), 'F32'));
  }

  /** The input in stored order. Sites that read one input transform it alike. */
  #transform({ transform, inFeatures }: OnnxLinearLayout, { inputOrder, inputSigns }: LinearInitializers, x: Value): Value {
    if (!transform) return x;
    return this.#once(`${x.name} transformed`, () => {
      const builder = this.#builder;
      const sorted = inputOrder ? this.#sort(x, builder.initializer(inputOrder)) : x;
      const turned = inputSigns ? builder.mul(sorted, signsOf(builder, builder.initializer(inputSigns), inFeatures)) : sorted;
      const rest = transform.hadamard > 0 ? inFeatures % transform.hadamard : 0;
      if (transform.hadamard === 0) return turned;
      if (rest === 0) return this.#rotate(turned, transform.hadamard);
      const [whole, last] = builder.split(turned, [inFeatures - rest, rest], -1);
      return builder.concat([this.#rotate(whole, transform.hadamard), last], -1);
    });
  }

  /** Columns by their index. Gather copies an element at a time along the last axis, whole rows along the first: a prompt of 128 tokens and 2048 columns takes a fifth of the time with two transpositions. */
  #sort(x: Value, order: Value): Value {
    const { shape } = x;
    const last = shape.length - 1;
    const leading = Array.from({ length: last }, (_, axis) => axis);
    const rows = this.#builder.gather(this.#builder.transpose(x, [last, ...leading]), order, 0);
    return this.#builder.transpose(rows, [...leading.map((axis) => axis + 1), 0]);
  }

  /** Every run of `size` columns times the Hadamard matrix, which is its own transpose. */
  #rotate(x: Value, size: number): Value {
    const builder = this.#builder;
    const leading = x.shape.slice(0, -1);
    const columns = Number(x.shape[x.shape.length - 1]);
    const [first, ...rest] = rotationSteps(size).map((order) =>
      this.#once(`hadamard ${order}`, () => hadamardConstant(builder, order)),
    );
    // As a matrix of rows by columns a run is multiplied from both sides.
    const runs = columns === size && rest.length > 0 ? [] : [columns / size];
    const orders = [first, ...rest].map((matrix) => Number(matrix.shape[0]));
    const values = builder.reshape(x, [...leading, ...runs, ...orders]);
    const rotated = rest.length > 0 ? builder.matmul(first, builder.matmul(values, rest[0])) : builder.matmul(values, first);
    return builder.reshape(rotated, [...leading, columns]);
  }

  /** `x` filled up with zero columns to whole groups. */
  #pad(layout: OnnxLinearLayout, x: Value): Value {
    if (layout.padding === 0) return x;
    return this.#once(`${x.name} padded`, () => {
      const leading = x.shape.slice(0, -1);
      const pads = [...x.shape.map(() => 0), ...leading.map(() => 0), layout.padding];
      const shape = [...leading, layout.inFeatures + layout.padding];
      return this.#builder.node1('Pad', [x, this.#builder.vector(pads)], { dtype: x.dtype, shape });
    });
  }

  /** `x` as (..., groups, blockSize). */
  #groups(layout: OnnxLinearLayout, x: Value): Value {
    return this.#once(`${x.name} groups of ${layout.blockSize}`, () => {
      const padded = this.#pad(layout, x);
      const columns = layout.inFeatures + layout.padding;
      return this.#builder.reshape(padded, [...x.shape.slice(0, -1), columns / layout.blockSize, layout.blockSize]);
    });
  }

  #gatherGroups(site: string, layout: OnnxLinearLayout, order: readonly number[], x: Value): Value {
    return this.#once(`${x.name} order ${order} of ${layout.blockSize}`, () => {
      const indices = this.#builder.initializer(indexVector(`${site}.group_order`, order));
      const gathered = this.#builder.gather(this.#groups(layout, x), indices, x.shape.length - 1);
      return this.#builder.reshape(gathered, [...x.shape.slice(0, -1), layout.inFeatures + layout.padding]);
    });
  }

  #split(x: Value, sizes: readonly number[]): Value[] {
    const parts = sizes.map((_, i) => this.#shared.get(`${x.name} split ${sizes} ${i}`));
    if (parts.every((part) => part !== undefined)) return parts;
    const fresh = this.#builder.split(x, sizes, -1);
    fresh.forEach((part, i) => {
      this.#shared.set(`${x.name} split ${sizes} ${i}`, part);
    });
    return fresh;
  }

  /** Sums of the inputs of the groups that have a mean, (..., meanGroups). */
  #meanGroupSums(site: string, layout: OnnxLinearLayout, x: Value): Value {
    const sums = this.#once(`${x.name} sums of ${layout.blockSize}`, () =>
      this.#builder.reduceSum(this.#groups(layout, x), [-1], false),
    );
    const all = (layout.inFeatures + layout.padding) / layout.blockSize;
    if (layout.meanGroups.length === all) return sums;
    return this.#once(`${x.name} sums ${layout.meanGroups} of ${layout.blockSize}`, () => {
      const indices = this.#builder.initializer(indexVector(`${site}.mean_groups`, layout.meanGroups));
      return this.#builder.gather(sums, indices, -1);
    });
  }

  #once(key: string, make: () => Value): Value {
    const known = this.#shared.get(key);
    if (known) return known;
    const value = make();
    this.#shared.set(key, value);
    return value;
  }
}

/** An I64 vector under a name that readers of the artifact look for. */
function indexVector(name: string, indices: readonly number[]) {
  const data = new Uint8Array(BigInt64Array.from(indices, BigInt).buffer);
  const read = async (start = 0, end = data.byteLength) => data.subarray(start, end);
  return { name, dtype: 'I64', shape: [indices.length], byteLength: data.byteLength, read } as const;
}

/**
 * Sums of x x^T made where x is made: the graph that computes x on a device multiplies it there, and only the products come back.
 * Each run sums over its own tokens in fp32; across runs the sums are kept in fp64.
 */
import type { Initializer, Node, OnnxModel, ValueInfo } from '../../formats/onnx/model.ts';
import type { DType } from '../../formats/tensor.ts';
import type { Engine, NdArray } from './engine.ts';

/** Rows of one panel of the upper triangle: half of the square stays where it is, and a panel is still a large product. */
const PANEL = 1024;
/** Tokens of one fp32 product; more lose digits that the factorization of a Hessian needs. */
export const FUSED_TOKENS = 2048;

/** Graph input that says which rows are tokens, not pads: BOOL (batch, sequence, 1). */
const IS_TOKEN = 'gram is token';

/** Whether an engine gains by fusing: on the CPU products read x in place. */
export function fusesGrams(engine: Engine): boolean {
  return engine.device !== 'cpu';
}

/** A value of the graph, F32 (batch, sequence, features), whose tokens are summed. */
export interface GramTarget {
  readonly value: string;
  readonly features: number;
}

/** A graph that sums what it computes, and what its runs have summed. One graph may have many sums, so make one of these per pass. */
export class FusedGrams {
  /** The graph with `outputs` besides its own. */
  readonly model: OnnxModel;
  /** What to ask of a run. */
  readonly outputs: readonly string[];
  readonly #sums: ReadonlyMap<string, PanelSum>;

  constructor(model: OnnxModel, targets: readonly GramTarget[]) {
    this.#sums = new Map(targets.map(({ value, features }) => [value, new PanelSum(value, features)]));
    this.model = withPanels(model, [...this.#sums.values()]);
    this.outputs = [...this.#sums.values()].flatMap(({ panels }) => panels.map(({ output }) => output));
  }

  /** What a run over right-padded rows of these lengths is fed beside its own inputs. */
  feeds(lengths: Int32Array, sequence: number): Record<string, NdArray> {
    const data = new Uint8Array(lengths.length * sequence);
    lengths.forEach((length, row) => {
      data.fill(1, row * sequence, row * sequence + length);
    });
    return { [IS_TOKEN]: { dtype: 'BOOL', shape: [lengths.length, sequence, 1], data } };
  }

  /** Memory for `outputs`, to run into; used again by the next run. */
  memory(): Record<string, NdArray> {
    return Object.fromEntries([...this.#sums.values()].flatMap((sum) => sum.memory()));
  }

  /** Adds what a run left in the memory. Returns the targets whose products are not all finite. */
  add(made: Readonly<Record<string, NdArray>>, tokenCount: number): GramTarget[] {
    return [...this.#sums.values()].filter((sum) => !sum.add(made, tokenCount));
  }

  /** `sum x x^T / tokens` of a value, (features, features), full and exactly symmetric. Ends its sum. */
  finish(value: string): Float64Array {
    return this.#sums.get(value)!.finish();
  }
}

/** Rows [start, start + rows) of an upper triangle, from column `start` on. */
interface Panel {
  readonly output: string;
  readonly start: number;
  readonly rows: number;
  readonly columns: number;
}

class PanelSum implements GramTarget {
  readonly value: string;
  readonly features: number;
  readonly panels: readonly Panel[];
  #memory: Float32Array[] | undefined;
  #sums: Float64Array[];
  #tokenCount = 0;

  constructor(value: string, features: number) {
    this.value = value;
    this.features = features;
    this.panels = Array.from({ length: Math.ceil(features / PANEL) }, (_, i) => {
      const start = i * PANEL;
      return { output: `gram ${value} ${start}`, start, rows: Math.min(PANEL, features - start), columns: features - start };
    });
    this.#sums = this.panels.map(({ rows, columns }) => new Float64Array(rows * columns));
  }

  memory(): [string, NdArray][] {
    this.#memory ??= this.panels.map(({ rows, columns }) => new Float32Array(rows * columns));
    const memory = this.#memory;
    return this.panels.map(({ output, rows, columns }, i) => [output, { dtype: 'F32', shape: [rows, columns], data: memory[i] }]);
  }

  add(made: Readonly<Record<string, NdArray>>, tokenCount: number): boolean {
    const data = this.panels.map(({ output }) => made[output].data as Float32Array);
    let zero = 0;
    data.forEach((values, panel) => {
      const sum = this.#sums[panel];
      for (let i = 0; i < sum.length; i++) {
        sum[i] += values[i];
        // 0 for every finite value, NaN for the others.
        zero += 0 * values[i];
      }
    });
    this.#tokenCount += tokenCount;
    return zero === 0;
  }

  finish(): Float64Array {
    const n = this.features;
    const gram = new Float64Array(n * n);
    const count = Math.max(1, this.#tokenCount);
    this.panels.forEach(({ start, rows, columns }, panel) => {
      const sum = this.#sums[panel];
      for (let r = 0; r < rows; r++) {
        const row = start + r;
        // What lies below the diagonal is the mirror image of what lies above: symmetric to the last bit.
        for (let c = r; c < columns; c++) {
          const value = sum[r * columns + c] / count;
          gram[row * n + start + c] = value;
          gram[(start + c) * n + row] = value;
        }
      }
    });
    this.#memory = undefined;
    this.#sums = [];
    return gram;
  }
}

/** For each sum: pads replaced by zeros (whatever they hold), tokens as rows, and a product per panel. */
function withPanels(model: OnnxModel, sums: readonly PanelSum[]): OnnxModel {
  const { graph } = model;
  const nodes: Node[] = [...graph.nodes];
  const outputs: ValueInfo[] = [...graph.outputs];
  const initializers = new Map(graph.initializers);
  const zero = constant('gram zero', 'F32', [], Float32Array.of(0));
  initializers.set(zero.name, zero);
  const vector = (values: readonly number[]): string => {
    const name = `gram [${values.join()}]`;
    initializers.set(name, constant(name, 'I64', [values.length], BigInt64Array.from(values, BigInt)));
    return name;
  };
  const node = (op: string, inputs: readonly string[], output: string, attributes: Node['attributes'] = {}): string => {
    nodes.push({ name: output, op, domain: '', inputs, outputs: [output], attributes });
    return output;
  };
  for (const { value, features, panels } of sums) {
    const tokens = node('Where', [IS_TOKEN, value, zero.name], `gram ${value} tokens`);
    const rows = node('Reshape', [tokens, vector([-1, features])], `gram ${value} rows`);
    for (const { output, start, rows: height, columns } of panels) {
      const bounds = (end: number): string[] => [vector([start]), vector([end]), vector([1])];
      const cut = (end: number, what: string): string =>
        end - start === features ? rows : node('Slice', [rows, ...bounds(end)], `${output} ${what}`);
      const strip = cut(start + height, 'strip');
      const rest = cut(features, 'rest');
      node('Gemm', [strip, rest], output, { transA: { kind: 'int', value: 1 } });
      outputs.push({ name: output, dtype: 'F32', shape: [height, columns] });
    }
  }
  const mask: ValueInfo = { name: IS_TOKEN, dtype: 'BOOL', shape: ['batch', 'sequence', 1] };
  return { ...model, graph: { ...graph, nodes, outputs, initializers, inputs: [...graph.inputs, mask] } };
}

function constant(name: string, dtype: DType, shape: readonly number[], values: ArrayBufferView<ArrayBuffer>): Initializer {
  const bytes = new Uint8Array(values.buffer);
  const read = async (start = 0, end = bytes.length): Promise<Uint8Array> => bytes.subarray(start, end);
  return { name, dtype, shape, byteLength: bytes.length, read };
}

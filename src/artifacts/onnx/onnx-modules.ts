/** Quantized modules and plain tensors of an ONNX artifact. */
import type { Initializer } from '../../../formats/onnx/model.ts';
import type { OnnxFile } from '../../../formats/onnx/reader.ts';
import type { Tensor, TensorInfo, TensorSource } from '../../../formats/tensor.ts';
import { FormatError } from '../../errors.ts';
import { lowRankBits } from '../accounting.ts';
import { parseQuantMetadata } from '../quant-metadata.ts';
import { moduleStorage, type StoredModules } from '../stored-modules.ts';
import { isHadamardFactor } from './hadamard-constant.ts';
import { decodeLinear, type StoredLinear, storedLinears } from './linear-decode.ts';
import { branchConstantNames } from './linear-initializers.ts';

/** Orders, signs and choices of columns and groups. */
const INDICES = /\.(input_order|input_signs|group_order|mean_groups)$/;

/** Finds the quantized modules that the file's metadata names. Throws FormatError when the graph does not have one of them. */
export async function onnxModules({ path, model }: OnnxFile): Promise<StoredModules> {
  const modules = parseQuantMetadata(path, model.metadata);
  const linears = await storedLinears(path, model.graph);
  const linearOf = (name: string): StoredLinear => {
    const linear = linears.get(name);
    if (!linear)
      throw new FormatError(path, 'onnx-linear-missing', `its metadata names module "${name}", its graph does not have it`);
    return linear;
  };
  for (const [name, module] of modules) {
    const { outFeatures, lowRank } = linearOf(name);
    const rank = lowRank?.rank ?? 0;
    if (outFeatures === module.outFeatures && rank === (module.rank ?? 0)) continue;
    throw new FormatError(
      path,
      'onnx-linear-shape',
      `module "${name}" has ${outFeatures} outputs and rank ${rank} in the graph, ${module.outFeatures} and ${module.rank ?? 0} in the metadata`,
    );
  }
  const branches = new Set([...modules.keys()].flatMap((name) => branchConstantNames(name)));
  return {
    layout: 'onnx',
    modules,
    owns: (tensor) =>
      tensor.includes('.MatMulNBits.') || INDICES.test(tensor) || isHadamardFactor(tensor) || branches.has(tensor),
    decode: async (name) => decodeLinear(path, linearOf(name), modules.get(name)!.inFeatures),
    async storage(name) {
      const module = modules.get(name)!;
      const linear = linearOf(name);
      const operands = linear.parts.flatMap((part) => part.groups.map((group) => [group, part.bits] as const));
      const widths = module.bits ?? operands.sort(([a], [b]) => a - b).map(([, bits]) => bits);
      return moduleStorage(name, module, widths, {
        storedBits: linear.byteLength * 8,
        runtimeBits: linear.runtimeByteLength * 8,
        lowRankBits: lowRankBits({ ...module, ...(linear.lowRank && { lowRank: linear.lowRank }) }),
      });
    },
  };
}

/** The constants of an ONNX file as a source of tensors: unquantized weights keep their checkpoint names there. */
export class OnnxTensors implements TensorSource {
  readonly path: string;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  readonly metadata: ReadonlyMap<string, string>;
  readonly files: TensorSource['files'];
  readonly #file: OnnxFile;

  constructor(file: OnnxFile) {
    this.#file = file;
    this.path = file.path;
    this.tensors = file.model.graph.initializers;
    this.metadata = file.model.metadata;
    this.files = file.files;
  }

  async read(name: string): Promise<Tensor> {
    const initializer = this.#initializer(name);
    const { dtype, shape, byteLength } = initializer;
    return { name, dtype, shape, byteLength, data: await initializer.read() };
  }

  async readRows(name: string, start: number, end: number): Promise<Tensor> {
    const initializer = this.#initializer(name);
    const { dtype, shape, byteLength } = initializer;
    const rowBytes = byteLength / shape[0];
    const data = await initializer.read(start * rowBytes, end * rowBytes);
    return { name, dtype, shape: [end - start, ...shape.slice(1)], byteLength: data.byteLength, data };
  }

  async close(): Promise<void> {
    await this.#file.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #initializer(name: string): Initializer {
    const initializer = this.#file.model.graph.initializers.get(name);
    if (!initializer) throw new FormatError(this.path, 'tensor-missing', `there is no tensor "${name}"`);
    return initializer;
  }
}

/** Quantized modules as an artifact stores them: what they are, what they cost, and their weights decoded. One implementation per layout. */
import type { TensorSource } from '../../formats/tensor.ts';
import { dequantize, type QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import type { ModuleStorage } from './accounting.ts';
import { codeBitsOf } from './accounting.ts';
import { type GptqFormat, gptqBits, readGptq } from './gptq.ts';
import { LOW_RANK_SUFFIXES, PLANES_SUFFIXES, readPlanes, readPlanesShape } from './planes.ts';
import { type LayoutName, parseQuantMetadata, type QuantizedModule } from './quant-metadata.ts';

export interface StoredModules {
  readonly layout: LayoutName;
  /** Every quantized module by name. */
  readonly modules: ReadonlyMap<string, QuantizedModule>;
  /** Whether a tensor of the file belongs to a quantized module's encoding. */
  owns(tensor: string): boolean;
  /** W (outFeatures, inFeatures). */
  decode(name: string): Promise<Float32Array>;
  storage(name: string): Promise<ModuleStorage>;
}

/** A module, the file it is in, and the suffixes of its tensors. */
class SafetensorsModules {
  readonly modules = new Map<string, QuantizedModule>();
  readonly #sources = new Map<string, TensorSource>();
  readonly #tensors = new Set<string>();
  readonly #suffixes: readonly string[];

  constructor(sources: readonly TensorSource[], suffixes: readonly string[]) {
    this.#suffixes = suffixes;
    for (const source of sources) {
      for (const [name, module] of parseQuantMetadata(source.path, source.metadata)) {
        this.modules.set(name, module);
        this.#sources.set(name, source);
        for (const suffix of suffixes) this.#tensors.add(name + suffix);
      }
    }
  }

  owns(tensor: string): boolean {
    return this.#tensors.has(tensor);
  }

  locate(name: string): { readonly source: TensorSource; readonly module: QuantizedModule } {
    return { source: this.#sources.get(name)!, module: this.modules.get(name)! };
  }

  storage(name: string, bits: ArrayLike<number>): ModuleStorage {
    const { source, module } = this.locate(name);
    let bytes = 0;
    for (const suffix of this.#suffixes) bytes += source.tensors.get(name + suffix)?.byteLength ?? 0;
    const branch = LOW_RANK_SUFFIXES.map((suffix) => source.tensors.get(name + suffix)?.byteLength ?? 0);
    return moduleStorage(name, module, bits, {
      storedBits: bytes * 8,
      lowRankBits: 8 * branch.reduce((sum, one) => sum + one, 0),
    });
  }
}

/** What a module costs, from its shape, its widths and the bits it takes. */
export function moduleStorage(
  name: string,
  { outFeatures, inFeatures, groupSize, rank }: QuantizedModule,
  bits: ArrayLike<number>,
  { storedBits, lowRankBits, runtimeBits }: { storedBits: number; lowRankBits: number; runtimeBits?: number },
): ModuleStorage {
  const widths = Array.from(bits);
  const shape = { outFeatures, inFeatures, groupSize, bits: widths };
  const lowRank = rank === undefined ? undefined : { rank, storedBits: lowRankBits };
  const storage = { name, ...shape, codeBits: codeBitsOf(shape), storedBits, ...(lowRank && { lowRank }) };
  return runtimeBits === undefined ? storage : { ...storage, runtimeBits };
}

/** Modules in the layout `planes`, in any number of files. */
export function planesModules(sources: readonly TensorSource[]): StoredModules {
  const stored = new SafetensorsModules(sources, PLANES_SUFFIXES);
  return {
    layout: 'planes',
    modules: stored.modules,
    owns: (tensor) => stored.owns(tensor),
    async decode(name) {
      const { source, module } = stored.locate(name);
      return dequantize(await readPlanes(source, name, module));
    },
    async storage(name) {
      const { source, module } = stored.locate(name);
      return stored.storage(name, (await readPlanesShape(source, name, module)).bits);
    },
  };
}

/** Modules in the layout `gptq`, in any number of files. */
export function gptqModules(sources: readonly TensorSource[], format: GptqFormat): StoredModules {
  const stored = new SafetensorsModules(sources, ['.qweight', '.qzeros', '.scales', '.g_idx']);
  const read = (name: string): Promise<QuantizedLinear> => {
    const { source, module } = stored.locate(name);
    return readGptq(source, name, module, format);
  };
  return {
    layout: 'gptq',
    modules: stored.modules,
    owns: (tensor) => stored.owns(tensor),
    decode: async (name) => dequantize(await read(name)),
    async storage(name) {
      const { source, module } = stored.locate(name);
      const groups = Math.ceil(module.inFeatures / module.groupSize);
      return stored.storage(name, new Uint8Array(groups).fill(gptqBits(source, name, module)));
    },
  };
}

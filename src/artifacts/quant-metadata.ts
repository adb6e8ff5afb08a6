/** What an artifact says of its quantized modules: one JSON in the metadata of a safetensors or ONNX file, whatever the layout. */
import { FormatError } from '../errors.ts';
import { isHadamardOrder } from '../methods/quantize/hadamard.ts';
import type { TransformShape } from '../methods/quantize/input-transform.ts';
import { TRANSFORMS, type TransformKind } from '../methods/quantize/quantizer.ts';

export const LAYOUTS = ['planes', 'gptq', 'onnx'] as const;
/** How the codes are stored. */
export type LayoutName = (typeof LAYOUTS)[number];

/** A quantized module. Its tensors alone do not tell the number of columns, or the size of its groups. */
export interface QuantizedModule {
  readonly outFeatures: number;
  readonly inFeatures: number;
  readonly groupSize: number;
  /** First of the modules that read the same activation. */
  readonly input: string;
  /** The model expects the weight as (inFeatures, outFeatures). */
  readonly transposed: boolean;
  /** What is done to `input`; absent: nothing. Order and signs of its columns are tensors or constants of the file. */
  readonly transform?: TransformShape;
  /** Widths of the groups, where the layout itself does not keep them. */
  readonly bits?: readonly number[];
  /** Rank of the branch beside it; absent: none. */
  readonly rank?: number;
}

/** Strings to store: deterministic, in the order of `modules`. A module whose group size is not `groupSize` says so itself. */
export function quantMetadata(
  layout: LayoutName,
  groupSize: number,
  modules: ReadonlyMap<string, QuantizedModule>,
): Map<string, string> {
  const inputs = new Map<string, object>();
  const entries = [...modules].map(([name, module]) => {
    const { transform, input } = module;
    const kind = kindOf(transform);
    const folded = (kind === 'perm' || kind === 'perm-had') && !transform?.permuted;
    inputs.set(input, { transform: kind, block: transform?.hadamard || groupSize, folded });
    const entry = {
      shape: [module.outFeatures, module.inFeatures],
      input,
      ...(module.groupSize === groupSize ? {} : { group_size: module.groupSize }),
      ...(module.transposed ? { transposed: true } : {}),
      ...(module.bits ? { bits: module.bits } : {}),
      ...(module.rank === undefined ? {} : { rank: module.rank }),
    };
    return [name, entry] as const;
  });
  const quant = {
    group_size: groupSize,
    modules: Object.fromEntries(entries),
    inputs: Object.fromEntries(inputs),
  };
  return new Map([
    ['pcomp.layout', layout],
    ['pcomp.layout_version', '1'],
    ['pcomp.quant', JSON.stringify(quant)],
  ]);
}

/** The layout a file says it is in; undefined for files of others. Throws FormatError for a layout this version does not know. */
export function layoutOf(path: string, metadata: ReadonlyMap<string, string>): LayoutName | undefined {
  const name = metadata.get('pcomp.layout');
  if (name === undefined) return undefined;
  const layout = LAYOUTS.find((known) => known === name);
  if (layout === undefined)
    throw new FormatError(path, 'quant-layout', `its layout is "${name}", pcomp reads ${LAYOUTS.join(', ')}`);
  return layout;
}

/** Modules of a file. Throws FormatError on another version, a transform this version does not know, or malformed JSON. */
export function parseQuantMetadata(path: string, metadata: ReadonlyMap<string, string>): Map<string, QuantizedModule> {
  const version = metadata.get('pcomp.layout_version');
  if (version !== '1') {
    throw new FormatError(path, 'quant-version', `layout version is ${version ?? 'missing'}, pcomp reads version 1`);
  }
  const quant = parseJson(path, metadata.get('pcomp.quant'));
  if (!isRecord(quant) || !isRecord(quant['modules']) || !isRecord(quant['inputs'])) {
    throw new FormatError(path, 'quant-metadata', 'pcomp.quant needs objects "modules" and "inputs"');
  }
  const transforms = new Map(
    Object.entries(quant['inputs']).map(([input, value]) => [input, parseTransform(path, input, value)] as const),
  );
  const modules = new Map<string, QuantizedModule>();
  for (const [name, value] of Object.entries(quant['modules'])) {
    const module = parseModule(path, name, value, quant['group_size']);
    if (!transforms.has(module.input)) {
      throw new FormatError(
        path,
        'quant-metadata',
        `pcomp.quant: module "${name}" reads "${module.input}", which is not described`,
      );
    }
    const transform = transforms.get(module.input);
    modules.set(name, transform ? { ...module, transform } : module);
  }
  return modules;
}

/** The name of a transform. A sorted input whose order the file does not have is *folded*: the layers before yield it in that order. */
function kindOf(transform: TransformShape | undefined): TransformKind {
  if (transform === undefined) return 'none';
  if (transform.signed) return 'had';
  return transform.hadamard === 0 ? 'perm' : 'perm-had';
}

function parseTransform(path: string, input: string, value: unknown): TransformShape | undefined {
  const fail = (rule: string) => new FormatError(path, 'quant-transform', `pcomp.quant: input "${input}" ${rule}`);
  const { transform: kind, block, folded = false } = isRecord(value) ? value : {};
  if (typeof folded !== 'boolean') throw fail('has a "folded" that is not true or false');
  const permuted = !folded;
  switch (TRANSFORMS.find((known) => known === kind)) {
    case 'none':
      return undefined;
    case 'perm':
      return { permuted, signed: false, hadamard: 0 };
    case 'perm-had':
      if (isPositive(block) && Number.isInteger(Math.log2(block)) && block > 1)
        return { permuted, signed: false, hadamard: block };
      throw fail(`rotates blocks of ${JSON.stringify(block)}, which is no power of two above 1`);
    case 'had':
      if (isPositive(block) && isHadamardOrder(block)) return { permuted: false, signed: true, hadamard: block };
      throw fail(`rotates blocks of ${JSON.stringify(block)}, which no Hadamard matrix does`);
    case undefined:
      throw fail(`has transform ${JSON.stringify(kind)}, pcomp reads ${TRANSFORMS.join(', ')}`);
  }
}

function parseModule(path: string, name: string, value: unknown, defaultGroupSize: unknown): QuantizedModule {
  const fail = (rule: string) => new FormatError(path, 'quant-metadata', `pcomp.quant: module "${name}" ${rule}`);
  if (!isRecord(value)) throw fail('is not an object');
  const { shape, input, transposed = false, bits, rank } = value;
  const groupSize = value['group_size'] ?? defaultGroupSize;
  if (!Array.isArray(shape) || shape.length !== 2 || !shape.every(isPositive))
    throw fail('needs a shape of two positive integers');
  if (!isPositive(groupSize)) throw fail('has no positive group_size');
  if (typeof input !== 'string') throw fail('names no input');
  if (typeof transposed !== 'boolean') throw fail('has a "transposed" that is not true or false');
  const [outFeatures, inFeatures] = shape as [number, number];
  if (rank !== undefined && !(isPositive(rank) && rank <= Math.min(outFeatures, inFeatures))) {
    throw fail(`has rank ${JSON.stringify(rank)}, it must be within 1..${Math.min(outFeatures, inFeatures)}`);
  }
  const module = { outFeatures, inFeatures, groupSize, input, transposed, ...(rank !== undefined && { rank }) };
  if (bits === undefined) return module;
  const groups = Math.ceil(inFeatures / groupSize);
  const widths =
    Array.isArray(bits) && bits.length === groups && bits.every((width) => Number.isInteger(width) && width >= 0 && width <= 8);
  if (!widths) throw fail(`needs ${groups} widths of 0 to 8 bits`);
  return { ...module, bits: bits as number[] };
}

function parseJson(path: string, text: string | undefined): unknown {
  try {
    return JSON.parse(text ?? 'null');
  } catch (cause) {
    throw new FormatError(path, 'quant-metadata', 'pcomp.quant is not JSON', { cause });
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function isPositive(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) > 0;
}

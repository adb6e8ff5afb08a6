/** Adapters that keep a module's components in lists of blocks, or with a square matrix between the factors, as plain factors (adapters.md 9.2). */
import { quote } from '../../formats/safetensors/header.ts';
import { FormatError } from '../errors.ts';
import type { AdapterModule } from './peft.ts';

/** A tensor in float32. */
export interface Block {
  readonly name: string;
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** The tensors of one module by role (`lora_A`, `lora_E`, ...), in the order of their numbers. */
export type ModuleBlocks = ReadonlyMap<string, readonly Block[]>;

/** Guard of these methods' own scale, alpha / (rank + guard). */
const SCALE_GUARD = 1e-5;
/** IncreLoRA: a component that was never selected still has the value it was made with. */
const UNSELECTED = 1e-5;

interface Context {
  /** For messages. */
  readonly path: string;
  readonly module: string;
  readonly alpha: number;
}

/** `scale B diag(e) A` over all blocks; components that were not selected are left out. @param ranknum the rank as stored, if it is */
export function incrementalFactors(context: Context, blocks: ModuleBlocks, ranknum: number | undefined): AdapterModule {
  const a = stacked(context, blocks, 'lora_A', 0);
  const b = stacked(context, blocks, 'lora_B', 1);
  const e = (blocks.get('lora_E') ?? []).flatMap(({ values }) => [...values]);
  const [rank, inFeatures] = a.shape;
  const [outFeatures] = b.shape;
  if (b.shape[1] !== rank || e.length !== rank) {
    const detail = `module ${quote(context.module)} has ${rank} rows of A, ${b.shape[1]} columns of B and ${e.length} values of E`;
    throw new FormatError(context.path, 'adapter-rank', detail);
  }
  const kept = e.flatMap((value, k) => (Math.abs(value) > UNSELECTED ? [k] : []));
  const scale = context.alpha / ((ranknum ?? kept.length) + SCALE_GUARD);
  const loraA = new Float32Array(kept.length * inFeatures);
  const loraB = new Float32Array(outFeatures * kept.length);
  for (const [to, from] of kept.entries()) {
    loraA.set(a.values.subarray(from * inFeatures, (from + 1) * inFeatures), to * inFeatures);
    for (let i = 0; i < outFeatures; i++) loraB[i * kept.length + to] = scale * e[from] * b.values[i * rank + from];
  }
  return { name: context.module, rank: kept.length, loraA, loraB };
}

/** `scale B C A`; block i of C is a run of rows and a run of columns, whose common corner is their sum. */
export function triangularFactors(context: Context, blocks: ModuleBlocks): AdapterModule {
  const a = stacked(context, blocks, 'lora_A', 0);
  const b = stacked(context, blocks, 'lora_B', 1);
  const [rank] = a.shape;
  const core = new Float32Array(rank * rank);
  let start = 0;
  const [rows, columns] = [blocks.get('lora_C_row') ?? [], blocks.get('lora_C_col') ?? []];
  for (const [i, row] of rows.entries()) {
    const column = columns[i];
    const [height, width] = row.shape;
    if (width !== start + height || column?.shape[0] !== width || column.shape[1] !== height) {
      const shapes = `[${row.shape.join(', ')}] and [${column?.shape.join(', ') ?? ''}]`;
      const detail = `module ${quote(context.module)}: blocks ${i} of C are ${shapes}, after ${start} components`;
      throw new FormatError(context.path, 'adapter-core', detail);
    }
    for (let r = 0; r < height; r++) {
      for (let c = 0; c < width; c++) {
        core[(start + r) * rank + c] += row.values[r * width + c];
        core[c * rank + start + r] += column.values[c * height + r];
      }
    }
    start += height;
  }
  if (start !== rank) {
    const detail = `module ${quote(context.module)}: C has ${start} components, but A ${rank}`;
    throw new FormatError(context.path, 'adapter-core', detail);
  }
  return withCore(context, a, b, core, context.alpha / (rank + SCALE_GUARD));
}

/** `scale B S A`, S square. */
export function coreFactors(context: Context, blocks: ModuleBlocks): AdapterModule {
  const a = stacked(context, blocks, 'lora_A', 0);
  const b = stacked(context, blocks, 'lora_B', 1);
  const [sigma] = blocks.get('sigma')!;
  const [rank] = a.shape;
  if (sigma.shape[0] !== rank || sigma.shape[1] !== rank) {
    const detail = `${quote(sigma.name)} is [${sigma.shape.join(', ')}], but the rank is ${rank}`;
    throw new FormatError(context.path, 'adapter-core', detail);
  }
  return withCore(context, a, b, sigma.values, context.alpha / rank);
}

function withCore({ path, module }: Context, a: Block, b: Block, core: Float32Array, scale: number): AdapterModule {
  const [rank] = a.shape;
  const [outFeatures, columns] = b.shape;
  if (columns !== rank)
    throw new FormatError(path, 'adapter-rank', `module ${quote(module)}: A has ${rank} rows, but B ${columns} columns`);
  const loraB = new Float32Array(outFeatures * rank);
  for (let i = 0; i < outFeatures; i++) {
    for (let k = 0; k < rank; k++) {
      let sum = 0;
      for (let l = 0; l < rank; l++) sum += b.values[i * rank + l] * core[l * rank + k];
      loraB[i * rank + k] = scale * sum;
    }
  }
  return { name: module, rank, loraA: a.values, loraB };
}

/** Matrices one below the other (`axis` 0) or side by side (1). */
function stacked({ path, module }: Context, blocks: ModuleBlocks, role: string, axis: 0 | 1): Block {
  const all = blocks.get(role) ?? [];
  const other = all[0]?.shape[1 - axis];
  if (all.length === 0 || all.some(({ shape }) => shape.length !== 2 || shape[1 - axis] !== other)) {
    const shapes = all.map(({ shape }) => `[${shape.join(', ')}]`).join(', ') || 'none';
    throw new FormatError(path, 'adapter-factor-missing', `module ${quote(module)}: blocks of ${role} are ${shapes}`);
  }
  const total = all.reduce((sum, { shape }) => sum + shape[axis], 0);
  const values = new Float32Array(total * other);
  let at = 0;
  for (const block of all) {
    if (axis === 0) values.set(block.values, at * other);
    else {
      const width = block.shape[1];
      for (let i = 0; i < other; i++) values.set(block.values.subarray(i * width, (i + 1) * width), i * total + at);
    }
    at += block.shape[axis];
  }
  return { name: all[0].name, shape: axis === 0 ? [total, other] : [other, total], values };
}

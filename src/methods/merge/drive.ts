/** Takes one tensor through a merge method: the method's scans, each over all blocks, then its merged blocks. */
import { vectors } from '../../compute/kernels/vectors.ts';
import { UnsupportedError } from '../../errors.ts';
import type { MergeBlock, MergeContext, Merger, MergeTensor, Parameters, ParameterValues } from './merger.ts';

/** The same rows of every input; where the task vectors are what is stored (LoRA), they are given and the experts are made from them. */
export interface BlockInputs {
  readonly base?: Float32Array | undefined;
  readonly experts: readonly Float32Array[];
  readonly taskVectors?: readonly Float32Array[];
  readonly statistics?: readonly Float32Array[];
  /** Where the merged rows may be written; absent: new memory. */
  readonly output?: Float32Array;
}

/** A block from its inputs; `taskVectors` are computed when first asked for, and kept. @param start flat index of the first element */
export function mergeBlock(start: number, inputs: BlockInputs): MergeBlock {
  const { base, experts, statistics } = inputs;
  let { taskVectors, output } = inputs;
  const length = (experts[0] ?? base)?.length ?? 0;
  return {
    start,
    length,
    base,
    experts,
    get taskVectors() {
      taskVectors ??= experts.map((expert) => difference(expert, base));
      return taskVectors;
    },
    get output() {
      output ??= new Float32Array(length);
      return output;
    },
    ...(statistics ? { statistics } : {}),
  };
}

function difference(expert: Float32Array, base: Float32Array | undefined): Float32Array {
  if (!base) throw new Error('task vectors need a base');
  const result = new Float32Array(expert.length);
  for (let i = 0; i < result.length; i++) result[i] = expert[i] - base[i];
  return result;
}

/**
 * The blocks of one tensor from the first row to the last, whole rows each; or the first of every so many, or then none where nothing
 * is saved. Called once per pass; a pass may cut them differently.
 */
export type BlockPass = (every?: number) => Iterable<MergeBlock> | AsyncIterable<MergeBlock>;

/**
 * Yields the merged tensor, block by block as the last pass cuts it, each good until the next is asked for. Reads the blocks at most `scans + 1` times.
 * @param options `allowNonfinite` lets NaN and infinities through
 * @throws RecipeError for values the method cannot use, UnsupportedError for a number that is not finite: tensor, input and flat index
 */
export async function* mergeTensor<D extends Parameters>(
  merger: Merger<D>,
  tensor: MergeTensor,
  blocks: BlockPass,
  values: ParameterValues<D>,
  context: MergeContext,
  options: { readonly allowNonfinite?: boolean } = {},
): AsyncGenerator<Float32Array> {
  using _ = vectors().open();
  const merge = merger.prepare(tensor, values, context);
  let checked = options.allowNonfinite === true;
  for (const scan of merge.scans) {
    if (scan.needed && !scan.needed()) continue;
    for await (const block of blocks(scan.every)) {
      if (!checked) refuseNonfinite(tensor, block);
      scan.look(block);
    }
    checked ||= scan.every === undefined;
  }
  for await (const block of blocks()) {
    if (!checked) refuseNonfinite(tensor, block);
    yield await merge.merge(block);
  }
}

/** Throws UnsupportedError for the first number of a block that is not finite. */
export function refuseNonfinite(tensor: MergeTensor, block: MergeBlock): void {
  const inputs = [...block.experts.map((values, k) => ({ label: `expert "${tensor.experts[k]}"`, values }))];
  if (block.base) inputs.push({ label: 'the base', values: block.base });
  for (const { label, values } of inputs) {
    // x - x is 0 unless x is NaN or infinite, so one sum answers for all; only then is it worth looking where.
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += values[i] - values[i];
    if (sum === 0) continue;
    const at = values.findIndex((value) => !Number.isFinite(value));
    throw new UnsupportedError(
      `tensor "${tensor.name}": ${label} holds ${values[at]} at flat index ${block.start + at}, and pcomp merges finite numbers. ` +
        'To merge it anyway, use --allow-nonfinite.',
    );
  }
}

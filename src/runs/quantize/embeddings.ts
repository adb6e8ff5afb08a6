/** `--embeddings 4|8`: the embedding table and the output head, rounded to nearest in groups along the hidden size; a tied one is stored once. */
import { embeddingModules } from '../../artifacts/describe-modules.ts';
import { embeddingGroupSize } from '../../artifacts/onnx/lowering.ts';
import type { PartStore } from '../../artifacts/parts.ts';
import type { Blas } from '../../compute/blas.ts';
import { RecipeError } from '../../errors.ts';
import type { QuantizedLinear } from '../../methods/quantize/quantized-linear.ts';
import type { QuantizeOptions, SitePlan } from '../../methods/quantize/quantizer.ts';
import { rtn } from '../../methods/quantize/rtn.ts';
import type { LinearSite, Model, WeightReader } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';
import { nominalGroupSize, type QuantizeRecipe } from './recipe.ts';

/** Rows of a table that are float32 at once; their codes stay. */
const ROWS_BYTES = 64 * 2 ** 20;

/** The tables as linears, (vocabSize, hiddenSize); one when they are tied. */
export function embeddingSites(model: Model): LinearSite[] {
  const { hiddenSize, vocabSize } = model.shape;
  return embeddingModules(model).map((name) => {
    return { name, outFeatures: vocabSize, inFeatures: hiddenSize, hasBias: false, transposed: false, input: name };
  });
}

/** Size of the groups along the hidden size. Throws RecipeError when it does not divide into any that onnxruntime takes. */
export function embeddingGroups(
  model: Model,
  { embeddings, groupSize }: Pick<QuantizeRecipe, 'embeddings' | 'groupSize'>,
): number {
  const { hiddenSize } = model.shape;
  const size = embeddingGroupSize(hiddenSize, nominalGroupSize({ groupSize }));
  if (size !== undefined) return size;
  throw new RecipeError(
    `--embeddings ${embeddings}: rows of ${hiddenSize} values do not divide into blocks of 16 or more, which onnxruntime asks for; keep them float`,
  );
}

/** Quantizes the tables that `plans` has, and stores them. */
export async function quantizeEmbeddings(
  weights: WeightReader,
  plans: ReadonlyMap<LinearSite, SitePlan>,
  options: QuantizeOptions,
  blas: Blas,
  parts: PartStore,
  hooks: RunHooks,
): Promise<void> {
  const context = { blas, options: { ...options, symmetric: false }, note: () => undefined };
  const tables = new Map<string, QuantizedLinear>();
  for (const [table, plan] of plans) {
    const step = Math.max(1, Math.floor(ROWS_BYTES / (table.inFeatures * 4)));
    const pieces: QuantizedLinear[] = [];
    for (let start = 0; start < table.outFeatures; start += step) {
      hooks.signal?.throwIfAborted();
      const end = Math.min(start + step, table.outFeatures);
      const weight = await weights.loadRows(`${table.name}.weight`, start, end);
      const rows: LinearSite = { ...table, outFeatures: end - start };
      pieces.push((await rtn.apply(context, rows, weight, undefined, plan)).quantized);
    }
    tables.set(table.name, joinRows(pieces));
  }
  await parts.addEmbeddings(tables);
}

/** Stacks quantized rows; all pieces share widths and columns. Scales are F16 only if those of every piece are. */
function joinRows(pieces: readonly QuantizedLinear[]): QuantizedLinear {
  const [first] = pieces;
  if (pieces.length === 1) return first;
  const outFeatures = pieces.reduce((sum, piece) => sum + piece.outFeatures, 0);
  const groups = first.bits.length;
  const codes = new Uint8Array(outFeatures * first.inFeatures);
  const scales = new Float32Array(outFeatures * groups);
  const zeroPoints = new Uint8Array(outFeatures * groups);
  let row = 0;
  for (const piece of pieces) {
    codes.set(piece.codes, row * first.inFeatures);
    scales.set(piece.scales, row * groups);
    zeroPoints.set(piece.zeroPoints, row * groups);
    row += piece.outFeatures;
  }
  const scaleDtype = pieces.every((piece) => piece.scaleDtype === 'F16') ? 'F16' : 'F32';
  return { ...first, outFeatures, codes, scales, zeroPoints, scaleDtype };
}

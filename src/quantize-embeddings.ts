/** `--embeddings 4|8`: the embedding table and the output head, rounded to nearest in groups along the hidden size; a tied one is stored once. */
import { embeddingModules } from './artifacts/describe-modules.ts';
import type { ModelSource } from './artifacts/model-source.ts';
import { embeddingGroupSize } from './artifacts/onnx/lowering.ts';
import type { PartStore } from './artifacts/parts.ts';
import type { Blas } from './compute/blas.ts';
import { RecipeError } from './errors.ts';
import type { QuantizedLinear } from './methods/quantize/quantized-linear.ts';
import type { QuantizeOptions } from './methods/quantize/quantizer.ts';
import { rtn } from './methods/quantize/rtn.ts';
import type { LinearSite } from './model/model.ts';
import type { RunHooks } from './run.ts';

/** Rows of a table that are float32 at once; their codes stay. */
const ROWS_BYTES = 64 * 2 ** 20;

export async function quantizeEmbeddings(
  source: ModelSource,
  options: QuantizeOptions & { readonly bits: number },
  blas: Blas,
  parts: PartStore,
  hooks: RunHooks,
): Promise<void> {
  const { hiddenSize, vocabSize } = source.model.shape;
  const groupSize = embeddingGroupSize(hiddenSize, options.groupSize);
  if (groupSize === undefined) {
    throw new RecipeError(
      `--embeddings ${options.bits}: rows of ${hiddenSize} values do not divide into blocks of 16 or more, which onnxruntime asks for; keep them float`,
    );
  }
  const tables = new Map<string, QuantizedLinear>();
  for (const name of embeddingModules(source.model)) {
    const step = Math.max(1, Math.floor(ROWS_BYTES / (hiddenSize * 4)));
    const pieces: QuantizedLinear[] = [];
    for (let start = 0; start < vocabSize; start += step) {
      hooks.signal?.throwIfAborted();
      const end = Math.min(start + step, vocabSize);
      const weight = await source.weights.loadRows(`${name}.weight`, start, end);
      const site: LinearSite = {
        name,
        outFeatures: end - start,
        inFeatures: hiddenSize,
        hasBias: false,
        transposed: false,
        input: name,
      };
      const context = { blas, options: { ...options, groupSize }, note: () => undefined };
      const plan = await rtn.decide(context, site, weight, undefined);
      pieces.push((await rtn.apply(context, site, weight, undefined, plan)).quantized);
    }
    tables.set(name, joinRows(pieces));
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

/** Preset `best` (slim-llm section 5): one layer's codes for given widths and a given transform of its input. */
import type { CalibrationStats, Drift } from '../../../calibration/statistics.ts';
import type { AsyncKernels, Grid, Group } from '../../../compute/kernels/kernels.ts';
import { inlineKernels } from '../../../compute/kernels/wasm-kernels.ts';
import type { LinearSite } from '../../../model/model.ts';
import { columnRange, takeColumns } from '../columns.ts';
import { sweep } from '../gptq-core.ts';
import { decodeGroup, fitSearched } from '../grid.ts';
import { transformColumns } from '../input-transform.ts';
import { checkPlan } from '../plan.ts';
import { QuantizedBuilder } from '../quantized-builder.ts';
import { dequantize, type QuantizedLinear } from '../quantized-linear.ts';
import type { QuantizeContext, QuantizeResult, SitePlan, TransformKind } from '../quantizer.ts';
import { requireStats } from '../require-stats.ts';
import { correctForDrift } from './drift-target.ts';
import { sampledEnergy } from './energy.ts';
import { type PolishedGroup, polish } from './polish.ts';
import { type PreparedInput, prepareInput, type WeighedInput } from './prepared-input.ts';
import type { BestStep } from './steps.ts';

const SWEEPS = 3;

interface Prepared {
  readonly kind: TransformKind;
  readonly groupSize: number;
  readonly input: Promise<PreparedInput>;
}

// Entries live as long as the statistics they come from.
const shared = new WeakMap<CalibrationStats, Prepared>();

/** The input of `site`, prepared on first use. All sites that read it must agree on the transform: the statistics are used up by it. */
export function preparedInput(
  context: QuantizeContext,
  site: LinearSite,
  stats: CalibrationStats,
  kind: TransformKind,
  groupSize: number,
): Promise<PreparedInput> {
  const known = shared.get(stats);
  if (known) {
    const rotates = kind === 'perm-had' ? ` in groups of ${groupSize}` : '';
    if (known.kind !== kind || (rotates && known.groupSize !== groupSize))
      throw new Error(
        `${site.name}: its input is prepared with transform ${known.kind}, groups of ${known.groupSize}, not ${kind}${rotates}`,
      );
    return known.input;
  }
  const input = prepareInput(context, site, stats, kind, groupSize, { centred: centred(context, site, stats) });
  shared.set(stats, { kind, groupSize, input });
  return input;
}

/** Whether statistics are taken around their means: the bias then makes up for what quantization does to the mean output. */
function centred(context: QuantizeContext, site: LinearSite, stats: CalibrationStats): boolean {
  return site.hasBias && stats.drift?.means !== undefined && !without(context, 'bias');
}

function without({ options }: QuantizeContext, step: BestStep): boolean {
  return options.without?.includes(step) ?? false;
}

/** W^T (features, outFeatures) in stored order. */
export function storedColumns(site: LinearSite, weight: Float32Array, input: Pick<WeighedInput, 'transform'>): Float32Array {
  const { outFeatures, inFeatures } = site;
  const natural = columnRange(0, inFeatures);
  const stored = input.transform ? transformColumns(input.transform, weight, outFeatures, inFeatures) : weight;
  return takeColumns(site, stored, natural, new Set());
}

/** Follows a plan. */
export async function applyBest(
  context: QuantizeContext,
  site: LinearSite,
  weight: Float32Array,
  measured: CalibrationStats | undefined,
  plan: SitePlan,
): Promise<QuantizeResult> {
  checkPlan(site, plan);
  const stats = requireStats(site, measured);
  const { blas } = context;
  const kernels = context.kernels ?? inlineKernels();
  const input = await preparedInput(context, site, stats, plan.transform ?? 'none', plan.groupSize);
  const original = storedColumns(site, weight, input);
  const columns = original.slice();
  let alpha = 0;
  if (stats.drift && !without(context, 'asymmetric')) {
    const correction = await correctForDrift(
      blas,
      stats.drift,
      input,
      columns,
      context.options.alpha,
      centred(context, site, stats),
    );
    alpha = correction.alpha;
  }
  const target = columns.slice();
  const builder = new QuantizedBuilder(site, plan);
  const decoded = new Float32Array(columns.length);
  const groups: PolishedGroup[] = [];
  const m = site.outFeatures;
  await sweep(
    blas,
    kernels,
    input.factor,
    columns,
    plan.groupSize,
    async ({ start, end, group }) => {
      const bits = plan.bits[start / plan.groupSize];
      // Without compensation, errors stay where they are made.
      const own = without(context, 'compensation') ? { ...group, values: target.subarray(start * m, end * m) } : group;
      const fitted = await fitGrid(context, kernels, own, bits, input.energies.subarray(start, end));
      const grid = builder.setGrid(start / plan.groupSize, fitted);
      groups.push({ start, end, bits, grid, codes: new Uint8Array(0) });
      return { bits: new Uint8Array(group.columns).fill(bits), grid };
    },
    ({ start }, codes) => {
      const group = groups[groups.length - 1];
      group.codes = codes;
      decoded.set(decodeGroup(codes, group.bits, group.grid), start * m);
    },
  );
  if (without(context, 'compensation')) {
    for (const group of groups) {
      const values = { columns: group.end - group.start, rows: m, values: target.subarray(group.start * m, group.end * m) };
      group.codes = await kernels.roundCodes(values, group.bits, group.grid);
      decoded.set(decodeGroup(group.codes, group.bits, group.grid), group.start * m);
    }
  }
  if (!without(context, 'polish')) await polish(blas, kernels, input.hessian, target, decoded, groups, SWEEPS);
  for (const { start, end, codes } of groups) builder.setCodes(columnRange(start, end), codes);
  const error = difference(decoded, original);
  const [energy, loss] = await sampledEnergy(blas, input.hessian, [original, error], input.features);
  const decided = { ...builder.finish(), ...(input.transform && { transform: input.transform }) };
  const bias = centred(context, site, stats)
    ? await correctedBias(context, site, weight, decided, stats.drift!.means!)
    : undefined;
  const quantized = { ...decided, ...(bias && { bias }) };
  return {
    quantized,
    relativeError: energy > 0 ? loss / energy : 0,
    details: { alpha, shrinkage: input.shrinkage },
    remainder: () => ({ error: rowsOfDifference(target, decoded, m), gram: input.hessian }),
  };
}

/** `a - b`, element by element. */
function difference(a: Float32Array, b: Float32Array): Float32Array {
  const result = new Float32Array(a.length);
  for (let i = 0; i < a.length; i++) result[i] = a[i] - b[i];
  return result;
}

/** `a - b` of two W^T (features, rows), as (rows, features). */
function rowsOfDifference(a: Float32Array, b: Float32Array, rows: number): Float32Array {
  const features = a.length / rows;
  const difference = new Float32Array(a.length);
  for (let j = 0; j < features; j++) {
    for (let row = 0; row < rows; row++) difference[row * features + j] = a[j * rows + row] - b[j * rows + row];
  }
  return difference;
}

/** `b + W E[x'] - Wq E[x]`: the mean output is the float model's again (slim-llm 5.2). */
async function correctedBias(
  context: QuantizeContext,
  site: LinearSite,
  weight: Float32Array,
  quantized: QuantizedLinear,
  means: NonNullable<Drift['means']>,
): Promise<Float32Array> {
  if (!context.loadBias || !context.roundBias) throw new Error(`${site.name} has a bias, but the context cannot load it`);
  const bias = (await context.loadBias(site)).slice();
  const decoded = dequantize(quantized);
  const n = site.inFeatures;
  for (let row = 0; row < site.outFeatures; row++) {
    let change = 0;
    for (let j = 0; j < n; j++) change += weight[row * n + j] * means.float[j] - decoded[row * n + j] * means.actual[j];
    bias[row] += change;
  }
  return context.roundBias(site, bias);
}

async function fitGrid(
  context: QuantizeContext,
  kernels: AsyncKernels,
  group: Group,
  bits: number,
  energies: Float32Array,
): Promise<Grid> {
  if (bits === 0 || without(context, 'grid')) return fitSearched(kernels, group, bits);
  return (await kernels.fitWeighted(group, bits, energies)).grid;
}

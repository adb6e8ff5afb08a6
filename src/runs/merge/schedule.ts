/** From checked inputs to jobs: where every result goes, in what type, in blocks of how many rows, and on how many threads. */
import { bitsPerElement, elementCount } from '../../../formats/dtype.ts';
import { type CheckpointLayout, layOutCheckpoint } from '../../../formats/safetensors/placed-files.ts';
import type { DType } from '../../../formats/tensor.ts';
import type { TensorOrigin } from '../../artifacts/merge/tensor-origin.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { PlainEngine } from '../../compute/plain.ts';
import { RecipeError, UnsupportedError } from '../../errors.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import type { MergePlan } from '../../methods/merge/merge-plan.ts';
import type { AccessClass, Merger, Parameters, ParameterValues } from '../../methods/merge/merger.ts';
import { resolveParameters } from '../../methods/merge/parameters.ts';
import type { MergeInputs, OutputTensor } from './inputs.ts';
import { blockBytes, blockRowsFor, type MergeJob, type StoredOrigin, type StoredTensor, type TensorJob } from './jobs.ts';
import { mergekitParameters } from './mergekit/parameters.ts';
import { parametersOf } from './parameters.ts';
import type { MergeRecipe } from './recipe.ts';
import type { MergeStatistics } from './statistics.ts';

/** How a tensor of the result came to be. */
export type Disposition = 'merged' | 'passive' | 'copied' | 'tied';

export interface MergeSchedule {
  readonly merger: Merger;
  readonly layout: CheckpointLayout;
  readonly jobs: readonly TensorJob[];
  /** Threads that jobs run on, each with an equal share of the memory. */
  readonly threads: number;
  /** Most bytes of buffers at any time. */
  readonly peakBytes: number;
  /** Most bytes that will be read, every pass counted. */
  readonly readBytes: number;
  readonly writtenBytes: number;
  /** Per tensor of the result, in order: what was done, and by which rule. */
  readonly dispositions: ReadonlyMap<string, { readonly disposition: Disposition; readonly rule: string; readonly dtype: DType }>;
}

/** Throws RecipeError and UnsupportedError for what cannot be done, before anything is read or written. */
export function scheduleMerge(
  inputs: MergeInputs,
  recipe: MergeRecipe,
  merger: Merger,
  { plan, statistics }: { readonly plan?: MergePlan | undefined; readonly statistics?: MergeStatistics | undefined } = {},
): MergeSchedule {
  checkExperts(inputs, merger);
  if (plan) checkPlan(inputs, plan);
  const { outputs } = inputs;
  const dtypes = new Map(outputs.map((output) => [output.name, dtypeOf(output, recipe)]));
  const layout = layOutCheckpoint(
    outputs.map(({ name, shape }) => ({ name, dtype: dtypes.get(name)!, shape })),
    { maxShardBytes: recipe.shardSize, metadata: new Map([['format', 'pt']]) },
  );
  const labels = inputs.experts.map(({ label }) => label);
  const valuesOf = plan
    ? planValues(plan, merger)
    : recipe.mergekit
      ? mergekitParameters(merger, recipe, recipe.mergekit, inputs)
      : parametersOf(
          merger,
          recipe,
          labels,
          outputs.map(({ name }) => name),
        );
  const make = (output: OutputTensor, budget: number) =>
    jobOf({ inputs, merger, plan, statistics, layout, labels, dtypes, valuesOf, budget }, output);
  const { jobs, threads } = shareMemory(recipe.threads, (count) =>
    outputs.filter(({ made }) => made.by !== 'tie').map((output) => make(output, Math.floor(recipe.maxMemory / count))),
  );
  const peaks = jobs.map((job) => bufferBytes(job, merger)).sort((a, b) => b - a);
  return {
    merger,
    layout,
    jobs,
    threads,
    peakBytes: peaks.slice(0, threads).reduce((sum, bytes) => sum + bytes, 0),
    readBytes: jobs.reduce((sum, job) => sum + readBytesOf(job, merger, recipe), 0),
    writtenBytes: layout.files.reduce((sum, { byteLength }) => sum + byteLength, 0),
    dispositions: new Map(
      outputs.map((output) => [output.name, { ...dispositionOf(output, merger, labels, plan), dtype: dtypes.get(output.name)! }]),
    ),
  };
}

/** Everything that is not learned stands still, or moves by the mean task vector. */
const PASSIVE = mergerOf('task-arithmetic');

/** A plan's start for what is learned, its passive rule for the rest. */
function planValues(
  { start, passive, tensors, experts }: MergePlan,
  merger: Merger,
): (tensor: string) => ParameterValues<Parameters> {
  const values = (of: Merger, lambda: number) => resolveParameters(of, { shared: { lambda } }, experts, 'best');
  const [learned, rest] = [values(merger, start.scale), values(PASSIVE, passive === 'mean' ? 1 / experts.length : 0)];
  return (tensor) => (Object.hasOwn(tensors, tensor) ? learned : rest);
}

/** Throws RecipeError for a plan of other experts or other tensors. */
function checkPlan({ experts, outputs }: MergeInputs, plan: MergePlan): void {
  const labels = experts.map(({ label }) => label);
  if (labels.join() !== plan.experts.join()) {
    throw new RecipeError(`--plan: is of the experts ${plan.experts.join(', ')}, and ${labels.join(', ')} were given`);
  }
  const elements = new Map(outputs.map(({ name, shape }) => [name, elementCount(shape)]));
  for (const [name, { bounds, coefficients }] of Object.entries(plan.tensors)) {
    if (elements.get(name) !== bounds.at(-1)) {
      throw new RecipeError(
        `--plan: has ${bounds.at(-1)} elements for tensor "${name}", the base has ${elements.get(name) ?? 'no such tensor'}`,
      );
    }
    if (coefficients.length !== labels.length || coefficients.some(({ length }) => length !== bounds.length - 1)) {
      throw new RecipeError(
        `--plan: tensor "${name}" has not one coefficient for each of ${bounds.length - 1} chunks of ${labels.length} experts`,
      );
    }
  }
}

function checkExperts({ experts, base }: MergeInputs, { name, experts: allowed, base: needed }: Merger): void {
  const { min, max = Number.POSITIVE_INFINITY } = allowed;
  if (experts.length < min || experts.length > max) {
    const range = min === max ? `${min}` : max === Number.POSITIVE_INFINITY ? `at least ${min}` : `${min} to ${max}`;
    throw new RecipeError(`--method ${name}: takes ${range} experts, and ${experts.length} were given`);
  }
  if (needed === 'required' && !base) throw new RecipeError(`--base: ${name} needs the model that the experts were trained from`);
}

/** Fewer threads when a tensor would not fit into a thread's share of the memory. */
function shareMemory(threads: number, make: (threads: number) => TensorJob[]): { jobs: TensorJob[]; threads: number } {
  for (let count = threads; ; count = Math.ceil(count / 2)) {
    try {
      const jobs = make(count);
      return { jobs, threads: Math.max(1, Math.min(count, jobs.length)) };
    } catch (error) {
      if (count === 1 || !(error instanceof UnsupportedError)) throw error;
    }
  }
}

function dtypeOf({ dtype, made }: OutputTensor, { dtype: asked }: MergeRecipe): DType {
  return asked === undefined || made.by === 'copy' ? dtype : (asked.toUpperCase() as DType);
}

/** Methods on matrices treat everything else element by element. */
function accessOf(merger: Merger, { role }: OutputTensor): AccessClass {
  return merger.access === 'matrix' && role !== 'matrix' ? 'elementwise' : merger.access;
}

function dispositionOf(
  { name, made, role }: OutputTensor,
  merger: Merger,
  labels: readonly string[],
  plan: MergePlan | undefined,
): { disposition: Disposition; rule: string } {
  switch (made.by) {
    case 'copy':
      return { disposition: 'copied', rule: ruleOf(made.input, labels) };
    case 'tie':
      return { disposition: 'tied', rule: `to ${made.like}` };
    case 'merge':
      if (plan && Object.hasOwn(plan.tensors, name)) return { disposition: 'merged', rule: plan.method };
      if (plan) return { disposition: 'passive', rule: plan.passive === 'mean' ? 'mean of the task vectors' : 'of the base' };
      return merger.access === 'matrix' && role !== 'matrix'
        ? { disposition: 'passive', rule: 'mean of the task vectors' }
        : { disposition: 'merged', rule: merger.name };
    default:
      return made satisfies never;
  }
}

/** Experts come first, then the base, then what was made for the result. */
function ruleOf(input: number, labels: readonly string[]): string {
  if (input < labels.length) return `of ${labels[input]}`;
  return input === labels.length ? 'of the base' : 'made';
}

interface JobParts {
  readonly inputs: MergeInputs;
  readonly merger: Merger;
  readonly plan: MergePlan | undefined;
  readonly statistics: MergeStatistics | undefined;
  readonly layout: CheckpointLayout;
  readonly labels: readonly string[];
  readonly dtypes: ReadonlyMap<string, DType>;
  readonly valuesOf: ReturnType<typeof parametersOf>;
  readonly budget: number;
}

function jobOf(
  { inputs, merger: method, plan, statistics, layout, labels, dtypes, valuesOf, budget }: JobParts,
  output: OutputTensor,
): TensorJob {
  const { name, shape, role, made } = output;
  const twins = inputs.outputs.filter(({ made: other }) => other.by === 'tie' && other.like === name);
  const places = [name, ...twins.map((twin) => twin.name)].map((place) => layout.places.get(place)!);
  if (made.by === 'copy') return { kind: 'copy', name, places, tensor: storedTensor(inputs, made.input, made.name) };
  if (made.by === 'tie') throw new Error(`"${name}" is written with "${made.like}"`);
  const coefficients = plan && Object.hasOwn(plan.tensors, name) ? plan.tensors[name] : undefined;
  const merger = plan && !coefficients ? PASSIVE : method;
  const access = accessOf(merger, output);
  // Chunks are of (out, in) weights, whatever the method on them.
  const turned = output.transposed && (access !== 'elementwise' || coefficients !== undefined);
  const stacked = access === 'matrix' && shape.length === 3;
  const [columns, rows] = [shape.at(-1) ?? 1, elementCount(shape.slice(stacked ? 1 : 0, -1))];
  const seen = turned ? [columns, rows] : stacked ? [rows, columns] : shape;
  const baseIndex = inputs.all.length - 1;
  const whole = turned || access === 'matrix';
  const stored = made.experts.every(({ kind }) => kind === 'stored' || kind === 'base');
  // With Gram matrices at hand a system is solved instead.
  const decomposes = merger.statistics !== 'gram';
  const sizing = { name, rows, columns, experts: labels.length, access, side: merger.side, decomposes, whole, stored, budget };
  const blockRows = blockRowsFor(sizing);
  return {
    kind: 'merge',
    name,
    places,
    method: merger.name,
    tensor: { name, shape: seen, role, experts: labels },
    ...(coefficients ? { coefficients } : {}),
    values: valuesOf(name),
    dtype: dtypes.get(name)!,
    rows,
    columns,
    turned,
    stack: stacked ? shape[0] : 1,
    ...(made.base?.kind === 'stored' ? { base: storedTensor(inputs, baseIndex, made.base.name) } : {}),
    usesBase: merger.base !== 'unused' && made.base !== undefined,
    experts: made.experts.map((origin, input) => storedOrigin(inputs, input, origin)),
    ...(statistics?.tensors.has(name) ? { statistics: statistics.tensors.get(name)! } : {}),
    blockRows,
  };
}

function storedTensor({ all }: MergeInputs, input: number, name: string): StoredTensor {
  const { tensors } = all[input];
  const { dtype, shape, byteLength } = tensors.tensors.get(name)!;
  return { input, name, dtype, shape, byteLength, ...tensors.placeOf(name) };
}

function storedOrigin(inputs: MergeInputs, input: number, origin: TensorOrigin): StoredOrigin {
  const at = (name: string) => storedTensor(inputs, input, name);
  switch (origin.kind) {
    case 'base':
      return origin;
    case 'stored':
      return { kind: 'stored', tensor: at(origin.name) };
    case 'added':
      return { kind: 'added', tensor: at(origin.name), scale: origin.scale };
    case 'low-rank': {
      const { a, b, e, magnitude, scale, transposed } = origin;
      const optional = {
        ...(e === undefined ? {} : { e: at(e) }),
        ...(magnitude === undefined ? {} : { magnitude: at(magnitude) }),
      };
      return { kind: 'low-rank', a: at(a), b: at(b), ...optional, scale, transposed };
    }
    default:
      return origin satisfies never;
  }
}

function bufferBytes(job: TensorJob, { access, side }: Merger): number {
  if (job.kind === 'copy') return 0;
  const { columns, blockRows, experts, tensor } = job;
  const whole = job.turned || (access === 'matrix' && tensor.role === 'matrix');
  return blockBytes({
    rows: blockRows,
    columns,
    experts: experts.length,
    access: whole || access !== 'matrix' ? access : 'elementwise',
    side,
    whole,
  });
}

/** Most bytes that a job reads: a scan may turn out not to be needed. Asks the method for its scans, which also has it check the values. */
function readBytesOf(job: TensorJob, merger: Merger, recipe: MergeRecipe): number {
  if (job.kind === 'copy') return job.tensor.byteLength;
  const context = { seed: recipe.seed, blas: NO_PRODUCTS, note: () => {}, ...(recipe.compat ? { compat: recipe.compat } : {}) };
  const { scans } = merger.prepare(job.tensor, job.values, context);
  const passes = job.blockRows >= job.rows ? [1] : [1, ...scans.map(({ every = 1 }) => every)];
  const rows = passes.reduce((sum, every) => sum + rowsRead(job, every), 0);
  const stored = job.experts.flatMap((origin) => (origin.kind === 'stored' ? [origin.tensor] : []));
  const all = job.base && (job.usesBase || stored.length < job.experts.length) ? [...stored, job.base] : stored;
  const elements = rows * job.columns * job.stack;
  return all.reduce((sum, { dtype }) => sum + (elements * bitsPerElement(dtype)) / 8, 0);
}

/** Rows of one block in so many. */
function rowsRead({ rows, blockRows }: MergeJob, every: number): number {
  let read = 0;
  for (let start = 0; start < rows; start += every * blockRows) read += Math.min(blockRows, rows - start);
  return read;
}

/**
 * Seconds of one core for the singular vectors that methods on matrices take, roughly: measured 1 ns times R^3 for the eigenvectors, and 0.4 ns for each
 * R^2 n of the products beside them (bench/results/matrix-merge.md); of each expert, and of two matrices of all, or once where a method works on the columns.
 */
export function matrixSeconds({ outputs, experts }: Pick<MergeInputs, 'outputs' | 'experts'>, side?: Merger['side']): number {
  let total = 0;
  for (const { made, role, shape, transposed } of outputs) {
    if (made.by !== 'merge' || role !== 'matrix') continue;
    const [rows, columns] = transposed ? shape.slice(-2).reverse() : shape.slice(-2);
    const square = side === 'columns' ? columns : Math.min(rows, columns);
    const each = 1e-9 * square ** 3 + 0.4e-9 * square ** 2 * Math.max(rows, columns);
    total += elementCount(shape.slice(0, -2)) * (side === 'columns' ? 1 : experts.length + 2) * each;
  }
  return total;
}

/** Preparing a merge multiplies nothing. */
const NO_PRODUCTS = createBlas(new PlainEngine());

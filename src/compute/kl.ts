/** Mean Kullback-Leibler divergence between rows of logits, in chunks of rows that stay in the cache. */
import type { KlTarget, Matrix } from './blas.ts';
import type { CompileOptions, NdArray, Program } from './engine.ts';
import { type LiteralNode, literalGraph } from './literal-graph.ts';

/** Logits of one chunk: large enough to hide the cost of a call, small enough for the cache. */
const CHUNK = 2 ** 18;

export type Compile = (model: ReturnType<typeof literalGraph>, options: CompileOptions) => Promise<Program>;

const logSoftmax = (input: string, output: string): LiteralNode => ({
  op: 'LogSoftmax',
  inputs: [input],
  output,
  attributes: { axis: -1 },
});
const softmax = (input: string, output: string): LiteralNode => ({ ...logSoftmax(input, output), op: 'Softmax' });
/** Per row: sum of p (log p - log softmax(trial)). Differences of logarithms are small, so their sums lose nothing in fp32. */
const divergence: readonly LiteralNode[] = [
  logSoftmax('trial', 'log_q'),
  { op: 'Sub', inputs: ['log_p', 'log_q'], output: 'log_ratio' },
  { op: 'Mul', inputs: ['p', 'log_ratio'], output: 'terms' },
  { op: 'ReduceSum', inputs: ['terms', 'last'], output: 'kl', attributes: { keepdims: 0 } },
];

const LOGITS = ['F32', 'rows', 'columns'] as const;

const DIRECT = literalGraph('mean kl', {
  inputs: { target: LOGITS, trial: LOGITS },
  outputs: { kl: ['F32', 'rows'] },
  nodes: [softmax('target', 'p'), logSoftmax('target', 'log_p'), ...divergence],
  axes: { last: -1 },
});

const PREPARE = literalGraph('target distribution', {
  inputs: { target: LOGITS },
  outputs: { p: LOGITS, log_p: LOGITS },
  nodes: [softmax('target', 'p'), logSoftmax('target', 'log_p')],
});

const PREPARED = literalGraph('mean kl of a prepared target', {
  inputs: { p: LOGITS, log_p: LOGITS, trial: LOGITS },
  outputs: { kl: ['F32', 'rows'] },
  nodes: divergence,
  axes: { last: -1 },
});

/** Mean over rows of KL(softmax(target) || softmax(trial)), in nats. */
export async function meanKl(compile: Compile, target: Matrix, trial: Matrix): Promise<number> {
  assertSameShape(target, trial);
  const program = await compile(DIRECT, { key: 'mean kl' });
  let total = 0;
  for (const [start, end] of chunks(target)) {
    const { kl } = await program.run({ target: rowsOf(target, start, end), trial: rowsOf(trial, start, end) });
    total += sum(kl);
  }
  return total / target.rows;
}

/** Softmax of the target and its logarithm: what stays the same from trial to trial. */
export class PreparedKl implements KlTarget {
  readonly #p: Matrix;
  readonly #logP: Matrix;
  readonly #program: Program;

  private constructor(p: Matrix, logP: Matrix, program: Program) {
    this.#p = p;
    this.#logP = logP;
    this.#program = program;
  }

  /** The logarithm takes the place of the target's logits, the softmax that of `memory`. */
  static async prepare(compile: Compile, target: Matrix, memory?: Float32Array): Promise<PreparedKl> {
    const prepare = await compile(PREPARE, { key: 'target distribution' });
    const p: Matrix = { ...target, data: memory ?? new Float32Array(target.data.length) };
    const [longest] = chunks(target);
    const logs = new Float32Array(longest === undefined ? 0 : longest[1] * target.columns);
    for (const [start, end] of chunks(target)) {
      const logits = rowsOf(target, start, end);
      const logP: NdArray = { ...logits, data: logs.subarray(0, logits.data.length) };
      await prepare.run({ target: logits }, { into: { p: rowsOf(p, start, end), log_p: logP } });
      target.data.set(logP.data as Float32Array, start * target.columns);
    }
    return new PreparedKl(p, target, await compile(PREPARED, { key: 'mean kl of a prepared target' }));
  }

  async meanKl(trial: Matrix): Promise<number> {
    assertSameShape(this.#p, trial);
    let total = 0;
    for (const [start, end] of chunks(trial)) {
      const [p, logP, logits] = [this.#p, this.#logP, trial].map((matrix) => rowsOf(matrix, start, end));
      const { kl } = await this.#program.run({ p, log_p: logP, trial: logits });
      total += sum(kl);
    }
    return total / trial.rows;
  }
}

function assertSameShape(target: Matrix, trial: Matrix): void {
  if (target.rows === trial.rows && target.columns === trial.columns) return;
  throw new Error(`target (${target.rows}, ${target.columns}) and trial (${trial.rows}, ${trial.columns}) differ in shape`);
}

function* chunks({ rows, columns }: Matrix): Generator<readonly [start: number, end: number]> {
  const step = Math.max(1, Math.floor(CHUNK / columns));
  for (let start = 0; start < rows; start += step) yield [start, Math.min(rows, start + step)];
}

function rowsOf({ columns, data }: Matrix, start: number, end: number): NdArray {
  return { dtype: 'F32', shape: [end - start, columns], data: data.subarray(start * columns, end * columns) };
}

function sum({ data }: NdArray): number {
  let total = 0;
  for (const value of data as Float32Array) total += value;
  return total;
}

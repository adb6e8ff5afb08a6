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
const dotRows = (a: string, b: string, output: string): LiteralNode[] => [
  { op: 'Mul', inputs: [a, b], output: 'terms' },
  { op: 'ReduceSum', inputs: ['terms', 'last'], output, attributes: { keepdims: 0 } },
];

const DIRECT = literalGraph('mean kl', {
  inputs: { target: ['F32', 'rows', 'columns'], trial: ['F32', 'rows', 'columns'] },
  outputs: { kl: ['F32', 'rows'] },
  nodes: [
    softmax('target', 'p'),
    logSoftmax('target', 'log_p'),
    logSoftmax('trial', 'log_q'),
    { op: 'Sub', inputs: ['log_p', 'log_q'], output: 'log_ratio' },
    ...dotRows('p', 'log_ratio', 'kl'),
  ],
  axes: { last: -1 },
});

const SOFTMAX = literalGraph('softmax', {
  inputs: { logits: ['F32', 'rows', 'columns'] },
  outputs: { p: ['F32', 'rows', 'columns'] },
  nodes: [softmax('logits', 'p')],
});

/** Sum over columns of p log softmax(trial): minus the cross entropy. */
const CROSS = literalGraph('cross entropy', {
  inputs: { p: ['F32', 'rows', 'columns'], trial: ['F32', 'rows', 'columns'] },
  outputs: { sums: ['F32', 'rows'] },
  nodes: [logSoftmax('trial', 'log_q'), ...dotRows('p', 'log_q', 'sums')],
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

/** Softmax of the target, in its own memory, and its entropy: what stays the same from trial to trial. */
export class PreparedKl implements KlTarget {
  readonly #p: Matrix;
  readonly #cross: Program;
  /** Sum over rows of p log p. */
  readonly #own: Float64Array;

  private constructor(p: Matrix, cross: Program, own: Float64Array) {
    this.#p = p;
    this.#cross = cross;
    this.#own = own;
  }

  static async prepare(compile: Compile, target: Matrix): Promise<PreparedKl> {
    const softmaxProgram = await compile(SOFTMAX, { key: 'softmax' });
    const cross = await compile(CROSS, { key: 'cross entropy' });
    const own = new Float64Array(target.rows);
    let memory = new Float32Array(0);
    for (const [start, end] of chunks(target)) {
      const logits = rowsOf(target, start, end);
      if (memory.length < logits.data.length) memory = new Float32Array(logits.data.length);
      const p: NdArray = { ...logits, data: memory.subarray(0, logits.data.length) };
      await softmaxProgram.run({ logits }, { into: { p } });
      const { sums } = await cross.run({ p, trial: logits });
      own.set(sums.data as Float32Array, start);
      (logits.data as Float32Array).set(p.data as Float32Array);
    }
    return new PreparedKl(target, cross, own);
  }

  async meanKl(trial: Matrix): Promise<number> {
    assertSameShape(this.#p, trial);
    let total = 0;
    for (const [start, end] of chunks(trial)) {
      const { sums } = await this.#cross.run({ p: rowsOf(this.#p, start, end), trial: rowsOf(trial, start, end) });
      // The two sums of a row are close: subtracted one by one, in fp64, their common part is gone before the total grows.
      for (let row = start; row < end; row++) total += this.#own[row] - Number(sums.data[row - start]);
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

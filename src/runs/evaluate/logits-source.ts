/** Logits of a model over windows of tokens, whoever computes them: blocks on the engine, or an ONNX artifact as a runtime runs it. */

import type { AdapterFeed } from '../../artifacts/onnx/attach-adapter.ts';
import { branchNames } from '../../artifacts/onnx/linear-initializers.ts';
import { BlockRunner, DEFAULT_BATCH_TOKENS } from '../../calibration/block-runner.ts';
import { embedTokens } from '../../calibration/embed.ts';
import { HiddenStates, type HiddenWindow } from '../../calibration/hidden-states.ts';
import { Spool } from '../../calibration/state-store.ts';
import type { Blas, Matrix } from '../../compute/blas.ts';
import type { Engine, NdArray, Program } from '../../compute/engine.ts';
import { RecipeError } from '../../errors.ts';
import type { Model, WeightReader } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';
import { OutputHead } from './output-head.ts';

/** Logits for consecutive rows of one window: row r follows token `start + r` of window `windowIndex`. */
export interface LogitRows {
  readonly windowIndex: number;
  readonly start: number;
  readonly logits: Matrix;
}

export interface LogitsSource extends AsyncDisposable {
  /** Time spent in forward passes so far, seconds. */
  readonly seconds: number;
  /** Rows of all windows in order; every window's last row is included. Two sources over equal windows with equal `rowsAtOnce` yield equal pieces. */
  rows(rowsAtOnce: number): AsyncIterable<LogitRows>;
}

export interface LogitsOptions {
  readonly model: Model;
  readonly engine: Engine;
  readonly windows: readonly Int32Array[];
  readonly hooks: RunHooks;
}

export interface BlockLogitsOptions extends LogitsOptions {
  readonly weights: WeightReader;
  readonly blas: Blas;
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  /** Bytes of hidden states kept in RAM; the rest is spooled. */
  readonly ramBytes: number;
}

/** Weights decoded, float arithmetic, one block in memory at a time. */
export class BlockLogits implements LogitsSource {
  seconds = 0;
  readonly #states: HiddenStates;
  readonly #spool: Spool;
  readonly #head: OutputHead;

  private constructor(states: HiddenStates, spool: Spool, head: OutputHead) {
    this.#states = states;
    this.#spool = spool;
    this.#head = head;
  }

  /** Runs all blocks over all windows; what remains to do for logits is the head. */
  static async run(options: BlockLogitsOptions): Promise<BlockLogits> {
    const { model, engine, windows, hooks, weights, path } = options;
    const spool = new Spool({ ramBytes: options.ramBytes });
    const states = new HiddenStates(windows, model.shape.hiddenSize, DEFAULT_BATCH_TOKENS, spool);
    const source = new BlockLogits(states, spool, new OutputHead(model, weights, engine, options.blas));
    try {
      const runner = new BlockRunner(model, engine, path);
      const total = states.tokenCount * model.blocks.length;
      const started = performance.now();
      await embedTokens(model, weights, states, { path });
      for (const block of model.blocks) {
        hooks.signal?.throwIfAborted();
        await runner.advance(states, block, weights, (done) =>
          hooks.progress?.({ phase: `${path}: ${block.name}`, done: block.index * states.tokenCount + done, total }),
        );
      }
      source.seconds = (performance.now() - started) / 1000;
      return source;
    } catch (error) {
      await source[Symbol.asyncDispose]();
      throw error;
    }
  }

  async *rows(rowsAtOnce: number): AsyncGenerator<LogitRows> {
    for await (const window of this.#states.perWindow()) {
      for (const [start, hidden] of slices(window, this.#states.hiddenSize, rowsAtOnce)) {
        const from = performance.now();
        const logits = await this.#head.logits(hidden);
        this.seconds += (performance.now() - from) / 1000;
        yield { windowIndex: window.windowIndex, start, logits };
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#states[Symbol.asyncDispose]();
    await this.#spool[Symbol.asyncDispose]();
  }
}

function* slices(window: HiddenWindow, columns: number, rowsAtOnce: number): Generator<[number, Matrix]> {
  for (let start = 0; start < window.rowCount; start += rowsAtOnce) {
    const end = Math.min(start + rowsAtOnce, window.rowCount);
    yield [start, { rows: end - start, columns, data: window.hidden.subarray(start * columns, end * columns) }];
  }
}

/** Where the ONNX file is, and an adapter for its inputs. */
export interface ArtifactLogitsOptions extends LogitsOptions {
  readonly onnxPath: string;
  readonly adapter?: { readonly path: string; readonly feeds: readonly AdapterFeed[] };
}

/** Feeds of the inputs that take an adapter: its own factors, of rank 0 where it has none. */
function factorFeeds({ model, onnxPath, adapter }: ArtifactLogitsOptions, inputs: readonly string[]): Record<string, NdArray> {
  const feeds: Record<string, NdArray> = {};
  for (const { name, outFeatures, inFeatures } of model.blocks.flatMap(({ sites }) => sites)) {
    const { down, up } = branchNames(name);
    if (!inputs.includes(down)) continue;
    feeds[down] = { dtype: 'F32', shape: [inFeatures, 0], data: new Float32Array() };
    feeds[up] = { dtype: 'F32', shape: [0, outFeatures], data: new Float32Array() };
  }
  for (const { name, shape, data } of adapter?.feeds ?? []) {
    if (!feeds[name])
      throw new RecipeError(
        `--adapter ${adapter!.path}: ${onnxPath} has no input "${name}"; adapt convert --to onnx-inputs makes them, --accuracy exact needs none`,
      );
    feeds[name] = { dtype: 'F32', shape, data };
  }
  return feeds;
}

/** The ONNX file as it is, one window a run, from an empty cache. */
export class ArtifactLogits implements LogitsSource {
  seconds = 0;
  readonly #options: LogitsOptions;
  readonly #program: Program;
  readonly #factors: Record<string, NdArray>;

  private constructor(options: LogitsOptions, program: Program, factors: Record<string, NdArray>) {
    this.#options = options;
    this.#program = program;
    this.#factors = factors;
  }

  /** Throws RecipeError for an adapter that the artifact has no inputs for. */
  static async open(options: ArtifactLogitsOptions): Promise<ArtifactLogits> {
    const { engine, onnxPath } = options;
    const program = await engine.open(onnxPath);
    try {
      return new ArtifactLogits(options, program, factorFeeds(options, program.inputNames));
    } catch (error) {
      await program[Symbol.asyncDispose]();
      throw error;
    }
  }

  async *rows(rowsAtOnce: number): AsyncGenerator<LogitRows> {
    const { model, windows, hooks } = this.#options;
    const columns = model.shape.vocabSize;
    for (let windowIndex = 0; windowIndex < windows.length; windowIndex++) {
      hooks.signal?.throwIfAborted();
      const ids = windows[windowIndex];
      const from = performance.now();
      const { logits } = await this.#program.run({ ...promptFeeds(model, ids), ...this.#factors }, { outputs: ['logits'] });
      this.seconds += (performance.now() - from) / 1000;
      hooks.progress?.({ phase: 'artifact', done: windowIndex + 1, total: windows.length });
      for (let start = 0; start < ids.length; start += rowsAtOnce) {
        const end = Math.min(start + rowsAtOnce, ids.length);
        const data = (logits.data as Float32Array).subarray(start * columns, end * columns);
        yield { windowIndex, start, logits: { rows: end - start, columns, data } };
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program[Symbol.asyncDispose]();
  }
}

/** Feeds of a decoder artifact for a whole prompt and an empty cache. */
export function promptFeeds(model: Model, ids: Int32Array): Record<string, NdArray> {
  const { blockCount, kvHeadCount, headDim } = model.shape;
  const feeds: Record<string, NdArray> = {
    input_ids: { dtype: 'I64', shape: [1, ids.length], data: BigInt64Array.from(ids, BigInt) },
    attention_mask: { dtype: 'I64', shape: [1, ids.length], data: new BigInt64Array(ids.length).fill(1n) },
  };
  for (let block = 0; block < blockCount; block++) {
    for (const kind of ['key', 'value']) {
      feeds[`past_key_values.${block}.${kind}`] = {
        dtype: 'F32',
        shape: [1, kvHeadCount, 0, headDim],
        data: new Float32Array(0),
      };
    }
  }
  return feeds;
}

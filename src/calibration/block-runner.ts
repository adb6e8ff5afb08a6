/** One block at a time on an engine: its weights loaded once, its graph run over every batch of hidden states. */
import { attentionOn } from '../compute/devices.ts';
import type { Engine, NdArray, Program, ResidentArray } from '../compute/engine.ts';
import { FusedGrams, type GramTarget } from '../compute/fused-gram.ts';
import { FormatError } from '../errors.ts';
import { pruneModel } from '../graph/prune.ts';
import type { Block, BlockGraph, Model, WeightReader } from '../model/model.ts';
import type { BlockCut } from './block-cut.ts';
import { dropPads, type HiddenStates, type WindowBatch } from './hidden-states.ts';

/** Tokens, pads included, that run at once: enough for a GEMM at full speed, small beside a block's weights. */
export const DEFAULT_BATCH_TOKENS = 2048;

/** Graph output: the hidden states that enter the next block. */
export const HIDDEN_OUT = 'hidden_out';

/** A block ready to run: its compiled graph and its weights as the graph's inputs. Disposing takes the weights off the device. */
export interface LoadedBlock extends AsyncDisposable {
  readonly block: Block;
  readonly graph: BlockGraph;
  readonly program: Program;
  readonly weights: Readonly<Record<string, NdArray>>;
  /** Where its runs begin; absent: at the block's start. */
  readonly from?: BlockCut | undefined;
  /** What its runs sum up by themselves. */
  readonly grams?: FusedGrams | undefined;
}

export class BlockRunner {
  readonly #model: Model;
  readonly #engine: Engine;
  /** The model, as the user named it; used in messages. */
  readonly #path: string;
  /** Output memory by graph output, grown to the largest batch and used again. */
  readonly #scratch = new Map<string, Float32Array>();

  constructor(model: Model, engine: Engine, path: string) {
    this.#model = model;
    this.#engine = engine;
    this.#path = path;
  }

  /**
   * Compiles (or finds) what computes `outputs` of the block's graph, for windows like those of `states`, and reads the weights that takes.
   * The program belongs to the engine. Where the device keeps what it is given, the weights are moved there once.
   * @param targets outputs that every run sums x x^T of @param from where an earlier pass has got to
   */
  async load(
    block: Block,
    weights: WeightReader,
    states: HiddenStates,
    outputs: readonly string[] = [HIDDEN_OUT],
    targets: readonly GramTarget[] = [],
    from?: BlockCut,
  ): Promise<LoadedBlock> {
    const graph = this.#model.blockGraph(block, states.longest, attentionOn(this.#engine.device), weights.routed?.bind(weights));
    const given = [...(from?.values.keys() ?? [])];
    const pruned = pruneModel(graph.model, outputs, given);
    const grams = targets.length === 0 ? undefined : new FusedGrams(pruned, targets);
    const model = grams?.model ?? pruned;
    // An arena would keep the largest run's activations while the block is quantized: 0.8 GB for a 7B block of 2048 tokens,
    // against 4 % more time.
    const program = await this.#engine.compile(model, {
      key: `${graph.key} ${given.join(' ')} -> ${[...outputs, ...(grams?.outputs ?? [])].join(' ')}`,
      memoryArena: false,
    });
    const feeds: Record<string, NdArray> = {};
    const resident: ResidentArray[] = [];
    const dispose = async (): Promise<void> => {
      for (const array of resident) await array[Symbol.asyncDispose]();
    };
    try {
      for (const input of model.graph.inputs) {
        const source = graph.weights.get(input.name);
        if (source === undefined) continue;
        const name = typeof source === 'string' ? source : `${source.name}.weight`;
        const data = typeof source === 'string' ? await weights.load(source) : await weights.loadSite(source);
        const array: NdArray = { dtype: 'F32', shape: this.#weightShape(name, input.shape ?? [], data.length), data };
        const moved = await this.#engine.upload?.(array);
        if (moved) resident.push(moved);
        feeds[input.name] = moved ?? array;
      }
    } catch (error) {
      await dispose();
      throw error;
    }
    return { block, graph, program, weights: feeds, from, grams, [Symbol.asyncDispose]: dispose };
  }

  /**
   * Runs one batch. The result, by the names asked for (`hidden_out` or graph outputs of site inputs), holds real rows
   * only, (rows, features), in memory that the next run overwrites. Throws FormatError `non-finite-activation`.
   */
  async run(loaded: LoadedBlock, states: HiddenStates, batch: WindowBatch, outputs: ReadonlyMap<string, number>) {
    const { grams } = loaded;
    if (grams === undefined) return this.#run(loaded, states, batch, outputs);
    const memory = grams.memory();
    const made = await this.#run(loaded, states, batch, outputs, memory);
    const broken = grams.add(memory, batch.rowEnd - batch.rowStart);
    if (broken.length > 0) {
      // Which token it was, only the activations tell.
      await this.#run(loaded, states, batch, new Map(broken.map(({ value, features }) => [value, features])));
    }
    return made;
  }

  async #run(
    loaded: LoadedBlock,
    states: HiddenStates,
    batch: WindowBatch,
    outputs: ReadonlyMap<string, number>,
    products: Readonly<Record<string, NdArray>> = {},
  ) {
    const { hidden, lengths } = await states.feeds(batch);
    const rows = batch.lengths.length * batch.sequence;
    const into: Record<string, NdArray> = { ...products };
    for (const [name, features] of outputs) {
      into[name] = {
        dtype: 'F32',
        shape: [batch.lengths.length, batch.sequence, features],
        data: this.#memory(name, rows * features),
      };
    }
    const feeds: Record<string, NdArray> = {
      ...loaded.weights,
      ...(await loaded.from?.feeds(batch)),
      ...loaded.grams?.feeds(batch.lengths, batch.sequence),
    };
    // What only norms the hidden states knows nothing of their lengths.
    for (const name of loaded.program.inputNames) {
      if (name === 'hidden') feeds[name] = hidden;
      else if (name === 'lengths') feeds[name] = lengths;
    }
    const results = await loaded.program.run(feeds, { outputs: Object.keys(into), into });
    const made = new Map<string, Float32Array>();
    for (const [name, features] of outputs) {
      const real = dropPads(batch, results[name].data as Float32Array, features);
      this.#assertFinite(loaded, name, real, features, batch);
      made.set(name, real);
    }
    return made;
  }

  /** Moves the hidden states through the block. */
  async advance(
    states: HiddenStates,
    block: Block,
    weights: WeightReader,
    onProgress?: (done: number, total: number) => void,
    from?: BlockCut,
  ): Promise<void> {
    await using loaded = await this.load(block, weights, states, [HIDDEN_OUT], [], from);
    const outputs = new Map([[HIDDEN_OUT, states.hiddenSize]]);
    await states.replace(async (batch) => {
      const made = await this.run(loaded, states, batch, outputs);
      onProgress?.(batch.rowEnd, states.tokenCount);
      return made.get(HIDDEN_OUT)!;
    });
  }

  #memory(name: string, length: number): Float32Array {
    let memory = this.#scratch.get(name);
    if (memory === undefined || memory.length < length) {
      memory = new Float32Array(length);
      this.#scratch.set(name, memory);
    }
    return memory.subarray(0, length);
  }

  #weightShape(name: string, dims: readonly (number | string)[], length: number): number[] {
    const shape = dims.map(Number);
    const expected = shape.reduce((product, dim) => product * dim, 1);
    if (expected !== length) {
      throw new FormatError(
        this.#path,
        'weight-shape',
        `tensor "${name}" has ${length} values, but the model's config asks for ${expected} (${dims.join(' x ')})`,
      );
    }
    return shape;
  }

  #assertFinite(loaded: LoadedBlock, output: string, rows: Float32Array, features: number, batch: WindowBatch): void {
    if (allFinite(rows)) return;
    const at = rows.findIndex((value) => !Number.isFinite(value));
    let row = Math.floor(at / features);
    let window = 0;
    while (row >= batch.lengths[window]) row -= batch.lengths[window++];
    const what = [...loaded.graph.siteInputs].find(([, name]) => name === output)?.[0] ?? `the output of ${loaded.block.name}`;
    throw new FormatError(
      this.#path,
      'non-finite-activation',
      `${what} is ${rows[at]} at token ${row} of sample ${batch.firstWindow + window} (feature ${at % features}); ` +
        'the weights are broken or overflow on this text',
    );
  }
}

/** 0 * x is 0 for every finite x and NaN for the others: sums tell without a branch; four of them do not wait for each other. */
function allFinite(values: Float32Array): boolean {
  let a = 0;
  let b = 0;
  let c = 0;
  let d = 0;
  const whole = values.length - (values.length % 4);
  for (let i = 0; i < whole; i += 4) {
    a += 0 * values[i];
    b += 0 * values[i + 1];
    c += 0 * values[i + 2];
    d += 0 * values[i + 3];
  }
  for (let i = whole; i < values.length; i++) a += 0 * values[i];
  return a + b + c + d === 0;
}

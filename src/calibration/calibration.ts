/** Looks at a model on calibration text, block after block: measure what enters each linear layer, then move on. */
import type { Blas } from '../compute/blas.ts';
import type { Engine } from '../compute/engine.ts';
import { FUSED_TOKENS, fusesGrams } from '../compute/fused-gram.ts';
import { RecipeError } from '../errors.ts';
import type { Block, Model, WeightReader } from '../model/model.ts';
import { BlockCut } from './block-cut.ts';
import { OutputError } from './block-objective.ts';
import { BlockRunner, DEFAULT_BATCH_TOKENS, HIDDEN_OUT } from './block-runner.ts';
import { DriftMeter } from './drift-meter.ts';
import { embedTokens } from './embed.ts';
import { HiddenStates, type HiddenWindow, type WindowBatch } from './hidden-states.ts';
import { MeasuredBlock, MeasuredInput } from './measured.ts';
import { Spool, type SpoolOptions, type StateStore } from './state-store.ts';

export type CalibrationPhase = 'embed' | 'measure' | 'advance';

/** Tokens done of all, within one phase of one block (`block` is absent while embedding). */
export interface CalibrationProgress {
  readonly phase: CalibrationPhase;
  readonly block?: string;
  readonly done: number;
  readonly total: number;
}

export interface CalibrationOptions extends SpoolOptions {
  readonly model: Model;
  readonly engine: Engine;
  readonly blas: Blas;
  /** Token windows, each at most the model's context long. */
  readonly windows: readonly Int32Array[];
  /** The model, as the user named it; used in messages. */
  readonly path: string;
  /** Tokens, pads included, that run at once; default 2048. */
  readonly batchTokens?: number;
  readonly onProgress?: (progress: CalibrationProgress) => void;
  /** Keep the float model's hidden states beside those of the model quantized so far: `measure` can then tell their difference. */
  readonly followFloat?: boolean;
  /** Aborting stops a pass after the batch that runs; its reason is thrown. */
  readonly signal?: AbortSignal;
}

/** What to measure of a block, and against what. */
export interface MeasureOptions {
  /** Site inputs to look at; default: all of the block. */
  readonly inputs?: readonly string[];
  /** Keep the activations, for `CalibrationStats.batches`. Default true. */
  readonly replay?: boolean;
  /** The float model's weights: follow its own hidden states along, and measure how far these have drifted from them. */
  readonly float?: WeightReader | undefined;
  /**
   * Inputs come one after the other: a later `measure` of the block, or its `advance`, may begin where this one ended. What it takes the
   * weights of sites before `inputs` to be, they must stay.
   */
  readonly staged?: boolean;
  /** Move the hidden states through the block in the same pass. */
  readonly advance?: boolean;
}

/** One site input during a forward pass: the graph output that shows it, and what becomes of it. */
interface Observed {
  readonly input: string;
  readonly output: string;
  readonly features: number;
  readonly store?: StateStore | undefined;
  readonly drift?: DriftMeter | undefined;
}

/**
 * The calibration pass. `start`, then for each block in order `measure` (any number of times, it changes nothing) and
 * `advance` (once, with the weights the following blocks shall see). Peak memory is one block's weights and Hessians, one batch,
 * and activations up to `ramBytes`; the other activations are in a temporary file.
 */
export class Calibration implements AsyncDisposable {
  readonly states: HiddenStates;
  readonly #floatStates: HiddenStates | undefined;
  readonly #options: CalibrationOptions;
  readonly #spool: Spool;
  readonly #runner: BlockRunner;
  #cut: BlockCut | undefined;
  #floatCut: BlockCut | undefined;
  /** A runner reuses its output memory: two models at once need two. */
  readonly #floatRunner: BlockRunner;

  /** Throws RecipeError when there is no window, or one is empty or longer than the model's context. */
  constructor(options: CalibrationOptions) {
    const { model, windows } = options;
    assertWindows(windows, model.shape.contextLength);
    this.#options = options;
    this.#spool = new Spool(options);
    this.#runner = new BlockRunner(model, options.engine, options.path);
    this.#floatRunner = new BlockRunner(model, options.engine, options.path);
    const states = () =>
      new HiddenStates(windows, model.shape.hiddenSize, options.batchTokens ?? DEFAULT_BATCH_TOKENS, this.#spool);
    this.states = states();
    this.#floatStates = options.followFloat ? states() : undefined;
  }

  /** Tokens of all windows. */
  get tokenCount(): number {
    return this.states.tokenCount;
  }

  /** Embeds the text: the hidden states are then those that enter the first block. */
  async start(weights: WeightReader): Promise<void> {
    await embedTokens(this.#options.model, weights, this.states, {
      path: this.#options.path,
      onProgress: (done, total) => this.#report('embed', undefined, done, total),
    });
    await this.#floatStates?.copy(this.states);
  }

  /**
   * One forward pass of the block with `weights` over all windows, as far as the inputs asked for need it, and their statistics. The hidden
   * states stay as they are unless `advance` is asked for. Dispose of the result when the block is done.
   */
  async measure(block: Block, weights: WeightReader, options: MeasureOptions = {}): Promise<MeasuredBlock> {
    const graph = this.#options.model.blockGraph(block);
    const inputs = options.inputs ?? block.inputs;
    const observed = inputs.map((input) => this.#observe(block, input, graph.siteInputs.get(input), options));
    try {
      const hessian = await this.#pass(block, weights, observed, options);
      const { batches, tokenCount } = this.states;
      return new MeasuredBlock(observed.map((seen) => new MeasuredInput({ ...seen, tokenCount }, hessian(seen), seen, batches)));
    } catch (error) {
      for (const { store, drift } of observed) {
        await store?.[Symbol.asyncDispose]();
        await drift?.[Symbol.asyncDispose]();
      }
      throw error;
    }
  }

  /** Moves the hidden states through the block with `weights` (the quantized ones, decoded). */
  async advance(block: Block, weights: WeightReader): Promise<void> {
    const report = (done: number, total: number) => this.#report('advance', block, done, total);
    const from = this.#cut?.precedes(block, []) ? this.#cut : undefined;
    await this.#runner.advance(this.states, block, weights, report, from);
    await this.#moveCut(undefined);
  }

  /** Moves the float model's own hidden states through the block. */
  async advanceFloat(block: Block, weights: WeightReader): Promise<void> {
    if (this.#floatStates === undefined) throw new Error('the float model does not run along: followFloat was not asked for');
    const report = (done: number, total: number) => this.#report('advance', block, done, total);
    const from = this.#floatCut?.precedes(block, []) ? this.#floatCut : undefined;
    await this.#floatRunner.advance(this.#floatStates, block, weights, report, from);
    await this.#moveFloatCut(undefined);
  }

  /**
   * What the block's weights can be learned by: on the inputs as they are now, its output against the float block's on the float model's own
   * inputs; with `dual`, against the mean of that and of the float block's output on these inputs (the two squared errors added differ
   * from twice this by a constant). @param weights biases, norms and sites that stay @param float the float model's
   */
  async objective(block: Block, weights: WeightReader, float: WeightReader, dual: boolean): Promise<OutputError> {
    const { states } = this;
    const floatStates = this.#floatStates;
    if (floatStates === undefined) throw new Error('the float model does not run along: followFloat was not asked for');
    // Learning moves sites that a cut lies behind.
    await this.#moveCut(undefined);
    const { model, engine, signal } = this.#options;
    const targets = this.#spool.allocate(states.tokenCount, states.hiddenSize);
    try {
      const outputs = new Map([[HIDDEN_OUT, states.hiddenSize]]);
      await using loaded = await this.#floatRunner.load(block, float, floatStates);
      for (const batch of states.batches) {
        signal?.throwIfAborted();
        const made = await this.#floatRunner.run(loaded, floatStates, batch, outputs);
        const target = dual ? made.get(HIDDEN_OUT)!.slice() : made.get(HIDDEN_OUT)!;
        if (dual) {
          const beside = (await this.#floatRunner.run(loaded, states, batch, outputs)).get(HIDDEN_OUT)!;
          for (let i = 0; i < target.length; i++) target[i] = 0.5 * (target[i] + beside[i]);
        }
        await targets.write(batch.rowStart, target);
      }
      return new OutputError({ model, engine, block, weights, states, targets, signal });
    } catch (error) {
      await targets[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** The hidden states as they are now, a window at a time; after the last block, what the final norm and head take. */
  hiddenStates(): AsyncIterable<HiddenWindow> {
    return this.states.perWindow();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#moveCut(undefined);
    await this.#moveFloatCut(undefined);
    await this.states[Symbol.asyncDispose]();
    await this.#floatStates?.[Symbol.asyncDispose]();
    await this.#spool[Symbol.asyncDispose]();
  }

  #observe(block: Block, input: string, output: string | undefined, { replay, float }: MeasureOptions): Observed {
    const site = block.sites.find((candidate) => candidate.input === input);
    if (site === undefined || output === undefined) {
      throw new Error(`${block.name} has no site input "${input}"; it has ${block.inputs.join(', ')}`);
    }
    const features = site.inFeatures;
    const biased = block.sites.some((candidate) => candidate.input === input && candidate.hasBias);
    const { tokenCount } = this.states;
    const { blas } = this.#options;
    return {
      input,
      output,
      features,
      store: replay === false ? undefined : this.#spool.allocate(tokenCount, features),
      drift: float === undefined ? undefined : new DriftMeter(blas, features, tokenCount, this.#spool, biased),
    };
  }

  /** The block's weights live no longer than this: the Hessians are laid out after it, by what it returns. */
  async #pass(
    block: Block,
    weights: WeightReader,
    observed: readonly Observed[],
    { float: floatWeights, staged = false, advance = false }: MeasureOptions,
  ): Promise<(seen: Observed) => Float64Array> {
    const { states } = this;
    const floatStates = this.#floatStates;
    if (floatWeights !== undefined && floatStates === undefined) throw new Error('drift needs followFloat');
    const { blas, engine } = this.#options;
    const inputs = observed.map(({ input }) => input);
    const from = this.#cut?.precedes(block, inputs) ? this.#cut : undefined;
    const floatFrom = this.#floatCut?.precedes(block, inputs) ? this.#floatCut : undefined;
    const graph = this.#options.model.blockGraph(block, states.longest);
    const cutAfter = (before: BlockCut | undefined) => BlockCut.at(block, graph, inputs[0], states, this.#spool, before);
    const cut = staged && inputs.length === 1 ? cutAfter(from) : undefined;
    const floatCut = cut && floatWeights ? cutAfter(floatFrom) : undefined;
    const shown = new Map(observed.map(({ output, features }) => [output, features]));
    const kept = (made: BlockCut | undefined) => [...(made?.fresh ?? [])].map(([name, { columns }]) => [name, columns] as const);
    const floatOutputs = new Map([...shown, ...kept(floatCut)]);
    const passing = new Map([...kept(cut), ...(advance ? [[HIDDEN_OUT, states.hiddenSize] as const] : [])]);

    const fuses = fusesGrams(engine) && states.longest <= FUSED_TOKENS;
    const targets = fuses ? observed.map(({ output, features }) => ({ value: output, features })) : [];
    const names = new Set([...shown.keys(), ...passing.keys()]);
    await using loaded = await this.#runner.load(block, weights, states, [...names], targets, from);
    const floatNames = [...floatOutputs.keys()];
    await using float =
      floatWeights && (await this.#floatRunner.load(block, floatWeights, floatStates!, floatNames, [], floatFrom));
    const { grams: fused } = loaded;
    const grams = new Map(fused ? [] : observed.map(({ output, features }) => [output, blas.gram(features)]));
    // What is summed where it is made comes back only when something else wants it.
    const read = observed.filter(({ store, drift }) => !fused || store || drift);
    const outputs = new Map([...read.map(({ output, features }) => [output, features] as const), ...passing]);
    const visit = async (batch: WindowBatch): Promise<ReadonlyMap<string, Float32Array>> => {
      const made = await this.#runner.run(loaded, states, batch, outputs);
      const wanted = float && (await this.#floatRunner.run(float, floatStates!, batch, floatOutputs));
      for (const [name, store] of cut?.fresh ?? []) await store.append(made.get(name)!);
      for (const [name, store] of floatCut?.fresh ?? []) await store.append(wanted!.get(name)!);
      for (const { output, store, features, drift } of read) {
        const data = made.get(output)!;
        await grams.get(output)?.add({ rows: batch.rowEnd - batch.rowStart, columns: features, data });
        await store?.append(data);
        if (drift && wanted) await drift.add(data, wanted.get(output)!);
      }
      this.#report('measure', block, batch.rowEnd, states.tokenCount);
      return made;
    };
    if (advance) await states.replace(async (batch) => (await visit(batch)).get(HIDDEN_OUT)!);
    else for (const batch of states.batches) await visit(batch);
    if (cut || advance) await this.#moveCut(cut);
    if (floatCut) await this.#moveFloatCut(floatCut);
    return ({ output }) => fused?.finish(output) ?? grams.get(output)!.finish();
  }

  async #moveCut(cut: BlockCut | undefined): Promise<void> {
    await this.#cut?.makeWay(cut);
    this.#cut = cut;
  }

  async #moveFloatCut(cut: BlockCut | undefined): Promise<void> {
    await this.#floatCut?.makeWay(cut);
    this.#floatCut = cut;
  }

  #report(phase: CalibrationPhase, block: Block | undefined, done: number, total: number): void {
    this.#options.signal?.throwIfAborted();
    this.#options.onProgress?.({ phase, ...(block && { block: block.name }), done, total });
  }
}

/** Windows a model can run over. Throws RecipeError otherwise. */
export function assertWindows(windows: readonly Int32Array[], contextLength: number): void {
  if (windows.length === 0) throw new RecipeError('the text gives no tokens to run the model on');
  windows.forEach((window, index) => {
    if (window.length === 0 || window.length > contextLength) {
      throw new RecipeError(`window ${index} has ${window.length} tokens; the model takes 1 to ${contextLength}`);
    }
  });
}

/**
 * What an error in one layer does to the logits (slim-llm 5.6), measured: every block gets an error like that of quantization in all its
 * layers at once, and the float model carries it to the end; how much of it a single layer causes is measured at the block's output.
 */
import { BlockRunner, DEFAULT_BATCH_TOKENS } from '../../calibration/block-runner.ts';
import { embedTokens } from '../../calibration/embed.ts';
import { HiddenStates } from '../../calibration/hidden-states.ts';
import { Spool } from '../../calibration/state-store.ts';
import type { Blas } from '../../compute/blas.ts';
import type { Engine } from '../../compute/engine.ts';
import type { Trial } from '../../methods/quantize/quantizer.ts';
import type { Block, LinearSite, Model, WeightReader } from '../../model/model.ts';
import { OutputHead } from '../evaluate/output-head.ts';

/** Tokens the errors are followed on, each from its block to the end; fewer in deep models, where that would come to most of the run. */
const MOST_TOKENS = 2048;
/** On lab/base it finds the same bits as the most does; 512 find others, which are worse (perplexity 32.76 in place of 32.60). */
const LEAST_TOKENS = 768;
/** Blocks up to which it is the most. */
const SHALLOW = 12;
/** Tokens, of these, that a single layer's part in its block's error is told on: a ratio of sums over all values of all tokens is steady. */
const SHARE_TOKENS = 512;
/** Part of a trial's error that is made: small enough for the divergence to grow with its square. */
const STEP = 0.5;
/** Logits held at once, in bytes of float32. */
const LOGITS_BYTES = 64 * 2 ** 20;

export interface ProbeOptions {
  readonly model: Model;
  readonly weights: WeightReader;
  readonly engine: Engine;
  readonly blas: Blas;
  readonly windows: readonly Int32Array[];
  readonly path: string;
  readonly ramBytes: number;
  readonly signal?: AbortSignal | undefined;
}

/** A block whose error is under way. */
interface Probe {
  readonly states: HiddenStates;
  /** Mean square error at the block's output. */
  readonly error: number;
  /** By site: mean square error at the block's output over the trial's loss. */
  readonly shares: ReadonlyMap<string, number>;
}

/** Feed it the blocks in order. */
export class SensitivityProbe implements AsyncDisposable {
  readonly #options: ProbeOptions;
  readonly #windows: readonly Int32Array[];
  /** Their beginning. */
  readonly #few: readonly Int32Array[];
  readonly #spool: Spool;
  readonly #runner: BlockRunner;
  readonly #base: HiddenStates;
  readonly #probes: Probe[] = [];

  private constructor(options: ProbeOptions) {
    this.#options = options;
    this.#windows = firstTokens(options.windows, probedTokens(options.model.blocks.length));
    this.#few = firstTokens(this.#windows, SHARE_TOKENS);
    this.#spool = new Spool({ ramBytes: options.ramBytes });
    this.#runner = new BlockRunner(options.model, options.engine, options.path);
    this.#base = this.#states();
  }

  static async start(options: ProbeOptions): Promise<SensitivityProbe> {
    const probe = new SensitivityProbe(options);
    await embedTokens(options.model, options.weights, probe.#base, { path: options.path });
    return probe;
  }

  /** Takes the block's trials, by site name; their weights are its own from then on. */
  async add(block: Block, trials: ReadonlyMap<string, Trial>): Promise<void> {
    const float = await cached(this.#options.weights, block);
    const bent = new Map<string, Float32Array>();
    for (const site of block.sites) {
      const trial = trials.get(site.name);
      if (trial) bent.set(site.name, bend(trial.weight, await float.loadSite(site)));
    }
    const before = this.#states();
    await before.copy(this.#base);
    await this.#advance(this.#base, block, float);
    for (const { states } of this.#probes) await this.#advance(states, block, float);

    const parts = new Map<string, number>();
    for (const [site] of bent) {
      if (!(trials.get(site)!.loss > 0)) continue;
      await using one = this.#states(this.#few);
      await one.copy(before);
      await this.#advance(one, block, withSites(float, new Map([[site, bent.get(site)!]])));
      parts.set(site, await meanSquareError(one, this.#base));
    }
    await this.#advance(before, block, withSites(float, bent));
    await using whole = this.#states(this.#few);
    await whole.copy(before);
    const wholeOfFew = await meanSquareError(whole, this.#base);
    const error = await meanSquareError(before, this.#base);
    const shares = new Map<string, number>();
    for (const [site, part] of parts) {
      shares.set(site, wholeOfFew > 0 ? ((part / wholeOfFew) * error) / (STEP * STEP * trials.get(site)!.loss) : 0);
    }
    this.#probes.push({ states: before, error, shares });
  }

  /** After the last block: nats of divergence per unit of each site's loss. */
  async finish(): Promise<Map<string, number>> {
    const { model, weights, engine, blas } = this.#options;
    const head = new OutputHead(model, weights, engine, blas);
    const rows = Math.max(1, Math.floor(LOGITS_BYTES / (model.shape.vocabSize * 4)));
    const sums = this.#probes.map(() => 0);
    const { tokenCount, hiddenSize } = this.#base;
    const logits = async (states: HiddenStates, start: number, end: number) =>
      head.logits({ rows: end - start, columns: hiddenSize, data: await states.store.read(start, end) });
    for (let start = 0; start < tokenCount; start += rows) {
      const end = Math.min(start + rows, tokenCount);
      const target = await blas.klTarget(await logits(this.#base, start, end));
      for (const [i, { states }] of this.#probes.entries()) {
        this.#options.signal?.throwIfAborted();
        sums[i] += (end - start) * Math.max(0, await target.meanKl(await logits(states, start, end)));
      }
    }
    const sensitivities = new Map<string, number>();
    this.#probes.forEach(({ error, shares }, i) => {
      const perError = error > 0 ? sums[i] / tokenCount / error : 0;
      for (const [name, share] of shares) sensitivities.set(name, perError * share);
    });
    return sensitivities;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#spool[Symbol.asyncDispose]();
  }

  #states(windows = this.#windows): HiddenStates {
    return new HiddenStates(windows, this.#options.model.shape.hiddenSize, DEFAULT_BATCH_TOKENS, this.#spool);
  }

  async #advance(states: HiddenStates, block: Block, weights: WeightReader): Promise<void> {
    this.#options.signal?.throwIfAborted();
    await this.#runner.advance(states, block, weights);
  }
}

/** Tokens the errors of a model of so many blocks are followed on. */
export function probedTokens(blocks: number): number {
  return Math.max(LEAST_TOKENS, Math.min(MOST_TOKENS, Math.floor((MOST_TOKENS * SHALLOW) / blocks)));
}

/** Whole windows up to `most` tokens, at least one; a longer first one is cut. */
function firstTokens(windows: readonly Int32Array[], most: number): Int32Array[] {
  const taken = [windows[0].subarray(0, most)];
  let tokens = taken[0].length;
  for (const window of windows.slice(1)) {
    if (tokens + window.length > most) break;
    taken.push(window);
    tokens += window.length;
  }
  return taken;
}

/** In place: a second copy of a block is 0.8 GB for a model of 7B. */
function bend(trial: Float32Array, float: Float32Array): Float32Array {
  for (let i = 0; i < trial.length; i++) trial[i] = float[i] + STEP * (trial[i] - float[i]);
  return trial;
}

/** The block's weights read once and kept: they are run many times. */
async function cached(weights: WeightReader, block: Block): Promise<WeightReader> {
  const sites = new Map<string, Promise<Float32Array>>();
  const others = new Map<string, Promise<Float32Array>>();
  const once = (map: Map<string, Promise<Float32Array>>, name: string, load: () => Promise<Float32Array>) => {
    const known = map.get(name) ?? load();
    map.set(name, known);
    return known;
  };
  for (const site of block.sites) await once(sites, site.name, () => weights.loadSite(site));
  return {
    load: (name) => once(others, name, () => weights.load(name)),
    loadRows: (name, start, end) => weights.loadRows(name, start, end),
    info: (name) => weights.info(name),
    loadSite: (site: LinearSite) => once(sites, site.name, () => weights.loadSite(site)),
  };
}

function withSites(weights: WeightReader, replaced: ReadonlyMap<string, Float32Array>): WeightReader {
  return { ...weights, loadSite: async (site) => replaced.get(site.name) ?? weights.loadSite(site) };
}

/** Over the tokens of `a`, which `b` begins with. */
async function meanSquareError(a: HiddenStates, b: HiddenStates): Promise<number> {
  let sum = 0;
  for (const { rowStart, rowEnd } of a.batches) {
    const [x, y] = [await a.store.read(rowStart, rowEnd), await b.store.read(rowStart, rowEnd)];
    for (let i = 0; i < x.length; i++) sum += (x[i] - y[i]) ** 2;
  }
  return sum / a.tokenCount;
}

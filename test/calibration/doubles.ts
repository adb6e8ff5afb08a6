/** A network small enough to compute by hand: its graph is never compiled, the engine below does its arithmetic in plain loops. */
import type { OnnxModel } from '../../formats/onnx/model.ts';
import type { Blas, GramAccumulator, Matrix } from '../../src/compute/blas.ts';
import type { Engine, NdArray, Program } from '../../src/compute/engine.ts';
import type { Block, LinearSite, Model, WeightReader } from '../../src/model/model.ts';

export const HIDDEN = 3;
export const FEATURES = 4;
export const VOCABULARY = 11;
/** What the engine leaves in the rows of pads: nothing that is computed from them may be seen. */
const PAD_GARBAGE = 1e6;

function site(block: number): LinearSite {
  const input = `model.layers.${block}.mix`;
  return { name: `${input}.proj`, outFeatures: HIDDEN, inFeatures: FEATURES, hasBias: false, transposed: false, input };
}

export function toyModel(blockCount = 2, options: { contextLength?: number; positions?: boolean } = {}): Model {
  const blocks = Array.from({ length: blockCount }, (_, index): Block => {
    const only = site(index);
    return { index, name: `model.layers.${index}`, sites: [only], inputs: [only.input], folds: [], otherTensors: [] };
  });
  const unused = (): never => {
    throw new Error('not part of this double');
  };
  return {
    architecture: 'ToyForCausalLM',
    config: {},
    shape: {
      vocabSize: VOCABULARY,
      hiddenSize: HIDDEN,
      blockCount,
      headCount: 1,
      kvHeadCount: 1,
      headDim: HIDDEN,
      contextLength: options.contextLength ?? 64,
      tiedEmbeddings: true,
    },
    blocks,
    tokenEmbedding: 'embed.weight',
    ...(options.positions && { positionEmbedding: 'positions.weight' }),
    outputHead: 'embed.weight',
    unusedTensors: [],
    otherTensors: [],
    blockGraph: (block) => ({
      model: {
        graph: {
          inputs: ['hidden', 'lengths', 'w'].map((name) => ({ name, dtype: 'F32', shape: [HIDDEN, FEATURES] })),
          outputs: [{ name: 'mix' }, { name: 'hidden_out' }],
          nodes: [
            { inputs: ['hidden', 'lengths'], outputs: ['mix'], attributes: {} },
            { inputs: ['hidden', 'mix', 'w'], outputs: ['hidden_out'], attributes: {} },
          ],
          initializers: new Map(),
        },
      } as unknown as OnnxModel,
      key: 'toy',
      weights: new Map([['w', block.sites[0]]]),
      siteInputs: new Map([[block.inputs[0], 'mix']]),
      residuals: new Map([[block.inputs[0], 'hidden']]),
    }),
    blockGradient: unused,
    blockStep: unused,
    blockLoss: unused,
    headGradient: unused,
    finalNormGraph: unused,
    decoderGraph: unused,
  };
}

/**
 * mix_t = (mean of h_0..h_t, 1): causal, so a pad that came before a token would show. hidden_out = h + mix W^T.
 * Works on one window, (tokens, HIDDEN).
 */
export function toyBlock(hidden: Float32Array, w: Float32Array): { mix: Float32Array; hiddenOut: Float32Array } {
  const tokens = hidden.length / HIDDEN;
  const mix = new Float32Array(tokens * FEATURES);
  const hiddenOut = hidden.slice();
  for (let t = 0; t < tokens; t++) {
    for (let i = 0; i < HIDDEN; i++) {
      let sum = 0;
      for (let s = 0; s <= t; s++) sum += hidden[s * HIDDEN + i];
      mix[t * FEATURES + i] = sum / (t + 1);
    }
    mix[t * FEATURES + HIDDEN] = 1;
    for (let o = 0; o < HIDDEN; o++) {
      let sum = 0;
      for (let i = 0; i < FEATURES; i++) sum += mix[t * FEATURES + i] * w[o * FEATURES + i];
      hiddenOut[t * HIDDEN + o] += sum;
    }
  }
  return { mix, hiddenOut };
}

/** Runs `toyBlock` on every row of a padded batch, and counts what it is asked to do. */
export class ToyEngine {
  runs = 0;
  /** (batch, sequence) of each run. */
  readonly batches: (readonly [number, number])[] = [];

  asEngine(): Engine {
    const program: Program = {
      inputNames: ['hidden', 'lengths', 'w'],
      outputNames: ['hidden_out', 'mix'],
      run: async (feeds, options) => this.#run(feeds, options?.outputs ?? ['hidden_out', 'mix'], options?.into ?? {}),
      [Symbol.asyncDispose]: async () => {},
    };
    return {
      name: 'ort',
      device: 'cpu',
      threads: 1,
      runtime: 'double',
      compile: async () => program,
      open: async () => program,
      [Symbol.asyncDispose]: async () => {},
    };
  }

  #run(feeds: Readonly<Record<string, NdArray>>, outputs: readonly string[], into: Readonly<Record<string, NdArray>>) {
    this.runs++;
    const [count, sequence] = feeds['hidden'].shape;
    this.batches.push([count, sequence]);
    const hidden = feeds['hidden'].data as Float32Array;
    const results: Record<string, NdArray> = {};
    for (const name of outputs) {
      const features = name === 'mix' ? FEATURES : HIDDEN;
      const data = (into[name]?.data ?? new Float32Array(count * sequence * features)) as Float32Array;
      if (data.length !== count * sequence * features) throw new Error(`${name}: output memory of ${data.length}`);
      data.fill(PAD_GARBAGE);
      for (let b = 0; b < count; b++) {
        const length = (feeds['lengths'].data as Int32Array)[b];
        const row = hidden.subarray(b * sequence * HIDDEN, (b * sequence + length) * HIDDEN);
        const made = toyBlock(row, (feeds['w']?.data ?? new Float32Array(HIDDEN * FEATURES)) as Float32Array);
        data.set(name === 'mix' ? made.mix : made.hiddenOut, b * sequence * features);
      }
      results[name] = { dtype: 'F32', shape: [count, sequence, features], data };
    }
    return results;
  }
}

/** Only the Gram matrix, in the obvious way. */
export const toyBlas = {
  gram: (features: number): GramAccumulator => {
    const sum = new Float64Array(features * features);
    let tokenCount = 0;
    return {
      get tokenCount() {
        return tokenCount;
      },
      add: async (x: Matrix) => {
        if (x.columns !== features || x.data.length !== x.rows * features) throw new Error('wrong matrix');
        for (let t = 0; t < x.rows; t++) {
          for (let i = 0; i < features; i++) {
            for (let j = 0; j < features; j++) sum[i * features + j] += x.data[t * features + i] * x.data[t * features + j];
          }
        }
        tokenCount += x.rows;
      },
      finish: () => sum.map((value) => value / tokenCount),
    };
  },
} as unknown as Blas;

/** Weights with simple values; `loads` names what was read, with its rows. */
export class ToyWeights implements WeightReader {
  readonly loads: string[] = [];
  /** Changes every site's weights. */
  readonly scale: number;

  constructor(scale = 1) {
    this.scale = scale;
  }

  /** Row r of the embedding is (r, r / 8, -r); of the positions (p / 16, 0, 0). */
  static row(name: string, r: number): number[] {
    return name === 'embed.weight' ? [r, r / 8, -r] : [r / 16, 0, 0];
  }

  static rows(name: string): number {
    return name === 'embed.weight' ? VOCABULARY : 8;
  }

  async load(name: string): Promise<Float32Array> {
    return this.loadRows(name, 0, ToyWeights.rows(name));
  }

  async loadRows(name: string, start: number, end: number): Promise<Float32Array> {
    this.loads.push(`${name}[${start}, ${end})`);
    return Float32Array.from(Array.from({ length: end - start }, (_, i) => ToyWeights.row(name, start + i)).flat());
  }

  async loadSite(site: LinearSite): Promise<Float32Array> {
    this.loads.push(site.name);
    const block = Number(site.name.split('.')[2]);
    return Float32Array.from({ length: HIDDEN * FEATURES }, (_, i) => (this.scale * (((i * 7 + block * 3) % 11) - 5)) / 16);
  }

  info(name: string) {
    if (!name.endsWith('.weight')) return undefined;
    const shape = [ToyWeights.rows(name), HIDDEN];
    return { name, dtype: 'F32' as const, shape, byteLength: shape[0] * shape[1] * 4 };
  }
}

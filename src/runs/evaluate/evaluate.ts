/** `evaluate`: perplexity, size and speed of a model or artifact on text; against an original also KL and top-1 agreement. */

import { type ModelSource, openModelSource } from '../../artifacts/model-source.ts';
import { parseTextFile, readText } from '../../calibration/text.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { evaluationWindows } from '../../calibration/windows.ts';
import type { Blas } from '../../compute/blas.ts';
import type { Device, DeviceRequest, Engine } from '../../compute/engine.ts';
import { ENGINES, type EngineName } from '../../compute/engines.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { RecipeError } from '../../errors.ts';
import { withAdapter } from '../adapt/adapter-weights.ts';
import { readAdapterFeeds } from '../adapt/onnx.ts';
import type { RunHooks } from '../run.ts';
import { ArtifactLogits, BlockLogits, type LogitsSource } from './logits-source.ts';
import { scoreWindows } from './window-scores.ts';

/** What to evaluate on, and where. */
export interface EvaluateOptions {
  /** Text files, with selectors (`file.jsonl:field`). */
  readonly text: readonly string[];
  /** The float model to compare with. */
  readonly against?: string;
  /** A PEFT folder to apply to the model. */
  readonly adapter?: string;
  /** Tokens in a window, clipped to the model's context. */
  readonly sequenceLength: number;
  readonly accuracy: 'exact' | 'fast';
  readonly device: DeviceRequest;
  /** Default 'ort'. */
  readonly engine?: EngineName;
  readonly threads: number;
  /** Bytes of hidden states kept in RAM, both models together. */
  readonly maxMemory: number;
}

/** What was measured; definitions in docs/evaluate.md. */
export interface Evaluation {
  readonly perplexity: number;
  /** Nats per scored token. */
  readonly nll: number;
  /** Scored tokens. */
  readonly tokens: number;
  /** Weight files. */
  readonly bytes: number;
  /** Stored bits of quantized modules over their weights; 16 or 32 for a float model. */
  readonly bitsPerWeight: number;
  readonly averageBits: number;
  /** Scored tokens over forward time. */
  readonly tokensPerSecond: number;
  readonly kl?: number;
  readonly top1Agreement?: number;
  readonly perplexityRatio?: number;
  readonly accuracy: 'exact' | 'fast';
  readonly sequenceLength: number;
  readonly device: Device;
  readonly threads: number;
}

/**
 * Evaluates the model or artifact at `path`. Throws RecipeError for a request that makes no sense, FormatError for a broken file,
 * EnvironmentError for what the machine lacks.
 */
export async function evaluate(path: string, options: EvaluateOptions, hooks: RunHooks = {}): Promise<Evaluation> {
  await using source = await openModelSource(path);
  if (options.accuracy === 'fast' && source.onnxPath === undefined) {
    throw new RecipeError(`--accuracy fast: ${path} is no ONNX artifact; a ${source.kind} is evaluated with --accuracy exact`);
  }
  await using original = options.against === undefined ? undefined : await openModelSource(options.against);
  if (original !== undefined && original.model.shape.vocabSize !== source.model.shape.vocabSize) {
    const sizes = `${source.model.shape.vocabSize} and ${original.model.shape.vocabSize}`;
    throw new RecipeError(
      `--against ${options.against}: the two models have vocabularies of ${sizes} tokens; they cannot be compared`,
    );
  }
  const tokenizer = await loadTokenizer(source.folder, source.model.shape.vocabSize);
  const contexts = [source, ...(original ? [original] : [])].map(({ model }) => model.shape.contextLength);
  const sequenceLength = Math.min(options.sequenceLength, ...contexts);
  const tokens = tokenizer.encode(await readText(options.text.map(parseTextFile)));
  const { windows } = evaluationWindows(tokens, sequenceLength);

  await using engine = await ENGINES[options.engine ?? 'ort']({
    device: options.device,
    threads: options.threads,
    ...(hooks.note && { onNote: hooks.note }),
  });
  const blas = createBlas(engine);
  const ramBytes = original === undefined ? options.maxMemory : options.maxMemory / 2;
  const open = (from: Pick<ModelSource, 'model' | 'weights' | 'path'>): Promise<LogitsSource> =>
    openLogits(from, { engine, blas, windows, hooks, ramBytes });
  const { adapter, accuracy } = options;
  const fast = accuracy === 'fast' && adapter !== undefined;
  const weights = adapter === undefined || fast ? source.weights : await withAdapter(source, adapter, blas);
  const fed = fast ? { adapter: { path: adapter, feeds: await readAdapterFeeds(adapter) } } : {};
  await using own =
    options.accuracy === 'fast' && source.onnxPath !== undefined
      ? await ArtifactLogits.open({ model: source.model, engine, windows, hooks, onnxPath: source.onnxPath, ...fed })
      : await open({ ...source, weights });
  await using reference = original === undefined ? undefined : await open(original);

  const scorer = await scoreWindows(own, windows, source.model, hooks, reference);
  const { perplexity, nll, tokens: scored } = scorer.score;
  return {
    perplexity,
    nll,
    tokens: scored,
    bytes: source.weightBytes,
    bitsPerWeight: source.storage.bitsPerWeight,
    averageBits: source.storage.averageBits,
    tokensPerSecond: scored / own.seconds,
    ...(reference && scorer.comparison),
    accuracy: options.accuracy,
    sequenceLength,
    device: engine.device,
    threads: engine.threads,
  };
}

interface Machine {
  readonly engine: Engine;
  readonly blas: Blas;
  readonly windows: readonly Int32Array[];
  readonly hooks: RunHooks;
  readonly ramBytes: number;
}

function openLogits(
  { model, weights, path }: Pick<ModelSource, 'model' | 'weights' | 'path'>,
  machine: Machine,
): Promise<LogitsSource> {
  return BlockLogits.run({ ...machine, model, weights, path });
}

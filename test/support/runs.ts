/** The runs behind the commands, in this process and on one thread: for tests of what they do rather than of how they are called. */
import { type Evaluation, evaluate } from '../../src/runs/evaluate/evaluate.ts';
import { type QuantizeOutcome, quantize } from '../../src/runs/quantize/quantize.ts';
import { type QuantizeRequest, quantizeRecipe } from '../../src/runs/quantize/recipe.ts';

/** Quantizes `model` into the new folder `output`; groups of 32 unless the request says otherwise. */
export function runQuantize(model: string, output: string, request: QuantizeRequest): Promise<QuantizeOutcome> {
  const mode = { overwrite: false, resume: false, dryRun: false };
  return quantize(model, output, quantizeRecipe({ groupSize: 32, ...request }, 1), mode);
}

/** Evaluates in windows of 32 tokens. */
export function runEvaluate(
  model: string,
  text: string,
  options: { readonly accuracy?: 'exact' | 'fast'; readonly against?: string } = {},
): Promise<Evaluation> {
  const defaults = { sequenceLength: 32, accuracy: 'exact', device: 'cpu', threads: 1, maxMemory: 2 ** 30 } as const;
  return evaluate(model, { ...defaults, text: [text], ...options });
}

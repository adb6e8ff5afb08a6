/** The loop that learns a block's quantized layers together: windows in, a step on all parameters, the best on held-out windows kept. */
import type { BlockObjective } from '../../../calibration/block-objective.ts';
import { ADAM } from '../../../compute/optim/parameter.ts';
import { signDescent } from '../../../compute/optim/sign-descent.ts';
import { Random } from '../../../compute/random.ts';
import { dequantize, type QuantizedLinear } from '../quantized-linear.ts';
import type { LearnedBlock, SiteToLearn } from '../quantizer.ts';
import { FakeQuantizedLinear, type LearningRules } from './fake-quantized.ts';

export interface LearningSchedule extends LearningRules {
  readonly rule: 'adam' | 'sign';
  readonly steps: number;
  /** Windows a step. */
  readonly batch: number;
  /** Of grids, and of roundings; both fall linearly to 0 where `decays`. */
  readonly gridRate: number;
  readonly roundingRate: number;
  readonly decays: boolean;
}

/** How often held-out windows are looked at, in all. */
const LOOKS = 10;
/** Gradients are of a mean over all outputs: far smaller than where Adam's own 1e-8 would matter. */
const EPSILON = 1e-16;

/**
 * Starts from the quantized sites, and never ends behind them: what does not lower the loss on held-out windows is given up. The same seed and
 * inputs give the same codes.
 */
export async function learnBlock(
  sites: readonly SiteToLearn[],
  objective: BlockObjective,
  schedule: LearningSchedule,
  seed: number,
  onStep: (done: number, total: number) => void,
): Promise<LearnedBlock> {
  const layers = sites.map(({ weight, quantized }) => new FakeQuantizedLinear(weight, quantized, schedule));
  const weights = new Map(sites.map(({ site, quantized }) => [site.name, dequantize(quantized)]));
  const heldOut = range(objective.firstHeldOut, objective.windowCount);
  const before = await objective.loss(weights, heldOut);
  const draw = shuffled(objective.firstHeldOut > 0 ? objective.firstHeldOut : objective.windowCount, sites[0].site.name, seed);
  let best = { loss: before, step: 0, quantized: sites.map(({ quantized }) => quantized) };
  const every = Math.max(1, Math.round(schedule.steps / LOOKS));
  for (let step = 1; step <= schedule.steps; step++) {
    layers.forEach((layer, i) => {
      layer.decode(weights.get(sites[i].site.name)!);
    });
    const windows = Array.from({ length: schedule.batch }, draw);
    const { loss, gradients } = await objective.gradient(weights, windows);
    if (!Number.isFinite(loss)) break;
    const factor = schedule.decays ? 1 - (step - 1) / schedule.steps : 1;
    layers.forEach((layer, i) => {
      layer.backward(gradients.get(sites[i].site.name)!);
      for (const parameter of layer.parameters) {
        const rate = factor * (parameter === layer.rounding ? schedule.roundingRate : schedule.gridRate);
        if (schedule.rule === 'sign') signDescent(parameter, rate);
        else parameter.update(step, rate, { ...ADAM, epsilon: EPSILON });
      }
      layer.project();
    });
    if (step % every === 0 || step === schedule.steps) {
      const quantized = layers.map((layer) => layer.finish());
      quantized.forEach((layer, i) => {
        weights.set(sites[i].site.name, dequantize(layer));
      });
      const now = await objective.loss(weights, heldOut);
      if (now < best.loss) best = { loss: now, step, quantized };
    }
    onStep(step, schedule.steps);
  }
  const quantized = new Map<string, QuantizedLinear>(sites.map(({ site }, i) => [site.name, best.quantized[i]]));
  return { quantized, lossBefore: before, lossAfter: best.loss, step: best.step };
}

/** Windows in random order, again and again, each time in another. */
function shuffled(count: number, name: string, seed: number): () => number {
  const random = new Random(seed, `learning ${name}`);
  const order = range(0, count);
  let at = count;
  return () => {
    if (at === count) {
      for (let i = count - 1; i > 0; i--) {
        const j = random.nextBelow(i + 1);
        [order[i], order[j]] = [order[j], order[i]];
      }
      at = 0;
    }
    return order[at++];
  };
}

function range(start: number, end: number): number[] {
  return Array.from({ length: end - start }, (_, i) => start + i);
}

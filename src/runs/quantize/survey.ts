/** First pass of an allocating method: the float model on the calibration text, every layer's costs, and what an error in each does to the logits. */
import type { BudgetUnit } from '../../artifacts/layer-sizes.ts';
import type { Calibration } from '../../calibration/calibration.ts';
import { frontier } from '../../methods/quantize/allocation/frontier.ts';
import type { Choice, ChoiceSet } from '../../methods/quantize/allocation/hull.ts';
import { type Repair, withRanks } from '../../methods/quantize/allocation/joint.ts';
import {
  type BitAllocation,
  type InputSurvey,
  type QuantizeContext,
  type Quantizer,
  sorts,
  type TransformCosts,
  type TransformKind,
  type Trial,
} from '../../methods/quantize/quantizer.ts';
import type { LinearSite, Model, WeightReader } from '../../model/model.ts';
import type { SensitivityProbe } from './sensitivity-probe.ts';

/**
 * Factor on the loss that is predicted without a transform. Transforms help more than is predicted: asked to predict 3 % less than going without
 * (slim-llm 5.3), they are left out of a third of the layers, and the finished model is worse (docs/methods/best.md).
 */
const TRANSFORM_HANDICAP = 1.03;
/** Bits a column that a transform is stored with: an index, or a sign. */
const TRANSFORM_BITS: Readonly<Record<TransformKind, number>> = { none: 0, perm: 32, 'perm-had': 32, had: 1 };

/** All that was seen of a model. */
export interface ModelSurvey {
  /** In model order; `sites` share the input. */
  readonly inputs: readonly { readonly input: string; readonly survey: InputSurvey }[];
  /** What a unit of each site's loss costs the model. */
  readonly sensitivities: ReadonlyMap<string, number>;
}

export interface SurveyRun {
  readonly model: Model;
  /** The float model's weights. */
  readonly weights: WeightReader;
  readonly quantizer: Quantizer;
  readonly context: QuantizeContext;
  /** Absent for a method that needs no text. */
  readonly calibration: Calibration | undefined;
  /** Absent: every unit of loss weighs the same. */
  readonly probe: SensitivityProbe | undefined;
  readonly selected: ReadonlySet<string>;
  readonly widths: readonly number[];
  /** A layer's loss counts as a part of its output's energy. */
  readonly relative?: boolean;
  readonly signal?: AbortSignal | undefined;
  /** Called after each block, with how many are done. */
  readonly onBlock?: (done: number) => void;
}

/** Surveys every selected site. */
export async function surveyModel(run: SurveyRun): Promise<ModelSurvey> {
  const { model, weights, quantizer, context, calibration, probe, widths } = run;
  const inputs: { input: string; survey: InputSurvey }[] = [];
  const last = model.blocks.at(-1);
  await calibration?.start(weights);
  for (const block of model.blocks) {
    const sitesOf = (input: string) => block.sites.filter((site) => site.input === input && run.selected.has(site.name));
    const wanted = block.inputs.filter((input) => sitesOf(input).length > 0);
    const trials = new Map<string, Trial>();
    if (wanted.length === 0 && block !== last) await calibration?.advance(block, weights);
    if (wanted.length > 0) {
      await using measured = await calibration?.measure(block, weights, {
        inputs: wanted,
        replay: false,
        advance: block !== last,
      });
      for (const input of wanted) {
        run.signal?.throwIfAborted();
        const load = (site: LinearSite) => weights.loadSite(site);
        const survey = await quantizer.survey!(context, sitesOf(input), load, measured?.get(input), widths);
        for (const [name, trial] of survey.trials) trials.set(name, trial);
        inputs.push({ input, survey: { transforms: survey.transforms, trials: new Map() } });
        await measured?.release(input);
      }
    }
    await probe?.add(block, trials);
    run.onBlock?.(block.index + 1);
  }
  if (probe) return { inputs, sensitivities: await probe.finish() };
  const sites = inputs.flatMap(({ survey }) => survey.transforms[0].sites);
  return {
    inputs,
    sensitivities: new Map(sites.map(({ site, energy }) => [site.name, run.relative && energy > 0 ? 1 / energy : 1])),
  };
}

/** What a choice of the allocator is called. */
export function choiceLabel({ transform, groupSize }: Pick<TransformCosts, 'transform' | 'groupSize'>): string {
  return `${transform}, groups of ${groupSize}`;
}

/** What else there is to a choice. */
export interface ChoiceExtras {
  /** What ranks would do for layers that may have some, by name. */
  readonly repairs?: ReadonlyMap<string, Repair> | undefined;
  /** Where whole files are counted: what a transform takes in them, beside the order of the columns. */
  readonly transformBytes?: Readonly<Record<TransformKind, number>> | undefined;
}

/** The survey as the allocator takes it, sizes counted in `unit`. */
export function choiceSets(
  { inputs, sensitivities }: ModelSurvey,
  widths: readonly number[],
  sizesOf: BitAllocation['sizesOf'],
  unit: BudgetUnit,
  extras: ChoiceExtras = {},
): ChoiceSet[] {
  return inputs.map(({ input, survey }) => ({
    name: input,
    choices: survey.transforms.map((costs) => choiceOf(costs, sensitivities, widths, sizesOf, unit, extras)),
  }));
}

function choiceOf(
  treatment: TransformCosts,
  sensitivities: ReadonlyMap<string, number>,
  widths: readonly number[],
  sizesOf: BitAllocation['sizesOf'],
  unit: BudgetUnit,
  { repairs, transformBytes }: ChoiceExtras,
): Choice {
  const { transform, free, groupSize, sites } = treatment;
  const { inFeatures } = sites[0].site;
  const order = unit === 'code' || (free && sorts(transform)) ? 0 : TRANSFORM_BITS[transform] * inFeatures;
  const fixedBits = order + 8 * (transformBytes?.[transform] ?? 0);
  const handicap = transform === 'none' ? TRANSFORM_HANDICAP : 1;
  const members = sites.map(({ site, costs }) => {
    const codes = frontier({ widths, costs, ...sizesOf(site, groupSize), monotone: sorts(transform) });
    const repair = repairs?.get(site.name);
    return {
      name: site.name,
      frontier: repair ? withRanks(codes, repair) : codes,
      omega: handicap * (sensitivities.get(site.name) ?? 1),
    };
  });
  return { label: choiceLabel(treatment), fixedBits, members };
}

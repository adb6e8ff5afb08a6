/** `merge --extract-lora`: what one expert changed of its base, as a PEFT adapter. */
import { hashFolder, writeJson, writeReport } from '../../artifacts/manifest.ts';
import { OutputFolder } from '../../artifacts/output-folder.ts';
import { type AdapterModule, type SavedModule, writeAdapter } from '../../artifacts/peft.ts';
import { RecipeError } from '../../errors.ts';
import { extractLora } from '../../methods/merge/extract-lora.ts';
import { mergerOf } from '../../methods/merge/index.ts';
import type { OutputMode } from '../quantize/quantize.ts';
import type { RunHooks } from '../run.ts';
import { openMergeInputs } from './inputs.ts';
import { markInputs } from './marks.ts';
import type { MergeRecipe } from './recipe.ts';
import { scheduleMerge } from './schedule.ts';
import { MergeWeights } from './weights.ts';

export interface ExtractRequest {
  readonly rank: number;
  /** Part of the squared length of each task vector that is enough; 1: as much as the rank allows. */
  readonly energy: number;
}

/** What was extracted. */
export interface ExtractOutcome {
  readonly expert: string;
  readonly base: string;
  readonly modules: Readonly<Record<string, { readonly rank: number; readonly residual: number }>>;
  /** Embeddings and heads that changed, stored whole. */
  readonly saved: readonly string[];
  /** Changed tensors that an adapter has no place for. */
  readonly lost: readonly string[];
  readonly parameters: number;
  readonly notes: readonly string[];
}

/** Throws RecipeError for another number of experts than one, no base, or a rank below 1; then as `merge`. */
export async function extract(
  experts: readonly string[],
  outputPath: string,
  { rank, energy }: ExtractRequest,
  recipe: MergeRecipe,
  mode: OutputMode,
  hooks: RunHooks = {},
): Promise<ExtractOutcome> {
  if (recipe.base === undefined) throw new RecipeError('--base: --extract-lora needs the model that the expert was trained from');
  if (mode.dryRun || mode.resume) throw new RecipeError(`--extract-lora: has no ${mode.dryRun ? '--dry-run' : '--resume'}`);
  await using inputs = await openMergeInputs(experts, recipe);
  const [expert, second] = inputs.experts;
  if (second) throw new RecipeError(`--extract-lora: takes one expert, and ${inputs.experts.length} were given`);
  const { hash, weights: marks } = await markInputs(inputs, recipe);
  await using output = await OutputFolder.open({ path: outputPath, overwrite: mode.overwrite, resume: false, recipeHash: hash });
  const { jobs } = scheduleMerge(inputs, { ...recipe, set: [], weights: [] }, mergerOf('task-arithmetic'));
  using weights = new MergeWeights(inputs, jobs, 0);
  const modules: (AdapterModule & { residual: number })[] = [];
  const saved: SavedModule[] = [];
  const lost: string[] = [];
  const merged = inputs.outputs.filter(({ made }) => made.by === 'merge');
  let transposed = false;
  for (const [done, { name, role, shape, transposed: turned }] of merged.entries()) {
    hooks.signal?.throwIfAborted();
    hooks.progress?.({ phase: `extract ${name}`, done, total: merged.length });
    const module = name.replace(/\.weight$/, '');
    if (role === 'matrix' && shape.length === 2 && name.endsWith('.weight')) {
      const [outFeatures, inFeatures] = turned ? [shape[1], shape[0]] : shape;
      const site = { name: module, outFeatures, inFeatures, transposed: turned, hasBias: false, input: module };
      modules.push({ name: module, ...extractLora(weights.taskVector(0, site), outFeatures, inFeatures, { rank, energy }) });
      transposed ||= turned;
      continue;
    }
    if (weights.namedTaskVector(0, name).every((value) => value === 0)) continue;
    if (shape.length === 2 && (role === 'embedding' || role === 'head')) {
      saved.push({ name: module, shape, weight: await weights.expert(0).load(name) });
    } else lost.push(name);
  }
  const notes = lost.length === 0 ? [] : [`${lost.length} tensors changed that an adapter has no place for: ${lost.join(', ')}`];
  for (const note of notes) hooks.note?.(note);
  const base = inputs.base!.label;
  await writeAdapter(output.artifactPath, { base, modules, saved, transposed });
  const outcome: ExtractOutcome = {
    expert: expert.label,
    base,
    modules: Object.fromEntries(modules.map(({ name, rank: own, residual }) => [name, { rank: own, residual }])),
    saved: saved.map(({ name }) => name),
    lost,
    parameters:
      modules.reduce((sum, { loraA, loraB }) => sum + loraA.length + loraB.length, 0) +
      saved.reduce((sum, { weight }) => sum + weight.length, 0),
    notes,
  };
  await writeJson(`${output.artifactPath}/pcomp.json`, {
    format: 1,
    command: 'merge --extract-lora',
    recipe: { base, expert: expert.label, rank, energy },
    inputs: marks,
    outputs: await hashFolder(output.artifactPath),
  });
  await writeReport(output.artifactPath, { ...outcome });
  await output.finalize();
  return outcome;
}

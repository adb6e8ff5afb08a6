/** Fills the weight files of a merge: every tensor at its place, and a journal of those that are done. */
import { join } from 'node:path';
import { createPlacedFiles, hasPlacedFiles } from '../../../formats/safetensors/placed-files.ts';
import type { OutputFolder } from '../../artifacts/output-folder.ts';
import { FormatError, RecipeError, UnsupportedError } from '../../errors.ts';
import type { RunHooks } from '../run.ts';
import type { MergeSetup } from './jobs.ts';
import { Journal } from './journal.ts';
import { openRunners, runJobs } from './pool.ts';
import type { MergeRecipe } from './recipe.ts';
import type { MergeSchedule } from './schedule.ts';
import type { MergeStatistics } from './statistics.ts';
import type { TensorResult } from './tensor.ts';

export interface Production {
  readonly recipe: MergeRecipe;
  readonly schedule: MergeSchedule;
  readonly statistics: MergeStatistics | undefined;
  /** Of the run: whether it goes on from an earlier one, and whether it is kept for a later. */
  readonly output: OutputFolder;
  /** Where the files are; it exists. */
  readonly folder: string;
  /** File of the journal. */
  readonly journal: string;
  /** What is being done, for the bar. */
  readonly phase: string;
  readonly hooks: RunHooks;
}

/** Goes on from where an earlier run left off. Returns what was done to each tensor, and how many of them an earlier run had finished. */
export async function produce({
  recipe,
  schedule,
  statistics,
  output,
  folder,
  journal: journalPath,
  phase,
  hooks,
}: Production): Promise<{ results: Map<string, TensorResult>; resumed: number }> {
  const { layout, jobs, threads } = schedule;
  const intact = output.resumed && (await hasPlacedFiles(folder, layout));
  if (!intact) await createPlacedFiles(folder, layout);
  const outputs = layout.files.map(({ name }) => join(folder, name));
  await using journal = await Journal.open(journalPath, outputs, !intact, () => output.keepForResume());
  const left = jobs.filter(({ name }) => !journal.results.has(name));
  // Largest first: a thread that ends with a large one would keep the others waiting.
  if (threads > 1) left.sort((a, b) => b.places[0].byteLength - a.places[0].byteLength);
  const resumed = jobs.length - left.length;
  if (output.resumed) hooks.note?.(`resuming: ${resumed} of ${jobs.length} tensors are finished`);
  let done = [...journal.results.values()].reduce((sum, { bytes }) => sum + bytes, 0);
  const total = jobs.reduce((sum, { places }) => sum + places[0].byteLength, 0);
  const setup: MergeSetup = {
    seed: recipe.seed,
    ...(recipe.compat ? { compat: recipe.compat } : {}),
    ...(statistics?.norms ? { statisticNorms: statistics.norms } : {}),
    allowNonfinite: recipe.allowNonfinite,
    folder,
  };
  const finish = (result: TensorResult): void => {
    for (const message of result.notes) hooks.note?.(`${result.tensor}: ${message}`);
    journal.add(result);
    done += result.bytes;
    hooks.progress?.({ phase: `${phase} ${result.tensor}`, done, total });
  };
  try {
    const runners = openRunners(setup, Math.min(threads, left.length));
    await runJobs(left, runners, { signal: hooks.signal, done: finish });
  } catch (error) {
    // What is wrong with the inputs stays wrong: only other ends are worth resuming from.
    const hopeless = error instanceof FormatError || error instanceof UnsupportedError || error instanceof RecipeError;
    if (hopeless) output.abandon();
    else await journal.sync();
    throw error;
  }
  await journal.sync();
  return { results: journal.results, resumed };
}

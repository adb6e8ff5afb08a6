/** pcomp.json of an adapter: the recipe, what every layer got and why, and the files that went in and came out. */
import { basename, join, resolve } from 'node:path';
import { type HashedFile, hashFolder, writeJson } from '../../artifacts/manifest.ts';
import type { Device } from '../../compute/engine.ts';
import { packageVersion } from '../../package-root.ts';
import { type AdaptOutcome, type PreparedRun, sizeOf } from './outcome.ts';
import type { AdaptRecipe } from './recipe.ts';

/** The recipe as pcomp.json has it: without this machine in it, and without folders on the way to files. */
export function portableRecipe(recipe: AdaptRecipe): Record<string, unknown> {
  const { threads: _, maxMemory: __, device: ___, text, against, ...rest } = recipe;
  const original = against === undefined ? {} : { against: basename(resolve(against)) };
  return { ...rest, ...original, text: text.map((file) => basename(file)) };
}

/** Writes pcomp.json into the finished folder. */
export async function writeAdaptManifest(
  folder: string,
  run: PreparedRun,
  made: Omit<AdaptOutcome, 'run'>,
  { device, inputs }: { readonly device: Device; readonly inputs: Readonly<Record<string, HashedFile>> },
): Promise<void> {
  const { recipe, modules, schedule, start } = run;
  const { method, preset, seed } = recipe;
  const ranks = schedule.ranks(modules);
  const surrogate = start?.surrogate;
  await writeJson(join(folder, 'pcomp.json'), {
    format: 1,
    command: 'adapt',
    recipe: portableRecipe(recipe),
    plan: {
      method,
      preset,
      label: made.label,
      budget: made.budget,
      ...(made.solved ? { solved: made.solved } : {}),
      modules: Object.fromEntries(
        modules.map((module) => {
          const { name, outFeatures, inFeatures, routed, kernel } = module;
          const rank = ranks.get(name)!;
          const { spent: cost, parameters } = sizeOf(run, module, rank);
          const kept = routed ? { routed } : kernel ? { nonZeros: parameters } : { rank };
          const scores = surrogate?.scores.get(name);
          return [name, { outFeatures, inFeatures, ...kept, cost, ...(scores ? { scores } : {}) }];
        }),
      ),
      ...(surrogate
        ? {
            surrogate: {
              of: surrogate.of,
              components: surrogate.components,
              windows: surrogate.windows,
              concentration: surrogate.concentration,
            },
          }
        : {}),
      trace: surrogate?.trace ?? schedule.trace,
    },
    seed,
    device,
    versions: { pcomp: packageVersion() },
    inputs,
    outputs: await hashFolder(folder),
  });
}

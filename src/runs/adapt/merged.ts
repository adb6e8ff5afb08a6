/** `adapt convert --to merged`: the base with an adapter folded in, which is a merge of one expert. */
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { hashFile, writeReport } from '../../artifacts/manifest.ts';
import { readJsonObject } from '../../artifacts/merge/merge-input.ts';
import type { OutputFolder } from '../../artifacts/output-folder.ts';
import { type AdapterFolder, writeAdapter } from '../../artifacts/peft.ts';
import { packageVersion } from '../../package-root.ts';
import { quoted } from '../merge/card.ts';
import { merge } from '../merge/merge.ts';
import { mergeRecipe } from '../merge/recipe.ts';
import { flag } from '../recipe-fields.ts';
import type { RunHooks } from '../run.ts';

export interface MergedRequest {
  /** Folder of the adapter. */
  readonly path: string;
  readonly base: string;
  /** What goes in instead of the adapter as it is stored. */
  readonly plain: AdapterFolder | undefined;
  /** How it is made, as pcomp.json has it. */
  readonly recipe: Readonly<Record<string, unknown>>;
  /** The output as the user named it, for the report. */
  readonly output: string;
  readonly threads: number;
}

/** Fills the artifact of `folder`; returns what a manifest says of it. Throws as `merge`. */
export async function writeMerged(
  { path, base, plain, recipe, output, threads }: MergedRequest,
  { artifactPath, partsPath }: OutputFolder,
  hooks: RunHooks,
): Promise<Readonly<Record<'outputs' | 'tensors', unknown>>> {
  // The merge calls its experts by the names of their folders.
  const expert = plain ? join(partsPath, 'factors', basename(resolve(path))) : path;
  if (plain) {
    await mkdir(expert, { recursive: true });
    await writeAdapter(expert, plain);
  }
  // It has an output of its own, which it could go on with; what holds it is gone when the run is stopped.
  const made = join(partsPath, 'merged');
  const asMerge = mergeRecipe({ base, method: 'linear', card: false, threads }, threads);
  await merge([expert], made, asMerge, { overwrite: false, resume: false, dryRun: false }, hooks);
  await rm(artifactPath, { recursive: true });
  await rename(made, artifactPath);
  const report = await readJsonObject(join(artifactPath, 'report.json'));
  await writeReport(artifactPath, { ...report, run: { ...(report['run'] as object), output } });
  const { outputs, tensors } = await readJsonObject(join(artifactPath, 'pcomp.json'));
  await writeFile(join(artifactPath, CARD), cardOf(recipe));
  return { outputs: { ...(outputs as object), [CARD]: await hashFile(join(artifactPath, CARD)) }, tensors };
}

const CARD = 'README.md';

function cardOf({ adapter, base, to, ...options }: MergedRequest['recipe']): string {
  const flags = Object.entries({ to, base, ...options })
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => `${flag(key)} ${[value].flat().map(quoted).join(' ')}`);
  return [
    '---',
    `base_model: ${String(base)}`,
    'library_name: transformers',
    'tags:',
    '- pcomp',
    '---',
    `# ${String(base)} with ${String(adapter)} folded in`,
    '',
    `Made with pcomp ${packageVersion()}:`,
    '',
    `    ${['pcomp adapt convert', quoted(adapter), ...flags, '-o merged'].join(' ')}`,
    '',
    '`pcomp.json` has the hash of every file that went in and of every tensor that came out.',
    '',
  ].join('\n');
}

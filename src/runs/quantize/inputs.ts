/** What an artifact says it was made from: the recipe without this machine in it, and the hashes of the files that were read. */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { basename, join, resolve } from 'node:path';
import { type HashedFile, hashFile } from '../../artifacts/manifest.ts';
import { parseTextFile } from '../../calibration/text.ts';
import { packageVersion } from '../../package-root.ts';
import { calibrationFiles, type QuantizeJob } from './job.ts';

export interface RunInputs {
  /** The recipe as pcomp.json has it: without threads and memory, and without folders on the way to files. */
  readonly recipe: Readonly<Record<string, unknown>>;
  readonly files: Readonly<Record<string, HashedFile>>;
  /** Hash of everything that decides the output's bytes. */
  readonly hash: string;
}

export async function describeInputs(job: QuantizeJob): Promise<RunInputs> {
  const recipe = portableRecipe(job);
  const files = await hashInputs(job);
  const hash = createHash('sha256')
    .update(JSON.stringify([recipe, files, packageVersion()]))
    .digest('hex');
  return { recipe, files, hash };
}

function portableRecipe({ source, recipe }: QuantizeJob): Record<string, unknown> {
  const { threads: _, maxMemory: __, plan, ...portable } = recipe;
  return {
    // Resolved: `.` and `models/base` may be the same folder.
    model: basename(resolve(source.path)),
    ...portable,
    calibration: recipe.calibration.map((file) => basename(file)),
    ...(plan === undefined ? {} : { plan: basename(plan) }),
  };
}

/** Names that mean something without this machine -> content. */
async function hashInputs({ source, recipe, readsText }: QuantizeJob): Promise<Record<string, HashedFile>> {
  const files = new Map<string, string>();
  for (const { path } of source.files) files.set(`model/${basename(path)}`, path);
  files.set('model/config.json', source.configPath);
  if (readsText) {
    for (const name of ['tokenizer.json', 'tokenizer_config.json']) {
      const path = join(source.folder, name);
      if (existsSync(path)) files.set(`model/${name}`, path);
    }
    calibrationFiles(recipe).forEach((file, i) => {
      const { path } = parseTextFile(file);
      files.set(`calibration/${i}/${basename(path)}`, path);
    });
  }
  if (recipe.plan !== undefined) files.set(`plan/${basename(recipe.plan)}`, recipe.plan);
  const hashed: Record<string, HashedFile> = {};
  for (const [name, path] of files) hashed[name] = await hashFile(path);
  return hashed;
}

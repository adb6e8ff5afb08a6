/** What identifies the files that go into a merge, without reading all of them: for resuming, and for following a plan. */
import { createHash } from 'node:crypto';
import { open } from 'node:fs/promises';
import { basename } from 'node:path';
import { type HashedFile, hashFile } from '../../artifacts/manifest.ts';
import { readJsonObject } from '../../artifacts/merge/merge-input.ts';
import { errorCode } from '../../artifacts/process-lock.ts';
import { parseTextFile } from '../../calibration/text.ts';
import { EnvironmentError, RecipeError } from '../../errors.ts';
import { packageVersion } from '../../package-root.ts';
import { portableRecipe } from './describe.ts';
import type { MergeInputs } from './inputs.ts';
import type { MergeRecipe } from './recipe.ts';

/** What is known of a file without reading all of it. */
export interface FileMark {
  readonly name: string;
  readonly bytes: number;
  /** Of the length and header of a safetensors file. */
  readonly headerSha256: string;
  /** Of its first and last 64 KiB. */
  readonly edgesSha256: string;
}

const EDGE_BYTES = 64 * 1024;

async function markOf(path: string, byteLength: number): Promise<FileMark> {
  const handle = await open(path, 'r');
  try {
    const read = async (start: number, end: number) => {
      const bytes = Buffer.alloc(Math.max(0, end - start));
      await handle.read(bytes, 0, bytes.byteLength, start);
      return bytes;
    };
    const sha = (...parts: Uint8Array[]) => parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest('hex');
    const first = await read(0, Math.min(EDGE_BYTES, byteLength));
    const last = await read(Math.max(0, byteLength - EDGE_BYTES), byteLength);
    const isIndex = path.endsWith('.json');
    const headerEnd = isIndex ? byteLength : 8 + Number(first.readBigUInt64LE(0));
    return {
      name: basename(path),
      bytes: byteLength,
      headerSha256: sha(await read(0, headerEnd)),
      edgesSha256: sha(first, last),
    };
  } finally {
    await handle.close();
  }
}

export interface InputMarks {
  /** By input: the files of its weights. */
  readonly weights: readonly (readonly FileMark[])[];
  /** Texts and plans, by the flag and the name of the file. */
  readonly texts: Readonly<Record<string, HashedFile>>;
  /** What a resumed run must share: the recipe, and everything that goes in. */
  readonly hash: string;
}

/** Marks every file that goes in. Throws RecipeError when a plan was made from other models. */
export async function markInputs(inputs: MergeInputs, recipe: MergeRecipe): Promise<InputMarks> {
  const weights: FileMark[][] = [];
  for (const { tensors } of inputs.all) {
    weights.push(await Promise.all(tensors.files.map(({ path, byteLength }) => markOf(path, byteLength))));
  }
  const texts: Record<string, HashedFile> = {};
  for (const [i, argument] of recipe.calibration.entries()) {
    const { path } = parseTextFile(argument.slice(argument.indexOf('=') + 1));
    texts[`calibration/${i}/${basename(path)}`] = await hashGiven('--calibration', path);
  }
  for (const flag of ['prompts', 'negative'] as const) {
    for (const [i, argument] of recipe[flag].entries()) {
      const { path } = parseTextFile(argument.slice(argument.indexOf('=') + 1));
      texts[`${flag}/${i}/${basename(path)}`] = await hashGiven(`--${flag}`, path);
    }
  }
  if (recipe.plan !== undefined) {
    texts[`plan/${basename(recipe.plan)}`] = await hashGiven('--plan', recipe.plan);
    await requirePlannedInputs(recipe.plan, inputs, weights);
  }
  const adapters = inputs.all.map(({ adapter }) => adapter ?? null);
  // What was made for the result follows from the rest, but for roundings: another number of threads is no other request.
  const given = weights.slice(0, inputs.experts.length + (inputs.base ? 1 : 0));
  const all = [portableRecipe(recipe, inputs), given, texts, adapters, inputs.config, inputs.outputs, packageVersion()];
  return { weights, texts, hash: createHash('sha256').update(JSON.stringify(all)).digest('hex') };
}

async function hashGiven(flag: string, path: string): Promise<HashedFile> {
  try {
    return await hashFile(path);
  } catch (error) {
    throw new EnvironmentError('FILE_UNREADABLE', `${flag} ${path}: cannot be read (${errorCode(error)})`, { cause: error });
  }
}

interface ManifestInput {
  readonly label: string;
  readonly files: readonly FileMark[];
}

/** A pcomp.json says which files its plan was learned from; a bare plan does not. */
async function requirePlannedInputs(path: string, { all }: MergeInputs, marks: readonly (readonly FileMark[])[]): Promise<void> {
  const { inputs: planned } = (await readJsonObject(path)) as { inputs?: readonly ManifestInput[] };
  if (!planned) return;
  for (const [i, { label }] of all.entries()) {
    const files = planned.find((input) => input.label === label)?.files;
    if (files && JSON.stringify(files) !== JSON.stringify(marks[i])) {
      throw new RecipeError(`--plan ${path}: was learned from other files of ${label}; learn a plan for these`);
    }
  }
}

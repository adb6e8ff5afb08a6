/** Files that go into an adapter, by content: what pcomp.json says of them, and what a run is recognized by. */
import { basename } from 'node:path';
import { type HashedFile, hashFile } from '../../artifacts/manifest.ts';
import { type ModelSource, openModelSource } from '../../artifacts/model-source.ts';
import { parseTextFile } from '../../calibration/text.ts';
import type { AdaptRecipe } from './recipe.ts';

/** Everything that a run reads: the model, the text, and what the model was made from. */
export async function hashInputs(
  source: ModelSource,
  { text, against }: Pick<AdaptRecipe, 'text' | 'against'>,
): Promise<Record<string, HashedFile>> {
  const inputs = await hashModel('model', source);
  if (against !== undefined) {
    await using original = await openModelSource(against);
    for (const { path } of original.files) inputs[`against/${basename(path)}`] = await hashFile(path);
  }
  return { ...inputs, ...(await hashTexts(text)) };
}

/** Configuration and weight files of a model, as `<prefix>/<file>`. */
export async function hashModel(
  prefix: string,
  { files, configPath }: Pick<ModelSource, 'files' | 'configPath'>,
): Promise<Record<string, HashedFile>> {
  const inputs: Record<string, HashedFile> = { [`${prefix}/config.json`]: await hashFile(configPath) };
  for (const { path } of files) inputs[`${prefix}/${basename(path)}`] = await hashFile(path);
  return inputs;
}

/** Files of text, as `text/<number>/<file>`. */
export async function hashTexts(text: readonly string[]): Promise<Record<string, HashedFile>> {
  const inputs: Record<string, HashedFile> = {};
  for (const [i, file] of text.entries()) {
    const { path } = parseTextFile(file);
    inputs[`text/${i}/${basename(path)}`] = await hashFile(path);
  }
  return inputs;
}

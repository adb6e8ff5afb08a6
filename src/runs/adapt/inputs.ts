/** Files that go into an adapter, by content: what pcomp.json says of them, and what a run is recognized by. */
import { basename } from 'node:path';
import { type HashedFile, hashFile } from '../../artifacts/manifest.ts';
import type { ModelSource } from '../../artifacts/model-source.ts';
import { parseTextFile } from '../../calibration/text.ts';

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

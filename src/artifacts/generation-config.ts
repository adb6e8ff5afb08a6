/** generation_config.json of the model that is compressed. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { FormatError } from '../errors.ts';
import type { ModelSource } from './model-source.ts';
import { errorCode } from './process-lock.ts';

/** The source's generation_config.json; without one, the special tokens of its config.json. Throws FormatError. */
export async function readGenerationConfig(source: Pick<ModelSource, 'folder' | 'config'>): Promise<Record<string, unknown>> {
  const path = join(source.folder, 'generation_config.json');
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) !== 'ENOENT') throw error;
    const tokens = ['bos_token_id', 'eos_token_id', 'pad_token_id'].filter((name) => source.config[name] !== undefined);
    return { _from_model_config: true, ...Object.fromEntries(tokens.map((name) => [name, source.config[name]])) };
  }
  try {
    const value: unknown = JSON.parse(text);
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  } catch (cause) {
    throw new FormatError(path, 'generation-config-not-json', 'not JSON', { cause });
  }
  throw new FormatError(path, 'generation-config-not-an-object', 'must be a JSON object');
}

/** Whether an expert's tokenizer gives every id the meaning it has in the base: rows of embeddings are only comparable then. */
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { RecipeError } from '../../errors.ts';
import { readJsonObject } from './merge-input.ts';

/** Throws RecipeError naming up to ten ids on which tokenizer.json of the two folders disagree. Folders without that file agree. */
export async function requireSameVocabulary(expertFolder: string, baseFolder: string): Promise<void> {
  const [expert, base] = await Promise.all([expertFolder, baseFolder].map(vocabularyOf));
  if (!expert || !base) return;
  const ids = [...new Set([...expert.keys(), ...base.keys()])].sort((a, b) => a - b);
  const show = (token: string | undefined) => (token === undefined ? 'nothing' : JSON.stringify(token));
  const differences = ids
    .filter((id) => expert.get(id) !== base.get(id))
    .map((id) => `${id} is ${show(expert.get(id))}, the base's ${show(base.get(id))}`);
  if (differences.length === 0) return;
  throw new RecipeError(
    `${expertFolder}: its vocabulary differs from the base's in ${differences.length} ids: ${differences.slice(0, 10).join('; ')}. ` +
      'Bring all models to one vocabulary first.',
  );
}

async function vocabularyOf(folder: string): Promise<Map<number, string> | undefined> {
  const path = join(folder, 'tokenizer.json');
  try {
    await stat(path);
  } catch {
    return undefined;
  }
  const tokenizer = await readJsonObject(path);
  const result = new Map<number, string>();
  const vocab = (tokenizer['model'] as { readonly vocab?: unknown } | undefined)?.vocab;
  // Unigram keeps a list of [token, score], the others a map of token -> id.
  if (Array.isArray(vocab)) {
    for (const [id, entry] of (vocab as unknown[]).entries()) result.set(id, String(Array.isArray(entry) ? entry[0] : entry));
  } else if (typeof vocab === 'object' && vocab !== null) {
    for (const [token, id] of Object.entries(vocab)) result.set(Number(id), token);
  }
  const added = tokenizer['added_tokens'];
  if (Array.isArray(added)) for (const token of added as { id: number; content: string }[]) result.set(token.id, token.content);
  return result;
}

/** Whether an expert's tokenizer gives every id the meaning it has in the base: rows of embeddings are only comparable then. */
import { RecipeError } from '../../errors.ts';
import { readVocabulary } from './vocabulary.ts';

/** Throws RecipeError naming up to ten ids on which tokenizer.json of the two folders disagree. Folders without that file agree. */
export async function requireSameVocabulary(expertFolder: string, baseFolder: string): Promise<void> {
  const [expert, base] = (await Promise.all([expertFolder, baseFolder].map(readVocabulary))).map(
    (vocabulary) => vocabulary && new Map([...vocabulary.ids].map(([token, id]) => [id, token])),
  );
  if (!expert || !base) return;
  const ids = [...new Set([...expert.keys(), ...base.keys()])].sort((a, b) => a - b);
  const show = (token: string | undefined) => (token === undefined ? 'nothing' : JSON.stringify(token));
  const differences = ids
    .filter((id) => expert.get(id) !== base.get(id))
    .map((id) => `${id} is ${show(expert.get(id))}, the base's ${show(base.get(id))}`);
  if (differences.length === 0) return;
  throw new RecipeError(
    `${expertFolder}: its vocabulary differs from the base's in ${differences.length} ids: ${differences.slice(0, 10).join('; ')}. ` +
      '--tokenizer union brings them to one vocabulary.',
  );
}

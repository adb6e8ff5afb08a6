/** File arguments: globs are expanded here, because not every shell does. */
import { existsSync } from 'node:fs';
import { glob } from 'tinyglobby';
import { RecipeError } from '../src/errors.ts';

/** Splits `file.jsonl:field` into the path and the rest; a Windows drive letter is not a separator. */
function splitSelector(item: string): [string, string] {
  const match = /^(.+\.(?:jsonl|csv|tsv)):([^:/\\]+)$/i.exec(item);
  return match ? [match[1], `:${match[2]}`] : [item, ''];
}

/** Expands globs, keeping `:field` selectors. A pattern that matches no file is a RecipeError naming the flag. */
export async function expandFiles(flag: string, items: readonly string[]): Promise<string[]> {
  const files: string[] = [];
  for (const item of items) {
    const [pattern, selector] = splitSelector(item);
    if (existsSync(pattern) || !/[*?[\]{}]/.test(pattern)) {
      files.push(item);
      continue;
    }
    const matches = (await glob(pattern.replaceAll('\\', '/'), { dot: false })).sort();
    if (matches.length === 0) throw new RecipeError(`${flag} ${item}: no file matches`);
    files.push(...matches.map((match) => match + selector));
  }
  return files;
}

/** Expands globs to files and folders. A pattern that matches nothing is a RecipeError. */
export async function expandModels(items: readonly string[]): Promise<string[]> {
  const models: string[] = [];
  for (const item of items) {
    if (existsSync(item) || !/[*?[\]{}]/.test(item)) {
      models.push(item);
      continue;
    }
    const matches = await glob(item.replaceAll('\\', '/'), { dot: false, onlyFiles: false, expandDirectories: false });
    if (matches.length === 0) throw new RecipeError(`${item}: no model matches`);
    models.push(...matches.map((match) => match.replace(/\/$/, '')).sort());
  }
  return models;
}

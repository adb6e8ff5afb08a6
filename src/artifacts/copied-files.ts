/** Files of a Hugging Face folder that go into an artifact as they are. */
import { chmod, copyFile, readdir } from 'node:fs/promises';
import { join } from 'node:path';

/** Tokenizers in every form, chat templates, and the terms the weights come under. */
const COPIED = [
  /^tokenizer\.json$/,
  /^tokenizer_config\.json$/,
  /^tokenizer\.model$/,
  /^special_tokens_map\.json$/,
  /^added_tokens\.json$/,
  /^vocab\.(json|txt)$/,
  /^merges\.txt$/,
  /^chat_template\.(jinja|json)$/,
  /^(LICENSE|LICENCE|NOTICE)(\.(txt|md))?$/,
];

/** Copies them; returns their names, sorted. */
export async function copyModelFiles(from: string, to: string): Promise<string[]> {
  const names = (await readdir(from)).filter((name) => COPIED.some((pattern) => pattern.test(name))).sort();
  for (const name of names) {
    await copyFile(join(from, name), join(to, name));
    // A read-only original would make an artifact that --overwrite cannot replace everywhere.
    await chmod(join(to, name), 0o644);
  }
  return names;
}

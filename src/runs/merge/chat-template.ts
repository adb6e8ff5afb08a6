/** The chat template that a mergekit configuration asks for, in the place where every reader looks. */
import { readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { readChatTemplate } from '../../calibration/chat-template.ts';
import type { MergeInputs } from './inputs.ts';

/** The template that most models have; of equals the first, the base before the experts. Undefined when none has one. */
export async function commonTemplate({ base, experts }: MergeInputs): Promise<string | undefined> {
  const counts = new Map<string, number>();
  for (const { place } of [...(base ? [base] : []), ...experts]) {
    if (place.kind !== 'folder') continue;
    const found = await readChatTemplate(place.path);
    if (found) counts.set(found.source, (counts.get(found.source) ?? 0) + 1);
  }
  return [...counts].sort(([, a], [, b]) => b - a)[0]?.[0];
}

/** Files that hold templates of their own, which would go before the tokenizer's configuration. */
const OTHERS = ['chat_template.jinja', 'chat_template.json'];

/** Writes it into the folder's tokenizer_config.json. @param names files of the folder; returned as they are then */
export async function putTemplate(folder: string, template: string, names: readonly string[]): Promise<string[]> {
  const name = 'tokenizer_config.json';
  const config = names.includes(name) ? (JSON.parse(await readFile(join(folder, name), 'utf8')) as Record<string, unknown>) : {};
  await writeFile(join(folder, name), `${JSON.stringify({ ...config, chat_template: template }, null, 2)}\n`);
  for (const other of OTHERS) await rm(join(folder, other), { force: true });
  return [...names.filter((known) => known !== name && !OTHERS.includes(known)), name];
}

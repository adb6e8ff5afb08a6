/** What stands beside the weights of a merged model: configuration, tokenizer, index, card. */
import { chmod, copyFile, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { coefficientMap } from '../../artifacts/coefficient-map.ts';
import { copyModelFiles } from '../../artifacts/copied-files.ts';
import { writeCard } from './card.ts';
import { commonTemplate, putTemplate } from './chat-template.ts';
import type { MergeInputs } from './inputs.ts';
import type { LambdaReport } from './lambda-search.ts';
import type { PlannedMerge } from './learned.ts';
import type { MergeRecipe } from './recipe.ts';
import type { MergeSchedule } from './schedule.ts';

/** What was learned as a picture, beside the report. */
const MAP = 'coefficients.svg';

/** Writes everything that is no weight; returns the names. @param decided what was learned, or given, and the lambda that was found */
export async function writeModelFiles(
  folder: string,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  { layout }: MergeSchedule,
  { planned, lambda }: { readonly planned: PlannedMerge | undefined; readonly lambda: LambdaReport | undefined },
  note: (message: string) => void,
): Promise<string[]> {
  let names: string[] = [];
  if (layout.index) {
    await writeFile(join(folder, layout.index.name), layout.index.text);
    names.push(layout.index.name);
  }
  if (inputs.config) {
    await writeFile(join(folder, 'config.json'), `${JSON.stringify(withDtype(inputs.config, recipe), null, 2)}\n`);
    names.push(
      'config.json',
      ...(await copyModelFiles(inputs.folder, folder)),
      ...(await copyIfThere(inputs.folder, folder, 'generation_config.json')),
    );
  } else {
    note(`${inputs.template.place.path}: there is no config.json beside it, so the result has none`);
  }
  const asked = recipe.mergekit?.chatTemplate;
  if (asked !== undefined) {
    const template = asked === 'auto' ? await commonTemplate(inputs) : asked;
    if (template === undefined) note('chat_template auto: none of the models has one, so the result has none');
    else names = await putTemplate(folder, template, names);
  }
  if (recipe.mergekit) {
    await writeFile(join(folder, 'mergekit_config.yml'), recipe.mergekit.text);
    names.push('mergekit_config.yml');
  }
  if (planned) {
    await writeFile(join(folder, MAP), coefficientMap(planned.plan));
    names.push(MAP);
  }
  if (recipe.card) {
    await writeCard(folder, inputs, recipe, { learned: planned && { map: MAP, report: planned.report }, lambda });
    names.push('README.md');
  }
  return names;
}

async function copyIfThere(from: string, to: string, name: string): Promise<string[]> {
  try {
    await stat(join(from, name));
  } catch {
    return [];
  }
  await copyFile(join(from, name), join(to, name));
  await chmod(join(to, name), 0o644);
  return [name];
}

const TORCH_NAMES = { f32: 'float32', f16: 'float16', bf16: 'bfloat16' } as const;

function withDtype(config: Readonly<Record<string, unknown>>, { dtype }: MergeRecipe): Record<string, unknown> {
  if (dtype === undefined) return config;
  const key = config['dtype'] === undefined ? 'torch_dtype' : 'dtype';
  return { ...config, [key]: TORCH_NAMES[dtype] };
}

/** README.md of a merged model: a model card that says what was merged, how, and how to do it again. */
import { writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { portableRecipe } from './merge-describe.ts';
import type { MergeInputs } from './merge-inputs.ts';
import { MERGE_DEFAULTS, type MergeRecipe } from './merge-recipe.ts';
import { packageVersion } from './package-root.ts';
import { flag } from './recipe-fields.ts';

/** Writes the card. It names no folder of this machine. */
export async function writeCard(folder: string, inputs: MergeInputs, recipe: MergeRecipe): Promise<void> {
  const { base, experts, config } = inputs;
  const models = [...(base ? [base] : []), ...experts].map(({ label }) => `- ${label}`);
  const architecture = Array.isArray(config?.['architectures']) ? ` (${String(config['architectures'][0])})` : '';
  const onBase = base ? `, with ${base.label} as the base` : '';
  const text = [
    '---',
    'base_model:',
    ...models,
    'base_model_relation: merge',
    'library_name: transformers',
    'tags:',
    '- merge',
    '- pcomp',
    '---',
    `# Merge of ${experts.map(({ label }) => label).join(', ')}`,
    '',
    `${experts.length === 1 ? '1 model' : `${experts.length} models`}${architecture} merged by \`${recipe.method}\`${onBase}. Made with pcomp ${packageVersion()}:`,
    '',
    `    ${commandOf(inputs, recipe)}`,
    '',
    '`pcomp.json` has the hash of every tensor that went in and came out.',
    '',
  ].join('\n');
  await writeFile(join(folder, 'README.md'), text);
}

/** The command line that makes the result again: every option that is not the default. */
function commandOf(inputs: MergeInputs, recipe: MergeRecipe): string {
  const defaults: Readonly<Record<string, unknown>> = MERGE_DEFAULTS;
  const { base: _, experts: __, card: ___, mergekit, method, dtype, ...options } = portableRecipe(recipe, inputs);
  const flags = Object.entries(mergekit || dtype === undefined ? options : { dtype, ...options })
    .filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(defaults[key]))
    .map(([key, value]) =>
      value === false ? `--no-${key}` : value === true ? flag(key) : `${flag(key)} ${[value].flat().map(quoted).join(' ')}`,
    );
  // The file says the rest: models, method, type.
  if (mergekit) return ['pcomp merge --config mergekit_config.yml', ...flags, '-o merged'].join(' ');
  const { base, experts } = inputs;
  const onBase = base ? [`--base ${quoted(basename(base.place.path))}`] : [];
  const names = experts.flatMap(({ place }) => (place.files ?? [place.path]).map((path) => quoted(basename(path))));
  return ['pcomp merge', ...names, ...onBase, `--method ${String(method)}`, ...flags, '-o merged'].join(' ');
}

function quoted(value: unknown): string {
  const text = String(value);
  return /^[\w./=,+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

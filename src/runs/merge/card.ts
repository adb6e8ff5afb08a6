/** README.md of a merged model: a model card that says what was merged, how, and how to do it again. */
import { writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { packageVersion } from '../../package-root.ts';
import { flag } from '../recipe-fields.ts';
import { portableRecipe } from './describe.ts';
import type { LearningReport } from './experts/learner.ts';
import type { MergeInputs } from './inputs.ts';
import type { LambdaReport } from './lambda-search.ts';
import { MERGE_DEFAULTS, type MergeRecipe } from './recipe.ts';

/** What a learned merge has to tell: the picture of its coefficients, and how near the experts it came. */
export interface LearnedNews {
  /** File beside the card. */
  readonly map: string;
  /** Absent where a plan was given. */
  readonly report: LearningReport | undefined;
}

/** Writes the card. It names no folder of this machine. */
export async function writeCard(
  folder: string,
  inputs: MergeInputs,
  recipe: MergeRecipe,
  { learned, lambda }: { readonly learned: LearnedNews | undefined; readonly lambda: LambdaReport | undefined },
): Promise<void> {
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
    ...(learned ? tellLearned(learned) : []),
    ...(lambda ? [`lambda is ${lambda.value}: of ${lambda.tried.length} tried, nearest to the models on text of each.`, ''] : []),
  ].join('\n');
  await writeFile(join(folder, 'README.md'), text);
}

function tellLearned({ map, report }: LearnedNews): string[] {
  const picture = ['## Coefficients', '', `![Coefficients by block, kind of layer and expert](${map})`, ''];
  if (report === undefined) return picture;
  const rows = report.experts.map(({ label, base, merged, recovered }) =>
    [
      label,
      base.kl.toPrecision(3),
      merged.kl.toPrecision(3),
      `${(100 * recovered).toFixed(0)} %`,
      `${(100 * merged.agreement).toFixed(0)} %`,
      base.perplexity.toPrecision(4),
      merged.perplexity.toPrecision(4),
      merged.expertPerplexity.toPrecision(4),
    ].join(' | '),
  );
  return [
    '## How near the experts it is',
    '',
    `On ${report.judgedOn} of each expert: Kullback-Leibler divergence from the expert in nats per token, of the base and of the merge; how much of it the merge takes away; how often merge and expert think the same token likeliest; and perplexity.`,
    '',
    '| expert | KL base | KL merged | recovered | same top token | perplexity base | merged | expert |',
    '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ...rows.map((row) => `| ${row} |`),
    '',
    ...picture,
  ];
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

/** A word of a command as a shell takes it. */
export function quoted(value: unknown): string {
  const text = String(value);
  return /^[\w./=,+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

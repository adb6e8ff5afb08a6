/** `pcomp merge EXPERTS --base BASE`: flags -> recipe -> run -> report. */
import { Command, Option } from 'commander';
import { formatDuration } from '../src/calibration/progress.ts';
import { RecipeError } from '../src/errors.ts';
import { MERGERS } from '../src/methods/merge/index.ts';
import { LEARNED } from '../src/methods/merge/learned.ts';
import type { Merger, Parameter } from '../src/methods/merge/merger.ts';
import { MOE } from '../src/methods/merge/moe/layouts.ts';
import { GATES } from '../src/methods/merge/moe/router.ts';
import type { LearningReport } from '../src/runs/merge/experts/learner.ts';
import type { LearningCost } from '../src/runs/merge/experts/prepare.ts';
import { type ExtractOutcome, type ExtractRequest, extract } from '../src/runs/merge/extract-lora.ts';
import type { LambdaCost } from '../src/runs/merge/lambda-search.ts';
import { type MergeOutcome, merge } from '../src/runs/merge/merge.ts';
import { readMergekitConfig } from '../src/runs/merge/mergekit/config.ts';
import {
  MERGE_DEFAULTS,
  MERGE_DTYPES,
  MERGE_PRESETS,
  type MergeRequest,
  mergeRecipe,
  ON_EXTRA,
  ON_MISSING,
} from '../src/runs/merge/recipe.ts';
import { formatSize, parseSize } from '../src/runs/size.ts';
import { expandModels } from './files.ts';
import { CORES, jsonOption, outputMode, outputOption, quietOption, type RunFlags, recipeFlags } from './options.ts';
import { createConsole } from './ui/console.ts';
import { renderPairs, renderTable } from './ui/table.ts';

interface Flags extends RunFlags {
  readonly config?: string;
}

const D = MERGE_DEFAULTS;

export function mergeCommand(signal: AbortSignal): Command {
  return new Command('merge')
    .description('Merge models that were trained from one base into one.')
    .argument(
      '[experts...]',
      'Hugging Face folders, .safetensors files, PEFT LoRA folders; globs allowed; shards of a series are one model',
    )
    .addOption(outputOption())
    .option('--config <file>', 'mergekit YAML: models or slices, method and parameters; leave the experts out then')
    .option('--base <model>', 'the model that the experts were trained from: folder or .safetensors file')
    .option(
      '--method <method>',
      'how tensors are merged (default: expert-merging++ with --calibration, else tsv-m with --base, linear without)',
    )
    .option(
      '--calibration <texts...>',
      'texts to learn on, or to find lambda by: label=FILE for each expert, or a file for all (.txt, .jsonl)',
    )
    .option('--no-generate', 'compare on prompts themselves, where a response is lacking; experts write them otherwise')
    .option('--plan <file>', 'coefficients of an earlier learned merge: a plan file, or its pcomp.json')
    .addOption(new Option('--preset <preset>', `variant of the method (default: ${D.preset})`).choices([...MERGE_PRESETS]))
    .option('--weights <weights>', 'weight of each expert: 0.5,0.3 in label order, or label=0.5,other=0.3 (default: 1 each)')
    .option(
      '--set <settings...>',
      'parameters of the method: [glob:][label.]name=value; the last that matches a tensor wins; lambda=auto: by --calibration',
    )
    .addOption(
      new Option('--dtype <dtype>', "element type of the result (default: each base tensor's own)").choices([...MERGE_DTYPES]),
    )
    .option('--max-memory <size>', `bound on buffers (default: ${formatSize(D.maxMemory)})`)
    .option('--shard-size <size>', `tensors in one file (default: ${formatSize(D.shardSize)})`)
    .option('--seed <seed>', `seed of random masks (default: ${D.seed})`)
    .addOption(
      new Option('--on-missing <rule>', `an expert lacks a tensor of the base (default: ${D.onMissing})`).choices([
        ...ON_MISSING,
      ]),
    )
    .addOption(
      new Option('--on-extra <rule>', `an expert has a tensor that the base lacks (default: ${D.onExtra})`).choices([
        ...ON_EXTRA,
      ]),
    )
    .option(
      '--extract-lora <rank>',
      "merge nothing: write one expert's change of the base as a PEFT adapter of at most this rank",
    )
    .option(
      '--energy <part>',
      'with --extract-lora: as many directions as hold this part of the squared change (default: 1, all)',
    )
    .option('--prompts <texts...>', 'moe: what each expert is for, label=FILE: a prompt a line, or .jsonl')
    .option('--negative <texts...>', 'moe: prompts that an expert is not for, label=FILE')
    .addOption(new Option('--gate <kind>', `moe: what routers are made of (default: ${D.gate})`).choices([...GATES]))
    .option('--top-k <count>', `moe: experts of a token (default: ${D.topK})`)
    .option(
      '--tokenizer <whose>',
      `tokens of the result: base (all models must have the same), union, or the label of an expert (default: ${D.tokenizer})`,
    )
    .option('--pad-vocab <rows>', 'rows of the embedding in a multiple of this')
    .option('--untie', 'store the output head apart, where the base ties it to the embedding')
    .option('--allow-nonfinite', 'let NaN and infinities through')
    .addOption(new Option('--compat <tool>', "that tool's results where pcomp differs on purpose").choices(['mergekit']))
    .option('--threads <count>', `threads (default: all cores, here ${CORES})`)
    .option('--no-card', 'write no model card')
    .option('--overwrite', 'replace an existing output')
    .option('--resume', 'continue an interrupted run of the same recipe')
    .option('--dry-run', 'print the plan, bytes to read and memory, and stop')
    .addOption(jsonOption())
    .addOption(quietOption())
    .addHelpText('after', `\nMethods, and their parameters for --set:\n${describeMethods()}\n`)
    .action(async (experts: string[], flags: Flags) => {
      const recipe = mergeRecipe(await readRequest(flags), CORES);
      if (experts.length === 0 && recipe.mergekit === undefined) {
        throw new RecipeError('no expert: name at least one model to merge, or a mergekit file with --config');
      }
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        if (flags['energy'] !== undefined && flags['extractLora'] === undefined) {
          throw new RecipeError('--energy: goes with --extract-lora');
        }
        const mode = outputMode(flags);
        if (flags['extractLora'] !== undefined) {
          const outcome = await extract(
            await expandModels(experts),
            flags.output,
            extraction(flags),
            recipe,
            mode,
            console.hooks,
          );
          console.result(outcome, describeExtraction(outcome, flags.output));
          return;
        }
        const outcome = await merge(await expandModels(experts), flags.output, recipe, mode, console.hooks);
        console.result(outcome, describe(outcome));
      } finally {
        console.close();
      }
    });
}

async function readRequest(flags: Flags): Promise<MergeRequest> {
  const request = recipeFlags(flags, 'config', 'extractLora', 'energy');
  for (const [key, name] of [
    ['maxMemory', '--max-memory'],
    ['shardSize', '--shard-size'],
  ]) {
    if (typeof request[key] === 'string') request[key] = parseSize(name, request[key]);
  }
  if (flags.config !== undefined) request['mergekit'] = await readMergekitConfig(flags.config);
  return request;
}

/** What `--extract-lora` and `--energy` ask for. Throws RecipeError beside flags of a merge. */
function extraction(flags: Flags): ExtractRequest {
  const number = (
    name: 'extractLora' | 'energy',
    flag: string,
    fallback: number,
    rule: (value: number) => boolean,
    wanted: string,
  ) => {
    const value = flags[name] === undefined ? fallback : Number(flags[name]);
    if (!rule(value)) throw new RecipeError(`${flag} ${String(flags[name])}: must be ${wanted}`);
    return value;
  };
  for (const other of ['config', 'method', 'weights', 'set', 'calibration', 'plan', 'dtype', 'compat']) {
    if (flags[other] !== undefined) throw new RecipeError(`--${other}: has no use with --extract-lora, which merges nothing`);
  }
  return {
    rank: number(
      'extractLora',
      '--extract-lora',
      0,
      (value) => Number.isInteger(value) && value >= 1,
      'a whole number of at least 1',
    ),
    energy: number('energy', '--energy', 1, (value) => value > 0 && value <= 1, 'above 0 and at most 1'),
  };
}

function describeExtraction({ expert, base, modules, saved, parameters }: ExtractOutcome, output: string): string {
  const all = Object.values(modules);
  const ranks = all.map(({ rank }) => rank);
  const worst = Object.entries(modules).sort(([, a], [, b]) => b.residual - a.residual)[0];
  const pairs: [string, string][] = [
    ['adapter', `${expert} less ${base}: ${all.length} layers, rank ${Math.min(...ranks)} to ${Math.max(...ranks)}`],
    ['parameters', `${parameters}`],
    ['lost', worst ? `${(100 * worst[1].residual).toFixed(1)} % of the change at most, in ${worst[0]}` : 'nothing'],
    ...(saved.length === 0 ? [] : [['stored whole', saved.join(', ')] as [string, string]]),
  ];
  return `${renderPairs(pairs)}\n\nWritten to ${output}`;
}

/** A method's formula, and its parameters as `--set` takes them, with their defaults. */
function describeMethods(): string {
  const applied = Object.values<Merger>(MERGERS)
    .map(({ name, formula, parameters }) => {
      const settings = Object.entries(parameters).map(([key, { default: value }]) => `${key}=${value ?? '<required>'}`);
      return `  ${name.padEnd(18)} ${formula}${settings.length === 0 ? '' : `\n${' '.repeat(21)}${settings.join('  ')}`}`;
    })
    .join('\n');
  const learned = Object.values(LEARNED).map(({ name, formula }) => `  ${name.padEnd(18)} ${formula}`);
  const settings = Object.entries<Parameter>(LEARNED['expert-merging++'].parameters).map(
    ([key, { summary, default: value }]) => `    ${`${key}=${value}`.padEnd(20)} ${summary}`,
  );
  const sparse = `  ${MOE.padEnd(18)} the experts' MLPs side by side behind routers from --prompts; the rest is the base's`;
  return [applied, sparse, '\nLearned on --calibration:', ...learned, ...settings].join('\n');
}

function describe(outcome: MergeOutcome): string {
  const { experts, base, tensors, run } = outcome;
  const pairs: [string, string][] = [
    ['method', outcome.method],
    ...(base === undefined ? [] : [['base', base] as [string, string]]),
    [
      'tensors',
      Object.entries(tensors)
        .map(([disposition, count]) => `${count} ${disposition}`)
        .join(', '),
    ],
    ['weight files', formatSize(outcome.bytes)],
  ];
  const weighted = experts.some(({ weight }) => weight !== undefined);
  const table = renderTable(
    ['expert', 'kind', ...(weighted ? ['weight'] : [])],
    experts.map(({ label, kind, weight }) => [label, kind, ...(weighted ? [weight ?? ''] : [])]),
  );
  if (run === undefined) {
    pairs.push(
      ['to read', `at most ${formatSize(outcome.readBytes)}, every pass counted`],
      ['peak buffers', `${formatSize(outcome.predictedPeakBytes)} on ${outcome.threads} threads`],
    );
    if (outcome.toLearn) pairs.push(...describeCost(outcome.toLearn));
    if (outcome.toFindLambda) pairs.push(...describeSearch(outcome.toFindLambda));
    return `${renderPairs(pairs)}\n\n${table}\n\nDry run: nothing was written.`;
  }
  if (outcome.lambda) pairs.push(['lambda', `${outcome.lambda.value}, of ${outcome.lambda.tried.length} tried`]);
  if (outcome.learning) pairs.push(...describeLearning(outcome.learning));
  if (run.roundingLoss) pairs.push(['rounding loss', `${run.roundingLoss.loss.toPrecision(2)} of the change at most`]);
  pairs.push(['time', formatDuration(run.seconds)], ['peak memory', formatSize(run.peakBytes)]);
  const learned = outcome.learning ? `\n\n${renderDistances(outcome.learning)}` : '';
  return `${renderPairs(pairs)}\n\n${table}${learned}\n\nWritten to ${run.output}`;
}

function describeSearch({ lambdas, samples, prompts, tokens, temporaryBytes, mergedBytes }: LambdaCost): [string, string][] {
  const written = prompts === 0 ? '' : `, ${prompts} of them prompts that experts answer first`;
  return [
    ['to find lambda', `${lambdas} values on ${samples} samples, ${tokens} tokens${written}`],
    ['temporary files', `${formatSize(mergedBytes)} beside the result, ${formatSize(temporaryBytes)} elsewhere`],
  ];
}

function describeCost({ samples, heldOut, prompts, tokens, updates, temporaryBytes }: LearningCost): [string, string][] {
  const written = prompts === 0 ? '' : `, ${prompts} of them prompts that experts answer first`;
  return [
    ['to learn from', `${samples} samples, ${heldOut} held out, ${tokens} tokens${written}`],
    ['to learn', `${updates} updates`],
    ['temporary files', formatSize(temporaryBytes)],
  ];
}

function describeLearning({ start, gamma, stages }: LearningReport): [string, string][] {
  const [best] = [...start].sort((a, b) => a.kl - b.kl);
  const last = stages.at(-1)!;
  return [
    ...(best ? [['start', `${best.scale} x ${best.method}, of ${start.length} tried`] as [string, string]] : []),
    ['learned', `${last.coefficients} ${last.name}, gamma ${gamma}`],
  ];
}

/** How far the base, the start and the result are from every expert. */
function renderDistances({ experts, judgedOn }: LearningReport): string {
  const rows = experts.map(({ label, samples, base, start, merged, recovered }) => [
    label,
    samples,
    base.kl.toPrecision(3),
    start.kl.toPrecision(3),
    merged.kl.toPrecision(3),
    `${(100 * recovered).toFixed(0)} %`,
    `${(100 * merged.agreement).toFixed(0)} %`,
    base.perplexity.toPrecision(4),
    merged.perplexity.toPrecision(4),
    merged.expertPerplexity.toPrecision(4),
  ]);
  const heads = [
    'expert',
    'samples',
    'KL base',
    'start',
    'merged',
    'recovered',
    'same top token',
    'perplexity base',
    'merged',
    'expert',
  ];
  return `Divergence from every expert in nats per token, on ${judgedOn}:\n${renderTable(heads, rows)}`;
}

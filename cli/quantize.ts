/** `pcomp quantize MODEL`: flags -> recipe -> run -> report. */
import { readFile } from 'node:fs/promises';
import { Command, Option } from 'commander';
import { parse as parseYaml } from 'yaml';
import { ONNX_CONTAINERS } from '../src/artifacts/onnx/linear-layout.ts';
import { formatDuration } from '../src/calibration/progress.ts';
import { DEVICES } from '../src/compute/engine.ts';
import { ENGINES } from '../src/compute/engines.ts';
import { EnvironmentError, RecipeError } from '../src/errors.ts';
import { BEST_STEPS } from '../src/methods/quantize/best/steps.ts';
import { QUANTIZERS } from '../src/methods/quantize/index.ts';
import { TRANSFORMS } from '../src/methods/quantize/quantizer.ts';
import { COMPENSATION_VARIANTS } from '../src/methods/rank/compensation.ts';
import type { QuantizeOutcome } from '../src/runs/quantize/quantize.ts';
import {
  FORMATS,
  GROUP_SIZES,
  PRESETS,
  QUANTIZE_DEFAULTS,
  type QuantizeRequest,
  quantizeRecipe,
  SENSITIVITIES,
} from '../src/runs/quantize/recipe.ts';
import { formatSize, parseSize } from '../src/runs/size.ts';
import { expandFiles } from './files.ts';
import { CORES, jsonOption, outputMode, outputOption, quietOption, type RunFlags, recipeFlags } from './options.ts';
import { inThread } from './runs.ts';
import { createConsole } from './ui/console.ts';
import { renderPairs, renderTable } from './ui/table.ts';

interface Flags extends RunFlags {
  readonly recipe?: string;
  readonly format?: string;
}

const D = QUANTIZE_DEFAULTS;

export function quantizeCommand(signal: AbortSignal): Command {
  const methods = Object.values(QUANTIZERS)
    .map(({ name, summary }) => `  ${name.padEnd(13)} ${summary}`)
    .join('\n');
  const command = new Command('quantize')
    .description('Quantize every linear layer of every block, and write a folder that runtimes load.')
    .argument('<model>', 'Hugging Face folder, or a bare .safetensors file with config.json beside it')
    .addOption(outputOption())
    .option('--bits <bits>', 'budget: mean code bits over the quantized weights, 1..8, e.g. 2 or 2.25')
    .option('--bpw <bits>', 'budget: all stored bits of the quantized layers over their weights, e.g. 2.4')
    .option('--size <size>', 'budget: all weight files of the artifact, e.g. 120MB')
    .option('--runtime-memory <size>', 'budget: the quantized operands as onnxruntime holds them')
    .option('--max-loss <part>', 'budget: the smallest artifact whose perplexity on held-out text rises by no more, e.g. 5%')
    .addOption(new Option('--method <method>', `how codes are chosen (default: ${D.method})`).choices(Object.keys(QUANTIZERS)))
    .option('--preset <preset>', `variant of the method: ${PRESETS.join(', ')} (default: ${D.preset})`)
    .addOption(
      new Option(
        '--group-size <columns>',
        `input columns that share a scale; auto: for each input what loses least within the budget (default: ${D.groupSize})`,
      ).choices(['auto', ...GROUP_SIZES.map(String)]),
    )
    .option('--format <formats>', `comma-separated: ${FORMATS.join(', ')} (default: ${D.formats.join(',')})`)
    .option('--skip <globs...>', 'modules to leave as they are, e.g. "*.down_proj" "model.layers.0"')
    .option('--only <globs...>', 'quantize these modules and no others')
    .addOption(
      new Option('--embeddings <width>', `width of embeddings and output head (default: ${D.embeddings})`).choices([
        'float',
        '4',
        '8',
      ]),
    )
    .option(
      '--calibration <files...>',
      'text to measure on: .txt, .jsonl[:field], .csv[:column]; globs allowed (default: a text that ships with pcomp)',
    )
    .option('--samples <count>', `calibration windows (default: ${D.samples})`)
    .option('--sequence-length <tokens>', `tokens in a window, at most the model's context (default: ${D.sequenceLength})`)
    .addOption(
      new Option('--transform <kind>', `best: what may be done to inputs (default: ${D.transform})`).choices([
        'auto',
        ...TRANSFORMS,
      ]),
    )
    .option('--without <steps>', `best: leave steps out, comma-separated: ${BEST_STEPS.join(', ')}`)
    .option('--alpha <part>', 'best: part of the drift correction to take, 0..1 (default: what helps on held-out tokens)')
    .addOption(
      new Option('--sensitivity <kind>', `best: how layers are weighed against each other (default: ${D.sensitivity})`).choices([
        ...SENSITIVITIES,
      ]),
    )
    .option('--steps <count>', "slim-llm-plus, autoround: learning steps a block (default: the method's own)")
    .option(
      '--lowrank <budget>',
      'low-rank branches that repair what codes lose, beside the budget: bpw=0.1, bytes=, params=, r=',
    )
    .option('--lowrank-bits <bits>', `how wide branches are stored: 16, 8 or 4 (default: ${D.lowrankBits})`)
    .option('--joint', '--lowrank: ranks and widths compete for one budget, the sum of both')
    .option('--lowrank-outer <rounds>', `times that codes and branches are made for each other (default: ${D.lowrankOuter})`)
    .addOption(
      new Option('--lowrank-inputs <kind>', `what branches take inputs for (default: ${D.lowrankInputs})`).choices([
        ...COMPENSATION_VARIANTS,
      ]),
    )
    .addOption(
      new Option(
        '--onnx-container <bits>',
        `ONNX: operands the runtime holds. auto: one a layer, the narrowest that holds it; 2: each group in the narrowest, the least memory; 4: none of 2 bits, as CUDA needs it (default: ${D.onnxContainer})`,
      ).choices([...ONNX_CONTAINERS]),
    )
    .option('--no-compact', 'ONNX: store codes in operands of 2, 4 and 8 bits, as the runtime holds them')
    .option('--seed <seed>', `seed of the window crops (default: ${D.seed})`)
    .option('--plan <file>', "reuse the widths of a plan file or an artifact's pcomp.json; skips deciding")
    .option('--dampening <fraction>', `paper: part of the Hessian's mean diagonal added to it (default: ${D.dampening})`)
    .option('--act-order', 'gptq, paper: visit columns by descending Hessian diagonal')
    .option('--static-groups', 'gptq, paper: fit every grid before any column moves')
    .option('--true-sequential', 'paper: measure each layer with the layers before it in the block already quantized')
    .option('--symmetric', 'rtn, gptq, paper: zero point fixed at the middle')
    .addOption(
      new Option('--salience <kind>', `slim-llm, paper: denominator of the salience (default: ${D.salience})`).choices([
        'code',
        'inverse-diag',
      ]),
    )
    .option(
      '--lambda-salience <weight>',
      `slim-llm, paper: weight of salient elements in the grid search (default: ${D.lambdaSalience})`,
    )
    .addOption(
      new Option('--device <device>', `where matrix products run; only auto may fall back (default: ${D.device})`).choices([
        ...DEVICES,
      ]),
    )
    .addOption(new Option('--engine <engine>', `what runs the graphs (default: ${D.engine})`).choices(Object.keys(ENGINES)))
    .option('--threads <count>', `threads of the engine (default: all cores, here ${CORES})`)
    .option(
      '--max-memory <size>',
      `bound on buffered activations; the rest is spooled to disk (default: ${formatSize(D.maxMemory)})`,
    )
    .option('--recipe <file>', 'YAML or JSON with the same options by the same names; flags win over it')
    .option('--overwrite', 'replace an existing output')
    .option('--resume', 'continue an interrupted run of the same recipe')
    .option('--dry-run', 'print the plan, sizes and memory, and stop')
    .addOption(jsonOption())
    .addOption(quietOption())
    .addHelpText('after', `\nMethods:\n${methods}\n`)
    .action(async (model: string, flags: Flags) => {
      const recipe = quantizeRecipe(await readRequest(flags), CORES);
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        const calibration = await expandFiles('--calibration', recipe.calibration);
        const mode = outputMode(flags);
        const outcome = await inThread('quantize', [model, flags.output, { ...recipe, calibration }, mode], console.hooks);
        console.result(outcome, describe(outcome));
      } finally {
        console.close();
      }
    });
  return command;
}

/** The request the flags and the recipe file spell together. */
async function readRequest(flags: Flags): Promise<QuantizeRequest> {
  const fromFile = flags.recipe === undefined ? {} : await readRecipeFile(flags.recipe);
  const merged: Record<string, unknown> = { ...fromFile, ...recipeFlags(flags, 'recipe', 'format') };
  if (flags.format !== undefined) merged['formats'] = flags.format;
  // Commander gives every --no- flag a default of true, which is no request.
  if (flags['compact'] === true && fromFile['compact'] !== undefined) merged['compact'] = fromFile['compact'];
  for (const key of ['maxMemory']) {
    if (typeof merged[key] === 'string') merged[key] = parseSize('--max-memory', merged[key]);
  }
  return merged;
}

/** Option names in the file are the flags' names, with dashes: `group-size: 64`. */
async function readRecipeFile(path: string): Promise<Record<string, unknown>> {
  const content = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
    throw new EnvironmentError('FILE_UNREADABLE', `--recipe ${path}: cannot be read (${error.code ?? error.message})`);
  });
  let parsed: unknown;
  try {
    parsed = parseYaml(content);
    // Aliases let a YAML list hold itself, which nothing can check or show.
    JSON.stringify(parsed);
  } catch (error) {
    throw new RecipeError(
      `--recipe ${path}: not YAML or JSON: ${error instanceof Error ? error.message.split('\n')[0].replace(/:$/, '') : String(error)}`,
    );
  }
  if (typeof parsed !== 'object' || parsed === null || Array.isArray(parsed)) {
    throw new RecipeError(`--recipe ${path}: a map of option names to values is expected`);
  }
  const camel = (key: string) => key.replace(/-([a-z])/g, (_, letter: string) => letter.toUpperCase());
  return Object.fromEntries(Object.entries(parsed).map(([key, value]) => [key === 'format' ? 'formats' : camel(key), value]));
}

function describe(outcome: QuantizeOutcome): string {
  const pairs: [string, string][] = [
    [
      'model',
      `${outcome.architecture}, ${outcome.quantizedModules} of ${outcome.modules} linear layers quantized (${outcome.method})`,
    ],
    ['code bits', outcome.averageBits.toFixed(4)],
  ];
  const rows = outcome.artifacts.map(({ format, bitsPerWeight, quantizedBytes, unquantizedBytes, bytes }) => [
    format,
    bitsPerWeight.toFixed(4),
    formatSize(quantizedBytes),
    formatSize(unquantizedBytes),
    formatSize(bytes),
    `${(outcome.sourceBytes / bytes).toFixed(2)}x`,
  ]);
  const ranks = describeRanks(outcome);
  if (ranks !== undefined) pairs.push(['low-rank', ranks]);
  const table = renderTable(['format', 'stored bpw', 'quantized', 'unquantized', 'files', 'source/files'], rows);
  if (outcome.run === undefined) {
    pairs.push(
      ['plan', describePlan(outcome)],
      ['peak memory', `about ${formatSize(outcome.predictedPeakBytes)}`],
      ['passes', outcome.passes],
    );
    return `${renderPairs(pairs)}\n\n${table}\n\nDry run: nothing was written.`;
  }
  const { seconds, peakBytes, device, output } = outcome.run;
  pairs.push(['time', formatDuration(seconds)], ['peak memory', formatSize(peakBytes)], ['device', device]);
  return `${renderPairs(pairs)}\n\n${table}\n\nWritten to ${output}`;
}

/** `37 of 42 layers, rank 1 to 19, 0.0998 bpw of the stored ones` */
function describeRanks({ plan, artifacts, quantizedModules }: QuantizeOutcome): string | undefined {
  const ranks = Object.values(plan.modules).flatMap(({ rank }) => (rank === undefined ? [] : [rank]));
  if (ranks.length === 0) return undefined;
  const [least, most] = [Math.min(...ranks), Math.max(...ranks)];
  const range = least === most ? `rank ${least}` : `rank ${least} to ${most}`;
  const { lowRankBitsPerWeight = 0 } = artifacts[0];
  return `${range} in ${ranks.length} of ${quantizedModules} layers, ${lowRankBitsPerWeight.toFixed(4)} of the stored bpw`;
}

/** `2 bits in 84 groups, 3 bits in 6`, widest last; --json has every group. */
function describePlan({ plan }: QuantizeOutcome): string {
  const groups = new Map<number, number>();
  for (const { bits } of Object.values(plan.modules)) {
    for (const width of bits) groups.set(width, (groups.get(width) ?? 0) + 1);
  }
  const sorted = [...groups].sort(([a], [b]) => a - b);
  return sorted.map(([width, count]) => `${width} ${width === 1 ? 'bit' : 'bits'} in ${count} groups`).join(', ');
}

/** `pcomp adapt MODEL --text FILE --budget B`: flags -> recipe -> run -> report. */
import { Command, Option } from 'commander';
import { formatDuration } from '../src/calibration/progress.ts';
import { SOLVERS } from '../src/methods/rank/solve.ts';
import { adapt } from '../src/runs/adapt/adapt.ts';
import type { AdaptOutcome } from '../src/runs/adapt/outcome.ts';
import {
  ADAPT_DEFAULTS,
  ADAPT_INITS,
  ADAPT_METHODS,
  ADAPT_PRESETS,
  type AdaptRequest,
  adaptRecipe,
  GROWTH_LAWS,
  ROUTERS,
} from '../src/runs/adapt/recipe.ts';
import { formatSize } from '../src/runs/size.ts';
import { adaptConvertCommand } from './adapt-convert.ts';
import { expandFiles } from './files.ts';
import { CORES, deviceOption, jsonOption, outputMode, outputOption, quietOption, type RunFlags, recipeFlags } from './options.ts';
import { createConsole } from './ui/console.ts';
import { renderPairs, renderTable } from './ui/table.ts';

const D = ADAPT_DEFAULTS;

export function adaptCommand(signal: AbortSignal): Command {
  // What is needed is said by the recipe: options that commander requires would be required of `convert` too.
  return new Command('adapt')
    .addCommand(adaptConvertCommand(signal))
    .description('Train a low-rank adapter of a model on text, within a budget.')
    .argument('<model>', 'Hugging Face folder, bare .safetensors file, or an artifact that pcomp wrote; it stays as it is')
    .addOption(outputOption())
    .option(
      '--text <files...>',
      'text to train on: .txt, .jsonl[:field], .csv[:column]; globs allowed; the last 5 % are held out',
    )
    .option(
      '--budget <budget>',
      'what it may cost: r=16 (mean rank), params=2.5M, pct=0.5%, bytes=20MB, bpw=0.25, experts=160 (mola), density=0.05 (snella)',
    )
    .addOption(new Option('--method <method>', `where ranks go (default: ${D.method})`).choices([...ADAPT_METHODS]))
    .addOption(new Option('--preset <preset>', `variant of the method (default: ${D.preset})`).choices([...ADAPT_PRESETS]))
    .option(
      '--steps <steps>',
      'steps of the optimizer; 0: ranks and first factors only, to train elsewhere (default: 0; methods that train need it said)',
    )
    .option('--targets <globs...>', 'layers to adapt, by name (default: all linear layers)')
    .option('--dora', 'train the lengths of the rows of a weight beside where they point')
    .option(
      '--against <model>',
      'qerror, loftq, a method that trains with --steps 0: the float model that the base was quantized from',
    )
    .option('--invert', 'lamda++: more rank where the spectrum of a weight is steep')
    .option('--r-min <rank>', 'eva, qerror, gora: least rank of a layer (default: 0, or what the method has)')
    .option(
      '--r-max <rank>',
      'eva, qerror, gora, a method that trains with --steps 0: largest rank of a layer (default: what the method has)',
    )
    .option('--rank-multiple <ranks>', 'eva, qerror: ranks in a multiple of this')
    .option('--tie-inputs', 'eva, qerror: one rank for layers that read the same input')
    .addOption(new Option('--solver <solver>', `eva, qerror: how ranks are found (default: ${D.solver})`).choices([...SOLVERS]))
    .addOption(
      new Option('--growth <law>', 'triadaptlora: how the number of layers that grow at once rises (default: linear)').choices([
        ...GROWTH_LAWS,
      ]),
    )
    .option('--profile <digits>', 'mola: experts of the quarters of the depth, such as 2468, a list, or auto (default: 2882)')
    .addOption(
      new Option('--router <router>', 'mola: through the best experts, or through all on one A (default: topk)').choices([
        ...ROUTERS,
      ]),
    )
    .option('--top-k <experts>', 'mola: experts that a token goes through (default: 2)')
    .option('--expert-rank <rank>', 'mola: rank of every expert (default: 8, or what the budget allows)')
    .option(
      '--start-rank <rank>',
      'rank of every layer before any is cut or added (default: adalora 1.5 times the mean of the budget; increlora and triadaptlora 0, or 1 in preset paper)',
    )
    .option('--lr <rate>', 'learning rate (default: the one of the method)')
    .option('--alpha <alpha>', 'the update is multiplied by alpha / rank (default: a scale of the method)')
    .addOption(
      new Option('--init <init>', `what the factors start as (default: ${D.init}, or what the method finds)`).choices([
        ...ADAPT_INITS,
      ]),
    )
    .option('--rslora', 'by alpha over the root of the rank')
    .option('--batch <windows>', `windows of a step (default: ${D.batch})`)
    .option('--sequence-length <tokens>', `tokens of a window, at most the model's context (default: ${D.sequenceLength})`)
    .option(
      '--patience <looks>',
      'end after so many looks at held-out text without a better one; 20 looks in a run (default: never)',
    )
    .option('--pad-ranks', 'store all layers at the largest rank, for servers that know one')
    .option('--seed <seed>', `seed of the start and of the order of the text (default: ${D.seed})`)
    .addOption(deviceOption())
    .option('--threads <count>', 'threads (default: all cores)')
    .option('--max-memory <size>', `bound on kept weights and activations (default: ${formatSize(D.maxMemory)})`)
    .option('--overwrite', 'replace an existing output')
    .option('--resume', 'continue an interrupted run of the same recipe')
    .option('--dry-run', 'print ranks and sizes, and stop')
    .addOption(jsonOption())
    .addOption(quietOption())
    .action(async (model: string, flags: RunFlags) => {
      const recipe = adaptRecipe(recipeFlags(flags) as AdaptRequest, CORES);
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        const text = await expandFiles('--text', recipe.text);
        const outcome = await adapt(model, flags.output, { ...recipe, text }, outputMode(flags), console.hooks);
        console.result(outcome, describe(outcome));
      } finally {
        console.close();
      }
    });
}

function describe(outcome: AdaptOutcome): string {
  const { modules, parameters, budget, windows, run } = outcome;
  const ranks = modules.map(({ rank }) => rank);
  const mean = ranks.reduce((sum, rank) => sum + rank, 0) / ranks.length;
  const pairs: [string, string][] = [
    ['method', `${outcome.method} (${outcome.label})`],
    [
      'adapter',
      `${parameters} ${budget.unit === 'non-zeros' ? 'non-zeros' : `parameters, rank ${Math.min(...ranks)} to ${Math.max(...ranks)}, ${mean.toFixed(2)} on average`}, in ${ranks.length} layers`,
    ],
    ['budget', `${budget.requested}: ${budget.spent} of ${Math.floor(budget.total)} ${budget.unit}`],
    ...(outcome.solved
      ? [
          [
            'ranks by',
            `${outcome.solved.solver}, ${(100 * (outcome.solved.bound > 0 ? outcome.solved.value / outcome.solved.bound : 1)).toFixed(2)} % of what any could be worth`,
          ] as [string, string],
        ]
      : []),
    ['text', `${windows.training} windows of ${windows.tokens} tokens, and ${windows.heldOut} held out`],
  ];
  if (run === undefined) return `${renderPairs(pairs)}\n\n${renderRanks(modules)}\n\nDry run: nothing was written.`;
  const perplexity = (nll: number) => `${nll.toFixed(4)} nats a token (perplexity ${Math.exp(nll).toFixed(2)})`;
  pairs.push(
    ['held out, before', perplexity(run.heldOut.before)],
    ...(run.heldOut.best === run.heldOut.before
      ? []
      : [['held out, best', `${perplexity(run.heldOut.best)} after step ${run.heldOut.bestStep}`] as [string, string]]),
    ['time', `${formatDuration(run.seconds)} on ${run.device}`],
    ['peak memory', formatSize(run.peakBytes)],
  );
  return `${renderPairs(pairs)}\n\n${renderRanks(modules)}\n\nWritten to ${run.output}`;
}

/** Ranks, experts or densities by block and layer: where the budget went. */
function renderRanks(modules: AdaptOutcome['modules']): string {
  const [{ experts: routed, density: sparse }] = modules;
  const split = modules.map(({ name, rank, experts, density }) => {
    const match = /^(.*\.\d+)\.(.*)$/.exec(name);
    const got = density === undefined ? (experts ?? rank) : (100 * density).toFixed(2);
    return { block: match?.[1] ?? '', layer: match?.[2] ?? name, got };
  });
  const layers = [...new Set(split.map(({ layer }) => layer))];
  const blocks = [...new Set(split.map(({ block }) => block))];
  const rows = blocks.map((block) => [
    block,
    ...layers.map((layer) => split.find((one) => one.block === block && one.layer === layer)?.got ?? ''),
  ]);
  return renderTable(
    [
      sparse !== undefined ? 'density, %' : routed !== undefined ? 'experts' : 'rank',
      ...layers.map((layer) => layer.slice(layer.lastIndexOf('.') + 1)),
    ],
    rows,
  );
}

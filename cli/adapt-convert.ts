/** `pcomp adapt convert ADAPTER --to FORM`: the same update in another form. */
import { Command, Option } from 'commander';
import { CONVERSIONS, type ConvertOutcome, convertAdapter, FOLDS } from '../src/runs/adapt/convert.ts';
import { integer, part } from '../src/runs/recipe-fields.ts';
import { expandFiles } from './files.ts';
import { renderAdapter } from './inspect-adapter.ts';
import { CORES, jsonOption, quietOption } from './options.ts';
import { createConsole } from './ui/console.ts';

interface Flags {
  readonly output: string;
  readonly to: (typeof CONVERSIONS)[number];
  readonly base?: string;
  readonly overwrite?: boolean;
  readonly json?: boolean;
  readonly quiet?: boolean;
  readonly text?: string[];
  readonly rank?: string;
  readonly maxError?: string;
  readonly fold?: (typeof FOLDS)[number];
}

export function adaptConvertCommand(signal: AbortSignal): Command {
  return new Command('convert')
    .description('Write an adapter in another form.')
    .argument(
      '<adapter>',
      'folder of a PEFT LoRA or AdaLoRA, or of an IncreLoRA, TriAdaptLoRA, LaMDA, MoLA, TMoE or sparse update with adapter_config.json',
    )
    .requiredOption('-o, --output <folder>', 'folder to write; must not exist unless --overwrite')
    .addOption(
      new Option(
        '--to <form>',
        'plain LoRA at unit scale, the same at one rank, the base with the adapter folded in, an ONNX artifact with it beside: in the file, or as inputs; routed experts or a sparse update as they are',
      )
        .choices([...CONVERSIONS])
        .makeOptionMandatory(),
    )
    .option(
      '--base <model>',
      'the model it is of, for onnx and onnx-inputs an artifact: needed by these and merged; else the adapter is checked against it',
    )
    .option('--text <files...>', 'routed experts as plain factors: text to fit them to; its last 5 % measure what that loses')
    .option('--rank <rank>', 'what is folded to plain factors: their rank (default: that of all experts, or what costs as much)')
    .option('--max-error <part>', 'the part of what a layer adds that folding may lose, root mean square (default: 0.05)')
    .addOption(
      new Option('--fold <how>', 'experts by least squares of what they add, or by their mean weights (default: ls)').choices([
        ...FOLDS,
      ]),
    )
    .option('--overwrite', 'replace an existing output')
    .addOption(jsonOption())
    .addOption(quietOption())
    .action(async (path: string, flags: Flags) => {
      const { to, base, overwrite = false } = flags;
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        const { text, rank, maxError, fold } = flags;
        const request = {
          to,
          overwrite,
          threads: CORES,
          ...(base === undefined ? {} : { base }),
          ...(text === undefined ? {} : { text: await expandFiles('--text', text) }),
          ...(rank === undefined ? {} : { rank: integer('rank', rank, 1, 65_536) }),
          ...(maxError === undefined ? {} : { maxError: part('maxError', maxError) }),
          ...(fold === undefined ? {} : { fold }),
        };
        const outcome = await convertAdapter(path, flags.output, request, { ...console.hooks, signal });
        console.result(outcome, describe(outcome));
      } finally {
        console.close();
      }
    });
}

function describe({ adapter, folded, output }: ConvertOutcome): string {
  const worst = folded?.reduce((most, one) => (one.error > most.error ? one : most));
  const lost = worst
    ? `Folding lost ${(100 * worst.error).toFixed(2)} % of what ${worst.name} adds, the most of ${folded!.length} layers\n\n`
    : '';
  return `${adapter ? `${renderAdapter(adapter)}\n\n` : ''}${lost}Written to ${output}`;
}

/** `pcomp adapt convert ADAPTER --to FORM`: the same update in another form. */
import { Command, Option } from 'commander';
import { CONVERSIONS, type ConvertOutcome, convertAdapter } from '../src/adapt-convert.ts';
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
}

export function adaptConvertCommand(signal: AbortSignal): Command {
  return new Command('convert')
    .description('Write an adapter in another form.')
    .argument('<adapter>', 'folder of a PEFT LoRA or AdaLoRA, or of an IncreLoRA, TriAdaptLoRA or LaMDA with adapter_config.json')
    .requiredOption('-o, --output <folder>', 'folder to write; must not exist unless --overwrite')
    .addOption(
      new Option(
        '--to <form>',
        'plain LoRA at unit scale, the same at one rank, the base with the adapter folded in, or an ONNX artifact with it beside: in the file, or as inputs',
      )
        .choices([...CONVERSIONS])
        .makeOptionMandatory(),
    )
    .option(
      '--base <model>',
      'the model it is of, for onnx and onnx-inputs an artifact: needed by these and merged; else the adapter is checked against it',
    )
    .option('--overwrite', 'replace an existing output')
    .addOption(jsonOption())
    .addOption(quietOption())
    .action(async (path: string, flags: Flags) => {
      const { to, base, overwrite = false } = flags;
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        const request = { to, overwrite, threads: CORES, ...(base === undefined ? {} : { base }) };
        const outcome = await convertAdapter(path, flags.output, request, { ...console.hooks, signal });
        console.result(outcome, describe(outcome));
      } finally {
        console.close();
      }
    });
}

function describe({ adapter, output }: ConvertOutcome): string {
  return `${adapter ? `${renderAdapter(adapter)}\n\n` : ''}Written to ${output}`;
}

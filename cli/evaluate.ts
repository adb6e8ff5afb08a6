/** `pcomp evaluate MODEL|ARTIFACT --text FILE`: perplexity, size and speed; against an original also KL and agreement. */
import { Command, Option } from 'commander';
import type { DeviceRequest } from '../src/compute/engine.ts';
import type { EngineName } from '../src/compute/engines.ts';
import type { EvaluateOptions, Evaluation } from '../src/runs/evaluate/evaluate.ts';
import { integer } from '../src/runs/recipe-fields.ts';
import { formatSize, parseSize } from '../src/runs/size.ts';
import { expandFiles } from './files.ts';
import { deviceOption, engineOption, jsonOption, quietOption, threadsOption } from './options.ts';
import { inThread } from './runs.ts';
import { createConsole } from './ui/console.ts';
import { renderPairs } from './ui/table.ts';

interface Flags {
  readonly text: readonly string[];
  readonly against?: string;
  readonly adapter?: string;
  readonly sequenceLength: string;
  readonly accuracy: 'exact' | 'fast';
  readonly device: DeviceRequest;
  readonly engine: EngineName;
  readonly threads: number;
  readonly maxMemory: string;
  readonly json?: boolean;
  readonly quiet?: boolean;
}

export function evaluateCommand(signal: AbortSignal): Command {
  return new Command('evaluate')
    .description('Measure a model or an artifact on text.')
    .argument('<model>', 'Hugging Face folder, bare .safetensors file, or an artifact that pcomp wrote')
    .requiredOption('--text <files...>', 'held-out text: .txt, .jsonl[:field], .csv[:column]; globs allowed')
    .option('--against <original>', 'the float model: adds KL, top-1 agreement and the perplexity ratio')
    .option('--adapter <folder>', 'a PEFT adapter, applied to the weights as they are read')
    .option('--sequence-length <tokens>', "tokens in a window, at most the model's context", '2048')
    .addOption(
      new Option(
        '--accuracy <mode>',
        'exact: weights dequantized, float arithmetic; fast: the ONNX artifact as a runtime runs it',
      )
        .choices(['exact', 'fast'])
        .default('exact'),
    )
    .addOption(deviceOption())
    .addOption(engineOption())
    .addOption(threadsOption())
    .option('--max-memory <size>', 'bound on buffered activations; the rest is spooled to disk', '1GiB')
    .addOption(jsonOption())
    .addOption(quietOption())
    .action(async (model: string, flags: Flags) => {
      const console = createConsole({ json: flags.json === true, quiet: flags.quiet === true, signal });
      try {
        const options: EvaluateOptions = {
          text: await expandFiles('--text', flags.text),
          ...(flags.against === undefined ? {} : { against: flags.against }),
          ...(flags.adapter === undefined ? {} : { adapter: flags.adapter }),
          sequenceLength: integer('sequenceLength', flags.sequenceLength, 2, 1_048_576),
          accuracy: flags.accuracy,
          device: flags.device,
          engine: flags.engine,
          threads: flags.threads,
          maxMemory: parseSize('--max-memory', flags.maxMemory),
        };
        const result = await inThread('evaluate', [model, options], console.hooks);
        console.result(result, describe(result));
      } finally {
        console.close();
      }
    });
}

function describe(result: Evaluation): string {
  const pairs: [string, string][] = [
    ['perplexity', result.perplexity.toFixed(4)],
    ['nll', `${result.nll.toFixed(5)} nats/token over ${result.tokens} tokens`],
    ['bits per weight', `${result.bitsPerWeight.toFixed(4)} stored, ${result.averageBits.toFixed(4)} code bits`],
    ['weight files', formatSize(result.bytes)],
    ['speed', `${Math.round(result.tokensPerSecond)} tokens/s (${result.accuracy}, ${result.device}, ${result.threads} threads)`],
  ];
  if (result.kl !== undefined) {
    pairs.push(
      ['KL to original', `${result.kl.toFixed(5)} nats/token`],
      ['top-1 agreement', `${(100 * (result.top1Agreement ?? 0)).toFixed(2)} %`],
      ['perplexity ratio', (result.perplexityRatio ?? 0).toFixed(4)],
    );
  }
  return renderPairs(pairs);
}

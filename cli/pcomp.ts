#!/usr/bin/env node
/** The program: parses argv, runs a command, turns errors into one line and an exit code. */
import { Command, CommanderError } from 'commander';
import { PcompError, RecipeError, UnsupportedError } from '../src/errors.ts';
import { packageVersion } from '../src/package-root.ts';
import { adaptCommand } from './adapt.ts';
import { evaluateCommand } from './evaluate.ts';
import { inspectCommand } from './inspect.ts';
import { mergeCommand } from './merge.ts';
import { quantizeCommand } from './quantize.ts';
import { endNow } from './runs.ts';

const EXIT = { done: 0, failed: 1, badRequest: 2, interrupted: 130 } as const;

/** Runs the program on arguments (without node and script). Resolves to the exit code. */
async function main(args: readonly string[]): Promise<number> {
  const abort = new AbortController();
  const program = new Command('pcomp')
    .description('Compresses trained models for deployment: 2-bit ONNX artifacts from Hugging Face checkpoints.')
    .version(packageVersion())
    .exitOverride()
    // Options after the name of a command are that command's own.
    .enablePositionalOptions()
    .configureOutput({ outputError: (text, write) => write(`pcomp: ${oneLine(text.replace(/^error: /, ''))}\n`) })
    .showSuggestionAfterError();
  for (const command of [quantizeCommand, mergeCommand, adaptCommand, evaluateCommand, inspectCommand]) {
    const made = command(abort.signal).copyInheritedSettings(program);
    for (const inner of made.commands) inner.copyInheritedSettings(program);
    program.addCommand(made);
  }

  // The first Ctrl-C stops at the next safe point, the second as soon as it is heard. Of a run that has --resume, both leave a state that it continues.
  process.on('SIGINT', () => {
    if (abort.signal.aborted) endNow();
    process.stderr.write('\npcomp: stopping; what --resume can use is kept\n');
    abort.abort();
  });
  try {
    await program.parseAsync(args, { from: 'user' });
    return EXIT.done;
  } catch (error) {
    if (abort.signal.aborted) return EXIT.interrupted;
    return report(error);
  }
}

function oneLine(text: string): string {
  return text.trim().replaceAll(/\s*\n\s*/g, ' ');
}

function report(error: unknown): number {
  if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.done : EXIT.badRequest;
  if (error instanceof PcompError) {
    process.stderr.write(`pcomp: ${oneLine(error.message)}\n`);
    return error instanceof RecipeError || error instanceof UnsupportedError ? EXIT.badRequest : EXIT.failed;
  }
  process.stderr.write(
    `pcomp: this is a bug, please report it\n${error instanceof Error ? (error.stack ?? error.message) : String(error)}\n`,
  );
  return EXIT.failed;
}

// A reader that has seen enough (`pcomp inspect x | head`) is no failure.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') throw error;
  process.exit(EXIT.done);
});
process.exitCode = await main(process.argv.slice(2));

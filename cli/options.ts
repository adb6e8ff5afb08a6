/** Flags that several commands share, and how their values are read. */
import { availableParallelism } from 'node:os';
import { InvalidArgumentError, Option } from 'commander';
import { DEVICES } from '../src/compute/engine.ts';
import { ENGINES } from '../src/compute/engines.ts';
import type { OutputMode } from '../src/runs/quantize/quantize.ts';

/** The machine's cores as the operating system grants them. */
export const CORES = availableParallelism();

export const jsonOption = () => new Option('--json', 'print one JSON object on stdout and nothing else there');
export const quietOption = () => new Option('--quiet', 'no progress');
export const deviceOption = () =>
  new Option('--device <device>', 'where matrix products run; only auto may fall back').choices([...DEVICES]).default('cpu');
export const engineOption = () =>
  new Option('--engine <engine>', 'what runs the graphs').choices(Object.keys(ENGINES)).default('ort');
export const threadsOption = () =>
  new Option('--threads <count>', 'threads of the engine').argParser(wholeNumber).default(CORES, 'all cores');
export const outputOption = () =>
  new Option(
    '-o, --output <folder>',
    'folder to write, needed but for --dry-run; must not exist unless --overwrite or --resume',
  ).default('', 'none');

/** Flags of the commands that follow a recipe to a folder. */
export interface RunFlags {
  readonly output: string;
  readonly overwrite?: boolean;
  readonly resume?: boolean;
  readonly dryRun?: boolean;
  readonly json?: boolean;
  readonly quiet?: boolean;
  readonly [flag: string]: unknown;
}

const NOT_RECIPE: readonly string[] = ['output', 'overwrite', 'resume', 'dryRun', 'json', 'quiet'];

/** What of the flags is of the recipe. @param others of the command's own that are not */
export function recipeFlags(flags: RunFlags, ...others: readonly string[]): Record<string, unknown> {
  const given = Object.entries(flags).filter(([key, value]) => value !== undefined && !NOT_RECIPE.includes(key));
  return Object.fromEntries(given.filter(([key]) => !others.includes(key)));
}

export function outputMode({ overwrite = false, resume = false, dryRun = false }: RunFlags): OutputMode {
  return { overwrite, resume, dryRun };
}

/** A whole number of at least 1. */
export function wholeNumber(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) throw new InvalidArgumentError('A whole number of at least 1 is expected.');
  return value;
}

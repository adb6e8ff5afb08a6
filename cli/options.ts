/** Flags that several commands share, and how their values are read. */
import { availableParallelism } from 'node:os';
import { InvalidArgumentError, Option } from 'commander';
import { DEVICES } from '../src/compute/engine.ts';
import { ENGINES } from '../src/compute/engines.ts';

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

/** A whole number of at least 1. */
export function wholeNumber(text: string): number {
  const value = Number(text);
  if (!Number.isInteger(value) || value < 1) throw new InvalidArgumentError('A whole number of at least 1 is expected.');
  return value;
}

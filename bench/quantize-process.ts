/** A run of `pcomp quantize` in a process of its own, and what it took. */
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const root = (path: string) => fileURLToPath(new URL(`../${path}`, import.meta.url));

/** Tells the processor time of a whole process on stderr when it ends; a run's own thread must not tell its part. */
const TELL_TIME =
  "data:text/javascript,import{isMainThread}from'node:worker_threads';isMainThread&&process.on('exit',()=>console.error(JSON.stringify(process.cpuUsage())))";

/** What the command line says of a run with --json. */
export interface QuantizeProcess {
  readonly passes: string;
  readonly run: { readonly seconds: number; readonly peakBytes: number };
  /** Processor seconds of the whole process, its start included. */
  readonly cpuSeconds: number;
}

export interface QuantizeProcessOptions {
  readonly preset: string;
  readonly samples: number;
  readonly sequenceLength: number;
  /** Globs of modules to quantize; default: all. */
  readonly only?: readonly string[];
}

/** Quantizes `model` into `output` at 2 bits. */
export async function quantizeInProcess(
  model: string,
  output: string,
  { preset, samples, sequenceLength, only = [] }: QuantizeProcessOptions,
): Promise<QuantizeProcess> {
  const flags = ['--preset', preset, '--bits', '2', '--samples', `${samples}`, '--sequence-length', `${sequenceLength}`];
  if (only.length > 0) flags.push('--only', ...only);
  const program = ['--import', 'tsx', '--import', TELL_TIME, root('cli/pcomp.ts'), 'quantize', model, '-o', output];
  const { stdout, stderr } = await promisify(execFile)(process.execPath, [...program, ...flags, '--json', '--quiet'], {
    cwd: root(''),
    maxBuffer: 2 ** 26,
  });
  const { user, system } = JSON.parse(stderr.trim().split('\n').at(-1) ?? '') as NodeJS.CpuUsage;
  return { ...(JSON.parse(stdout) as Omit<QuantizeProcess, 'cpuSeconds'>), cpuSeconds: (user + system) / 1e6 };
}

/** The command line as a user runs it: the built program (test/support/build.ts) in a process of its own. */
import { type ChildProcessByStdio, spawn } from 'node:child_process';
import type { Readable } from 'node:stream';
import { fileURLToPath } from 'node:url';

const ROOT = new URL('../../', import.meta.url);
const PROGRAM = fileURLToPath(new URL('dist/cli/pcomp.js', ROOT));

export interface CliResult {
  /** Exit code as a shell tells it: 130 for a program that Ctrl-C ended; null when another signal did. */
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface CliOptions {
  readonly cwd?: string;
  readonly env?: Readonly<Record<string, string | undefined>>;
  /** More arguments for node, before the program. */
  readonly nodeArgs?: readonly string[];
}

export interface RunningCli {
  readonly process: ChildProcessByStdio<null, Readable, Readable>;
  readonly done: Promise<CliResult>;
}

/** Starts `pcomp` and returns at once. */
export function startCli(args: readonly string[], options: CliOptions = {}): RunningCli {
  const child = spawn(process.execPath, [...(options.nodeArgs ?? []), PROGRAM, ...args], {
    cwd: options.cwd ?? fileURLToPath(ROOT),
    env: { ...process.env, ...options.env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const text = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8');
    child[name].on('data', (part: string) => {
      text[name] += part;
    });
  }
  const done = new Promise<CliResult>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code: signal === 'SIGINT' ? 130 : code, ...text }));
  });
  return { process: child, done };
}

/** Runs `pcomp` to its end. */
export function runCli(args: readonly string[], options: CliOptions = {}): Promise<CliResult> {
  return startCli(args, options).done;
}

/** Runs `pcomp` and returns the JSON object on its stdout. Throws what it said instead when it failed. */
export async function runCliJson<T = Record<string, unknown>>(args: readonly string[], options: CliOptions = {}): Promise<T> {
  const { code, stdout, stderr } = await runCli([...args, '--json'], options);
  if (code !== 0) throw new Error(`pcomp ${args.join(' ')}: exit code ${code}\n${stderr}`);
  return JSON.parse(stdout) as T;
}

/** Runs that compute for long, each in a thread of its own: the program's stays free to draw progress and to hear Ctrl-C. */
import { startJobThread } from '../src/compute/job-thread.ts';
import type { evaluate } from '../src/runs/evaluate/evaluate.ts';
import type { quantize } from '../src/runs/quantize/quantize.ts';
import type { Progress, RunHooks } from '../src/runs/run.ts';

/** By name, loaded where they run. Their arguments but the last, and their results, are plain data. */
export const RUNS = {
  quantize: async (...args: Parameters<typeof quantize>) => (await import('../src/runs/quantize/quantize.ts')).quantize(...args),
  evaluate: async (...args: Parameters<typeof evaluate>) => (await import('../src/runs/evaluate/evaluate.ts')).evaluate(...args),
};

/** How long a run may take to a safe point after Ctrl-C; a product of a large layer takes longer, and would be made again on --resume. */
const GRACE_MS = 1000;

type Runs = typeof RUNS;
type PlainArguments<F> = F extends (...args: [...infer Plain, hooks?: RunHooks]) => unknown ? Plain : never;

/** A run as it travels to its thread. */
export interface RunJob {
  readonly name: keyof Runs;
  readonly args: readonly unknown[];
}

/** What its hooks are told there. */
export type RunEvent = { readonly progress: Progress } | { readonly note: string };

/**
 * What `RUNS[name](...args, hooks)` resolves to, or fails with. A run that is aborted and comes to no safe point in a moment ends with the program:
 * what it leaves on disk is what it leaves when it is killed.
 */
export async function inThread<Name extends keyof Runs>(
  name: Name,
  args: PlainArguments<Runs[Name]>,
  { signal, progress, note }: RunHooks,
): Promise<Awaited<ReturnType<Runs[Name]>>> {
  type Result = Awaited<ReturnType<Runs[Name]>>;
  await using thread = startJobThread<RunJob, Result, RunEvent>(import.meta.url, 'run-thread');
  const onEvent = (event: RunEvent): void => ('note' in event ? note?.(event.note) : progress?.(event.progress));
  let grace: NodeJS.Timeout | undefined;
  const stop = (): void => {
    grace = setTimeout(endNow, GRACE_MS);
  };
  if (signal?.aborted) stop();
  else signal?.addEventListener('abort', stop);
  try {
    return await thread.run({ name, args }, { onEvent, signal });
  } finally {
    signal?.removeEventListener('abort', stop);
    clearTimeout(grace);
  }
}

/** Ends the program as a Ctrl-C that nobody handles does, which shells tell as 130: `process.exit` would wait for what native code is at. */
export function endNow(): void {
  process.removeAllListeners('SIGINT');
  process.kill(process.pid, 'SIGINT');
}

/** Runs the jobs of a merge on several threads; results come as they are done. */
import { Worker } from 'node:worker_threads';
import { createBlas } from './compute/ort-blas.ts';
import { PlainEngine } from './compute/plain.ts';
import { type EnvironmentCode, EnvironmentError, FormatError, PcompError, RecipeError, UnsupportedError } from './errors.ts';
import type { MergeSetup, TensorJob } from './merge-jobs.ts';
import { type TensorResult, TensorWorker } from './merge-tensor.ts';

/** Does jobs, one at a time. */
export interface JobRunner extends AsyncDisposable {
  run(job: TensorJob): Promise<TensorResult>;
}

/** What a worker answers. */
export type WorkerAnswer = { readonly result: TensorResult } | { readonly error: PortableError };

/** An error on its way between threads, which forget its class. */
export interface PortableError {
  readonly kind: string;
  readonly message: string;
  readonly stack: string | undefined;
  readonly path?: string;
  readonly rule?: string;
  readonly code?: EnvironmentCode;
}

/** Runs jobs in this thread. */
export function localRunner(setup: MergeSetup): JobRunner {
  const worker = new TensorWorker(setup, createBlas(new PlainEngine()));
  return {
    run: (job) => worker.run(job),
    async [Symbol.asyncDispose]() {
      worker.close();
    },
  };
}

/** Starts a thread that runs jobs. */
function threadRunner(setup: MergeSetup): JobRunner {
  const worker = startWorker(setup);
  let waiting: { resolve: (result: TensorResult) => void; reject: (error: unknown) => void } | undefined;
  worker.on('message', (answer: WorkerAnswer) => {
    if ('result' in answer) waiting?.resolve(answer.result);
    else waiting?.reject(fromPortable(answer.error));
  });
  worker.on('error', (error) => waiting?.reject(error));
  worker.on('exit', (code) => waiting?.reject(new Error(`a merging thread ended with code ${code}`)));
  return {
    run(job) {
      return new Promise((resolve, reject) => {
        waiting = { resolve, reject };
        worker.postMessage(job);
      });
    },
    async [Symbol.asyncDispose]() {
      waiting = undefined;
      await worker.terminate();
    },
  };
}

/** Published, the entry is JavaScript; from source, the thread must be taught TypeScript first, which Node's flags do not do for threads. */
function startWorker(workerData: MergeSetup): Worker {
  if (!import.meta.url.endsWith('.ts')) return new Worker(new URL('./merge-worker.js', import.meta.url), { workerData });
  const [tsx, entry] = [import.meta.resolve('tsx/esm/api'), new URL('./merge-worker.ts', import.meta.url).href];
  const code = `import(${JSON.stringify(tsx)}).then(({ register }) => { register(); return import(${JSON.stringify(entry)}); })`;
  return new Worker(code, { eval: true, workerData, execArgv: [] });
}

/** Runners of a run's jobs: this thread alone, or `count` others. */
export function openRunners(setup: MergeSetup, count: number): readonly JobRunner[] {
  if (count === 1) return [localRunner(setup)];
  return Array.from({ length: count }, () => threadRunner(setup));
}

/**
 * Gives jobs to runners, in order; calls `done` for each as it ends. An error or an abort lets the jobs under way end, and starts no more.
 */
export async function runJobs(
  jobs: readonly TensorJob[],
  runners: readonly JobRunner[],
  { signal, done }: { readonly signal: AbortSignal | undefined; readonly done: (result: TensorResult) => void },
): Promise<void> {
  let next = 0;
  let failed = false;
  const work = async (runner: JobRunner): Promise<void> => {
    try {
      while (!failed && next < jobs.length) {
        signal?.throwIfAborted();
        done(await runner.run(jobs[next++]));
      }
    } catch (error) {
      failed = true;
      throw error;
    }
  };
  try {
    const ends = await Promise.allSettled(runners.map(work));
    const failure = ends.find((end) => end.status === 'rejected');
    if (failure) throw failure.reason;
  } finally {
    for (const runner of runners) await runner[Symbol.asyncDispose]();
  }
}

export function toPortable(error: unknown): PortableError {
  if (!(error instanceof Error)) return { kind: 'Error', message: String(error), stack: undefined };
  return {
    kind: error instanceof PcompError ? error.name : 'Error',
    message: error.message,
    stack: error.stack,
    ...(error instanceof FormatError ? { path: error.path, rule: error.rule } : {}),
    ...(error instanceof EnvironmentError ? { code: error.code } : {}),
    ...('code' in error && !(error instanceof PcompError) ? { rule: String(error.code) } : {}),
  };
}

function fromPortable({ kind, message, stack, path = '', rule = '', code }: PortableError): Error {
  switch (kind) {
    case 'RecipeError':
      return new RecipeError(message);
    case 'UnsupportedError':
      return new UnsupportedError(message);
    case 'EnvironmentError':
      return new EnvironmentError(code!, message);
    case 'FormatError':
      return new FormatError(path, rule, message.slice(`${path}: `.length, -` [${rule}]`.length));
    default:
      // A system error keeps its code: a full disk is told from a bug by it.
      return Object.assign(new Error(message), { stack, ...(rule === '' ? {} : { code: rule }) });
  }
}

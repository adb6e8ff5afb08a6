/** Threads that do jobs one at a time, and their errors on the way back. */
import { parentPort, type TransferListItem, Worker } from 'node:worker_threads';
import { type EnvironmentCode, EnvironmentError, FormatError, PcompError, RecipeError, UnsupportedError } from '../errors.ts';

/** Does jobs, one at a time. */
export interface JobRunner<Job, Result> extends AsyncDisposable {
  run(job: Job): Promise<Result>;
}

type Answer<Result> = { readonly result: Result } | { readonly error: PortableError };

/** An error on its way between threads, which forget its class. */
interface PortableError {
  readonly kind: string;
  readonly message: string;
  readonly stack: string | undefined;
  readonly path?: string;
  readonly rule?: string;
  readonly code?: EnvironmentCode;
}

/**
 * Starts a thread from the module `name` beside the module at the URL `caller`; that module calls `serveJobs`. Jobs and results are copied as
 * structured clones. A job fails as it failed in the thread, stack included, or because the thread has ended.
 */
export function startJobThread<Job, Result>(caller: string, name: string, workerData?: unknown): JobRunner<Job, Result> {
  const worker = startWorker(caller, name, workerData);
  let waiting: { resolve: (result: Result) => void; reject: (error: unknown) => void } | undefined;
  let ended: unknown;
  const end = (error: unknown): void => {
    ended ??= error;
    waiting?.reject(ended);
  };
  worker.on('message', (answer: Answer<Result>) => {
    if ('result' in answer) waiting?.resolve(answer.result);
    else waiting?.reject(fromPortable(answer.error));
  });
  worker.on('error', end);
  worker.on('exit', (code) => end(new Error(`the thread of ${name} ended with code ${code}`)));
  return {
    run(job) {
      return new Promise((resolve, reject) => {
        if (ended !== undefined) return reject(ended);
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
function startWorker(caller: string, name: string, workerData: unknown): Worker {
  if (!caller.endsWith('.ts')) return new Worker(new URL(`./${name}.js`, caller), { workerData });
  const [tsx, entry] = [import.meta.resolve('tsx/esm/api'), new URL(`./${name}.ts`, caller).href];
  const code = `import(${JSON.stringify(tsx)}).then(({ register }) => { register(); return import(${JSON.stringify(entry)}); })`;
  return new Worker(code, { eval: true, workerData, execArgv: [] });
}

/** In a thread: answers every job. @param transfer what of a result changes hands instead of being copied */
export function serveJobs<Job, Result>(
  run: (job: Job) => Result | Promise<Result>,
  transfer: (result: Result) => TransferListItem[] = () => [],
): void {
  parentPort?.on('message', async (job: Job) => {
    try {
      const result = await run(job);
      parentPort?.postMessage({ result } satisfies Answer<Result>, transfer(result));
    } catch (error) {
      parentPort?.postMessage({ error: toPortable(error) } satisfies Answer<Result>);
    }
  });
}

function toPortable(error: unknown): PortableError {
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

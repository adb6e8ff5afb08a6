/** Threads that do jobs one at a time, and their errors on the way back. */
import { parentPort, SHARE_ENV, type TransferListItem, Worker, type WorkerOptions } from 'node:worker_threads';
import {
  type EnvironmentCode,
  EnvironmentError,
  FormatError,
  PcompError,
  RecipeError,
  TrainingError,
  UnsupportedError,
} from '../errors.ts';

/** How a job is heard of, and stopped, while it goes on. */
export interface JobOptions<Event> {
  /** What the job tells, in order. */
  readonly onEvent?: (event: Event) => void;
  /** Aborting asks the job to stop; it then fails with an AbortError, or ends well if it was nearly through. */
  readonly signal?: AbortSignal | undefined;
}

/** Does jobs, one at a time. */
export interface JobRunner<Job, Result, Event = never> extends AsyncDisposable {
  run(job: Job, options?: JobOptions<Event>): Promise<Result>;
}

/** What a thread is sent. */
type Order<Job> = { readonly job: Job } | { readonly abort: true };

type Answer<Result, Event> = { readonly result: Result } | { readonly error: PortableError } | { readonly event: Event };

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
export function startJobThread<Job, Result, Event = never>(
  caller: string,
  name: string,
  workerData?: unknown,
): JobRunner<Job, Result, Event> {
  const worker = startWorker(caller, name, workerData);
  let waiting: { resolve: (result: Result) => void; reject: (error: unknown) => void; tell?: (event: Event) => void } | undefined;
  let ended: unknown;
  const end = (error: unknown): void => {
    ended ??= error;
    waiting?.reject(ended);
  };
  const send = (order: Order<Job>): void => worker.postMessage(order);
  worker.on('message', (answer: Answer<Result, Event>) => {
    if ('event' in answer) waiting?.tell?.(answer.event);
    else if ('result' in answer) waiting?.resolve(answer.result);
    else waiting?.reject(fromPortable(answer.error));
  });
  worker.on('error', end);
  worker.on('exit', (code) => end(new Error(`the thread of ${name} ended with code ${code}`)));
  return {
    async run(job, { onEvent, signal } = {}) {
      const abort = (): void => send({ abort: true });
      try {
        return await new Promise<Result>((resolve, reject) => {
          if (ended !== undefined) return reject(ended);
          waiting = { resolve, reject, ...(onEvent && { tell: onEvent }) };
          send({ job });
          if (signal?.aborted) abort();
          else signal?.addEventListener('abort', abort);
        });
      } finally {
        signal?.removeEventListener('abort', abort);
      }
    },
    async [Symbol.asyncDispose]() {
      waiting = undefined;
      await worker.terminate();
    },
  };
}

/** Published, the entry is JavaScript; from source, the thread must be taught TypeScript first, which Node's flags do not do for threads. */
function startWorker(caller: string, name: string, workerData: unknown): Worker {
  // One environment: native libraries read the process's own, not a thread's copy.
  const options: WorkerOptions = { workerData, env: SHARE_ENV };
  if (!caller.endsWith('.ts')) return new Worker(new URL(`./${name}.js`, caller), options);
  const [tsx, entry] = [import.meta.resolve('tsx/esm/api'), new URL(`./${name}.ts`, caller).href];
  const code = `import(${JSON.stringify(tsx)}).then(({ register }) => { register(); return import(${JSON.stringify(entry)}); })`;
  return new Worker(code, { ...options, eval: true, execArgv: [] });
}

/** What a job hears and says while it goes on. */
interface JobContext<Event> {
  readonly signal: AbortSignal;
  tell(event: Event): void;
}

/** In a thread: answers every job. @param transfer what of a result changes hands instead of being copied */
export function serveJobs<Job, Result, Event = never>(
  run: (job: Job, context: JobContext<Event>) => Result | Promise<Result>,
  transfer: (result: Result) => TransferListItem[] = () => [],
): void {
  const answer = (message: Answer<Result, Event>, transferred: TransferListItem[] = []): void =>
    parentPort?.postMessage(message, transferred);
  let current = new AbortController();
  parentPort?.on('message', async (order: Order<Job>) => {
    if ('abort' in order) return current.abort();
    current = new AbortController();
    try {
      const result = await run(order.job, { signal: current.signal, tell: (event) => answer({ event }) });
      answer({ result }, transfer(result));
    } catch (error) {
      answer({ error: toPortable(error) });
    }
  });
}

/** Of those the other side can make; a class of an error that extends one of them is known here only. */
const KINDS = { RecipeError, UnsupportedError, TrainingError, EnvironmentError, FormatError } as const;

function toPortable(error: unknown): PortableError {
  if (!(error instanceof Error)) return { kind: 'Error', message: String(error), stack: undefined };
  return {
    kind: Object.keys(KINDS).find((name) => error instanceof KINDS[name as keyof typeof KINDS]) ?? error.name,
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
    case 'UnsupportedError':
    case 'TrainingError':
      return new KINDS[kind](message);
    case 'EnvironmentError':
      return new EnvironmentError(code!, message);
    case 'FormatError':
      return new FormatError(path, rule, message.slice(`${path}: `.length, -` [${rule}]`.length));
    default:
      // A system error keeps its code: a full disk is told from a bug by it.
      return Object.assign(new Error(message), { name: kind, stack, ...(rule === '' ? {} : { code: rule }) });
  }
}

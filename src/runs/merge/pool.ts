/** Runs the jobs of a merge on several threads; results come as they are done. */
import { type JobRunner, startJobThread } from '../../compute/job-thread.ts';
import { createBlas } from '../../compute/ort-blas.ts';
import { PlainEngine } from '../../compute/plain.ts';
import type { MergeSetup, TensorJob } from './jobs.ts';
import { type TensorResult, TensorWorker } from './tensor.ts';

type TensorRunner = JobRunner<TensorJob, TensorResult>;

/** Runs jobs in this thread. */
export function localRunner(setup: MergeSetup): TensorRunner {
  const worker = new TensorWorker(setup, createBlas(new PlainEngine()));
  return {
    run: (job) => worker.run(job),
    async [Symbol.asyncDispose]() {
      worker.close();
    },
  };
}

/** Runners of a run's jobs: this thread alone, or `count` others. */
export function openRunners(setup: MergeSetup, count: number): readonly TensorRunner[] {
  if (count === 1) return [localRunner(setup)];
  return Array.from({ length: count }, () => startJobThread<TensorJob, TensorResult>(import.meta.url, 'merge-worker', setup));
}

/**
 * Gives jobs to runners, in order; calls `done` for each as it ends. An error or an abort lets the jobs under way end, and starts no more.
 */
export async function runJobs(
  jobs: readonly TensorJob[],
  runners: readonly TensorRunner[],
  { signal, done }: { readonly signal: AbortSignal | undefined; readonly done: (result: TensorResult) => void },
): Promise<void> {
  let next = 0;
  let failed = false;
  const work = async (runner: TensorRunner): Promise<void> => {
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

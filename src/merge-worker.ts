/** A thread of a merge: gets the setup when it starts, then jobs one by one. */
import { parentPort, workerData } from 'node:worker_threads';
import type { MergeSetup, TensorJob } from './merge-jobs.ts';
import { localRunner, toPortable, type WorkerAnswer } from './merge-pool.ts';

const runner = localRunner(workerData as MergeSetup);
parentPort?.on('message', async (job: TensorJob) => {
  let answer: WorkerAnswer;
  try {
    answer = { result: await runner.run(job) };
  } catch (error) {
    answer = { error: toPortable(error) };
  }
  parentPort?.postMessage(answer);
});

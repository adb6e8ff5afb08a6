/** A thread of a merge: gets the setup when it starts, then jobs one by one. */
import { workerData } from 'node:worker_threads';
import { serveJobs } from '../../compute/job-thread.ts';
import type { MergeSetup, TensorJob } from './jobs.ts';
import { localRunner } from './pool.ts';

const runner = localRunner(workerData as MergeSetup);
serveJobs((job: TensorJob) => runner.run(job));

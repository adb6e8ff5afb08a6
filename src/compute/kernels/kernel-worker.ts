/** A thread of a kernel pool. Results are fresh memory of this thread and change hands. */
import type { TransferListItem } from 'node:worker_threads';
import { serveJobs } from '../job-thread.ts';
import { type KernelJob, type KernelResult, runKernel } from './kernel-pool.ts';

serveJobs((job: KernelJob) => runKernel(job), buffersOf);

function buffersOf(result: KernelResult): TransferListItem[] {
  const buffers: TransferListItem[] = [];
  for (const value of ArrayBuffer.isView(result) ? [result] : Object.values(result as object)) {
    if (ArrayBuffer.isView(value)) buffers.push(value.buffer as ArrayBuffer);
    else buffers.push(...buffersOf(value as KernelResult));
  }
  return buffers;
}

/** A thread whose jobs fail, tell and stop in the ways they can. */
import { setTimeout as delay } from 'node:timers/promises';
import { serveJobs } from '../../src/compute/job-thread.ts';
import { EnvironmentError, FormatError, TrainingError } from '../../src/errors.ts';
import { BudgetError } from '../../src/methods/quantize/allocation/frontier.ts';

serveJobs<string, string, number>(async (job, { signal, tell }) => {
  if (job === 'format') throw new FormatError('a.bin', 'too-short', 'ends at byte 3');
  if (job === 'disk') throw new EnvironmentError('DISK_FULL', 'a.bin: no space');
  if (job === 'budget') throw new BudgetError(1, 2, 3);
  if (job === 'training') throw new TrainingError('not finite');
  if (job === 'bug') throw Object.assign(new TypeError('unforeseen'), { code: 'EBUG' });
  if (job === 'exit') process.exit(3);
  if (job === 'count') for (const event of [1, 2, 3]) tell(event);
  if (job === 'wait') {
    tell(0);
    while (true) {
      signal.throwIfAborted();
      await delay(5);
    }
  }
  if (job === 'later') setTimeout(() => Promise.reject(new Error('nobody waits for this')), 20);
  return `did ${job}`;
});

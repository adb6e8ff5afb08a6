/** A thread whose jobs fail in the ways they can. */
import { serveJobs } from '../../src/compute/job-thread.ts';
import { EnvironmentError, FormatError } from '../../src/errors.ts';

serveJobs((job: string) => {
  if (job === 'format') throw new FormatError('a.bin', 'too-short', 'ends at byte 3');
  if (job === 'disk') throw new EnvironmentError('DISK_FULL', 'a.bin: no space');
  if (job === 'bug') throw Object.assign(new TypeError('unforeseen'), { code: 'EBUG' });
  if (job === 'exit') process.exit(3);
  if (job === 'later') setTimeout(() => Promise.reject(new Error('nobody waits for this')), 20);
  return `did ${job}`;
});

/** The thread of a run: what `inThread` starts. */
import { serveJobs } from '../src/compute/job-thread.ts';
import type { RunHooks } from '../src/runs/run.ts';
import { RUNS, type RunEvent, type RunJob } from './runs.ts';

serveJobs<RunJob, unknown, RunEvent>(({ name, args }, { signal, tell }) => {
  const hooks: RunHooks = { signal, progress: (progress) => tell({ progress }), note: (note) => tell({ note }) };
  return (RUNS[name] as (...args: unknown[]) => Promise<unknown>)(...args, hooks);
});

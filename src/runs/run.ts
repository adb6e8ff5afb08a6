/** What every run tells its caller while it works. */

export interface Progress {
  /** What is being done, for people: `block 3 of 6: measure`. */
  readonly phase: string;
  /** Work done and to do in the whole run, in any one unit. */
  readonly done: number;
  readonly total: number;
}

/** How a run talks to its caller. */
export interface RunHooks {
  /** Called often while work goes on. */
  readonly progress?: (progress: Progress) => void;
  /** Something the user should know; printed and kept in report.json. */
  readonly note?: (message: string) => void;
  /** Aborting stops the run at the next safe point; what is on disk can be resumed. */
  readonly signal?: AbortSignal;
}

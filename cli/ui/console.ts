/** The only place that prints: results on stdout; progress, notes and errors on stderr. */
import { EtaEstimator, formatDuration } from '../../src/calibration/progress.ts';
import type { RunHooks } from '../../src/runs/run.ts';

export interface Console {
  readonly hooks: RunHooks;
  /** Prints the result: the JSON object under --json, else the text. */
  result(json: unknown, text: string): void;
  /** Ends the progress line, if one is being drawn. */
  close(): void;
}

/** Redraws at most this often; a log file gets a line at most every LOG_INTERVAL_MS. */
const DRAW_INTERVAL_MS = 100;
const LOG_INTERVAL_MS = 15_000;

export function createConsole(options: {
  readonly json: boolean;
  readonly quiet: boolean;
  readonly signal: AbortSignal;
}): Console {
  const live = process.stderr.isTTY === true && process.env['TERM'] !== 'dumb';
  const colour = live && !process.env['NO_COLOR'];
  let lastDraw = Number.NEGATIVE_INFINITY;
  let drawn = false;
  let estimate: { readonly total: number; readonly eta: EtaEstimator } | undefined;

  const erase = () => {
    if (drawn) process.stderr.write('\r\u001b[K');
    drawn = false;
  };
  return {
    hooks: {
      signal: options.signal,
      note(message) {
        erase();
        process.stderr.write(`${colour ? '\u001b[33mnote:\u001b[0m' : 'note:'} ${message}\n`);
      },
      progress({ phase, done, total }) {
        const now = performance.now();
        if (estimate?.total !== total) estimate = { total, eta: new EtaEstimator(total, now / 1000) };
        estimate.eta.update(done, now / 1000);
        if (options.quiet || now - lastDraw < (live ? DRAW_INTERVAL_MS : LOG_INTERVAL_MS)) return;
        lastDraw = now;
        const { eta } = estimate;
        const left = eta.remaining(now / 1000);
        const percent = String(Math.floor(eta.fraction * 100)).padStart(3);
        const line = `${percent} %  ${phase}${left === undefined ? '' : `, ${formatDuration(left)} left`}`;
        if (!live) {
          process.stderr.write(`${line}\n`);
          return;
        }
        const width = 24;
        const filled = Math.round(eta.fraction * width);
        const bar = `${'█'.repeat(filled)}${'░'.repeat(width - filled)}`;
        const room = Math.max(20, (process.stderr.columns ?? 80) - width - 2);
        erase();
        process.stderr.write(`${bar} ${line.slice(0, room)}`);
        drawn = true;
      },
    },
    result(json, text) {
      erase();
      process.stdout.write(options.json ? `${JSON.stringify(json, null, 2)}\n` : `${text}\n`);
    },
    close: erase,
  };
}

/** How long a run still takes, from how fast it went lately. Pure: the caller passes the time. */

/** Share of the newest reading in the rate; the rest is what was believed before. */
const NEWEST_SHARE = 0.3;
/** Readings closer together than this are added up first: a rate over a few milliseconds is noise. */
const MIN_INTERVAL_SECONDS = 0.2;

/** Estimates the remaining seconds of work that is counted in any one unit. */
export class EtaEstimator {
  readonly #total: number;
  #lastTime: number;
  #lastDone = 0;
  #done = 0;
  #rate = 0;

  /** @param total units of work, @param startSeconds any clock, in seconds */
  constructor(total: number, startSeconds: number) {
    this.#total = total;
    this.#lastTime = startSeconds;
  }

  /** Tells that `done` units are done at `nowSeconds`. A count that falls starts the estimate over from there. */
  update(done: number, nowSeconds: number): void {
    this.#done = Math.min(done, this.#total);
    if (done < this.#lastDone) {
      this.#lastDone = done;
      this.#lastTime = nowSeconds;
      this.#rate = 0;
      return;
    }
    const seconds = nowSeconds - this.#lastTime;
    const units = done - this.#lastDone;
    if (seconds < MIN_INTERVAL_SECONDS || units === 0) return;
    const newest = units / seconds;
    this.#rate = this.#rate === 0 ? newest : this.#rate + NEWEST_SHARE * (newest - this.#rate);
    this.#lastDone = done;
    this.#lastTime = nowSeconds;
  }

  /** 0 to 1. Work of no units is done. */
  get fraction(): number {
    return this.#total > 0 ? this.#done / this.#total : 1;
  }

  /** Seconds left at `nowSeconds`, or undefined while nothing is known. Time since the last reading counts down. */
  remaining(nowSeconds: number): number | undefined {
    if (this.#done >= this.#total) return 0;
    if (this.#rate === 0) return undefined;
    return Math.max(0, (this.#total - this.#lastDone) / this.#rate - (nowSeconds - this.#lastTime));
  }
}

/** `45 s`, `3 min 20 s`, `2 h 05 min`. */
export function formatDuration(seconds: number): string {
  const whole = Math.ceil(seconds);
  if (whole < 60) return `${whole} s`;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes} min ${String(whole % 60).padStart(2, '0')} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}

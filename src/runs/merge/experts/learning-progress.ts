/**
 * What a run that learns has come to know, kept beside its unfinished result: the start, trials of the pull, and the stage under way after
 * every update. A killed run goes on from there to the same plan, bit for bit.
 */
import { readFile } from 'node:fs/promises';
import { writeDurably } from '../../../artifacts/durable.ts';
import type { StageResult, StageState } from './learn.ts';
import type { TriedStart } from './start.ts';

/** A stage that is done. */
interface FinishedStage extends StageResult {
  /** What it ended at, as `encodeFloats` writes it. */
  readonly parameters: string;
}

interface State {
  /** Of the engine: another number would round products otherwise. */
  readonly threads: number;
  readonly tried: readonly TriedStart[];
  /** By gamma: summed divergence of its folds. */
  readonly gammas: Readonly<Record<string, number>>;
  readonly finished: Readonly<Record<string, FinishedStage>>;
  readonly current?: { readonly name: string; readonly state: StageState };
}

export class LearningProgress {
  readonly #path: string;
  readonly #keep: () => Promise<void>;
  #state: State;

  private constructor(path: string, keep: () => Promise<void>, state: State) {
    this.#path = path;
    this.#keep = keep;
    this.#state = state;
  }

  /** @param keep called before the file is written @param threads of a run that begins here */
  static async open(path: string, keep: () => Promise<void>, threads: number): Promise<LearningProgress> {
    const kept = await readFile(path, 'utf8').catch(() => undefined);
    const state = kept === undefined ? { threads, tried: [], gammas: {}, finished: {} } : (JSON.parse(kept) as State);
    return new LearningProgress(path, keep, state);
  }

  get threads(): number {
    return this.#state.threads;
  }

  get tried(): readonly TriedStart[] {
    return this.#state.tried;
  }

  get gammas(): Readonly<Record<string, number>> {
    return this.#state.gammas;
  }

  /** Updates that an interrupted run had done, for a message; undefined when this is no continuation. */
  get interrupted(): { readonly name: string; readonly update: number } | undefined {
    const { current } = this.#state;
    return current && { name: current.name, update: current.state.update };
  }

  finished(stage: string): FinishedStage | undefined {
    return this.#state.finished[stage];
  }

  underWay(stage: string): StageState | undefined {
    return this.#state.current?.name === stage ? this.#state.current.state : undefined;
  }

  addTried(start: TriedStart): Promise<void> {
    return this.#save({ ...this.#state, tried: [...this.#state.tried, start] });
  }

  addGamma(gamma: number, kl: number): Promise<void> {
    return this.#save({ ...this.#state, gammas: { ...this.#state.gammas, [gamma]: kl } });
  }

  update(stage: string, state: StageState): Promise<void> {
    return this.#save({ ...this.#state, current: { name: stage, state } });
  }

  finish(stage: string, result: FinishedStage): Promise<void> {
    const { current: _, ...rest } = this.#state;
    return this.#save({ ...rest, finished: { ...rest.finished, [stage]: result } });
  }

  async #save(state: State): Promise<void> {
    this.#state = state;
    await this.#keep();
    await writeDurably(this.#path, JSON.stringify(state));
  }
}

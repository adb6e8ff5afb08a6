/** One count for a whole quantize run, from the progress of its parts. */
import type { CalibrationProgress } from '../../calibration/calibration.ts';
import type { Block, LinearSite, Model } from '../../model/model.ts';
import type { RunHooks } from '../run.ts';

/** Share of a block's time, as measured on blocks of 7B shape with slim-llm; other methods only move the estimate a little. */
const SHARES = { measure: 0.2, quantize: 0.65, advance: 0.15 } as const;
/** Part of a block's time that learning takes where it is learned: on small models nearly all. */
const LEARNING = 0.8;
/** Time of a survey of a block over that of its quantization. */
const SURVEY = 0.5;

export class QuantizeProgress {
  readonly #model: Model;
  readonly #hooks: RunHooks;
  /** Weights of the block's sites that are done, of all. */
  #siteWeights = 0;
  #done = 0;
  /** What a survey takes beside the blocks themselves, as a part of them; 0 without one. */
  readonly #surveyShare: number;
  #surveying: boolean;
  readonly #learning: number;

  constructor(model: Model, hooks: RunHooks, surveys = false, learns = false) {
    this.#model = model;
    this.#hooks = hooks;
    this.#surveyShare = surveys ? SURVEY : 0;
    this.#surveying = surveys;
    this.#learning = learns ? LEARNING : 0;
  }

  /** `done` blocks are surveyed. */
  surveyed(done: number): void {
    this.#tell(this.#surveyShare * done, `survey of block ${done - 1}`);
  }

  /** The survey, if there was one, is over. */
  startBlocks(): void {
    this.#surveying = false;
  }

  /** Takes a report of the calibration. */
  calibration({ phase, block, done, total }: CalibrationProgress): void {
    if (block === undefined || phase === 'embed' || this.#surveying) return;
    const index = this.#model.blocks.findIndex(({ name }) => name === block);
    const before = phase === 'measure' ? 0 : 1 - SHARES.advance;
    this.#report(index, before + SHARES[phase] * (done / total), `${block}: ${phase}`);
  }

  siteDone(block: Block, site: LinearSite): void {
    const weights = ({ inFeatures, outFeatures }: LinearSite) => inFeatures * outFeatures;
    this.#siteWeights = (site === block.sites[0] ? 0 : this.#siteWeights) + weights(site);
    const all = block.sites.reduce((sum, each) => sum + weights(each), 0);
    this.#report(block.index, SHARES.measure + SHARES.quantize * Math.min(1, this.#siteWeights / all), site.name);
  }

  /** `done` of `total` learning steps of the block are done. */
  learned(block: Block, done: number, total: number): void {
    const before = (1 - this.#learning) * (1 - SHARES.advance);
    this.#tellBlock(block.index, before + this.#learning * (done / total), `${block.name}: learning`);
  }

  #report(block: number, share: number, phase: string): void {
    const learned = share > 1 - SHARES.advance ? this.#learning : 0;
    this.#tellBlock(block, learned + (1 - this.#learning) * share, phase);
  }

  #tellBlock(block: number, share: number, phase: string): void {
    this.#tell(this.#surveyShare * this.#model.blocks.length + block + share, phase);
  }

  #tell(done: number, phase: string): void {
    // Stages of a true-sequential run measure again: what is done never shrinks.
    this.#done = Math.max(this.#done, done);
    this.#hooks.progress?.({ phase, done: this.#done, total: this.#model.blocks.length * (1 + this.#surveyShare) });
  }
}

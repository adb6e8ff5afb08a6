/** The steps of preset `best`, by the names `--without` takes. */
export const BEST_STEPS = ['asymmetric', 'transform', 'grid', 'allocation', 'compensation', 'polish', 'bias'] as const;
export type BestStep = (typeof BEST_STEPS)[number];

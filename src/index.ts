/** pcomp as a library: the runs behind the commands, and the errors they throw. */

export type { AdapterFeed } from './artifacts/onnx/attach-adapter.ts';
export type { Device, DeviceRequest } from './compute/engine.ts';
export { EnvironmentError, FormatError, PcompError, RecipeError, UnsupportedError } from './errors.ts';
export { adapt } from './runs/adapt/adapt.ts';
export { type ConvertOutcome, type ConvertRequest, convertAdapter } from './runs/adapt/convert.ts';
export { readAdapterFeeds } from './runs/adapt/onnx.ts';
export type { AdaptOutcome } from './runs/adapt/outcome.ts';
export { type AdaptRecipe, type AdaptRequest, adaptRecipe } from './runs/adapt/recipe.ts';
export { type EvaluateOptions, type Evaluation, evaluate } from './runs/evaluate/evaluate.ts';
export { type Inspection, inspect } from './runs/inspect/inspect.ts';
export { type Verification, verifyArtifact } from './runs/inspect/verify-artifact.ts';
export { type MergeOutcome, merge } from './runs/merge/merge.ts';
export { type MergeRecipe, type MergeRequest, mergeRecipe } from './runs/merge/recipe.ts';
export { type QuantizeOutcome, quantize } from './runs/quantize/quantize.ts';
export { type QuantizeRecipe, type QuantizeRequest, quantizeRecipe } from './runs/quantize/recipe.ts';
export type { Progress, RunHooks } from './runs/run.ts';

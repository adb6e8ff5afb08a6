/** pcomp as a library: the runs behind the commands, and the errors they throw. */
export { type AdaptOutcome, adapt } from './adapt.ts';
export { type ConvertOutcome, type ConvertRequest, convertAdapter } from './adapt-convert.ts';
export { readAdapterFeeds } from './adapt-onnx.ts';
export { type AdaptRecipe, type AdaptRequest, adaptRecipe } from './adapt-recipe.ts';
export type { AdapterFeed } from './artifacts/onnx/attach-adapter.ts';
export type { Device, DeviceRequest } from './compute/engine.ts';
export { EnvironmentError, FormatError, PcompError, RecipeError, UnsupportedError } from './errors.ts';
export { type EvaluateOptions, type Evaluation, evaluate } from './evaluate.ts';
export { type Inspection, inspect } from './inspect.ts';
export { type MergeOutcome, merge } from './merge.ts';
export { type MergeRecipe, type MergeRequest, mergeRecipe } from './merge-recipe.ts';
export { type QuantizeOutcome, quantize } from './quantize.ts';
export { type QuantizeRecipe, type QuantizeRequest, quantizeRecipe } from './recipe.ts';
export type { Progress, RunHooks } from './run.ts';
export { type Verification, verifyArtifact } from './verify-artifact.ts';

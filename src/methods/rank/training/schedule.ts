/** What a method does while an adapter is trained: score, grow, mask and freeze, around the optimizer's step (adapters.md, sections 3 and 8). */
import type { Blas } from '../../../compute/blas.ts';
import type { Parameter } from '../../../compute/optim/parameter.ts';

/**
 * How parameters make the branch beside a frozen linear layer, y = x W^T + branch; n = inFeatures, m = outFeatures, R = rank. The graph of each is in
 * src/model/adapters/.
 * - `lora`: s (x loraA^T) loraB^T; loraA (R, n), loraB (m, R)
 * - `svd`: s ((x loraA^T) * e) loraB^T; e (R) beside them (AdaLoRA, IncreLoRA)
 * - `core`: s ((x loraA^T) core^T) loraB^T; core (R, R) (TriAdaptLoRA, LaMDA): the update is s loraB core loraA
 */
export type AdapterForm = 'lora' | 'svd' | 'core';

/** One adapted layer in training. A schedule may change `parameters` (values, frozen) and replace them by larger ones. */
export interface TrainedModule {
  /** Module name, `model.layers.0.self_attn.q_proj` */
  readonly name: string;
  readonly block: number;
  readonly outFeatures: number;
  readonly inFeatures: number;
  /** s */
  scale: number;
  /** R: components that exist, masked ones included. */
  rank: number;
  readonly parameters: Map<string, Parameter>;
}

/** What a layer's parameters come to. */
export interface TrainedFactors {
  readonly rank: number;
  readonly loraA: Float32Array;
  readonly loraB: Float32Array;
  /** Length of each row of the updated weight, where it is trained. */
  readonly magnitude?: Float32Array;
}

/** A line of the plan's trace. */
export interface TraceEntry {
  readonly step: number;
  /** Sum of active ranks. */
  readonly totalRank: number;
  /** Modules whose rank changed. */
  readonly changed: readonly string[];
}

export interface TrainingSchedule {
  readonly form: AdapterForm;
  /** Weight of the orthogonality of loraA's rows and loraB's columns in the loss; 0: none. */
  readonly regulariser: number;
  /** The rate it trains well at, unless the user gives another. */
  readonly learningRate: number;
  /** Makes the parameters of every module. */
  init(modules: readonly TrainedModule[]): void;
  /** dL/dW of the coming step, (m, n), layer by layer as the backward pass reaches them; a step that is skipped never comes to `before`. */
  observe?(module: TrainedModule, gradient: Float32Array, blas: Blas): Promise<void>;
  /** Before the optimizer's step; gradients include the regulariser's and are clipped. @param step from 1 */
  before(step: number, modules: readonly TrainedModule[]): void;
  /** After the optimizer's step. */
  after(step: number, modules: readonly TrainedModule[]): void;
  /** Factor on the learning rate of what came to be after the update `born`, where the method has its own; absent: the trainer's. */
  rateFactor?(step: number, born: number): number;
  /** Active ranks now, by module name: what the plan reports and the budget counts. */
  ranks(modules: readonly TrainedModule[]): ReadonlyMap<string, number>;
  readonly trace: readonly TraceEntry[];
  /** From this step on the ranks are final: checkpoints from here on may be kept as the best. */
  readonly finalFrom: number;
  /** Update without its scale baked: loraA (r, n), loraB (m, r) with the scale in loraB; r may be 0. */
  factors(module: TrainedModule): TrainedFactors;
  /** All that a stopped run needs besides the parameters, as plain JSON. */
  state(): unknown;
  restore(state: unknown): void;
}

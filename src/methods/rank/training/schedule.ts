/** What a method does while an adapter is trained: score, grow, mask and freeze, around the optimizer's step (adapters.md, sections 3 and 8). */
import type { Blas } from '../../../compute/blas.ts';
import type { Parameter } from '../../../compute/optim/parameter.ts';
import type { RoutedShape } from '../../../graph/routed-branch.ts';
import type { KernelShape } from '../kernel-delta.ts';

/**
 * How parameters make the branch beside a frozen linear layer, y = x W^T + branch; n = inFeatures, m = outFeatures, R = rank. What each does to
 * the weight is in src/runs/adapt/adapted-weights.ts.
 * - `lora`: s (x loraA^T) loraB^T; loraA (R, n), loraB (m, R)
 * - `svd`: s ((x loraA^T) * e) loraB^T; e (R) beside them (AdaLoRA, IncreLoRA)
 * - `core`: s ((x loraA^T) core^T) loraB^T; core (R, R) (TriAdaptLoRA, LaMDA): the update is s loraB core loraA
 * - `routed`: experts weighed token by token (MoLA): `router`, `expertsA` and `expertsB` as src/graph/routed-branch.ts has them, expertsB times s
 * - `kernel`: an update with few non-zeros, of a kernel between `kernelIn` and `kernelOut` (SNELLA): src/methods/rank/kernel-delta.ts
 */
export type AdapterForm = 'lora' | 'svd' | 'core' | 'routed' | 'kernel';

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
  /** Of the form `routed`. */
  routed?: RoutedShape;
  /** Of the form `kernel`. */
  kernel?: KernelShape;
}

/** What a layer's parameters come to. */
export interface TrainedFactors {
  readonly rank: number;
  readonly loraA: Float32Array;
  readonly loraB: Float32Array;
  /** Length of each row of the updated weight, where it is trained. */
  readonly magnitude?: Float32Array;
}

/** Experts beside a layer, the scale in expertsB; tensors as routed-branch.ts has them. */
export interface RoutedFactors {
  readonly routed: RoutedShape;
  readonly router: Float32Array;
  readonly expertsA: Float32Array;
  readonly expertsB: Float32Array;
}

/** An update with few non-zeros: values at flat places of the (outFeatures, inFeatures) weight, ascending. */
export interface SparseDelta {
  readonly indices: Int32Array;
  readonly values: Float32Array;
}

/** What training makes of a layer. */
export type TrainedUpdate = TrainedFactors | RoutedFactors | SparseDelta;

/** A line of the plan's trace. */
export interface TraceEntry {
  readonly step: number;
  /** Sum of active ranks, or of non-zeros. */
  readonly totalRank: number;
  /** Modules whose rank changed. */
  readonly changed: readonly string[];
}

export interface TrainingSchedule {
  readonly form: AdapterForm;
  /** Weight of the orthogonality of loraA's rows and loraB's columns in the loss; 0: none. */
  readonly regulariser: number;
  /** Weight of how evenly experts are picked, in the loss; absent: none. */
  readonly balance?: number;
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
  /** What a layer costs of the budget, and the numbers that are stored of it; absent: its rank times what one costs, and the two factors. */
  size?(module: TrainedModule): { readonly spent: number; readonly parameters: number };
  readonly trace: readonly TraceEntry[];
  /** From this step on the ranks are final: checkpoints from here on may be kept as the best. */
  readonly finalFrom: number;
  /** The update as it is stored: loraA (r, n), loraB (m, r) with the scale in loraB, where r may be 0, or another form of it. */
  factors(module: TrainedModule, blas: Blas): TrainedUpdate | Promise<TrainedUpdate>;
  /** All that a stopped run needs besides the parameters: plain JSON, and typed arrays, which may be those that the schedule goes on with. */
  state(): unknown;
  restore(state: unknown): void;
}

/** Sparse architectures that dense siblings can be put into: names, configuration, and what else each wants (merging.md 6b). */
import { UnsupportedError } from '../../../errors.ts';

/** The method's name. */
export const MOE = 'moe';

/** The three matrices of a gated MLP. */
export type MlpPart = 'gate' | 'up' | 'down';

export interface MoeLayout {
  /** As `model_type`. */
  readonly name: 'mixtral' | 'qwen2_moe' | 'qwen3_moe';
  readonly architecture: string;
  /** Name of a block's router, (experts, hiddenSize). */
  router(block: string): string;
  expert(block: string, index: number, part: MlpPart): string;
  /** An expert that all tokens go through: of zeros, since the dense models have none. Absent: there is none. */
  readonly shared?: { part(block: string, part: MlpPart): string; gate(block: string): string };
  config(dense: Readonly<Record<string, unknown>>, experts: number, topK: number): Record<string, unknown>;
}

/** Features of a shared expert of zeros. */
export const SHARED_FEATURES = 64;

const MIXTRAL_NAMES = { gate: 'w1', up: 'w3', down: 'w2' } as const;

const MIXTRAL: MoeLayout = {
  name: 'mixtral',
  architecture: 'MixtralForCausalLM',
  router: (block) => `${block}.block_sparse_moe.gate.weight`,
  expert: (block, index, part) => `${block}.block_sparse_moe.experts.${index}.${MIXTRAL_NAMES[part]}.weight`,
  config: (dense, experts, topK) => {
    for (const field of ['attention_bias', 'mlp_bias'])
      if (dense[field] === true)
        throw new UnsupportedError(`--method moe: the base has ${field}, for which Mixtral has no place`);
    const { rope_scaling: scaling } = dense;
    const kind = typeof scaling === 'object' && scaling !== null ? (scaling as Record<string, unknown>) : undefined;
    if (kind && (kind['rope_type'] ?? kind['type'] ?? 'default') !== 'default')
      throw new UnsupportedError('--method moe: the base scales its rotation (rope_scaling), which Mixtral does not');
    return {
      ...dense,
      num_local_experts: experts,
      num_experts_per_tok: topK,
      sliding_window: dense['sliding_window'] ?? null,
      output_router_logits: false,
      router_aux_loss_coef: 0.001,
    };
  },
};

const qwen = (dense: Readonly<Record<string, unknown>>, experts: number, topK: number): Record<string, unknown> => ({
  ...dense,
  num_experts: experts,
  num_experts_per_tok: topK,
  moe_intermediate_size: dense['intermediate_size'],
  norm_topk_prob: true,
  decoder_sparse_step: 1,
  mlp_only_layers: [],
  output_router_logits: false,
  router_aux_loss_coef: 0.001,
});

const QWEN_NAMES = {
  router: (block: string) => `${block}.mlp.gate.weight`,
  expert: (block: string, index: number, part: MlpPart) => `${block}.mlp.experts.${index}.${part}_proj.weight`,
};

const QWEN2: MoeLayout = {
  name: 'qwen2_moe',
  architecture: 'Qwen2MoeForCausalLM',
  ...QWEN_NAMES,
  shared: {
    part: (block, part) => `${block}.mlp.shared_expert.${part}_proj.weight`,
    gate: (block) => `${block}.mlp.shared_expert_gate.weight`,
  },
  config: (...given) => ({ ...qwen(...given), shared_expert_intermediate_size: SHARED_FEATURES }),
};

const QWEN3: MoeLayout = { name: 'qwen3_moe', architecture: 'Qwen3MoeForCausalLM', ...QWEN_NAMES, config: qwen };

/** By the dense architecture. */
const LAYOUTS: Readonly<Record<string, MoeLayout>> = {
  LlamaForCausalLM: MIXTRAL,
  MistralForCausalLM: MIXTRAL,
  Qwen2ForCausalLM: QWEN2,
  Qwen3ForCausalLM: QWEN3,
};

/** Throws UnsupportedError for an architecture without a sparse sibling. */
export function moeLayout(architecture: string): MoeLayout {
  const layout = LAYOUTS[architecture];
  if (layout) return layout;
  throw new UnsupportedError(
    `--method moe: ${architecture} has no sparse sibling that pcomp knows; ${Object.keys(LAYOUTS).join(', ')} have`,
  );
}

/** config.json of the sparse model. */
export function moeConfig(
  layout: MoeLayout,
  dense: Readonly<Record<string, unknown>>,
  experts: number,
  topK: number,
): Record<string, unknown> {
  return { ...layout.config(dense, experts, topK), architectures: [layout.architecture], model_type: layout.name };
}

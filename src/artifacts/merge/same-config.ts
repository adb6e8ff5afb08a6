/** Whether two configurations describe one network: sizes, heads, rotation and norms must agree, or the weights mean different things. */
import { RecipeError } from '../../errors.ts';

type Config = Readonly<Record<string, unknown>>;

/** What must agree -> the value of a model that does not say, where every architecture has the same. */
const COMPARED: Readonly<Record<string, unknown>> = {
  model_type: undefined,
  hidden_size: undefined,
  n_embd: undefined,
  intermediate_size: undefined,
  n_inner: null,
  num_hidden_layers: undefined,
  n_layer: undefined,
  num_attention_heads: undefined,
  n_head: undefined,
  num_key_value_heads: undefined,
  head_dim: undefined,
  num_local_experts: undefined,
  num_experts: undefined,
  num_experts_per_tok: undefined,
  hidden_act: undefined,
  activation_function: undefined,
  rms_norm_eps: undefined,
  layer_norm_eps: undefined,
  layer_norm_epsilon: undefined,
  norm_epsilon: undefined,
  partial_rotary_factor: undefined,
  attention_bias: false,
  mlp_bias: false,
  no_rope_layers: undefined,
  attn_logit_softcapping: null,
  final_logit_softcapping: null,
  scale_attn_weights: true,
  scale_attn_by_inverse_layer_idx: false,
};

/**
 * Throws RecipeError listing every setting in which an expert's configuration differs from the base's. A setting that one of them leaves
 * out has its usual value.
 */
export function requireSameConfig(path: string, expert: Config, base: Config): void {
  const [a, b] = [normalized(expert), normalized(base)];
  const differences = [...new Set([...Object.keys(a), ...Object.keys(b)])]
    .filter((key) => a[key] !== undefined && b[key] !== undefined && JSON.stringify(a[key]) !== JSON.stringify(b[key]))
    .map((key) => `${key} is ${JSON.stringify(a[key])}, the base's ${JSON.stringify(b[key])}`);
  if (differences.length > 0) throw new RecipeError(`${path}: is not of the base's make: ${differences.join('; ')}`);
}

function normalized(config: Config): Record<string, unknown> {
  const result: Record<string, unknown> = {};
  for (const [key, usual] of Object.entries(COMPARED)) result[key] = config[key] ?? usual;
  const heads = config['num_attention_heads'];
  if (typeof heads === 'number') {
    result['num_key_value_heads'] ??= heads;
    if (typeof config['hidden_size'] === 'number') result['head_dim'] ??= config['hidden_size'] / heads;
  }
  // Newer files keep the base frequency and the scaling in one object.
  const rope = (config['rope_parameters'] ?? config['rope_scaling']) as Config | null | undefined;
  result['rope_theta'] = config['rope_theta'] ?? rope?.['rope_theta'];
  if (config['rope_theta'] !== undefined || rope !== undefined) {
    const { rope_theta: _, type, rope_type = type, ...scaling } = rope ?? {};
    result['rope scaling'] = rope_type === undefined || rope_type === 'default' ? null : sorted({ rope_type, ...scaling });
  }
  result['sliding_window'] = config['use_sliding_window'] === false ? null : config['sliding_window'];
  return result;
}

function sorted(value: Config): Config {
  return Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1)));
}

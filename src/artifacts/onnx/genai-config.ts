/** genai_config.json: how onnxruntime-genai runs the decoder. Written, and not run by us: the runtime has no npm package. */
import type { OnnxModel } from '../../../formats/onnx/model.ts';
import type { Model } from '../../model/model.ts';

/** Text types the runtime knows (0.16), among the architectures pcomp has. */
const KNOWN_TYPES = ['llama', 'mistral', 'qwen2', 'qwen3', 'smollm3'];

/** `LlamaForCausalLM` -> `llama`; undefined for types the runtime does not know. */
export function genaiType(architecture: string): string | undefined {
  const end = architecture.indexOf('For');
  const type = end < 0 ? '' : architecture.slice(0, end).toLowerCase();
  return KNOWN_TYPES.includes(type) ? type : undefined;
}

/**
 * The configuration, or undefined when the runtime does not know the architecture.
 * @param filename path of the .onnx file below the artifact's folder
 * @param generation generation_config.json, which knows the special tokens best
 */
export function genaiConfig(
  model: Model,
  graph: OnnxModel,
  filename: string,
  generation: Readonly<Record<string, unknown>>,
): Readonly<Record<string, unknown>> | undefined {
  const type = genaiType(model.architecture);
  if (type === undefined) return undefined;
  const { vocabSize, hiddenSize, blockCount, headCount, kvHeadCount, headDim, contextLength } = model.shape;
  const token = (name: string): unknown => generation[name] ?? model.config[name];
  const eos = token('eos_token_id');
  const pad = token('pad_token_id') ?? (Array.isArray(eos) ? eos[0] : eos);
  const tokens = { bos_token_id: token('bos_token_id'), eos_token_id: eos, pad_token_id: pad };
  const shared = graph.graph.nodes.some((node) => node.op === 'GroupQueryAttention');
  return {
    model: {
      ...Object.fromEntries(Object.entries(tokens).filter(([, value]) => value !== undefined && value !== null)),
      context_length: contextLength,
      decoder: {
        session_options: { provider_options: [] },
        filename,
        head_size: headDim,
        hidden_size: hiddenSize,
        inputs: {
          input_ids: 'input_ids',
          attention_mask: 'attention_mask',
          past_key_names: 'past_key_values.%d.key',
          past_value_names: 'past_key_values.%d.value',
        },
        outputs: { logits: 'logits', present_key_names: 'present.%d.key', present_value_names: 'present.%d.value' },
        num_attention_heads: headCount,
        num_hidden_layers: blockCount,
        num_key_value_heads: kvHeadCount,
      },
      type,
      vocab_size: vocabSize,
    },
    search: {
      do_sample: generation['do_sample'] ?? false,
      max_length: contextLength,
      num_beams: 1,
      // One buffer for past and present works with GroupQueryAttention only.
      past_present_share_buffer: shared,
      temperature: generation['temperature'] ?? 1,
      top_k: generation['top_k'] ?? 1,
      top_p: generation['top_p'] ?? 1,
    },
  };
}

/** Synthetic checkpoints of real shapes, with planted outlier channels: for speed and memory, never for quality. Never committed. */
import { cp, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { fromFloat32 } from '../formats/dtype.ts';
import { createShardedSink } from '../formats/safetensors/sharded-writer.ts';

export interface SyntheticShape {
  readonly hidden: number;
  readonly intermediate: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly context: number;
}

/** Block shapes of well-known models. */
export const SHAPES = {
  '7b': { hidden: 4096, intermediate: 11008, heads: 32, kvHeads: 32, context: 2048 },
  '1b': { hidden: 2048, intermediate: 8192, heads: 32, kvHeads: 8, context: 2048 },
} as const satisfies Record<string, SyntheticShape>;

/** One hidden channel in this many carries activations OUTLIER_GAIN times the others', as in trained models. */
const OUTLIER_EVERY = 128;
const OUTLIER_GAIN = 12;

/** Near-normal numbers, fast: the sum of four uniform bytes of an xorshift stream, scaled to unit variance. */
class Noise {
  #state: number;
  constructor(seed: number) {
    this.#state = (seed * 2_654_435_761 + 1) | 0 || 1;
  }
  fill(values: Float32Array, deviation: number): void {
    let x = this.#state;
    // Var of the sum of four uniform integers 0..255.
    const scale = deviation / Math.sqrt((4 * (256 ** 2 - 1)) / 12);
    for (let i = 0; i < values.length; i++) {
      x ^= x << 13;
      x ^= x >>> 17;
      x ^= x << 5;
      values[i] = ((x & 255) + ((x >>> 8) & 255) + ((x >>> 16) & 255) + (x >>> 24) - 510) * scale;
    }
    this.#state = x;
  }
}

/** Writes a Llama checkpoint of `blocks` blocks in BF16 with the tokenizer of `tokenizerFolder`, vocabulary 2048. */
export async function writeSynthetic(
  folder: string,
  shape: SyntheticShape,
  blocks: number,
  tokenizerFolder: string,
): Promise<void> {
  const vocab = 2048;
  const { hidden, intermediate, heads, kvHeads } = shape;
  const headDim = hidden / heads;
  await mkdir(folder, { recursive: true });
  for (const file of ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json'])
    await cp(join(tokenizerFolder, file), join(folder, file));
  const config = {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    vocab_size: vocab,
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: blocks,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    hidden_act: 'silu',
    max_position_embeddings: shape.context,
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    tie_word_embeddings: true,
    torch_dtype: 'bfloat16',
    bos_token_id: 1,
    eos_token_id: 2,
  };
  await writeFile(join(folder, 'config.json'), JSON.stringify(config, null, 1));

  const tensors = new Map<string, [number[], number]>([
    ['model.embed_tokens.weight', [[vocab, hidden], 0.02]],
    ['model.norm.weight', [[hidden], 0]],
  ]);
  for (let block = 0; block < blocks; block++) {
    const prefix = `model.layers.${block}`;
    const linear = (name: string, out: number, input: number) =>
      tensors.set(`${prefix}.${name}.weight`, [[out, input], 1 / Math.sqrt(input)]);
    tensors.set(`${prefix}.input_layernorm.weight`, [[hidden], 0]);
    linear('self_attn.q_proj', heads * headDim, hidden);
    linear('self_attn.k_proj', kvHeads * headDim, hidden);
    linear('self_attn.v_proj', kvHeads * headDim, hidden);
    linear('self_attn.o_proj', hidden, heads * headDim);
    tensors.set(`${prefix}.post_attention_layernorm.weight`, [[hidden], 0]);
    linear('mlp.gate_proj', intermediate, hidden);
    linear('mlp.up_proj', intermediate, hidden);
    linear('mlp.down_proj', hidden, intermediate);
  }
  const declarations = [...tensors].map(([name, [dims]]) => ({ name, dtype: 'BF16' as const, shape: dims }));
  await using sink = await createShardedSink(folder, declarations, { maxShardBytes: 2e9, metadata: new Map([['format', 'pt']]) });
  const noise = new Noise(1);
  for (const [name, [dims, deviation]] of tensors) {
    const values = new Float32Array(dims.reduce((product, dim) => product * dim, 1));
    if (deviation > 0) noise.fill(values, deviation);
    else for (let i = 0; i < values.length; i++) values[i] = i % OUTLIER_EVERY === 7 ? OUTLIER_GAIN : 1;
    await sink.write(name, fromFloat32('BF16', values));
  }
  await sink.finalize();
}

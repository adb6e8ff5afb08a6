/**
 * A slow and obvious forward pass in float64, written from the architectures' definitions and sharing no code with the
 * product: one token list in, logits and every linear layer's input out. Biases and head norms are used where the
 * checkpoint has them.
 */

/** Tensor name -> values as stored, row-major; undefined when the checkpoint has none of that name. */
export type Weights = (name: string) => ArrayLike<number> | undefined;

/** One vector a token. */
type Vectors = number[][];

export interface ReferenceResult {
  readonly logits: Vectors;
  /** Hidden states after each block. */
  readonly hidden: readonly Vectors[];
  /** Linear module name -> what it read. */
  readonly linearInputs: ReadonlyMap<string, Vectors>;
}

type Config = Readonly<Record<string, unknown>>;

export function referenceForward(config: Config, weights: Weights, tokens: readonly number[]): ReferenceResult {
  const [architecture] = config['architectures'] as string[];
  return architecture === 'GPT2LMHeadModel' ? gpt2(config, weights, tokens) : llama(config, weights, tokens);
}

function llama(config: Config, weights: Weights, tokens: readonly number[]): ReferenceResult {
  const width = config['hidden_size'] as number;
  const heads = config['num_attention_heads'] as number;
  const kvHeads = (config['num_key_value_heads'] as number) ?? heads;
  const headDim = (config['head_dim'] as number) ?? width / heads;
  const layers = config['num_hidden_layers'] as number;
  const epsilon = (config['rms_norm_eps'] as number) ?? 1e-6;
  const bend = activation((config['hidden_act'] as string) ?? 'silu');
  const frequencies = rotaryFrequencies(config, headDim);
  const linearInputs = new Map<string, Vectors>();
  const linear = (name: string, x: Vectors): Vectors => {
    linearInputs.set(name, x);
    const weight = weights(`${name}.weight`)!;
    const bias = weights(`${name}.bias`);
    return x.map((row) => {
      const out: number[] = [];
      for (let n = 0; n < weight.length / row.length; n++) {
        let sum = bias ? bias[n] : 0;
        for (let k = 0; k < row.length; k++) sum += weight[n * row.length + k] * row[k];
        out.push(sum);
      }
      return out;
    });
  };
  const rmsNorm = (name: string, row: number[]): number[] => {
    const scale = weights(`${name}.weight`)!;
    const mean = row.reduce((sum, value) => sum + value * value, 0) / row.length;
    return row.map((value, i) => (value / Math.sqrt(mean + epsilon)) * scale[i]);
  };

  let x = embedding(weights('model.embed_tokens.weight')!, width, tokens);
  const hidden: Vectors[] = [];
  for (let layer = 0; layer < layers; layer++) {
    const name = `model.layers.${layer}`;
    const rotates = layerRotates(config, layer);
    const normed = x.map((row) => rmsNorm(`${name}.input_layernorm`, row));
    const project = (letter: string): Vectors[] => {
      const perToken = linear(`${name}.self_attn.${letter}_proj`, normed).map((row) => cut(row, headDim));
      return perToken.map((vectors, position) =>
        vectors.map((vector) => {
          if (letter === 'v') return vector;
          const norm = `${name}.self_attn.${letter}_norm`;
          const straight = weights(`${norm}.weight`) ? rmsNorm(norm, vector) : vector;
          return rotates ? rotate(straight, position, frequencies) : straight;
        }),
      );
    };
    const attended = attend(
      project('q'),
      project('k'),
      project('v'),
      heads / kvHeads,
      headDim ** -0.5,
      layerWindow(config, layer),
    );
    x = plus(x, linear(`${name}.self_attn.o_proj`, attended));
    const inner = x.map((row) => rmsNorm(`${name}.post_attention_layernorm`, row));
    const gate = linear(`${name}.mlp.gate_proj`, inner);
    const up = linear(`${name}.mlp.up_proj`, inner);
    const mixed = gate.map((row, t) => row.map((value, i) => bend(value) * up[t][i]));
    x = plus(x, linear(`${name}.mlp.down_proj`, mixed));
    hidden.push(x);
  }
  const tied = (config['tie_word_embeddings'] as boolean) ?? config['model_type'] === 'smollm3';
  const table = weights(tied ? 'model.embed_tokens.weight' : 'lm_head.weight')!;
  return { logits: x.map((row) => scores(table, rmsNorm('model.norm', row))), hidden, linearInputs };
}

function gpt2(config: Config, weights: Weights, tokens: readonly number[]): ReferenceResult {
  const width = config['n_embd'] as number;
  const heads = config['n_head'] as number;
  const headDim = width / heads;
  const prefix = weights('wte.weight') ? '' : 'transformer.';
  const epsilon = (config['layer_norm_epsilon'] as number) ?? 1e-5;
  const bend = activation((config['activation_function'] as string) ?? 'gelu_new');
  const linearInputs = new Map<string, Vectors>();
  // Conv1D: the weight is stored (in, out).
  const conv = (name: string, x: Vectors): Vectors => {
    linearInputs.set(name, x);
    const weight = weights(`${name}.weight`)!;
    const bias = weights(`${name}.bias`)!;
    return x.map((row) =>
      Array.from(bias, (start, n) => row.reduce((sum, value, k) => sum + value * weight[k * bias.length + n], start)),
    );
  };
  const layerNorm = (name: string, row: number[]): number[] => {
    const scale = weights(`${name}.weight`)!;
    const bias = weights(`${name}.bias`)!;
    const mean = row.reduce((sum, value) => sum + value, 0) / row.length;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / row.length;
    return row.map((value, i) => ((value - mean) / Math.sqrt(variance + epsilon)) * scale[i] + bias[i]);
  };

  const places = embedding(
    weights(`${prefix}wpe.weight`)!,
    width,
    tokens.map((_, position) => position),
  );
  let x = plus(embedding(weights(`${prefix}wte.weight`)!, width, tokens), places);
  const hidden: Vectors[] = [];
  for (let layer = 0; layer < (config['n_layer'] as number); layer++) {
    const name = `${prefix}h.${layer}`;
    const qkv = conv(
      `${name}.attn.c_attn`,
      x.map((row) => layerNorm(`${name}.ln_1`, row)),
    );
    const part = (index: number): Vectors[] => qkv.map((row) => cut(row.slice(index * width, (index + 1) * width), headDim));
    let scale = config['scale_attn_weights'] === false ? 1 : 1 / Math.sqrt(headDim);
    if (config['scale_attn_by_inverse_layer_idx'] === true) scale /= layer + 1;
    const attended = attend(part(0), part(1), part(2), 1, scale, Number.POSITIVE_INFINITY);
    x = plus(x, conv(`${name}.attn.c_proj`, attended));
    const inner = conv(
      `${name}.mlp.c_fc`,
      x.map((row) => layerNorm(`${name}.ln_2`, row)),
    );
    x = plus(
      x,
      conv(
        `${name}.mlp.c_proj`,
        inner.map((row) => row.map(bend)),
      ),
    );
    hidden.push(x);
  }
  const table = weights(config['tie_word_embeddings'] === false ? 'lm_head.weight' : `${prefix}wte.weight`)!;
  return { logits: x.map((row) => scores(table, layerNorm(`${prefix}ln_f`, row))), hidden, linearInputs };
}

/** Causal softmax attention; q, k and v are [token][head][feature], `group` query heads share a key head. Heads end to end. */
function attend(q: Vectors[], k: Vectors[], v: Vectors[], group: number, scale: number, window: number): Vectors {
  return q.map((queries, t) =>
    queries.flatMap((query, head) => {
      const shared = Math.floor(head / group);
      const seen = k.map((_, s) => s).filter((s) => s <= t && t - s < window);
      const exponents = seen.map((s) => Math.exp(scale * query.reduce((sum, value, i) => sum + value * k[s][shared][i], 0)));
      const total = exponents.reduce((sum, value) => sum + value, 0);
      return query.map((_, i) => seen.reduce((sum, s, j) => sum + (exponents[j] / total) * v[s][shared][i], 0));
    }),
  );
}

/** The first half of the head is the real, the second the imaginary part of complex numbers that turn with the position. */
function rotate(vector: number[], position: number, frequencies: number[]): number[] {
  const half = vector.length / 2;
  return vector.map((value, i) => {
    const angle = position * frequencies[i % half];
    return i < half
      ? value * Math.cos(angle) - vector[i + half] * Math.sin(angle)
      : value * Math.cos(angle) + vector[i - half] * Math.sin(angle);
  });
}

function rotaryFrequencies(config: Config, headDim: number): number[] {
  const newer = config['rope_parameters'] as Config | undefined;
  const scaling = (newer ?? config['rope_scaling'] ?? {}) as Record<string, number | string>;
  const theta = (newer?.['rope_theta'] ?? config['rope_theta'] ?? (config['model_type'] === 'smollm3' ? 2e6 : 1e4)) as number;
  const kind = scaling['rope_type'] ?? scaling['type'] ?? 'default';
  const factor = scaling['factor'] as number;
  return Array.from({ length: headDim / 2 }, (_, i) => {
    const plain = 1 / theta ** ((2 * i) / headDim);
    if (kind === 'linear') return plain / factor;
    if (kind !== 'llama3') return plain;
    const context = scaling['original_max_position_embeddings'] as number;
    const low = scaling['low_freq_factor'] as number;
    const high = scaling['high_freq_factor'] as number;
    const wavelength = (2 * Math.PI) / plain;
    if (wavelength < context / high) return plain;
    if (wavelength > context / low) return plain / factor;
    const smooth = (context / wavelength - low) / (high - low);
    return ((1 - smooth) * plain) / factor + smooth * plain;
  });
}

function layerRotates(config: Config, layer: number): boolean {
  if (config['model_type'] !== 'smollm3') return true;
  const list = config['no_rope_layers'] as number[] | undefined;
  const interval = (config['no_rope_layer_interval'] as number) ?? 4;
  return list ? list[layer] === 1 : (layer + 1) % interval !== 0;
}

function layerWindow(config: Config, layer: number): number {
  const window = (config['sliding_window'] as number | null) ?? Number.POSITIVE_INFINITY;
  const types = config['layer_types'] as string[] | undefined;
  if (types) return types[layer] === 'sliding_attention' ? window : Number.POSITIVE_INFINITY;
  switch (config['model_type']) {
    case 'mistral':
      return window;
    case 'qwen2':
    case 'qwen3':
      return config['use_sliding_window'] && layer >= (config['max_window_layers'] as number) ? window : Number.POSITIVE_INFINITY;
    case 'smollm3':
      return config['use_sliding_window'] && !layerRotates(config, layer) ? window : Number.POSITIVE_INFINITY;
    default:
      return Number.POSITIVE_INFINITY;
  }
}

function activation(name: string): (x: number) => number {
  switch (name) {
    case 'silu':
      return (x) => x / (1 + Math.exp(-x));
    case 'gelu':
      return (x) => 0.5 * x * (1 + erf(x / Math.SQRT2));
    case 'gelu_new':
    case 'gelu_pytorch_tanh':
      return (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
    case 'relu':
      return (x) => Math.max(0, x);
    default:
      throw new Error(`the reference has no activation ${name}`);
  }
}

/** Maclaurin series, exact to rounding for the small arguments of tests. */
function erf(x: number): number {
  let term = x;
  let sum = x;
  for (let n = 1; n < 200; n++) {
    term *= (-x * x) / n;
    sum += term / (2 * n + 1);
  }
  return (2 / Math.sqrt(Math.PI)) * sum;
}

function embedding(table: ArrayLike<number>, width: number, rows: readonly number[]): Vectors {
  return rows.map((row) => Array.from({ length: width }, (_, i) => table[row * width + i]));
}

function scores(table: ArrayLike<number>, row: number[]): number[] {
  return Array.from({ length: table.length / row.length }, (_, n) =>
    row.reduce((sum, value, k) => sum + value * table[n * row.length + k], 0),
  );
}

function cut(row: number[], size: number): Vectors {
  return Array.from({ length: row.length / size }, (_, i) => row.slice(i * size, (i + 1) * size));
}

function plus(a: Vectors, b: Vectors): Vectors {
  return a.map((row, t) => row.map((value, i) => value + b[t][i]));
}

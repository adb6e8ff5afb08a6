/** PEFT adapters as experts: every variant adds to the base what its layers would add, and none is half understood. */
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { merge } from '../../../src/runs/merge/merge.ts';
import { mergeRecipe } from '../../../src/runs/merge/recipe.ts';
import {
  type NamedTensor,
  nudged,
  product,
  randomTensor,
  readWeights,
  saveAdapter,
  saveFile,
  saveFolder,
  type Weights,
  weightsOf,
} from '../../support/merge-models.ts';
import { scratchFolder } from '../../support/scratch-folder.ts';
import { type TinyModel, tinyGpt2, tinyLlama } from '../../support/tiny-models.ts';

const scratch = scratchFolder();
const llama = tinyLlama('adapters', {}, { biases: ['q_proj'] });
const Q = 'model.layers.0.self_attn.q_proj';
const UP = 'model.layers.1.mlp.up_proj';
const wrap = (entries: Readonly<Record<string, NamedTensor>>): Weights =>
  new Map(Object.entries(entries).map(([name, tensor]) => [`base_model.model.${name}`, tensor]));

/** Merges one adapter alone into a model: what the adapted model's weights are. */
async function adapted(model: TinyModel, adapter: Weights, config: Readonly<Record<string, unknown>> = {}): Promise<Weights> {
  const folder = scratch.folder();
  const base = await saveFolder(join(folder, 'base'), weightsOf(model), model.config);
  await saveAdapter(join(folder, 'adapter'), adapter, config);
  const recipe = mergeRecipe({ base, method: 'linear', card: false }, 1);
  const mode = { overwrite: false, resume: false, dryRun: false };
  await merge([join(folder, 'adapter')], join(folder, 'out'), recipe, mode);
  return readWeights(join(folder, 'out'));
}

/** Expects `name` to be its base plus `update`, and every other tensor to be the base's. */
function expectUpdate(model: TinyModel, found: Weights, updates: Readonly<Record<string, ArrayLike<number>>>): void {
  for (const [name, { values }] of weightsOf(model)) {
    const update = updates[name];
    const result = found.get(name)!.values;
    for (let i = 0; i < values.length; i++) expect(result[i], `${name}[${i}]`).toBeCloseTo(values[i] + (update?.[i] ?? 0), 5);
  }
}

const A = randomTensor([2, 32], 1);
const B = randomTensor([32, 2], 2);
const LORA = { [`${Q}.lora_A.weight`]: A, [`${Q}.lora_B.weight`]: B };

describe('a LoRA adds s B A,', () => {
  it('s = alpha / r', async () => {
    expectUpdate(llama, await adapted(llama, wrap(LORA)), { [`${Q}.weight`]: product(A, B, 2) });
  });

  it('s = alpha / sqrt(r) when it is rank-stabilized', async () => {
    expectUpdate(llama, await adapted(llama, wrap(LORA), { use_rslora: true }), {
      [`${Q}.weight`]: product(A, B, 4 / Math.sqrt(2)),
    });
  });

  it('with the rank and alpha of the first pattern that matches', async () => {
    const a3 = randomTensor([3, 32], 3);
    const b3 = randomTensor([24, 3], 4);
    const both = { ...LORA, [`${UP}.lora_A.weight`]: a3, [`${UP}.lora_B.weight`]: b3 };
    const config = { rank_pattern: { 'layers.1.mlp.up_proj': 3 }, alpha_pattern: { up_proj: 9, 'mlp.*': 100 } };
    expectUpdate(llama, await adapted(llama, wrap(both), config), {
      [`${Q}.weight`]: product(A, B, 2),
      [`${UP}.weight`]: product(a3, b3, 3),
    });
  });

  it('under the names of an adapter, and inside a wrapper that the base has not', async () => {
    const named = { [`model.${Q}.lora_A.default.weight`]: A, [`model.${Q}.lora_B.default.weight`]: B };
    expectUpdate(llama, await adapted(llama, wrap(named)), { [`${Q}.weight`]: product(A, B, 2) });
  });

  it('with a bias of its own', async () => {
    const bias = randomTensor([32], 5);
    const found = await adapted(llama, wrap({ ...LORA, [`${Q}.lora_B.bias`]: bias }));
    expectUpdate(llama, found, { [`${Q}.weight`]: product(A, B, 2), [`${Q}.bias`]: bias.values.map((value) => 2 * value) });
  });

  it('transposed, to weights stored (in, out) and to embeddings', async () => {
    const gpt2 = tinyGpt2('adapters');
    const b = randomTensor([96, 2], 6);
    const [va, vb] = [randomTensor([2, 41], 7), randomTensor([32, 2], 8)];
    const adapter = wrap({
      'h.0.attn.c_attn.lora_A.weight': A,
      'h.0.attn.c_attn.lora_B.weight': b,
      'wte.lora_embedding_A': va,
      'wte.lora_embedding_B': vb,
    });
    expectUpdate(gpt2, await adapted(gpt2, adapter, { fan_in_fan_out: true }), {
      'h.0.attn.c_attn.weight': turned(product(A, b, 2), 96, 32),
      'wte.weight': turned(product(va, vb, 2), 32, 41),
    });
  });
});

/** (rows, columns) -> (columns, rows), by the definition. */
function turned(values: Float64Array, rows: number, columns: number): Float64Array {
  return values.map((_, i) => values[(i % rows) * columns + Math.floor(i / rows)]);
}

describe('tensors that an adapter saves whole', () => {
  it('replace the base: modules_to_save and biases', async () => {
    const base = weightsOf(llama);
    const norm = randomTensor([32], 9);
    const bias = randomTensor([32], 10);
    const adapter = wrap({ ...LORA, 'model.norm.modules_to_save.default.weight': norm, [`${Q}.base_layer.bias`]: bias });
    expectUpdate(llama, await adapted(llama, adapter), {
      [`${Q}.weight`]: product(A, B, 2),
      'model.norm.weight': norm.values.map((value, i) => value - base.get('model.norm.weight')!.values[i]),
      [`${Q}.bias`]: bias.values.map((value, i) => value - base.get(`${Q}.bias`)!.values[i]),
    });
  });
});

describe('DoRA gives every output the length of its magnitude', () => {
  it('on rows, for weights stored (out, in)', async () => {
    const magnitude = randomTensor([32], 11);
    const found = await adapted(llama, wrap({ ...LORA, [`${Q}.lora_magnitude_vector`]: magnitude }), { use_dora: true });
    const { values } = weightsOf(llama).get(`${Q}.weight`)!;
    const v = product(A, B, 2).map((update, i) => update + values[i]);
    const norms = Array.from({ length: 32 }, (_, row) => Math.hypot(...v.subarray(row * 32, (row + 1) * 32)));
    const update = v.map((value, i) => (magnitude.values[Math.floor(i / 32)] / norms[Math.floor(i / 32)]) * value - values[i]);
    expectUpdate(llama, found, { [`${Q}.weight`]: update });
  });

  it('on columns, for weights stored (in, out)', async () => {
    const gpt2 = tinyGpt2('dora');
    const b = randomTensor([96, 2], 12);
    const magnitude = randomTensor([96], 13);
    const name = 'h.1.attn.c_attn';
    const adapter = wrap({
      [`${name}.lora_A.weight`]: A,
      [`${name}.lora_B.weight`]: b,
      [`${name}.lora_magnitude_vector.default.weight`]: magnitude,
    });
    const found = await adapted(gpt2, adapter, { fan_in_fan_out: true, use_dora: true });
    const { values } = weightsOf(gpt2).get(`${name}.weight`)!;
    const v = turned(product(A, b, 2), 96, 32).map((update, i) => update + values[i]);
    const norms = Array.from({ length: 96 }, (_, column) => Math.hypot(...v.filter((_, i) => i % 96 === column)));
    expectUpdate(gpt2, found, {
      [`${name}.weight`]: v.map((value, i) => (magnitude.values[i % 96] / norms[i % 96]) * value - values[i]),
    });
  });
});

describe('AdaLoRA', () => {
  const config = { peft_type: 'ADALORA', init_r: 12, lora_alpha: 6, rank_pattern: { [`${Q}.lora_E`]: [true, false, true] } };

  it('adds B diag(E) A, scaled by the rank it began with, and drops modules of rank 0', async () => {
    const e = randomTensor([2, 1], 14);
    const scaled = { shape: A.shape, values: A.values.map((value, i) => value * e.values[Math.floor(i / 32)]) };
    const adapter = wrap({
      [`${Q}.lora_A`]: A,
      [`${Q}.lora_B`]: B,
      [`${Q}.lora_E`]: e,
      [`${UP}.lora_A`]: { shape: [0, 32], values: new Float32Array(0) },
      [`${UP}.lora_B`]: { shape: [24, 0], values: new Float32Array(0) },
      [`${UP}.lora_E`]: { shape: [0, 1], values: new Float32Array(0) },
    });
    expectUpdate(llama, await adapted(llama, adapter, config), { [`${Q}.weight`]: product(scaled, B, 6 / (12 + 1e-5)) });
  });

  it('without its singular values is refused', async () => {
    await expect(adapted(llama, wrap({ [`${Q}.lora_A`]: A, [`${Q}.lora_B`]: B }), config)).rejects.toThrow(/has no lora_E/);
  });
});

describe('an adapter is refused', () => {
  it.each<[string, Readonly<Record<string, NamedTensor>>, Readonly<Record<string, unknown>>, RegExp]>([
    ['of another kind', LORA, { peft_type: 'IA3' }, /"peft_type" is "IA3"; pcomp merges LORA and ADALORA/],
    [
      'that changed the base when it began',
      LORA,
      { init_lora_weights: 'pissa_niter_16' },
      /"init_lora_weights" is "pissa_niter_16"/,
    ],
    ['with a tensor of no known part', { ...LORA, [`${Q}.oft_r`]: B }, {}, /tensor ".*oft_r", one of 3, is no part of a LoRA/],
    ['with half a pair', { [`${Q}.lora_A.weight`]: A }, {}, /has lora_A, but lora_A and lora_B belong together/],
    ['whose rank is not what it says', LORA, { r: 4 }, /has rank 2, but adapter_config.json gives 4/],
    [
      'for a module that the base has not',
      { 'model.layers.9.lora_A.weight': A, 'model.layers.9.lora_B.weight': B },
      {},
      /module "model.layers.9", but the base has no such/,
    ],
    [
      'of another shape',
      { [`${UP}.lora_A.weight`]: A, [`${UP}.lora_B.weight`]: B },
      {},
      /changes a tensor of \[32, 32\], but the base's ".*up_proj.weight" is \[24, 32\]/,
    ],
    [
      'for a convolution',
      { [`${Q}.lora_A.weight`]: { shape: [2, 32, 1, 1], values: A.values }, [`${Q}.lora_B.weight`]: B },
      {},
      /not of convolutions/,
    ],
    ['that replicates layers', LORA, { layer_replication: [[0, 1]] }, /"layer_replication"/],
    [
      'with a larger vocabulary',
      { 'model.embed_tokens.weight': randomTensor([43, 32], 1) },
      {},
      /is \[43, 32\], but the base's is \[41, 32\]; if the vocabulary has grown/,
    ],
  ])('%s', async (_, tensors, config, message) => {
    await expect(adapted(llama, wrap(tensors), config)).rejects.toThrow(message);
  });
});

it.each([
  ['task-arithmetic', []],
  ['ties', ['density=0.4']],
  ['tsv-m', []],
  ['iso-c', []],
  ['wudi', []],
])('by %s, an adapter counts as the model that it was merged into', async (method, set) => {
  const folder = scratch.folder();
  const weights = weightsOf(llama);
  const base = await saveFolder(join(folder, 'base'), weights, llama.config);
  await saveAdapter(join(folder, 'b'), wrap(LORA));
  const full = await adapted(llama, wrap(LORA));
  await saveFile(join(folder, 'full-b.safetensors'), full);
  await saveFile(join(folder, 'a.safetensors'), nudged(weights, 20));
  const recipe = mergeRecipe({ base, method, set, card: false }, 1);
  const mode = { overwrite: false, resume: false, dryRun: false };
  await merge([join(folder, 'a.safetensors'), join(folder, 'b')], join(folder, 'by-adapter'), recipe, mode);
  await merge([join(folder, 'a.safetensors'), join(folder, 'full-b.safetensors')], join(folder, 'by-model'), recipe, mode);
  const [byAdapter, byModel] = [await readWeights(join(folder, 'by-adapter')), await readWeights(join(folder, 'by-model'))];
  for (const [name, { values }] of byModel) {
    const other = byAdapter.get(name)!.values;
    for (let i = 0; i < values.length; i++)
      expect(Math.abs(other[i] - values[i]), name).toBeLessThanOrEqual(1e-5 * Math.max(1, Math.abs(values[i])));
  }
});

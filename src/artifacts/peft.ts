/** A PEFT LoRA folder, written: unit scale, so that readers of every kind compute the same (adapters.md 9.1). */
import { join } from 'node:path';
import { createSafetensorsSink } from '../../formats/safetensors/writer.ts';
import { writeJson } from './manifest.ts';

/** One adapted linear layer. */
export interface AdapterModule {
  /** Module name, `model.layers.0.self_attn.q_proj`. */
  readonly name: string;
  readonly rank: number;
  /** (rank, inFeatures) */
  readonly loraA: Float32Array;
  /** (outFeatures, rank) */
  readonly loraB: Float32Array;
  /** (outFeatures): the length that each row of the updated weight is given (DoRA). */
  readonly magnitude?: Float32Array;
}

/** A module that is replaced as a whole. */
export interface SavedModule {
  readonly name: string;
  readonly shape: readonly number[];
  readonly weight: Float32Array;
}

export interface AdapterFolder {
  /** As `base_model_name_or_path`. */
  readonly base: string;
  readonly modules: readonly AdapterModule[];
  readonly saved: readonly SavedModule[];
  /** Layers of the base are stored (in, out). */
  readonly transposed: boolean;
}

type Factors = Pick<AdapterModule, 'rank' | 'loraA' | 'loraB' | 'magnitude'>;

/** The same update with zero components up to `rank`; a module of rank 0 stays without any. */
export function padded(factors: Factors, rank: number): Factors {
  const { rank: own, loraA, loraB } = factors;
  if (own === 0 || own === rank) return factors;
  const [n, m] = [loraA.length / own, loraB.length / own];
  const a = new Float32Array(rank * n);
  a.set(loraA);
  const b = new Float32Array(m * rank);
  for (let j = 0; j < m; j++) b.set(loraB.subarray(j * own, (j + 1) * own), j * rank);
  return { ...factors, rank, loraA: a, loraB: b };
}

/** Writes adapter_model.safetensors and adapter_config.json into `folder`; returns their names. Modules of rank 0 are left out. */
export async function writeAdapter(folder: string, { base, modules, saved, transposed }: AdapterFolder): Promise<string[]> {
  const used = modules.filter(({ rank }) => rank > 0);
  const tensors = [
    ...used.flatMap(({ name, rank, loraA, loraB, magnitude }) => [
      { name: `base_model.model.${name}.lora_A.weight`, shape: [rank, loraA.length / rank], values: loraA },
      { name: `base_model.model.${name}.lora_B.weight`, shape: [loraB.length / rank, rank], values: loraB },
      ...(magnitude
        ? [{ name: `base_model.model.${name}.lora_magnitude_vector`, shape: [magnitude.length], values: magnitude }]
        : []),
    ]),
    ...saved.map(({ name, shape, weight }) => ({ name: `base_model.model.${name}.weight`, shape, values: weight })),
  ];
  await using sink = await createSafetensorsSink(
    join(folder, 'adapter_model.safetensors'),
    tensors.map(({ name, shape }) => ({ name, dtype: 'F32', shape })),
  );
  for (const { name, values } of tensors) {
    await sink.write(name, new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
  }
  await sink.finalize();
  const largest = used.reduce((most, { rank }) => Math.max(most, rank), 1);
  // PEFT matches keys as patterns: whole, escaped names match nothing else.
  const pattern = Object.fromEntries(used.map(({ name, rank }) => [`^${name.replaceAll('.', '\\.')}`, rank]));
  await writeJson(join(folder, 'adapter_config.json'), {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: base,
    r: largest,
    lora_alpha: largest,
    rank_pattern: pattern,
    alpha_pattern: pattern,
    lora_dropout: 0,
    bias: 'none',
    fan_in_fan_out: transposed,
    use_rslora: false,
    use_dora: used.some(({ magnitude }) => magnitude !== undefined),
    inference_mode: true,
    target_modules: used.map(({ name }) => name),
    modules_to_save: saved.length === 0 ? null : saved.map(({ name }) => name.slice(name.lastIndexOf('.') + 1)),
  });
  return ['adapter_model.safetensors', 'adapter_config.json'];
}

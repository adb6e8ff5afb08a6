/** The configuration that says how to read a GPTQ checkpoint, and who can. */

import type { GptqFormat } from './gptq.ts';
import type { CodeShape } from './planes.ts';

export interface GptqConfig {
  readonly quant_method: 'gptq';
  readonly bits: number;
  readonly group_size: number;
  readonly desc_act: false;
  readonly sym: boolean;
  readonly lm_head: false;
  readonly pack_dtype: 'int32';
  readonly checkpoint_format: GptqFormat;
  /** Modules that differ: `+:` of another width or group size, `-:` left in float. */
  readonly dynamic?: Readonly<Record<string, Readonly<Record<string, number>>>>;
}

/**
 * v1 is the format every reader knows, but it cannot hold a zero point of 0: it is used for symmetric modules of 4 and 8 bits,
 * where zero points are the middle. Everything else is v2.
 * @param modules quantized modules, @param left modules of the blocks that stay in float
 */
export function gptqConfig(modules: ReadonlyMap<string, CodeShape>, left: readonly string[], symmetric: boolean): GptqConfig {
  const shapes = [...modules.values()];
  const bits = mostCommon(shapes.map((shape) => shape.bits[0]));
  const groupSize = mostCommon(shapes.map((shape) => shape.groupSize));
  const differing = [...modules].filter(([, shape]) => shape.bits[0] !== bits || shape.groupSize !== groupSize);
  const dynamic = Object.fromEntries([
    ...differing.map(([name, shape]) => [`+:^${escaped(name)}$`, { bits: shape.bits[0], group_size: shape.groupSize }] as const),
    ...left.map((name) => [`-:^${escaped(name)}$`, {}] as const),
  ]);
  const v1 = symmetric && shapes.every((shape) => shape.bits[0] === 4 || shape.bits[0] === 8);
  return {
    quant_method: 'gptq',
    bits,
    group_size: groupSize,
    desc_act: false,
    sym: symmetric,
    lm_head: false,
    pack_dtype: 'int32',
    checkpoint_format: v1 ? 'gptq' : 'gptq_v2',
    ...(Object.keys(dynamic).length > 0 ? { dynamic } : {}),
  };
}

/** Who loads a checkpoint of this configuration, for the user. */
export function gptqLoaders(config: GptqConfig): string[] {
  const lines =
    config.checkpoint_format === 'gptq'
      ? ['transformers (with GPTQModel) and vLLM load this checkpoint']
      : [
          'transformers (with GPTQModel) loads this checkpoint',
          'vLLM reads asymmetric, 2- and 3-bit GPTQ only in versions between its pull requests 26092 and 38288; use --symmetric at 4 or 8 bits for others',
        ];
  return config.dynamic
    ? [...lines, 'its modules differ ("dynamic"): GPTQModel itself reads that, transformers does not']
    : lines;
}

function mostCommon(values: readonly number[]): number {
  const counts = new Map<number, number>();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts].sort(([a, x], [b, y]) => y - x || a - b)[0][0];
}

function escaped(name: string): string {
  return name.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');
}

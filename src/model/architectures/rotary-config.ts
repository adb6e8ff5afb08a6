/** The fields of a config.json that say how positions are rotated, in their older and newer spelling. */
import type { ConfigReader } from '../config.ts';
import { inverseFrequencies, type RotaryFrequencies, type RotaryScaling } from '../rotary.ts';

/** Older files have `rope_theta` and `rope_scaling` (null: none), newer ones `rope_parameters` with both inside. */
export function readRotary(
  config: ConfigReader,
  headDim: number,
  contextLength: number,
  defaultTheta: number,
): RotaryFrequencies {
  const newer = config.has('rope_parameters') ? config.object('rope_parameters') : undefined;
  if (newer && Object.values(newer.fields).some((value) => typeof value === 'object' && value !== null)) {
    throw config.unsupported(
      'rope_parameters',
      'one set of rotary parameters for all layers is supported, not one per layer type',
    );
  }
  const older = config.has('rope_scaling') ? config.object('rope_scaling') : undefined;
  for (const part of [config, newer, older]) {
    if (part && part.positive('partial_rotary_factor', 1) !== 1) {
      throw part.unsupported('partial_rotary_factor', 'only whole heads are rotated (1)');
    }
  }
  const theta = newer?.has('rope_theta') ? newer.positive('rope_theta') : config.positive('rope_theta', defaultTheta);
  const scaling = readScaling(newer ?? older);
  return { inverseFrequencies: inverseFrequencies(headDim, theta, scaling), positions: contextLength };
}

function readScaling(config: ConfigReader | undefined): RotaryScaling {
  if (!config) return { kind: 'none' };
  const field = config.has('rope_type') ? 'rope_type' : 'type';
  const kind = config.choice(field, { default: 'none', linear: 'linear', llama3: 'llama3' } as const, 'default');
  switch (kind) {
    case 'none':
      return { kind };
    case 'linear':
      return { kind, factor: config.positive('factor') };
    case 'llama3': {
      const lowFrequencyFactor = config.positive('low_freq_factor');
      const highFrequencyFactor = config.positive('high_freq_factor');
      if (highFrequencyFactor <= lowFrequencyFactor) {
        throw config.broken(
          'config-rope-scaling',
          'high_freq_factor',
          `it must be above the "low_freq_factor" of ${lowFrequencyFactor}`,
        );
      }
      return {
        kind,
        factor: config.positive('factor'),
        lowFrequencyFactor,
        highFrequencyFactor,
        originalContextLength: config.count('original_max_position_embeddings'),
      };
    }
    default:
      return kind satisfies never;
  }
}

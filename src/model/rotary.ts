/** Rotary position embedding (Su et al., 2021): frequencies, their published rescalings, and the tables graphs take. */
import type { Initializer } from '../../formats/onnx/model.ts';

/** Angle of pair i at position p is `p * inverseFrequencies[i]`; one entry per pair, headDim / 2 of them. */
export interface RotaryFrequencies {
  readonly inverseFrequencies: readonly number[];
  /** Positions the tables hold. */
  readonly positions: number;
}

/** How trained frequencies are stretched to longer contexts. */
export type RotaryScaling =
  | { readonly kind: 'none' }
  /** Chen et al., 2023: positions are divided by `factor`. */
  | { readonly kind: 'linear'; readonly factor: number }
  /** Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated. */
  | {
      readonly kind: 'llama3';
      readonly factor: number;
      readonly lowFrequencyFactor: number;
      readonly highFrequencyFactor: number;
      readonly originalContextLength: number;
    };

/** `theta^(-2i/headDim)`, rescaled. */
export function inverseFrequencies(headDim: number, theta: number, scaling: RotaryScaling): number[] {
  return Array.from({ length: headDim / 2 }, (_, i) => rescale(theta ** ((-2 * i) / headDim), scaling));
}

function rescale(frequency: number, scaling: RotaryScaling): number {
  switch (scaling.kind) {
    case 'none':
      return frequency;
    case 'linear':
      return frequency / scaling.factor;
    case 'llama3': {
      // Turns that fit into the original context: many for high frequencies, which need no stretching.
      const turns = (scaling.originalContextLength * frequency) / (2 * Math.PI);
      const { factor, lowFrequencyFactor: low, highFrequencyFactor: high } = scaling;
      const kept = Math.min(1, Math.max(0, (turns - low) / (high - low)));
      return kept * frequency + ((1 - kept) * frequency) / factor;
    }
    default:
      return scaling satisfies never;
  }
}

/** cos or sin of every angle, F32 (positions, headDim / 2): computed in f64 when read, rounded once, not kept. */
export function rotaryTable(name: string, of: 'cos' | 'sin', frequencies: RotaryFrequencies): Initializer {
  const { inverseFrequencies: inverse, positions } = frequencies;
  const byteLength = positions * inverse.length * 4;
  const read = async (start = 0, end = byteLength): Promise<Uint8Array> => {
    const first = Math.floor(start / 4);
    const values = new Float32Array(Math.ceil(end / 4) - first);
    for (let i = 0; i < values.length; i++) {
      const angle = Math.floor((first + i) / inverse.length) * inverse[(first + i) % inverse.length];
      values[i] = of === 'cos' ? Math.cos(angle) : Math.sin(angle);
    }
    return new Uint8Array(values.buffer, start - first * 4, end - start);
  };
  return { name, dtype: 'F32', shape: [positions, inverse.length], byteLength, read };
}

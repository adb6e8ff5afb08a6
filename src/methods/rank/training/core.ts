/** Layers with a square matrix between their factors. */
import type { TrainedFactors, TrainedModule } from './schedule.ts';

/** A and s B C: the core goes into B. */
export function coreFactors({ rank, scale, outFeatures: m, parameters }: TrainedModule): TrainedFactors {
  const [loraA, b, core] = ['loraA', 'loraB', 'core'].map((key) => parameters.get(key)!.values);
  const loraB = new Float32Array(m * rank);
  for (let i = 0; i < m; i++) {
    for (let k = 0; k < rank; k++) {
      let sum = 0;
      for (let l = 0; l < rank; l++) sum += b[i * rank + l] * core[l * rank + k];
      loraB[i * rank + k] = scale * sum;
    }
  }
  return { rank, loraA: loraA.slice(), loraB };
}

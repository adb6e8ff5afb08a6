/** The pull of AdaLoRA and its kin towards orthonormal factors: `|A A^T - I|_F` and `|B^T B - I|_F`, the norm, not its square (adapters.md, section 7). */
import type { Parameter } from '../../../compute/optim/parameter.ts';
import type { TrainedModule } from './schedule.ts';

/** Below this the factor counts as orthonormal: the norm has no derivative at 0. */
const NEGLIGIBLE = 1e-6;

/** `|A A^T - I|_F` of the rows of `a` (rows, columns), and its gradient `2 (A A^T - I) A / f`. */
export function orthogonality(
  a: Float32Array,
  rows: number,
  columns: number,
): { readonly norm: number; readonly gradient: Float64Array } {
  const gap = new Float64Array(rows * rows);
  let square = 0;
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < rows; j++) {
      let sum = i === j ? -1 : 0;
      for (let k = 0; k < columns; k++) sum += a[i * columns + k] * a[j * columns + k];
      gap[i * rows + j] = sum;
      square += sum * sum;
    }
  }
  const norm = Math.sqrt(square);
  const gradient = new Float64Array(rows * columns);
  if (norm < NEGLIGIBLE) return { norm, gradient };
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < rows; j++) {
      const factor = (2 * gap[i * rows + j]) / norm;
      for (let k = 0; k < columns; k++) gradient[i * columns + k] += factor * a[j * columns + k];
    }
  }
  return { norm, gradient };
}

/** Adds `weight * mean over the 2 M factors of f` to the gradients; returns that term of the loss. */
export function addOrthogonality(modules: readonly TrainedModule[], weight: number): number {
  const each = weight / (2 * modules.length);
  let loss = 0;
  for (const { rank, inFeatures, outFeatures, parameters } of modules) {
    if (rank === 0) continue;
    const [a, b] = [parameters.get('loraA') as Parameter, parameters.get('loraB') as Parameter];
    const ofA = orthogonality(a.values, rank, inFeatures);
    for (let i = 0; i < a.gradient.length; i++) a.gradient[i] += each * ofA.gradient[i];
    const ofB = orthogonality(turned(b.values, outFeatures, rank), rank, outFeatures);
    for (let j = 0; j < outFeatures; j++)
      for (let k = 0; k < rank; k++) b.gradient[j * rank + k] += each * ofB.gradient[k * outFeatures + j];
    loss += each * (ofA.norm + ofB.norm);
  }
  return loss;
}

function turned(b: Float32Array, rows: number, columns: number): Float32Array {
  const result = new Float32Array(b.length);
  for (let i = 0; i < rows; i++) for (let k = 0; k < columns; k++) result[k * rows + i] = b[i * columns + k];
  return result;
}

/** How much the output suffers when weights are lost (slim-llm 3.5): `delta_ij = w_ij^2 / U_jj^2`. */
import type { Group } from '../../../compute/kernels/kernels.ts';

/** An element is salient when its delta lies this many standard deviations above the block's mean (slim-llm 4.3). */
const SALIENT_Z_SCORE = 2;

/** Sum of delta over a group's rows and columns; `denominators` has one entry a column. */
export function groupSalience(group: Group, denominators: Float64Array): number {
  const { columns, rows, values } = group;
  let salience = 0;
  for (let j = 0; j < columns; j++) {
    let energy = 0;
    for (let i = j * rows; i < (j + 1) * rows; i++) energy += values[i] * values[i];
    salience += energy / denominators[j];
  }
  return salience;
}

/** Loss weights of a group's elements: `lambda` for salient ones, 1 for the others. No spread means none is salient. */
export function salienceWeights(group: Group, denominators: Float64Array, lambda: number): Float32Array {
  const { columns, rows, values } = group;
  const count = values.length;
  const weights = new Float32Array(count).fill(1);
  const mean = groupSalience(group, denominators) / count;
  let squares = 0;
  for (let j = 0; j < columns; j++) {
    for (let i = j * rows; i < (j + 1) * rows; i++) squares += (values[i] ** 2 / denominators[j] - mean) ** 2;
  }
  const deviation = Math.sqrt(squares / (count - 1));
  if (!(deviation > 0)) return weights;
  const threshold = mean + SALIENT_Z_SCORE * deviation;
  for (let j = 0; j < columns; j++) {
    for (let i = j * rows; i < (j + 1) * rows; i++) {
      if (values[i] ** 2 / denominators[j] > threshold) weights[i] = lambda;
    }
  }
  return weights;
}

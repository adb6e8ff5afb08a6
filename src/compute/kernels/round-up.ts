/** The next multiple of `step`, which is a power of two or not; `& ~(step - 1)` would turn negative from 2^31 on. */
export function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step;
}

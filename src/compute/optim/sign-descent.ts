/** Gradient descent by signs alone: every parameter moves by the rate, whatever the size of its slope (SignSGD, as AutoRound uses it). */
import type { Parameter } from './parameter.ts';

/** One step against the sign of the gradient; where the gradient is 0, or the value frozen, nothing moves. */
export function signDescent({ values, gradient, frozen }: Parameter, rate: number): void {
  for (let i = 0; i < values.length; i++) if (!frozen?.[i]) values[i] -= rate * Math.sign(gradient[i]);
}

/** Where writers take quantized linears from, one at a time: the finished parts of a run, or an artifact that is read again. */
import type { QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import type { QuantizedGrid } from './planes.ts';

export interface QuantizedSource {
  /** Whether module `name` is quantized here. */
  has(name: string): boolean;
  /** Everything but the codes: small. */
  readGrid(name: string): Promise<QuantizedGrid>;
  read(name: string): Promise<QuantizedLinear>;
}

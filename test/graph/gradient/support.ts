/** Runs small float64 graphs, and compares their gradients with central differences (gradients.md, section 10). */
import type { Engine, NdArray } from '../../../src/compute/engine.ts';
import { GraphBuilder, type Value } from '../../../src/graph/builder.ts';
import { gradient } from '../../../src/graph/gradient/gradient.ts';

export type Inputs = Readonly<Record<string, { readonly shape: readonly number[]; readonly values: readonly number[] }>>;
export type Build = (builder: GraphBuilder, inputs: Readonly<Record<string, Value>>) => Value;

export interface Differentiated {
  readonly y: number[];
  readonly gradients: Readonly<Record<string, number[]>>;
}

/** Deterministic numbers in (-1.5, 1.5), none near 0. */
export function numbers(count: number, seed = 0): number[] {
  return Array.from({ length: count }, (_, i) => {
    const value = 1.5 * Math.sin(12.9898 * (i + 1) + 78.233 * seed);
    return Math.abs(value) < 0.05 ? 0.3 : value;
  });
}

export const random = (shape: readonly number[], seed = 0) => ({
  shape,
  values: numbers(
    shape.reduce((a, b) => a * b, 1),
    seed,
  ),
});

/** Value of `build` and the gradients of `<cotangent, value>`. */
export async function differentiate(
  engine: Engine,
  build: Build,
  inputs: Inputs,
  cotangent: readonly number[] | undefined,
  dtype: 'F64' | 'F32' = 'F64',
): Promise<Differentiated> {
  const builder = new GraphBuilder('differentiated');
  const values = Object.fromEntries(Object.entries(inputs).map(([name, { shape }]) => [name, builder.input(name, dtype, shape)]));
  const y = build(builder, values);
  const g = builder.input('cotangent', dtype, y.shape);
  const wrt = Object.values(values);
  const results = gradient(builder, [y], [g], wrt);
  builder.output('y', y);
  results.forEach((result, i) => {
    builder.output(`d ${wrt[i].name}`, result);
  });
  const program = await engine.compile(builder.build());
  try {
    const count = y.shape.reduce<number>((product, dim) => product * Number(dim), 1);
    const array = (shape: readonly number[], data: readonly number[]): NdArray => ({
      dtype,
      shape,
      data: dtype === 'F64' ? Float64Array.from(data) : Float32Array.from(data),
    });
    const feeds: Record<string, NdArray> = {
      cotangent: array(y.shape.map(Number), cotangent ?? new Array<number>(count).fill(1)),
    };
    for (const [name, { shape, values: data }] of Object.entries(inputs)) feeds[name] = array(shape, data);
    const fed = Object.fromEntries(program.inputNames.map((name) => [name, feeds[name]]));
    const made = await program.run(fed);
    const list = ({ data }: NdArray) => Array.from(data as Float64Array, Number);
    return {
      y: list(made['y']),
      gradients: Object.fromEntries(Object.keys(inputs).map((name) => [name, list(made[`d ${name}`])])),
    };
  } finally {
    await program[Symbol.asyncDispose]();
  }
}

/** Worst error of directional derivatives, relative to the gradient: along the gradient, and along another direction. */
export async function worstError(engine: Engine, build: Build, inputs: Inputs): Promise<number> {
  const { y, gradients } = await differentiate(engine, build, inputs, undefined);
  const cotangent = numbers(y.length, 9);
  const exact = await differentiate(engine, build, inputs, cotangent);
  let worst = 0;
  for (const name of Object.keys(gradients)) {
    const own = exact.gradients[name];
    const norm = Math.hypot(...own);
    const other = numbers(own.length, 5);
    const otherNorm = Math.hypot(...other);
    const directions = [own.map((value) => value / (norm || 1)), other.map((value) => value / otherNorm)];
    for (const direction of directions) {
      const at = async (step: number) => {
        const { shape, values } = inputs[name];
        const moved = { ...inputs, [name]: { shape, values: values.map((value, i) => value + step * direction[i]) } };
        const result = await differentiate(engine, build, moved, cotangent);
        return result.y.reduce((sum, value, i) => sum + value * cotangent[i], 0);
      };
      const step = 1e-5;
      const measured = ((await at(step)) - (await at(-step))) / (2 * step);
      const predicted = own.reduce((sum, value, i) => sum + value * direction[i], 0);
      worst = Math.max(worst, Math.abs(measured - predicted) / Math.max(norm, 1e-3));
    }
  }
  return worst;
}

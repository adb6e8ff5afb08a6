/** Compact operands unfold on the WebGPU provider as on the CPU; skipped where there is no adapter. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { LinearRenderer } from '../../../src/artifacts/onnx/linear-graph.ts';
import { QuantizedInitializers } from '../../../src/artifacts/onnx/linear-initializers.ts';
import { ONNX_CONTAINERS, type OnnxContainer } from '../../../src/artifacts/onnx/linear-layout.ts';
import type { Engine } from '../../../src/compute/engine.ts';
import { createEngine } from '../../../src/compute/ort.ts';
import { GraphBuilder } from '../../../src/graph/builder.ts';
import { dequantize, type QuantizedLinear } from '../../../src/methods/quantize/quantized-linear.ts';
import { f32 } from '../../support/run-graph.ts';
import { webgpuEngine } from '../../support/software-vulkan.ts';
import { randomLinear } from '../random-linear.ts';

const TOKENS = 3;
/** A software adapter on busy cores. */
const MINUTES = 300_000;
/** Relative error of a product in float32. */
const CPU_TOLERANCE = 1e-5;
/** Its kernels may take activations as int8 per block whatever the accuracy level asks for. */
const GPU_TOLERANCE = 8e-3;

const CASES: readonly (readonly [string, Parameters<typeof randomLinear>[0]])[] = [
  ['1 bit', { rows: 32, columns: 128, groupSize: 32, bits: [1] }],
  ['2 bits', { rows: 32, columns: 128, groupSize: 32, bits: [2] }],
  ['3 bits', { rows: 32, columns: 128, groupSize: 32, bits: [3] }],
  ['1 to 4 bits in no order', { rows: 32, columns: 256, groupSize: 32, bits: [2, 4, 1, 3] }],
  ['1 to 8 bits', { rows: 32, columns: 256, groupSize: 32, bits: [2, 8, 1, 3] }],
  [
    'a sorted and rotated input, groups of 1 to 4 bits, a short one',
    { rows: 32, columns: 200, groupSize: 32, bits: [4, 4, 3, 3, 2, 1, 1], transform: { hadamard: 32 } },
  ],
];

/** `q` in a compact file with accuracy level 1, applied to `x` by an engine. */
async function product(
  engine: Engine,
  q: QuantizedLinear,
  x: Float32Array,
  container: OnnxContainer,
): Promise<ArrayLike<number>> {
  const source = { has: () => true, readGrid: async () => q, read: async () => q };
  const initializers = await QuantizedInitializers.create(source, ['m'], { container });
  const builder = new GraphBuilder();
  const input = builder.input('x', 'F32', ['batch_size', 'sequence_length', q.inFeatures]);
  builder.output(
    'y',
    new LinearRenderer(builder, 1).render('m', initializers.layouts.get('m')!, initializers.of('m'), input, null),
  );
  await using program = await engine.compile(builder.build());
  const { y } = await program.run({ x: f32([1, TOKENS, q.inFeatures], x) });
  return y.data as Float32Array;
}

const adapter = await webgpuEngine();

describe.skipIf(adapter === undefined)('a compact linear on the WebGPU provider', () => {
  let cpu: Engine;
  beforeAll(async () => {
    cpu = await createEngine({ threads: 1 });
  });
  afterAll(async () => {
    await cpu[Symbol.asyncDispose]();
    await adapter?.[Symbol.asyncDispose]();
  });

  it.each(CASES)(
    'with %s gives what the CPU and the decoded weights do, in every container',
    async (_, options) => {
      const q = randomLinear(options);
      const { inFeatures: k, outFeatures: n } = q;
      const x = Float32Array.from({ length: TOKENS * k }, (_, i) => Math.sin(i));
      const weight = dequantize(q);
      const expected = Array.from({ length: TOKENS * n }, (_, i) => {
        const [token, row] = [Math.floor(i / n), i % n];
        let sum = 0;
        for (let j = 0; j < k; j++) sum += x[token * k + j] * weight[row * k + j];
        return sum;
      });
      for (const container of ONNX_CONTAINERS) {
        expect(relativeError(await product(cpu, q, x, container), expected)).toBeLessThan(CPU_TOLERANCE);
        expect(relativeError(await product(adapter!, q, x, container), expected)).toBeLessThan(GPU_TOLERANCE);
      }
    },
    MINUTES,
  );
});

function relativeError(actual: ArrayLike<number>, expected: readonly number[]): number {
  const error = expected.reduce((sum, value, i) => sum + (actual[i] - value) ** 2, 0);
  return Math.sqrt(error / expected.reduce((sum, value) => sum + value ** 2, 0));
}

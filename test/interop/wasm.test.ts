/** The runtime of browsers unfolds compact operands and rotates inputs as onnxruntime in Node does. */
import * as ort from 'onnxruntime-web';
import { expect, it } from 'vitest';
import { encodeOnnx } from '../../formats/onnx/writer.ts';
import { LinearRenderer } from '../../src/artifacts/onnx/linear-graph.ts';
import { QuantizedInitializers } from '../../src/artifacts/onnx/linear-initializers.ts';
import { GraphBuilder } from '../../src/graph/builder.ts';
import { dequantize } from '../../src/methods/quantize/quantized-linear.ts';
import { randomLinear } from '../artifacts/random-linear.ts';

it('a linear with a rotated input and groups of 1 to 4 bits runs in WebAssembly as its decoded weights do', async () => {
  const q = randomLinear({ rows: 24, columns: 200, groupSize: 32, bits: [4, 4, 3, 3, 2, 2, 1], transform: { hadamard: 32 } });
  const source = { has: () => true, readGrid: async () => q, read: async () => q };
  const initializers = await QuantizedInitializers.create(source, ['m']);
  const builder = new GraphBuilder();
  const x = builder.input('x', 'F32', [1, 200]);
  builder.output('y', new LinearRenderer(builder, 1).render('m', initializers.layouts.get('m')!, initializers.of('m'), x, null));
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(await encodeOnnx(builder.build()), { executionProviders: ['wasm'] });
  const values = Float32Array.from({ length: 200 }, (_, i) => Math.sin(i));
  const { y } = await session.run({ x: new ort.Tensor('float32', values, [1, 200]) });
  const weight = dequantize(q);
  const norm = Math.hypot(...(y.data as Float32Array));
  (y.data as Float32Array).forEach((value, row) => {
    const expected = values.reduce((sum, one, j) => sum + one * weight[row * 200 + j], 0);
    expect(Math.abs(value - expected) / norm).toBeLessThan(1e-5);
  });
  await session.release();
});

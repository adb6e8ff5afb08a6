/**
 * Speed of one layer of 2048 x 8192 in onnxruntime by its widths, its operands and what is done to its input: one token, and a prompt of 128.
 * `npx tsx bench/layers.ts` writes bench/results/layers.{json,md}. One thread; the layers take turns; times are of the processor, not of the clock.
 */
import ort from 'onnxruntime-node';
import { encodeOnnx } from '../formats/onnx/writer.ts';
import { LinearRenderer } from '../src/artifacts/onnx/linear-graph.ts';
import { QuantizedInitializers } from '../src/artifacts/onnx/linear-initializers.ts';
import type { OnnxContainer } from '../src/artifacts/onnx/linear-layout.ts';
import { GraphBuilder } from '../src/graph/builder.ts';
import { randomLinear } from '../test/artifacts/random-linear.ts';
import { writeResults } from './results.ts';

const COLUMNS = 2048;
const ROWS = 8192;
const GROUP = 128;
const PROMPT = 128;
/** Runs in a round. */
const TOKENS = 20;
const PROMPTS = 2;
const ROUNDS = 7;
/** Widths of a layer that preset best mixes, sorted as it sorts them. */
const MIXED = [4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1];

/** The first is what the others are measured against. */
const LAYERS: readonly [widths: readonly number[], container: OnnxContainer, hadamard?: number][] = [
  [[4], 'auto'],
  [[2], 'auto'],
  [[2], '4'],
  [[2], 'auto', 0],
  [[1], 'auto', 0],
  [[3], 'auto', 0],
  [MIXED, '2'],
  [MIXED, 'auto'],
  [MIXED, '2', GROUP],
  [MIXED, 'auto', GROUP],
];

const layers = [];
for (const [widths, container, hadamard] of LAYERS) {
  const transform = hadamard === undefined ? {} : { transform: { hadamard } };
  const q = randomLinear({ rows: ROWS, columns: COLUMNS, groupSize: GROUP, bits: widths, ...transform });
  const source = { has: () => true, readGrid: async () => q, read: async () => q };
  const initializers = await QuantizedInitializers.create(source, ['m'], { container });
  const layout = initializers.layouts.get('m')!;
  const builder = new GraphBuilder();
  const x = builder.input('x', 'F32', ['batch_size', 'sequence_length', COLUMNS]);
  builder.output('y', new LinearRenderer(builder, 4).render('m', layout, initializers.of('m'), x, null));
  const options = { intraOpNumThreads: 1, logSeverityLevel: 3 } as const;
  const session = await ort.InferenceSession.create(await encodeOnnx(builder.build()), options);
  layers.push({
    widths,
    container,
    hadamard,
    products: layout.parts.length,
    session,
    token: [] as number[],
    prompt: [] as number[],
  });
}
const feeds = (tokens: number) => ({
  x: new ort.Tensor(
    'float32',
    Float32Array.from({ length: tokens * COLUMNS }, (_, i) => Math.sin(i)),
    [1, tokens, COLUMNS],
  ),
});
const [token, prompt] = [feeds(1), feeds(PROMPT)];
// Round 0 warms up.
for (let round = 0; round <= ROUNDS; round++) {
  for (const layer of layers) {
    const times = [await timed(layer.session, token, TOKENS), await timed(layer.session, prompt, PROMPTS)];
    if (round > 0) layer.token.push(times[0]);
    if (round > 0) layer.prompt.push(times[1]);
  }
}
const [first] = layers;
await writeResults(
  'layers',
  'npx tsx bench/layers.ts',
  layers.map(({ widths, container, hadamard, products, token: one, prompt: many }) => ({
    widths: widths === MIXED ? '4 to 1' : String(widths[0]),
    container,
    input: hadamard === undefined ? 'as it comes' : hadamard === 0 ? 'sorted' : 'sorted and rotated',
    products,
    'token, CPU ms': Math.min(...one),
    'token / 4 bits': Math.min(...first.token) / Math.min(...one),
    'prompt of 128, CPU ms': Math.min(...many),
    'prompt / 4 bits': Math.min(...first.prompt) / Math.min(...many),
  })),
  [
    `${COLUMNS} columns, ${ROWS} rows, groups of ${GROUP}, accuracy level 4, one thread of a machine shared with other work: least of ${ROUNDS} rounds. ` +
      'Ratios above 1 are faster than 4 bits. A model sorts and rotates an input once for all layers that read it.',
  ],
);

async function timed(session: ort.InferenceSession, feed: Record<string, ort.Tensor>, runs: number): Promise<number> {
  const before = process.cpuUsage();
  for (let i = 0; i < runs; i++) await session.run(feed);
  const { user, system } = process.cpuUsage(before);
  return (user + system) / 1000 / runs;
}

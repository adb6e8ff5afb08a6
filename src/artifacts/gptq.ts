/** A quantized linear as the tensors of the GPTQ layout (AutoGPTQ, GPTQModel), and back: one width per module, no mixed groups. */
import { fromFloat32, toFloat32 } from '../../formats/dtype.ts';
import type { Tensor, TensorDeclaration, TensorSource } from '../../formats/tensor.ts';
import { FormatError } from '../errors.ts';
import { groupCount, type QuantizedLinear } from '../methods/quantize/quantized-linear.ts';
import { readExpected } from './expected-tensor.ts';
import { type GptqBits, packStream, unpackStream } from './packing/gptq-streams.ts';
import type { CodeShape, QuantizedShape } from './planes.ts';
import type { QuantizedModule } from './quant-metadata.ts';
import { asBytes, asWords } from './tensor-bytes.ts';

const WIDTHS: readonly number[] = [2, 3, 4, 8];

/** `gptq` (v1) stores zero points minus one; `gptq_v2` stores them as they are. */
export type GptqFormat = 'gptq' | 'gptq_v2';

/** Why the layout cannot hold a module, as half a sentence; undefined when it can. */
export function whyNotGptq(shape: QuantizedShape): string | undefined {
  const { outFeatures, inFeatures, groupSize, bits, scaleDtype, transform, lowRank } = shape;
  const { permuted = false, signed = false, hadamard = 0 } = transform ?? {};
  const changes = [permuted && 'sorted', (signed || hadamard > 0) && 'rotated'].filter(Boolean);
  if (changes.length > 0) return `has its input ${changes.join(' and ')}, for which the layout has no place`;
  if (lowRank) return `has a branch of rank ${lowRank.rank}, for which the layout has no place`;
  const widths = [...new Set(bits)];
  if (widths.length > 1) return `mixes widths (${widths.sort().join(', ')} bits)`;
  if (!WIDTHS.includes(widths[0])) return `has ${widths[0]} bits, the layout holds ${WIDTHS.join(', ')}`;
  if (inFeatures % groupSize !== 0) return `has ${inFeatures} inputs, no multiple of the group size ${groupSize}`;
  if (inFeatures % 32 !== 0 || outFeatures % 32 !== 0)
    return `is ${outFeatures} x ${inFeatures}, and both must be multiples of 32`;
  return scaleDtype === 'F16' ? undefined : 'has scales that F16 cannot hold';
}

/** Whether every zero point is the middle of its range, as symmetric quantization has it. */
export function isSymmetric({ bits, zeroPoints }: Pick<QuantizedLinear, 'bits' | 'zeroPoints'>): boolean {
  const middle = 1 << (bits[0] - 1);
  return zeroPoints.every((zero) => zero === middle);
}

/** Headers of the tensors that stand for `<name>.weight`; the module must suit the layout. */
export function gptqDeclarations(name: string, shape: CodeShape): TensorDeclaration[] {
  const { outFeatures: m, inFeatures: n, bits } = shape;
  const [width] = bits;
  return [
    { name: `${name}.qweight`, dtype: 'I32', shape: [(n * width) / 32, m] },
    { name: `${name}.qzeros`, dtype: 'I32', shape: [bits.length, (m * width) / 32] },
    { name: `${name}.scales`, dtype: 'F16', shape: [bits.length, m] },
    { name: `${name}.g_idx`, dtype: 'I32', shape: [n] },
  ];
}

/** Tensors of a module, in the order of `gptqDeclarations`. Under v1 no zero point may be 0. */
export function encodeGptq(name: string, q: QuantizedLinear, format: GptqFormat): Tensor[] {
  const { outFeatures: m, inFeatures: n, groupSize } = q;
  const groups = q.bits.length;
  const bits = q.bits[0] as GptqBits;
  const qweight = new Uint32Array((m * n * bits) / 32);
  for (let row = 0; row < m; row++) packStream(q.codes, row * n, 1, n, bits, qweight, row, m);
  const stored = format === 'gptq_v2' ? q.zeroPoints : q.zeroPoints.map((zero) => zero - 1);
  const zeroWords = (m * bits) / 32;
  const qzeros = new Uint32Array(groups * zeroWords);
  for (let g = 0; g < groups; g++) packStream(stored, g, groups, m, bits, qzeros, g * zeroWords, 1);
  const scales = new Float32Array(groups * m);
  for (let i = 0; i < scales.length; i++) scales[i] = q.scales[(i % m) * groups + Math.floor(i / m)];
  const indices = Int32Array.from({ length: n }, (_, column) => Math.floor(column / groupSize));
  const data = [asBytes(qweight), asBytes(qzeros), fromFloat32('F16', scales), asBytes(indices)];
  return gptqDeclarations(name, q).map((declared, i) => ({ ...declared, byteLength: data[i].byteLength, data: data[i] }));
}

/** Width of a stored module, told by the shape of its codes. Throws FormatError when there is no such width. */
export function gptqBits(source: TensorSource, name: string, module: QuantizedModule): GptqBits {
  const rows = source.tensors.get(`${name}.qweight`)?.shape[0];
  const bits = rows === undefined ? undefined : (rows * 32) / module.inFeatures;
  if (bits === undefined || !WIDTHS.includes(bits)) {
    const found =
      rows === undefined
        ? 'is missing'
        : `has ${rows} rows for ${module.inFeatures} inputs, which is no width of ${WIDTHS.join(', ')} bits`;
    throw new FormatError(source.path, 'gptq-width', `tensor "${name}.qweight" ${found}`);
  }
  return bits as GptqBits;
}

/** Reads a module. Throws FormatError when a tensor is missing, has another shape, or assigns columns to groups out of order. */
export async function readGptq(
  source: TensorSource,
  name: string,
  module: QuantizedModule,
  format: GptqFormat,
): Promise<QuantizedLinear> {
  const { outFeatures: m, inFeatures: n, groupSize } = module;
  const bits = gptqBits(source, name, module);
  const groups = groupCount(n, groupSize);
  const shape = { outFeatures: m, inFeatures: n, groupSize, bits: new Uint8Array(groups).fill(bits), scaleDtype: 'F16' } as const;
  const why = whyNotGptq(module.transform ? { ...shape, transform: module.transform } : shape);
  if (why) throw new FormatError(source.path, 'gptq-shape', `module "${name}" ${why}`);
  const [qweight, qzeros, scaleBytes, indexBytes] = await Promise.all(
    gptqDeclarations(name, shape).map((tensor) => readExpected(source, tensor)),
  );
  if (asWords(indexBytes).some((group, column) => group !== Math.floor(column / groupSize))) {
    throw new FormatError(source.path, 'gptq-g-idx', `tensor "${name}.g_idx" does not assign columns to groups in order`);
  }
  const codes = new Uint8Array(m * n);
  for (let row = 0; row < m; row++) unpackStream(codes, row * n, 1, n, bits, asWords(qweight), row, m);
  const zeroPoints = new Uint8Array(m * groups);
  const zeroWords = (m * bits) / 32;
  for (let g = 0; g < groups; g++) unpackStream(zeroPoints, g, groups, m, bits, asWords(qzeros), g * zeroWords, 1);
  if (format === 'gptq') for (let i = 0; i < zeroPoints.length; i++) zeroPoints[i] += 1;
  const stored = toFloat32('F16', scaleBytes);
  const scales = new Float32Array(m * groups);
  for (let i = 0; i < stored.length; i++) scales[(i % m) * groups + Math.floor(i / m)] = stored[i];
  return { ...shape, codes, scales, zeroPoints };
}

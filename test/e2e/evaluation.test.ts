/** What `evaluate` measures, against its definition, against onnxruntime by hand, and across layouts. */
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { openOnnx } from '../../formats/onnx/reader.ts';
import { openModelSource } from '../../src/artifacts/model-source.ts';
import type { Evaluation } from '../../src/runs/evaluate/evaluate.ts';
import { promptFeeds } from '../../src/runs/evaluate/logits-source.ts';
import { groupedLlama, saveCheckpoint, tinyText, tokenIds } from '../support/checkpoint-folder.ts';
import { MemorySource } from '../support/memory-source.ts';
import { referenceForward } from '../support/reference-forward.ts';
import { runCliJson } from '../support/run-cli.ts';
import { openGraph } from '../support/run-graph.ts';
import { scratchFolder } from '../support/scratch-folder.ts';

const scratch = scratchFolder();
const cwd = scratch.path;
const at = (...path: string[]) => join(cwd, ...path);
/** FFN 160: whole groups everywhere, so that the gptq layout holds every layer. */
const tiny = groupedLlama('evaluation', { intermediate_size: 160 });
const text = tinyText(170);
const LENGTH = 16;
/** The quantized weights, decoded. */
const floats = new MemorySource();
const evaluate = (model: string, ...args: string[]) =>
  runCliJson<Evaluation>(['evaluate', model, '--text', 'text.txt', '--sequence-length', String(LENGTH), ...args], { cwd });

beforeAll(async () => {
  await saveCheckpoint(at('model'), tiny);
  scratch.write('text.txt', text);
  const settings = ['--bits', '4', '--group-size', '32', '--method', 'gptq', '--samples', '8', '--calibration', 'text.txt'];
  const quantize = (formats: string, output: string, ...rest: string[]) =>
    runCliJson(['quantize', 'model', '--format', formats, '-o', output, ...rest], { cwd });
  await quantize('onnx,gptq', 'onnx', ...settings);
  await quantize('safetensors', 'planes', '--plan', 'onnx/pcomp.json', ...settings.slice(4));
  // The same weights once more as plain floats.
  await using source = await openModelSource(at('planes'));
  for (const [name, { shape }] of source.tensors.tensors) {
    const { dtype, data } = await source.tensors.read(name);
    floats.add(name, dtype, shape, data);
  }
  await saveCheckpoint(at('floats'), { label: 'floats', config: tiny.config, source: floats });
});

/** Windows of the contract: one after the other, the last one short, each token but a window's first scored. */
function windowsOf(ids: readonly number[], length: number): number[][] {
  const windows: number[][] = [];
  for (let start = 0; start < ids.length; start += length) windows.push(ids.slice(start, start + length));
  return windows;
}

/** Mean nats per scored token from logits (row, vocabulary) of every window. */
function meanNll(
  windows: readonly number[][],
  logitsOf: (window: number) => readonly ArrayLike<number>[],
): { tokens: number; nll: number } {
  let tokens = 0;
  let nll = 0;
  windows.forEach((ids, w) => {
    const rows = logitsOf(w);
    for (let i = 1; i < ids.length; i++) {
      const logits = Array.from(rows[i - 1]);
      nll += Math.log(logits.reduce((sum, value) => sum + Math.exp(value), 0)) - logits[ids[i]];
      tokens++;
    }
  });
  return { tokens, nll: nll / tokens };
}

describe('the definition of the contract', () => {
  it.each([
    ['a last window that is short', LENGTH, 171 - 11],
    ['a last window of one token, which scores nothing', 17, 160],
    ['one window, clipped to the context', 2048, 171 - 3],
  ])('holds with %s', async (_, length, scored) => {
    const ids = tokenIds(text);
    expect(ids).toHaveLength(171);
    const windows = windowsOf(ids, Math.min(length, 64));
    const expected = meanNll(
      windows,
      (w) => referenceForward(tiny.config, (name) => tiny.source.values(name), windows[w]).logits,
    );
    const result = await evaluate('model', '--sequence-length', String(length));
    expect(expected.tokens).toBe(scored);
    expect(result).toMatchObject({ tokens: scored, bitsPerWeight: 32, averageBits: 32 });
    expect(result.nll).toBeCloseTo(expected.nll, 4);
    expect(result.perplexity / Math.exp(expected.nll)).toBeCloseTo(1, 4);
  });
});

it('every layout of one plan has the same exact perplexity, that of its weights as floats', async () => {
  const plain = await evaluate('floats');
  const layouts = {
    onnx: await evaluate('onnx'),
    gptq: await evaluate('onnx/model.safetensors'),
    planes: await evaluate('planes'),
  };
  for (const [layout, result] of Object.entries(layouts)) {
    expect(Math.abs(result.perplexity / plain.perplexity - 1), layout).toBeLessThan(1e-6);
    expect(result).toMatchObject({ averageBits: 4, tokens: plain.tokens });
    expect(result.bitsPerWeight, layout).toBeGreaterThan(4);
  }
  const fast = await evaluate('onnx', '--accuracy', 'fast');
  expect(fast).toMatchObject({ accuracy: 'fast', bytes: layouts.onnx.bytes, bitsPerWeight: layouts.onnx.bitsPerWeight });
  expect(fast.perplexity).not.toBe(plain.perplexity);
  expect(Math.abs(fast.perplexity / plain.perplexity - 1)).toBeLessThan(0.05);
});

it('the exact figure is that of the ONNX file in onnxruntime with float activations', async () => {
  const exact = await evaluate('onnx');
  await using source = await openModelSource(at('onnx'));
  await using file = await openOnnx(source.onnxPath!);
  for (const [i, node] of file.model.graph.nodes.entries()) {
    if (node.op !== 'MatMulNBits') continue;
    file.model.graph.nodes[i] = { ...node, attributes: { ...node.attributes, accuracy_level: { kind: 'int', value: 1 } } };
  }
  const session = await openGraph(file.model);
  const windows = windowsOf(tokenIds(text), LENGTH);
  const logits: Float32Array[][] = [];
  for (const ids of windows) {
    const result = await session.run(promptFeeds(source.model, Int32Array.from(ids)));
    const data = result['logits'].data as Float32Array;
    logits.push(ids.map((__, row) => data.subarray(row * 41, (row + 1) * 41)));
  }
  await session.release();
  const { nll, tokens } = meanNll(windows, (w) => logits[w]);
  expect(tokens).toBe(exact.tokens);
  expect(Math.abs(Math.exp(nll) / exact.perplexity - 1)).toBeLessThan(1e-3);
});

describe('against an original', () => {
  it('that is the model itself nothing is lost', async () => {
    const { kl, top1Agreement, perplexityRatio } = await evaluate('model', '--against', 'model');
    expect({ top1Agreement, perplexityRatio }).toEqual({ top1Agreement: 1, perplexityRatio: 1 });
    expect(Math.abs(kl!)).toBeLessThan(1e-12);
  });

  it('the divergence is that of the two models, token by token', async () => {
    const result = await evaluate('onnx', '--against', 'model');
    const windows = windowsOf(tokenIds(text), LENGTH);
    const softmax = (row: number[]) => {
      const total = row.reduce((sum, value) => sum + Math.exp(value), 0);
      return row.map((value) => Math.exp(value) / total);
    };
    let kl = 0;
    let agreed = 0;
    let count = 0;
    for (const ids of windows) {
      const original = referenceForward(tiny.config, (name) => tiny.source.values(name), ids).logits.map(softmax);
      const quantized = referenceForward(tiny.config, (name) => floats.values(name), ids).logits.map(softmax);
      for (let i = 0; i + 1 < ids.length; i++) {
        const [p, q] = [original[i], quantized[i]];
        kl += p.reduce((sum, value, j) => sum + value * Math.log(value / q[j]), 0);
        if (p.indexOf(Math.max(...p)) === q.indexOf(Math.max(...q))) agreed++;
        count++;
      }
    }
    const original = await evaluate('model');
    expect(result.tokens).toBe(count);
    expect(result.kl).toBeCloseTo(kl / count, 4);
    expect(result.top1Agreement).toBeCloseTo(agreed / count, 6);
    expect(result.perplexityRatio).toBeCloseTo(result.perplexity / original.perplexity, 6);
  });
});

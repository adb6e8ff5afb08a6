import { describe, expect, it } from 'vitest';
import { translateOrtError } from '../../src/compute/ort-errors.ts';
import { importOrt } from '../../src/compute/ort-runtime.ts';
import { EnvironmentError, FormatError, PcompError, UnsupportedError } from '../../src/errors.ts';

const CONTEXT = { device: 'webgpu', subject: 'graph "g"' } as const;

/** onnxruntime-node 1.30's own words, and what they mean. */
const TABLE = [
  ['OrtSessionOptionsAppendExecutionProvider_Cuda: Failed to load shared library', 'DEVICE_UNAVAILABLE'],
  ['OrtSessionOptionsAppendExecutionProvider_TensorRT: Failed to load shared library', 'DEVICE_UNAVAILABLE'],
  ['WebGpuContext::Initialize Failed to get a WebGPU adapter: No supported adapters', 'DEVICE_UNAVAILABLE'],
  ['no available backend found. ERR: [dml] backend not found.', 'DEVICE_UNAVAILABLE'],
  [
    'This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled by the user.',
    'DEVICE_UNAVAILABLE',
  ],
  ["Load model from nowhere.onnx failed:Load model nowhere.onnx failed. File doesn't exist", 'FILE_UNREADABLE'],
  ['std::bad_alloc', 'OUT_OF_MEMORY'],
] as const;

const UNSUPPORTED = [
  'Unsupported data type: 16',
  'ONNX Runtime only guarantees support for models stamped with official released onnx opset versions. Current official support for domain ai.onnx is till opset 26.',
  'Unsupported model IR version: 14, max supported IR version: 13',
  'This is an invalid model. In Node, ("n", Foo, "", -1) : No Op registered for Foo with domain_version of 21',
];

const BUGS = [
  'Invalid argument',
  "input 'a' is missing in 'feeds'.",
  'Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))',
  'output has shape {2,4} but the computed output shape for this run is {4,4}',
  'Session already disposed.',
];

describe('errors of onnxruntime', () => {
  it.each(TABLE)('"%s" means %s', (text, code) => {
    const error = translateOrtError(new Error(text), CONTEXT);
    expect(error).toBeInstanceOf(EnvironmentError);
    expect(error).toMatchObject({ code });
  });

  it.each(UNSUPPORTED)('"%s" is a model that is not supported', (text) => {
    expect(translateOrtError(new Error(text), CONTEXT)).toBeInstanceOf(UnsupportedError);
  });

  it('a file that is no protobuf breaks its format', () => {
    const cause = new Error('Load model from x.onnx failed:Protobuf parsing failed.');
    const error = translateOrtError(cause, { device: 'cpu', subject: 'x.onnx' });
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ rule: 'onnx-protobuf', path: 'x.onnx' });
  });

  it.each(BUGS)('"%s" is a mistake of ours: named after the graph, kept with its cause', (text) => {
    const cause = new Error(text);
    const error = translateOrtError(cause, CONTEXT);
    expect(error).not.toBeInstanceOf(PcompError);
    expect(error.message).toContain('graph "g": ');
    expect(error.cause).toBe(cause);
  });

  it('a message of several lines becomes one', () => {
    const error = translateOrtError(new Error('Failed to get a WebGPU adapter:\n  No supported adapters.\n'), CONTEXT);
    expect(error.message).toMatch(
      /^webgpu is not available: Failed to get a WebGPU adapter: No supported adapters\. It needs a GPU.*$/,
    );
  });
});

describe('a missing onnxruntime-node', () => {
  it('is ORT_MISSING, with the line that installs it', async () => {
    const absent = importOrt(async () => {
      throw Object.assign(new Error("Cannot find package 'onnxruntime-node' imported from x\nRequire stack"), {
        code: 'ERR_MODULE_NOT_FOUND',
      });
    });
    await expect(absent).rejects.toBeInstanceOf(EnvironmentError);
    await expect(absent).rejects.toMatchObject({
      code: 'ORT_MISSING',
      message: expect.stringMatching(/^[^\n]*ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node$/),
    });
  });
});

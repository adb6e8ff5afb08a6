/** What onnxruntime's errors mean. They are plain Errors without a code, so they are told apart by their text (version 1.30). */
import { EnvironmentError, FormatError, UnsupportedError } from '../errors.ts';
import type { Device } from './engine.ts';

/** Where an error came from. */
export interface OrtContext {
  readonly device: Device;
  /** The file, or `graph "name"`. */
  readonly subject: string;
}

const REMEDIES: Readonly<Record<Device, string>> = {
  cpu: 'Reinstall onnxruntime-node.',
  webgpu: 'It needs a GPU with a Vulkan, Metal or Direct3D 12 driver; use --device cpu, or --device auto to take what there is.',
  cuda: 'Run ONNXRUNTIME_NODE_INSTALL=true npm rebuild onnxruntime-node and put CUDA 12 and cuDNN 9 on the loader path, or use --device cpu.',
  dml: 'DirectML exists on Windows only; use --device cpu, or --device auto to take what there is.',
  coreml: 'CoreML exists on macOS (arm64) only; use --device cpu, or --device auto to take what there is.',
};

/** The error for a device that cannot be used: the provider, what the runtime said, and what to do. */
export function deviceUnavailable(device: Device, cause: unknown): EnvironmentError {
  const message = `${device} is not available: ${oneLine(cause)}. ${REMEDIES[device]}`;
  return new EnvironmentError('DEVICE_UNAVAILABLE', message, { cause });
}

type Rule = readonly [text: RegExp, error: (message: string, context: OrtContext, cause: unknown) => Error];

const unsupported = (message: string, { subject }: OrtContext, cause: unknown): Error =>
  new UnsupportedError(`${subject}: onnxruntime does not support it: ${message}`, { cause });

/** A mistake in our own calls: stays a plain Error, with the graph's name before the runtime's words. */
const bug = (message: string, { subject }: OrtContext, cause: unknown): Error => new Error(`${subject}: ${message}`, { cause });

const RULES: readonly Rule[] = [
  [/Failed to load shared library|No supported adapters|Failed to get a WebGPU adapter|no available backend found/, unavailable],
  [/assigned to the default CPU EP, but fallback to CPU EP has been explicitly disabled/, unavailable],
  [/Unsupported data type: \d+/, unsupported],
  [/official support for domain \S* ?is till opset|max supported IR version/, unsupported],
  [/No Op registered for|is not a registered function\/op|NOT_IMPLEMENTED|Could not find an implementation/, unsupported],
  [/File doesn't exist|No such file or directory/, unreadable],
  [/protobuf parsing failed/i, malformed],
  [/bad_alloc|Failed to allocate memory|bad allocation/, outOfMemory],
  [/Invalid argument$/, (message, context, cause) => bug(`${message}: is a tensor in shared memory?`, context, cause)],
];

function unavailable(_message: string, { device }: OrtContext, cause: unknown): Error {
  return deviceUnavailable(device, cause);
}

function unreadable(message: string, { subject }: OrtContext, cause: unknown): Error {
  return new EnvironmentError('FILE_UNREADABLE', `${subject}: cannot be opened: ${message}`, { cause });
}

function malformed(message: string, { subject }: OrtContext, cause: unknown): Error {
  return new FormatError(subject, 'onnx-protobuf', message, { cause });
}

function outOfMemory(message: string, { subject }: OrtContext, cause: unknown): Error {
  return new EnvironmentError('OUT_OF_MEMORY', `${subject}: onnxruntime ran out of memory: ${message}`, { cause });
}

/** The error of ours that an error of onnxruntime means; what is not in the table stays a plain Error, named after the graph. */
export function translateOrtError(cause: unknown, context: OrtContext): Error {
  const message = oneLine(cause);
  const rule = RULES.find(([text]) => text.test(message));
  return rule === undefined ? bug(message, context, cause) : rule[1](message, context, cause);
}

function oneLine(cause: unknown): string {
  const message = cause instanceof Error ? cause.message : String(cause);
  return message
    .replace(/\s*\n\s*/g, ' ')
    .trim()
    .replace(/\.$/, '');
}

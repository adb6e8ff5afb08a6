/** Which device a run ends up on: probing and choosing, apart from the runtime that is probed. */
import { EnvironmentError } from '../errors.ts';
import type { AttentionLowering } from '../graph/attention.ts';
import type { Device, DeviceRequest } from './engine.ts';

/** What a choice needs to know about the machine. */
export interface DeviceProbe {
  readonly platform: NodeJS.Platform;
  /** Resolves when the device computes a tiny product rightly; throws EnvironmentError DEVICE_UNAVAILABLE otherwise. */
  check(device: Device): Promise<void>;
  /** Milliseconds of a (512, 512) x (512, 512) product, best of a few. */
  time(device: Device): Promise<number>;
}

export interface DeviceChoice {
  readonly device: Device;
  /** What the user should know: what was tried, and why it was not taken. */
  readonly notes: readonly string[];
}

// Software adapters pass every functional check but are tens of times slower than the CPU they run on.
const WEBGPU_MINIMUM_SPEEDUP = 2;

/**
 * An explicit device is taken or is an error (a note and the CPU with `allowFallback`). `auto` takes CUDA, else DirectML on Windows, else WebGPU
 * when it is worth it, else the CPU. CoreML is never chosen by itself: it computes in half precision wherever it likes.
 */
export async function chooseDevice(request: DeviceRequest, probe: DeviceProbe, allowFallback = false): Promise<DeviceChoice> {
  if (request === 'auto') return chooseAutomatically(probe);
  const failure = await failureOf(request, probe);
  if (failure === undefined) return { device: request, notes: [] };
  if (!allowFallback || request === 'cpu') throw failure;
  return { device: 'cpu', notes: [`${failure.message} Running on cpu instead.`] };
}

async function chooseAutomatically(probe: DeviceProbe): Promise<DeviceChoice> {
  const notes: string[] = [];
  const candidates: Device[] = probe.platform === 'win32' ? ['cuda', 'dml', 'webgpu'] : ['cuda', 'webgpu'];
  for (const device of candidates) {
    const failure = await failureOf(device, probe);
    if (failure !== undefined) {
      notes.push(`auto: ${failure.message}`);
      continue;
    }
    if (device !== 'webgpu') return { device, notes };
    const [own, cpu] = [await probe.time('webgpu'), await probe.time('cpu')];
    if (own * WEBGPU_MINIMUM_SPEEDUP <= cpu) return { device, notes };
    const times = `${own.toFixed(1)} ms on webgpu, ${cpu.toFixed(1)} ms on cpu`;
    notes.push(`auto: a 512 x 512 x 512 product takes ${times}; webgpu is taken when at least twice as fast`);
  }
  return { device: 'cpu', notes };
}

async function failureOf(device: Device, probe: DeviceProbe): Promise<EnvironmentError | undefined> {
  try {
    await probe.check(device);
    return undefined;
  } catch (error) {
    if (error instanceof EnvironmentError && error.code === 'DEVICE_UNAVAILABLE') return error;
    throw error;
  }
}

/**
 * How graphs for a device attend; undefined: as suits the CPU best. Elsewhere onnxruntime 1.30's GroupQueryAttention is not to be trusted
 * with fp32: from 32 tokens a window on, WebGPU's is wrong by a fifth of the largest value on adapters with small subgroups (onnxruntime
 * issue 26064), and CUDA's takes half precision only, so that the whole operator would go to the CPU and back.
 */
export function attentionOn(device: Device): AttentionLowering | undefined {
  return device === 'cpu' ? undefined : 'plain';
}

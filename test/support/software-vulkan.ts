/** A WebGPU adapter for tests: the machine's own GPU, or SwiftShader where its driver and the Vulkan loader are installed. */
import { existsSync } from 'node:fs';
import type { Engine } from '../../src/compute/engine.ts';
import { createEngine } from '../../src/compute/ort.ts';
import { EnvironmentError } from '../../src/errors.ts';

/** Where Debian's chromium-common puts it. */
const SWIFTSHADER = '/usr/lib/chromium/vk_swiftshader_icd.json';

/** Starts an engine on WebGPU; undefined, with the reason printed, when there is no adapter. */
export async function webgpuEngine(strictDevice = false): Promise<Engine | undefined> {
  const told = process.env['VK_DRIVER_FILES'] ?? process.env['VK_ICD_FILENAMES'];
  if (told === undefined && existsSync(SWIFTSHADER)) process.env['VK_DRIVER_FILES'] = SWIFTSHADER;
  try {
    return await createEngine({ device: 'webgpu', strictDevice, threads: 1 });
  } catch (error) {
    if (!(error instanceof EnvironmentError) || error.code !== 'DEVICE_UNAVAILABLE') throw error;
    console.warn(`skipped: ${error.message}`);
    return undefined;
  }
}

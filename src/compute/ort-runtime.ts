/** Loads onnxruntime-node, which may be absent, the first time arithmetic is asked for. */
import { mkdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type * as OrtModule from 'onnxruntime-node';
import { EnvironmentError } from '../errors.ts';

export type Ort = typeof OrtModule;

const INSTALL = 'ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node';

let loaded: Promise<Ort> | undefined;

/** onnxruntime-node, loaded once and told to be quiet. Throws EnvironmentError ORT_MISSING. */
export function loadOrt(): Promise<Ort> {
  loaded ??= importOrt(() => import('onnxruntime-node')).catch((error: unknown) => {
    loaded = undefined;
    throw error;
  });
  return loaded;
}

/** Imports the runtime by `importer`; a failure tells how to install it. */
export async function importOrt(importer: () => Promise<Ort>): Promise<Ort> {
  let ort: Ort;
  try {
    ort = await importer();
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause);
    const message = `onnxruntime-node cannot be loaded on ${process.platform}-${process.arch} (${reason}). Install it: ${INSTALL}`;
    throw new EnvironmentError('ORT_MISSING', message, { cause });
  }
  // Before the first session: a failed probe of a device then writes nothing to stderr.
  ort.env.logLevel = 'fatal';
  return ort;
}

/** WebGPU's Vulkan loader complains on stderr when the variable is unset; it wants a folder of the user's own. */
export function ensureRuntimeFolder(): void {
  if (process.platform !== 'linux' || process.env['XDG_RUNTIME_DIR']) return;
  // One per user, not one per process: nothing is left to remove after a kill.
  const folder = join(tmpdir(), `pcomp-runtime-${process.getuid?.() ?? 0}`);
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  process.env['XDG_RUNTIME_DIR'] = folder;
}

/**
 * Ampere GPUs and later round the factors of fp32 products to 10 bits unless told otherwise, and onnxruntime-node passes no option to
 * the CUDA provider. Read by CUDA's libraries when they are loaded.
 */
export function forbidRoundedProducts(): void {
  process.env['NVIDIA_TF32_OVERRIDE'] ??= '0';
}

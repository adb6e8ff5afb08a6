/** Loads tfjs, an optional package, the first time it is asked for. */
import { EnvironmentError } from '../../errors.ts';
import { forbidRoundedProducts } from '../ort-runtime.ts';
import type { Tf } from './values.ts';

const PACKAGE = '@tensorflow/tfjs-node-gpu';
const INSTALL = `npm install ${PACKAGE}`;

export interface LoadedTfjs {
  readonly tf: Tf;
  readonly usesGpu: boolean;
  /** Name and version, for manifests. */
  readonly runtime: string;
}

/** What the backend of tfjs's Node packages tells of itself. */
interface NodeBackend {
  readonly isUsingGpuDevice?: boolean;
}

/** tfjs and where it computes. What it reads from the environment is set before it is loaded. Throws EnvironmentError TFJS_MISSING. */
export async function loadTfjs(options: { tf?: Tf | undefined; cpuOnly: boolean; threads: number }): Promise<LoadedTfjs> {
  const tf = options.tf ?? (await importInstalled(options));
  tf.enableProdMode();
  await tf.ready();
  const { isUsingGpuDevice } = tf.backend() as NodeBackend;
  const name = options.tf === undefined ? 'tfjs-node-gpu' : 'tfjs';
  return { tf, usesGpu: isUsingGpuDevice === true, runtime: `${name} ${tf.version.tfjs}` };
}

function importInstalled({ cpuOnly, threads }: { cpuOnly: boolean; threads: number }): Promise<Tf> {
  if (cpuOnly) process.env['CUDA_VISIBLE_DEVICES'] = '-1';
  forbidRoundedProducts();
  process.env['TF_NUM_INTRAOP_THREADS'] ??= String(threads);
  process.env['TF_CPP_MIN_LOG_LEVEL'] ??= '2';
  return importTfjs(() => import(PACKAGE) as Promise<Tf>);
}

/** Imports tfjs by `importer`; a failure tells how to install it. */
export async function importTfjs(importer: () => Promise<Tf>): Promise<Tf> {
  try {
    const loaded = (await importer()) as Tf & { readonly default?: Tf };
    // A CommonJS package: what is not found as a named export is in the default one.
    return typeof loaded.tidy === 'function' ? loaded : (loaded.default ?? loaded);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message.split('\n')[0] : String(cause);
    const message = `--engine tfjs needs ${PACKAGE}, which cannot be loaded on ${process.platform}-${process.arch} (${reason}). Install it: ${INSTALL}`;
    throw new EnvironmentError('TFJS_MISSING', message, { cause });
  }
}

/** Proof that what lies on the disk is what was solved for: every module is read again, decoded, and compared by its SHA-256. */
import { createHash } from 'node:crypto';
import { dequantize } from '../methods/quantize/quantized-linear.ts';
import type { QuantizedSource } from './quantized-source.ts';
import type { StoredModules } from './stored-modules.ts';
import { asBytes } from './tensor-bytes.ts';

/** SHA-256 of a weight's little-endian float32 bytes, hexadecimal. */
export function weightHash(weight: Float32Array): string {
  return createHash('sha256').update(asBytes(weight)).digest('hex');
}

/** Hash of each module's decoded weight, as the solver left it. */
export async function solvedHashes(quantized: QuantizedSource, names: Iterable<string>): Promise<Map<string, string>> {
  const hashes = new Map<string, string>();
  for (const name of names) hashes.set(name, weightHash(dequantize(await quantized.read(name))));
  return hashes;
}

/**
 * Decodes every module of a written artifact. A difference is a bug of ours, never the user's doing: a plain Error.
 * @param path the artifact's file or folder, for the message
 */
export async function verifyModules(path: string, stored: StoredModules, expected: ReadonlyMap<string, string>): Promise<void> {
  for (const name of stored.modules.keys()) {
    const hash = weightHash(await stored.decode(name));
    if (hash === expected.get(name)) continue;
    throw new Error(
      `${path}: module "${name}" decodes to other weights than were written (layout ${stored.layout}). This is a bug in pcomp.`,
    );
  }
}

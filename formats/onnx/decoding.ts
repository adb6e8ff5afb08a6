/** Decoding one message: what protobufjs throws becomes a named broken rule, what it does not know is copied out. */
import { FormatError } from '../../src/errors.ts';
import { type Codec, fromInt64, type Int64, type WithUnknowns } from './schema.ts';

/** Longest name of a value, node, operator or dimension in bytes. Exporters that spell out a whole module path stay below 2000. */
const MAX_NAME_LENGTH = 65_536;

export function decode<T>(codec: Codec<T>, bytes: Uint8Array, path: string, what: string): T {
  try {
    return codec.decode(bytes);
  } catch (cause) {
    const error = cause as NodeJS.ErrnoException;
    const rule = error.code === 'ERR_ENCODING_INVALID_ENCODED_DATA' ? 'name-not-utf8' : 'malformed-message';
    throw new FormatError(path, rule, `${what} cannot be decoded: ${error.message}`, { cause });
  }
}

/** `{ unknown }` with copies of the fields the schema does not name, or `{}`: to be spread into plain data. */
export function unknownOf(message: WithUnknowns, more: readonly Uint8Array[] = []): { readonly unknown?: readonly Uint8Array[] } {
  // Copies, because the originals are windows that would keep the whole file's graph in memory.
  const unknown = [...more, ...(message.$unknowns ?? [])].map((bytes) => Uint8Array.from(bytes));
  return unknown.length === 0 ? {} : { unknown };
}

export function checkName(name: string, path: string, what: string): string {
  if (name.length > MAX_NAME_LENGTH) {
    throw new FormatError(
      path,
      'name-too-long',
      `${what} has a name of ${name.length} characters, pcomp reads up to ${MAX_NAME_LENGTH}`,
    );
  }
  return name;
}

/** An int64 that must be a number pcomp can count with. */
export function safeInteger(value: Int64, path: string, rule: string, what: string): number {
  const exact = fromInt64(value);
  if (typeof exact === 'bigint') throw new FormatError(path, rule, `${what} is ${exact}, beyond the exact integers`);
  return exact;
}

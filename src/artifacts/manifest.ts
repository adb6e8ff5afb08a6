/** pcomp.json says how an artifact came to be, the same for every run of one recipe; report.json says how it went. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join, relative, sep } from 'node:path';
import { writeDurably } from './durable.ts';

/** A file by its content. */
export interface HashedFile {
  readonly bytes: number;
  readonly sha256: string;
}

/** pcomp.json. Nothing in it may depend on time, paths of this machine, or the number of threads. */
export interface Manifest {
  readonly command: string;
  readonly recipe: Readonly<Record<string, unknown>>;
  /** What the budget was spent on; `--plan` reads it back. */
  readonly plan: unknown;
  /** How the plan was found, where that took more than one try. */
  readonly search?: unknown;
  readonly seed: number;
  /** The device that the run ended up on. */
  readonly device: string;
  /** pcomp, onnxruntime, ...: name -> version. */
  readonly versions: Readonly<Record<string, string>>;
  /** Files read, by a name that means something without this machine. */
  readonly inputs: Readonly<Record<string, HashedFile>>;
  /** Files written, by their path below the artifact. */
  readonly outputs: Readonly<Record<string, HashedFile>>;
  /** SHA-256 of each quantized module's decoded float32 weight. */
  readonly weights: Readonly<Record<string, string>>;
}

/** Hashes a file without holding it in memory. */
export async function hashFile(path: string): Promise<HashedFile> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path, { highWaterMark: 4 * 1024 * 1024 })) hash.update(chunk as Uint8Array);
  return { bytes: (await stat(path)).size, sha256: hash.digest('hex') };
}

/** Hashes every file below a folder, by its path with forward slashes, sorted. */
export async function hashFolder(folder: string): Promise<Record<string, HashedFile>> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const paths = entries.filter((entry) => entry.isFile()).map((entry) => join(entry.parentPath, entry.name));
  const named = paths.map((path): [string, string] => [relative(folder, path).split(sep).join('/'), path]);
  const result: Record<string, HashedFile> = {};
  for (const [name, path] of named.sort(([a], [b]) => (a < b ? -1 : 1))) result[name] = await hashFile(path);
  return result;
}

/** Writes `<folder>/pcomp.json`. */
export async function writeManifest(folder: string, manifest: Manifest): Promise<void> {
  await writeJson(join(folder, 'pcomp.json'), { format: 1, ...manifest });
}

/** Writes `<folder>/report.json`: measurements, times, notes; the only file that may differ between two runs of one recipe. */
export async function writeReport(folder: string, report: Readonly<Record<string, unknown>>): Promise<void> {
  await writeJson(join(folder, 'report.json'), report);
}

/** Writes JSON for people and programs: indented, keys in the order given, lists of numbers on one line. */
export async function writeJson(path: string, value: unknown): Promise<void> {
  // Strings hold no raw line breaks: only lists match.
  const text = JSON.stringify(value, undefined, 2).replace(/\[\n\s+([-+\d.e,\s]+?)\n\s+\]/g, (_, items: string) => {
    return `[${items.split(/,\s+/).join(', ')}]`;
  });
  await writeDurably(path, `${text}\n`);
}

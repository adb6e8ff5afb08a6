/** What lies in a folder, for comparing folders and for showing that nothing changed. */
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync } from 'node:fs';
import { join, relative } from 'node:path';

/** Every file below `folder` -> SHA-256 of its bytes; folders that are empty have an entry too. Names in `except` are left out. */
export function folderTree(folder: string, except: readonly string[] = []): Record<string, string> {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true }).filter(({ name }) => !except.includes(name));
  const described = entries.map((entry): [string, string] => {
    const path = join(entry.parentPath, entry.name);
    const content = entry.isFile() ? createHash('sha256').update(readFileSync(path)).digest('hex') : 'folder';
    return [relative(folder, path), content];
  });
  return Object.fromEntries(described.sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** An artifact's files without the one that may differ between two runs. */
export function artifactTree(folder: string): Record<string, string> {
  return folderTree(folder, ['report.json']);
}

/** Files that survive a crash whole: written aside, flushed, then renamed; and one clear line when the disk is full. */
import { open, readdir, rename, writeFile } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { EnvironmentError } from '../errors.ts';
import { errorCode } from './process-lock.ts';

/** Writes a small file so that it exists whole or not at all, even after a crash. */
export async function writeDurably(path: string, content: string | Uint8Array): Promise<void> {
  const aside = `${path}.tmp`;
  await writeFile(aside, content, { flush: true });
  await rename(aside, path);
  await flushFolder(dirname(path));
}

/** Flushes a folder's entries to disk. Windows has no such thing and needs none. */
export async function flushFolder(path: string): Promise<void> {
  if (process.platform === 'win32') return;
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Flushes every file and folder below `path`. */
export async function flushTree(path: string): Promise<void> {
  for (const entry of await readdir(path, { withFileTypes: true })) {
    const child = join(path, entry.name);
    if (entry.isDirectory()) {
      await flushTree(child);
      continue;
    }
    const handle = await open(child, 'r+');
    try {
      await handle.sync();
    } finally {
      await handle.close();
    }
  }
  await flushFolder(path);
}

/** Turns a full disk (or quota) into an EnvironmentError that says where; any other error is returned as it is. */
export function explainDiskError(error: unknown, path: string): unknown {
  if (!['ENOSPC', 'EDQUOT'].includes(errorCode(error))) return error;
  return new EnvironmentError('DISK_FULL', `${path}: no space left on the disk. Free some, then continue with --resume.`, {
    cause: error,
  });
}

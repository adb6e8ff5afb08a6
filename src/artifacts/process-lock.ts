/** A file that says which process works in a folder, so that two runs never write the same output. */
import { readFile, rename, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { EnvironmentError } from '../errors.ts';

interface LockOwner {
  readonly pid: number;
  readonly host: string;
  /** When the owner started, as the system tells it: a process that merely inherited the pid has another. '' where unknown. */
  readonly start: string;
}

/** Takes the lock; one left by a dead process of this machine is taken over. Throws EnvironmentError OUTPUT_BUSY while its owner lives. */
export async function takeLock(path: string): Promise<void> {
  const content = JSON.stringify({ pid: process.pid, host: hostname(), start: await startOf(process.pid) } satisfies LockOwner);
  for (;;) {
    try {
      await writeFile(path, content, { flag: 'wx' });
      return;
    } catch (error) {
      if (errorCode(error) !== 'EEXIST') throw error;
    }
    const found = await readIfThere(path);
    if (found === undefined) continue;
    if (await isAlive(found)) throw busy(path, found);
    // Whoever renames a stale lock away owns its removal; a fresh lock caught by mistake in a race is put back.
    const aside = `${path}.${process.pid}`;
    try {
      await rename(path, aside);
    } catch (error) {
      if (errorCode(error) === 'ENOENT') continue;
      throw error;
    }
    if ((await readIfThere(aside)) !== found) {
      await rename(aside, path);
      throw busy(path, found);
    }
    await rm(aside);
  }
}

/** Throws EnvironmentError OUTPUT_BUSY when a living process holds the lock. */
export async function assertUnlocked(path: string): Promise<void> {
  const found = await readIfThere(path);
  if (found !== undefined && (await isAlive(found))) throw busy(path, found);
}

/** Gives the lock back. */
export async function releaseLock(path: string): Promise<void> {
  await rm(path, { force: true });
}

function busy(path: string, content: string): EnvironmentError {
  const owner = parseOwner(content);
  const who = owner ? `process ${owner.pid} on ${owner.host}` : 'another process';
  return new EnvironmentError(
    'OUTPUT_BUSY',
    `${path}: ${who} is working on this output. Wait for it, choose another -o, or remove the lock if that process is gone.`,
  );
}

async function isAlive(content: string): Promise<boolean> {
  const owner = parseOwner(content);
  if (!owner) return false;
  // Nobody can ask another machine's processes: believe its lock.
  if (owner.host !== hostname()) return true;
  try {
    process.kill(owner.pid, 0);
  } catch (error) {
    if (errorCode(error) !== 'EPERM') return false;
  }
  return owner.start === (await startOf(owner.pid));
}

/** Linux tells when a process started (field 22 of stat, after the parenthesised name); elsewhere a live pid must do. */
async function startOf(pid: number): Promise<string> {
  const stat = await readIfThere(`/proc/${pid}/stat`);
  return stat?.slice(stat.lastIndexOf(')') + 2).split(' ')[19] ?? '';
}

function parseOwner(content: string): LockOwner | undefined {
  try {
    const value: unknown = JSON.parse(content);
    if (typeof value !== 'object' || value === null) return undefined;
    const { pid, host, start } = value as Partial<LockOwner>;
    const whole =
      typeof pid === 'number' && Number.isSafeInteger(pid) && pid > 0 && typeof host === 'string' && typeof start === 'string';
    return whole ? { pid, host, start } : undefined;
  } catch {
    return undefined;
  }
}

async function readIfThere(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8');
  } catch (error) {
    if (['ENOENT', 'ENOTDIR', 'ESRCH'].includes(errorCode(error))) return undefined;
    throw error;
  }
}

/** `ENOENT` and the like; '' for errors that have none. */
export function errorCode(error: unknown): string {
  return error instanceof Error && 'code' in error ? String(error.code) : '';
}

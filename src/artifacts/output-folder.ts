/**
 * The folder a run writes: everything happens in a sibling `<out>.partial`, and `<out>` appears by one rename at the end. Whatever
 * happens, at any moment, `<out>` is absent, the old one, or the new one whole.
 *
 *     <out>.partial/lock        the process at work; created first, removed last
 *     <out>.partial/state.json  there once a finished block is worth resuming
 *     <out>.partial/parts/      finished blocks
 *     <out>.partial/artifact/   becomes <out>
 *     <out>.partial/replaced/   the old <out>, for the instant between two renames
 */
import { lstat, mkdir, readdir, readFile, rename, rm, rmdir } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { EnvironmentError, RecipeError } from '../errors.ts';
import { explainDiskError, flushFolder, flushTree, writeDurably } from './durable.ts';
import { assertUnlocked, errorCode, releaseLock, takeLock } from './process-lock.ts';

export interface OutputRequest {
  /** The output as the user named it. */
  readonly path: string;
  /** Hash of everything that decides the output's bytes; parts of another recipe are never mixed in. */
  readonly recipeHash: string;
  /** Replace an existing output, discard an unfinished one. */
  readonly overwrite: boolean;
  /** Continue an unfinished run. Starts afresh when there is none. */
  readonly resume: boolean;
  /** The artifact is written in place, piece by piece: what is in its folder is finished work too, and outlives a crash. */
  readonly inPlace?: boolean;
}

interface RunState {
  readonly recipeHash: string;
  /** The run may replace an existing output. */
  readonly overwrite: boolean;
  /** The artifact was complete and being moved to its name. */
  readonly publishing: boolean;
}

/** The one thing that makes a folder an artifact of ours, which `--overwrite` may delete. */
const MANIFEST = 'pcomp.json';
/** Names pcomp uses in a `.partial`; a folder with anything else and none of these is not ours. */
const OURS = ['lock', 'state.json', 'parts', 'artifact', 'replaced'];

export class OutputFolder implements AsyncDisposable {
  /** Final path, absolute. */
  readonly path: string;
  /** Write the artifact's files below this folder. */
  readonly artifactPath: string;
  /** Finished blocks live below this folder. */
  readonly partsPath: string;
  /** Whether finished work of an earlier run was found and kept. */
  readonly resumed: boolean;
  readonly #partial: string;
  readonly #recipeHash: string;
  readonly #replaces: boolean;
  readonly #inPlace: boolean;
  #resumable: boolean;
  #abandoned = false;
  #publishing = false;
  #closed = false;

  private constructor(request: OutputRequest, partial: string, resumed: boolean, replaces: boolean) {
    this.path = resolve(request.path);
    this.artifactPath = join(partial, 'artifact');
    this.partsPath = join(partial, 'parts');
    this.resumed = resumed;
    this.#partial = partial;
    this.#recipeHash = request.recipeHash;
    this.#replaces = replaces;
    this.#inPlace = request.inPlace === true;
    this.#resumable = resumed;
  }

  /**
   * Checks a request without touching the disk. Throws RecipeError when it has no name, or an output, or an unfinished run of it, is in the way and neither
   * flag allows what would happen to it; EnvironmentError OUTPUT_BUSY when another run is at it.
   */
  static async check(request: OutputRequest): Promise<void> {
    if (request.path === '') throw new RecipeError('-o: the name of a folder to write is needed');
    await assertUnlocked(join(partialOf(request.path), 'lock'));
    await judge(request);
  }

  /** Takes the output: checks it, locks it, recovers what a crash left. Throws RecipeError as `check`, EnvironmentError OUTPUT_BUSY. */
  static async open(request: OutputRequest): Promise<OutputFolder> {
    const partial = partialOf(request.path);
    await OutputFolder.check(request);
    await makeFolder(partial);
    await takeLock(join(partial, 'lock'));
    try {
      await recoverReplaced(resolve(request.path), partial);
      // Judged again under the lock: what was true before may have changed while another run finished.
      const { resumed, replaces } = await judge(request);
      const keep = resumed ? ['lock', 'state.json', 'parts', ...(request.inPlace ? ['artifact'] : [])] : ['lock'];
      for (const entry of await readdir(partial)) {
        if (!keep.includes(entry)) await rm(join(partial, entry), { recursive: true, force: true });
      }
      const folder = new OutputFolder(request, partial, resumed, replaces);
      await mkdir(folder.artifactPath, { recursive: true });
      await mkdir(folder.partsPath, { recursive: true });
      return folder;
    } catch (error) {
      await releaseLock(join(partial, 'lock'));
      await rmdir(partial).catch(() => undefined);
      throw error;
    }
  }

  /** Says that a part is safely stored: from now on a failed run leaves its work for `--resume`. */
  async keepForResume(): Promise<void> {
    if (this.#resumable) return;
    await this.#writeState(false);
    this.#resumable = true;
  }

  /** Says that the run cannot end well, however often it is resumed: its work is not kept. */
  abandon(): void {
    this.#abandoned = true;
  }

  /** Makes the artifact appear under its final name, replacing an old one if that was asked for. */
  async finalize(): Promise<void> {
    await flushTree(this.artifactPath);
    await this.#writeState(true);
    this.#publishing = true;
    if (await exists(this.path)) {
      if (!this.#replaces)
        throw new RecipeError(`${this.path}: appeared while the run went on. Move it away, then continue with --resume.`);
      await rename(this.path, join(this.#partial, 'replaced'));
    }
    await rename(this.artifactPath, this.path);
    await flushFolder(dirname(this.path));
    this.#closed = true;
    await discard(this.#partial);
  }

  /** Leaves a resumable state if a part was finished, else nothing. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    if (!this.#resumable || this.#abandoned) {
      await discard(this.#partial);
      return;
    }
    // Only then: a run that ends because the disk is full must not need room to end.
    if (this.#publishing) await this.#writeState(false);
    if (!this.#inPlace) await rm(this.artifactPath, { recursive: true, force: true });
    await releaseLock(join(this.#partial, 'lock'));
  }

  async #writeState(publishing: boolean): Promise<void> {
    const state: RunState = { recipeHash: this.#recipeHash, overwrite: this.#replaces, publishing };
    await writeDurably(join(this.#partial, 'state.json'), `${JSON.stringify(state)}\n`);
  }
}

/** Makes the folder, its parents too. Throws EnvironmentError FILE_UNREADABLE or DISK_FULL when the system does not let it. */
async function makeFolder(path: string): Promise<void> {
  try {
    await mkdir(dirname(path), { recursive: true });
    // Not recursive: where a parent exists and takes no folders (/proc), Node 20 would try for ever.
    await mkdir(path);
  } catch (error) {
    if ((await entriesOf(path)) !== undefined) return;
    const code = errorCode(error);
    const explained = explainDiskError(error, path);
    if (explained !== error || code === '') throw explained;
    throw new EnvironmentError('FILE_UNREADABLE', `${path}: cannot be made (${code}); choose another -o`, { cause: error });
  }
}

function partialOf(path: string): string {
  return `${resolve(path)}.partial`;
}

/** What a request may do with what is on disk. */
async function judge(request: OutputRequest): Promise<{ resumed: boolean; replaces: boolean }> {
  const path = resolve(request.path);
  const partial = partialOf(path);
  const entries = await entriesOf(partial);
  if (entries && entries.length > 0 && !entries.some((entry) => OURS.includes(entry))) {
    throw new RecipeError(`${partial}: exists and is not an unfinished pcomp run. Move it away or choose another -o.`);
  }
  const state = await readState(partial);
  const resumed = request.resume && state !== undefined;
  if (resumed && state.recipeHash !== request.recipeHash) {
    throw new RecipeError(
      `--resume: ${partial} was made by another recipe or from other inputs. Repeat that recipe, or start again with --overwrite.`,
    );
  }
  // Without its artifact folder, a run that was publishing had done so: what is left is rubbish.
  const published = state?.publishing === true && !entries?.includes('artifact');
  if (state && !published && !request.resume && !request.overwrite) {
    throw new RecipeError(`${partial}: holds an unfinished run. Continue it with --resume, or discard it with --overwrite.`);
  }
  const replaces = request.overwrite || (resumed && (state.overwrite || state.publishing));
  if (await exists(path)) {
    if (!replaces) {
      const advice = request.resume ? 'There is nothing to resume.' : 'Replace it with --overwrite, or choose another -o.';
      throw new RecipeError(`${request.path}: exists. ${advice}`);
    }
    const content = await entriesOf(path);
    if (!content || (content.length > 0 && !content.includes(MANIFEST))) {
      throw new RecipeError(
        `${request.path}: --overwrite replaces outputs of pcomp, and this has no ${MANIFEST}. Remove it yourself, or choose another -o.`,
      );
    }
  }
  return { resumed, replaces };
}

/** A crash between the two renames of `finalize` left no output: the old one comes back, the new one is written again. */
async function recoverReplaced(path: string, partial: string): Promise<void> {
  const replaced = join(partial, 'replaced');
  if ((await exists(replaced)) && !(await exists(path))) await rename(replaced, path);
}

/** Removes a `.partial`, the lock last: until then it is recognized as ours and as taken. */
async function discard(partial: string): Promise<void> {
  for (const entry of await readdir(partial)) {
    if (entry !== 'lock') await rm(join(partial, entry), { recursive: true, force: true });
  }
  await releaseLock(join(partial, 'lock'));
  // Another run may have moved in already.
  await rmdir(partial).catch(() => undefined);
}

async function readState(partial: string): Promise<RunState | undefined> {
  try {
    const state: unknown = JSON.parse(await readFile(join(partial, 'state.json'), 'utf8'));
    return typeof state === 'object' && state !== null ? (state as RunState) : undefined;
  } catch (error) {
    // state.json appears whole or not at all; anything else in its place is no state.
    if (errorCode(error) === 'ENOENT' || errorCode(error) === 'ENOTDIR' || error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Entries of a folder; undefined when there is none. */
async function entriesOf(path: string): Promise<string[] | undefined> {
  try {
    return await readdir(path);
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errorCode(error))) return undefined;
    throw error;
  }
}

/** Whether the name is taken; a link to nowhere takes it too, and no folder could be renamed to it. */
async function exists(path: string): Promise<boolean> {
  try {
    await lstat(path);
    return true;
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errorCode(error))) return false;
    throw error;
  }
}

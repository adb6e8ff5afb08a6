/** The programs of one engine: shared by their key, and released with the engine. */
import type { CompileOptions, Program } from './engine.ts';

export class ProgramPool implements AsyncDisposable {
  readonly #shared = new Map<string, Promise<Program>>();
  readonly #live = new Set<Program>();
  #disposed = false;

  /**
   * The program of `options.key`, made when nobody has asked for it before; a new one, the caller's own, without a key.
   * @param subject names the graph in errors
   * @param create makes the program, which calls `onRelease` when it is disposed
   */
  async get(subject: string, options: CompileOptions, create: (onRelease: () => void) => Promise<Program>): Promise<Program> {
    if (this.#disposed) throw new Error(`${subject}: the engine was disposed`);
    if (options.key === undefined) return this.#make(create);
    const key = [options.key, options.optimization ?? 'all', options.memoryArena ?? true].join('|');
    let program = this.#shared.get(key);
    if (program === undefined) {
      program = this.#make(create).then(undisposable);
      this.#shared.set(key, program);
      program.catch(() => this.#shared.delete(key));
    }
    return program;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true;
    await Promise.allSettled(this.#shared.values());
    await Promise.all(Array.from(this.#live, (program) => program[Symbol.asyncDispose]()));
  }

  async #make(create: (onRelease: () => void) => Promise<Program>): Promise<Program> {
    const program = await create(() => this.#live.delete(program));
    this.#live.add(program);
    return program;
  }
}

/** The same program for one of several users, who cannot release it. */
function undisposable(program: Program): Program {
  return {
    inputNames: program.inputNames,
    outputNames: program.outputNames,
    run: (feeds, options) => program.run(feeds, options),
    [Symbol.asyncDispose]: async () => {},
  };
}

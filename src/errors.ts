/** The errors a caller may act on. Anything else that is thrown is a bug and keeps its stack. Every room may import this file. */

/** Base of all errors whose message is meant for the user: one line, naming the file, the tensor or flag, the rule, both numbers. */
export abstract class PcompError extends Error {
  override get name(): string {
    return this.constructor.name;
  }
}

/** The file is broken: it breaks a rule of its own format. The rule is a stable identifier tests and callers can match. */
export class FormatError extends PcompError {
  readonly path: string;
  readonly rule: string;
  /** @param path the file, @param rule kebab-case name of the broken rule, @param detail what was found and what the rule asks */
  constructor(path: string, rule: string, detail: string, options?: ErrorOptions) {
    super(`${path}: ${detail} [${rule}]`, options);
    this.path = path;
    this.rule = rule;
  }
}

/** The file or model is fine, but pcomp does not support it. The message lists what is supported. */
export class UnsupportedError extends PcompError {}

/** The request makes no sense: a flag, a recipe field, a glob, a plan that does not fit the model. */
export class RecipeError extends PcompError {}

/** A run that learned came to nothing: its numbers are not finite. */
export class TrainingError extends PcompError {}

/** What the machine lacks. */
export type EnvironmentCode =
  | 'ORT_MISSING'
  | 'TFJS_MISSING'
  | 'DEVICE_UNAVAILABLE'
  | 'DISK_FULL'
  | 'FILE_UNREADABLE'
  | 'OUTPUT_BUSY'
  | 'OUT_OF_MEMORY';

/** The machine lacks something: disk, memory, a device, an optional package, a readable file. */
export class EnvironmentError extends PcompError {
  readonly code: EnvironmentCode;
  constructor(code: EnvironmentCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.code = code;
  }
}
